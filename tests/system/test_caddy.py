"""The shipped Caddyfile: what it passes, changes and logs, and what it answers when no broker does."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import Counter
from io import BytesIO
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from broker.settings import Settings
from tests.kinds import running_servers
from tests.system.caddy import running_caddy
from tests.system.harness import eventually, free_port, running_broker
from tests.system.proxy import EVENTS, ROOM, block, prepared, standing_in

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from tests.system.proxy import Handler

pytestmark = pytest.mark.slow

ORIGIN = "https://page.example"
MAX_BODY = Settings().max_body


def standing_in_alive(handler: Handler) -> AbstractAsyncContextManager[int]:
    """A server in a broker's place that also says that it lives: Caddy asks for that all the time."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response() if request.path == "/health/live" else await handler(request)

    return standing_in(handle)


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
async def test_every_event_arrives_before_the_next_is_written(encoding: str) -> None:
    arrived = asyncio.Semaphore(0)

    async def lock_step(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for n in range(20):
            await answer.write(b"data: %d\n\n" % n)
            await arrived.acquire()
        return answer

    asked = {**EVENTS, "Accept-Encoding": encoding}
    async with (
        standing_in_alive(lock_step) as port,
        running_caddy(port, port) as proxy,
        proxy.page.get("/stream/any", headers=asked) as answer,
    ):
        assert "Content-Encoding" not in answer.headers  # which Caddy would not flush
        for n in range(20):
            assert await block(answer) == f"data: {n}\n\n"
            arrived.release()


async def test_a_broker_gets_the_callers_address_and_host() -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response({name.title(): value for name, value in request.headers.items()})

    spoofed = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "gopher", "X-Broker-Session": "x"}
    async with standing_in_alive(echo) as port, running_caddy(port, port) as proxy:
        async with proxy.page.get("/models", headers={**spoofed, "X-Request-Id": "mine-1"}) as answer:
            seen = await answer.json()
    assert seen["Host"] == f"localhost:{proxy.port}"
    assert seen["X-Forwarded-For"] in {"127.0.0.1", "::1"}
    assert (seen["X-Forwarded-Proto"], seen["X-Request-Id"]) == ("https", "mine-1")
    assert "X-Broker-Session" not in seen


async def test_a_session_stays_with_one_broker() -> None:
    seen: dict[str, set[int]] = {}

    def named(number: int) -> Handler:
        async def remember(request: web.Request) -> web.Response:
            seen.setdefault(request.path.split("/")[2], set()).add(number)
            return web.Response()

        return remember

    async with (
        standing_in_alive(named(1)) as first,
        standing_in_alive(named(2)) as second,
        running_caddy(first, second) as proxy,
    ):
        for session_id in [str(uuid.uuid4()) for _ in range(30)]:
            asked = [("GET", ""), ("GET", "?lastEventId=1-7"), ("DELETE", ""), ("POST", "/cancel")]
            for method, rest in asked:
                async with proxy.page.request(method, f"/stream/{session_id}{rest}") as answer:
                    assert answer.status == 200
    assert len(seen) == 30
    assert all(len(brokers) == 1 for brokers in seen.values())
    assert set().union(*seen.values()) == {1, 2}


async def test_a_large_body_is_refused_by_the_broker_and_harms_nothing() -> None:
    async with running_broker(env=ROOM) as broker, running_caddy(broker.port, broker.port) as proxy:
        headers = {"Content-Type": "application/json"}
        for _ in range(3):
            async with proxy.page.post(
                "/prepare", data=BytesIO(b" " * (MAX_BODY + 1)), headers=headers
            ) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (413, "body_too_large")
            await prepared(proxy.page, "rehearsal/echo")


