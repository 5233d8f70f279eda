"""The shipped nginx configuration while brokers are away, die, or drop what they are asked."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import Counter
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web

from tests.kinds import running_servers
from tests.system.browser import launched_chromium
from tests.system.harness import POLL_INTERVAL, free_port, running_broker
from tests.system.proxy import (
    EVENTS,
    QUESTION,
    ROOM,
    block,
    prepared,
    proxy_before,
    running_proxy,
    standing_in,
)

PATIENCE = 15.0
ORIGIN = "https://page.example"


async def test_an_eventsource_reconnects_when_no_broker_answers() -> None:
    async with running_proxy() as proxy:
        for _ in range(3):  # refused by both, and then marked as failed
            address = f"/stream/{uuid.uuid4()}"
            async with proxy.page.get(address, headers={**EVENTS, "Origin": ORIGIN}) as answer:
                body = await answer.text()
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert "no-store" in answer.headers["Cache-Control"]
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"
            assert answer.headers["Vary"] == "Origin"
            found = re.fullmatch(r"retry: (\d+)\n: [a-z ]+\n\n", body)
            assert found is not None, body
            assert 2400 <= int(found[1]) <= 3600


@pytest.mark.parametrize(
    ("method", "path", "accept"),
    [
        ("GET", "/stream/any", "*/*"),
        ("DELETE", "/stream/any", "text/event-stream"),
        ("POST", "/prepare", "text/event-stream"),
        ("GET", "/models", "*/*"),
    ],
)
async def test_any_other_caller_gets_json(method: str, path: str, accept: str) -> None:
    async with running_proxy() as proxy:
        async with proxy.page.request(method, path, headers={"Accept": accept, "Origin": ORIGIN}) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (503, "broker_unavailable")
        assert error["message"]
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert answer.headers["Retry-After"] == "3"
        assert answer.headers["X-Request-Id"]
        async with proxy.page.request(method, path) as answer:
            assert answer.status == 503
            assert not [name for name in answer.headers if name.startswith("Access-Control-Allow")]


async def test_a_preflight_is_answered_without_a_broker() -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    headers = {"Origin": ORIGIN, **asked}
    async with running_proxy() as proxy, proxy.page.options("/prepare", headers=headers) as answer:
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert "Content-Type" in answer.headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize(("method", "times"), [("POST", 1), ("GET", 2), ("DELETE", 2)])
async def test_a_post_that_may_have_arrived_is_not_sent_again(method: str, times: int) -> None:
    arrived: Counter[str] = Counter()

    async def drop(request: web.Request) -> web.Response:
        arrived[request.method] += 1
        await request.read()
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with (
        proxy_before(drop) as proxy,
        proxy.page.request(method, "/stream/any/cancel", data=b"{}") as answer,
    ):
        assert answer.status == 503
    assert arrived == {method: times}


async def test_one_broker_down_is_not_noticed() -> None:
    async with (
        running_broker(env=ROOM) as broker,
        running_proxy(free_port(), broker.port) as proxy,
    ):
        for _ in range(12):
            session_id = await prepared(proxy.page, "rehearsal/echo")
            async with proxy.page.get(f"/stream/{session_id}", headers=EVENTS) as answer:
                assert "event: done" in await answer.text()
            async with proxy.page.delete(f"/stream/{session_id}") as answer:
                assert (answer.status, await answer.json()) == (200, {"state": "done"})
        tried = [line["broker_status"] for line in await proxy.logged(36)]
    assert any(statuses.startswith("502, 20") for statuses in tried), "the other broker was never tried"


async def test_a_page_of_a_dead_broker_goes_to_the_next() -> None:
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(running_servers())
        ports = free_port(), free_port()
        env, other = [{**ROOM, "REDIS_URL": valkey.url, "PORT": str(port)} for port in ports]
        broker = await stack.enter_async_context(running_broker(env=env))
        proxy = await stack.enter_async_context(running_proxy(*ports))
        address = f"/stream/{await prepared(proxy.page, 'rehearsal/long')}"
        async with proxy.page.get(address, headers=EVENTS) as answer:
            while "event: chunk" not in (chunk := await block(answer)):
                pass
            await stack.enter_async_context(running_broker(env=other))
            broker.process.kill()
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        found = re.search("^id: (.+)$", chunk, re.MULTILINE)
        assert found is not None, chunk
        assert (await reopened(proxy.page, address, found[1])).startswith("retry: ")


async def reopened(page: aiohttp.ClientSession, address: str, cursor: str) -> str:
    """Reconnect to a session as a page does, and return the first event of a broker."""
    async with asyncio.timeout(PATIENCE):
        while True:
            async with page.get(address, headers={**EVENTS, "Last-Event-ID": cursor}) as answer:
                assert (answer.status, answer.content_type) == (200, "text/event-stream")
                if "no broker answers" not in (opening := await block(answer)):
                    return opening
            await asyncio.sleep(POLL_INTERVAL)


FOLLOW = """url => {
  Object.assign(window, {comings: 0, text: "", result: null});
  const source = new EventSource(url, {withCredentials: true});
  source.addEventListener("open", () => { window.comings += 1; });
  source.addEventListener("chunk", e => { window.text += JSON.parse(e.data).choices?.[0]?.delta?.content ?? ""; });
  source.addEventListener("done", e => { source.close(); window.result = JSON.parse(e.data); });
}"""


async def blank(request: web.Request) -> web.Response:
    return web.Response(text="<!doctype html><title>Another site</title>", content_type="text/html")


@pytest.mark.slow
async def test_an_eventsource_comes_back_when_its_broker_dies_under_it() -> None:
    async with AsyncExitStack() as stack:
        site = f"http://127.0.0.1:{await stack.enter_async_context(standing_in(blank))}"
        env = {**ROOM, "BROKER_CORS_ORIGINS": site}
        broker = await stack.enter_async_context(running_broker(env=env))
        proxy = await stack.enter_async_context(running_proxy(broker.port))
        session_id = await prepared(proxy.page, "rehearsal/long")
        chromium = await stack.enter_async_context(launched_chromium())
        page = await chromium.new_page(ignore_https_errors=True)
        await page.goto(site)
        await page.evaluate(FOLLOW, f"{proxy.url}/stream/{session_id}")
        await page.wait_for_function("window.text")
        broker.process.kill()
        await page.wait_for_function("window.comings > 1")


@pytest.mark.slow
async def test_an_eventsource_waits_for_the_first_broker() -> None:
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(running_servers())
        site = f"http://127.0.0.1:{await stack.enter_async_context(standing_in(blank))}"
        port = free_port()
        env = {**ROOM, "REDIS_URL": valkey.url, "PORT": str(port), "BROKER_CORS_ORIGINS": site}
        async with running_broker(env=env) as broker, aiohttp.ClientSession() as session:
            session_id = await prepared(session, "rehearsal/echo", broker.url)
        proxy = await stack.enter_async_context(running_proxy(port))
        chromium = await stack.enter_async_context(launched_chromium())
        page = await chromium.new_page(ignore_https_errors=True)
        await page.goto(site)
        await page.evaluate(FOLLOW, f"{proxy.url}/stream/{session_id}")
        await page.wait_for_function("window.comings > 0")
        await stack.enter_async_context(running_broker(env=env))
        await page.wait_for_function("window.result")
        assert await page.evaluate("window.text") == QUESTION
        assert await page.evaluate("window.comings") > 1