async def test_a_cut_a_resume_and_a_cancel_reach_the_broker() -> None:
    async with running_servers() as valkey:
        env = {**ROOM, "REDIS_URL": valkey.url, "BROKER_DISCONNECT_GRACE": "1"}
        async with (
            running_broker(env=env) as first,
            running_broker(env=env) as second,
            running_caddy(first.port, second.port) as proxy,
        ):
            resumed, left, stopped = [
                f"/stream/{await prepared(proxy.page, 'rehearsal/long')}" for _ in range(3)
            ]
            async with proxy.page.get(resumed, headers=EVENTS) as answer:
                while "event: chunk" not in (chunk := await block(answer)):
                    pass
            cursor = re.search("^id: 1-(.+)$", chunk, re.MULTILINE)
            assert cursor is not None
            async with proxy.page.get(
                resumed, headers={**EVENTS, "Last-Event-ID": f"1-{cursor[1]}"}
            ) as answer:
                while "event: chunk" not in (chunk := await block(answer)):
                    pass
                assert f"id: 1-{int(cursor[1]) + 1}\n" in chunk
            async with proxy.page.get(left, headers=EVENTS) as answer:
                await block(answer)
            await eventually(lambda: '"abandoned"' in first.log() + second.log())
            async with proxy.page.get(stopped, headers=EVENTS) as answer:
                await block(answer)
                async with proxy.page.delete(stopped) as cancelled:
                    assert cancelled.status == 202
                assert '"finishReason":"cancelled"' in await answer.text()


async def test_a_broker_that_is_down_is_soon_left_out() -> None:
    async with running_broker(env=ROOM) as broker, running_caddy(free_port(), broker.port) as proxy:
        body = {"model": "rehearsal/echo", "messages": [{"role": "user", "content": "Hello"}]}
        good = 0
        async with asyncio.timeout(30):
            while good < 10:
                async with proxy.page.post("/prepare", json=body) as answer:
                    good = good + 1 if answer.status == 201 else 0
        for _ in range(10):
            session_id = await prepared(proxy.page, "rehearsal/echo")
            async with proxy.page.get(f"/stream/{session_id}", headers=EVENTS) as answer:
                assert "event: done" in await answer.text()


async def test_a_post_that_may_have_arrived_is_not_sent_again() -> None:
    arrived: Counter[str] = Counter()

    async def drop(request: web.Request) -> web.Response:
        arrived[request.method] += 1
        await request.read()
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with (
        standing_in_alive(drop) as port,
        running_caddy(port, port) as proxy,
        proxy.page.post("/prepare", data=b"{}") as answer,
    ):
        assert answer.status == 503
    assert arrived == {"POST": 1}


async def test_an_eventsource_reconnects_when_no_broker_answers() -> None:
    async with running_caddy() as proxy:
        headers = {**EVENTS, "Origin": ORIGIN}
        async with proxy.page.get(f"/stream/{uuid.uuid4()}", headers=headers) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"
            found = re.fullmatch(r"retry: (\d+)\n: no broker answers right now\n\n", await answer.text())
            assert found is not None

        async def pause() -> str:
            async with proxy.page.get(f"/stream/{uuid.uuid4()}", headers=headers) as answer:
                return (await answer.text()).split()[1]

        pauses = set(await asyncio.gather(*(pause() for _ in range(20))))  # one of five each time
        assert pauses <= {"2400", "2700", "3000", "3300", "3600"}
        assert len(pauses) > 1
        async with proxy.page.post("/prepare", headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "broker_unavailable")
            assert answer.headers["Retry-After"] == "3"
        async with proxy.page.options("/prepare", headers={"Origin": ORIGIN}) as answer:
            assert answer.status == 204
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]


async def test_no_log_has_a_whole_session_id() -> None:
    async def point(request: web.Request) -> web.Response:
        return web.Response(status=201, headers={"Location": f"/stream/{session_id}"})

    session_id = str(uuid.uuid4())
    leaky = {**EVENTS, "Referer": f"{ORIGIN}/?session={session_id}"}
    paths = [f"/stream/{session_id}", f"/stream/{session_id}/cancel", f"/x?id={session_id}"]
    said = ""
    async with standing_in_alive(point) as port, running_caddy(port, port) as proxy:
        for path in paths:
            async with proxy.page.post(path, headers=leaky) as answer:
                assert answer.status == 201
        await eventually(lambda: proxy.said().count(session_id[:8]) >= len(paths))
        said += proxy.said()
    async with running_caddy() as proxy:  # an error log quotes what was asked
        for path in paths:
            async with proxy.page.get(path, headers=leaky) as answer:
                assert answer.status in {200, 503}
        await eventually(lambda: proxy.said().count(session_id[:8]) >= len(paths))
        said += proxy.said()
    assert session_id[8:18] not in said


async def test_the_brokers_figures_are_not_for_the_public() -> None:
    async def never(request: web.Request) -> web.Response:
        return web.Response(text="figures")

    async with (
        standing_in_alive(never) as port,
        running_caddy(port, port) as proxy,
        proxy.page.get("/metrics") as answer,
    ):
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")
