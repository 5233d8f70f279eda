"""The shipped nginx configuration while its brokers answer: what it passes, changes and logs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import uuid
from io import BytesIO
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web
from playwright.async_api import expect
from yarl import URL

from broker.settings import Settings
from tests.system.browser import Complaints, launched_chromium
from tests.system.chat_page import ask
from tests.system.harness import free_port, running_broker
from tests.system.proxy import (
    EVENTS,
    ROOM,
    SHIPPED,
    block,
    nginx,
    proxy_before,
    render,
    running_proxy,
    standing_in,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.system.proxy import Handler

PATIENCE = 30.0
ORIGIN = "https://page.example"
MAX_BODY = Settings().max_body


# The configuration itself


def test_nginx_accepts_the_shipped_files_and_needs_all_of_them(tmp_path: Path) -> None:
    render(tmp_path, free_port(), (1, 2))
    checked = subprocess.run(nginx(tmp_path, "-T"), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    # Releases from 1.25.1 on would rather see HTTP/2 asked for in a way that earlier ones refuse.
    complaints = [line for line in checked.stderr.splitlines() if "[" in line]
    assert [line for line in complaints if '"listen ... http2"' not in line] == []
    dumped = re.findall(r"^# configuration file \S+/(\S+):$", checked.stdout, re.MULTILINE)
    assert set(dumped) == {path.name for path in SHIPPED.iterdir()}


# Requests to a broker, and answers


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

    async with (
        proxy_before(lock_step) as proxy,
        proxy.page.get("/stream/any", headers={**EVENTS, "Accept-Encoding": encoding}) as answer,
    ):
        assert answer.headers.get("Content-Encoding", "identity") == encoding
        for n in range(20):
            assert await block(answer) == f"data: {n}\n\n"
            arrived.release()
        assert await answer.content.read() == b""


async def test_a_broker_gets_the_callers_address_and_host() -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response({name.title(): value for name, value in request.headers.items()})

    spoofed = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "gopher", "X-Request-Id": "mine-1"}
    async with proxy_before(echo) as proxy:
        async with proxy.page.get("/models", headers=spoofed) as answer:
            seen = await answer.json()
        async with proxy.page.get("/models", headers={"X-Request-Id": "not an id"}) as answer:
            named = (await answer.json())["X-Request-Id"]
        lines = await proxy.logged(2)
    assert seen["Host"] == f"127.0.0.1:{proxy.port}"
    assert (seen["X-Forwarded-For"], seen["X-Forwarded-Proto"]) == ("127.0.0.1", "https")
    assert seen["X-Request-Id"] == "mine-1"
    assert re.fullmatch("[0-9a-f]{32}", named)
    assert [line["request_id"] for line in lines] == ["mine-1", named]


async def test_connections_to_a_broker_are_used_again() -> None:
    connections = set()

    async def remember(request: web.Request) -> web.Response:
        assert request.transport is not None
        connections.add(request.transport.get_extra_info("peername"))
        return web.Response(text="ok")

    async with standing_in(remember) as port, running_proxy(port, port) as proxy:
        for _ in range(10):
            async with proxy.page.get("/health/live") as answer:
                assert await answer.text() == "ok"
    assert len(connections) == 1


async def test_a_session_stays_with_one_broker() -> None:
    seen: dict[str, set[int]] = {}

    def named(number: int) -> Handler:
        async def remember(request: web.Request) -> web.Response:
            seen.setdefault(request.path.split("/")[2], set()).add(number)
            return web.Response()

        return remember

    async with proxy_before(named(1), named(2)) as proxy:
        for session_id in [str(uuid.uuid4()) for _ in range(30)]:
            asked = [("GET", ""), ("GET", "?lastEventId=1-7"), ("DELETE", ""), ("POST", "/cancel")]
            for method, rest in asked:
                async with proxy.page.request(method, f"/stream/{session_id}{rest}") as answer:
                    assert answer.status == 200
    assert len(seen) == 30
    assert all(len(brokers) == 1 for brokers in seen.values())
    assert set().union(*seen.values()) == {1, 2}


@pytest.mark.parametrize("status", [403, 404, 503])
@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
async def test_a_brokers_own_answer_passes_unchanged(status: int, accept: str) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=status, text="as it was", headers={"Vary": "Origin"})

    asked = {"Accept": accept, "Origin": ORIGIN}
    async with proxy_before(refuse) as proxy, proxy.page.get("/stream/any", headers=asked) as answer:
        assert (answer.status, await answer.text()) == (status, "as it was")
        assert answer.headers.getall("Vary") == ["Origin"]
        assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_body_is_limited_and_never_written_to_a_disk() -> None:
    sizes: list[int] = []
    kept: list[Path] = []

    async def measure(request: web.Request) -> web.Response:
        kept.extend((proxy.directory / "client_body").iterdir())
        sizes.append(len(await request.read()))
        return web.Response()

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * (MAX_BODY // 2)

    async with proxy_before(measure) as proxy:
        async with proxy.page.post("/prepare", data=BytesIO(b" " * MAX_BODY)) as answer:
            assert answer.status == 200
        for body in (BytesIO(b" " * (MAX_BODY + 1)), pieces()):
            async with proxy.page.post("/prepare", data=body, headers={"Origin": ORIGIN}) as answer:
                assert answer.status == 413
                assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
                assert (await answer.json())["error"]["code"] == "body_too_large"
    assert sizes == [MAX_BODY]
    assert kept == []


async def test_the_brokers_figures_are_not_for_the_public() -> None:
    async def never(request: web.Request) -> web.Response:
        return web.Response(text="figures")

    async with proxy_before(never) as proxy, proxy.page.get("/metrics") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")


async def test_plain_http_is_sent_to_https() -> None:
    async with running_proxy() as proxy, aiohttp.ClientSession() as page:
        url = f"http://127.0.0.1:{proxy.port}/models?free=true"
        async with page.get(url, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (308, f"{proxy.url}/models?free=true")


# Secrets


async def test_no_log_has_a_whole_session_id() -> None:
    async def point(request: web.Request) -> web.Response:
        return web.Response(status=201, headers={"Location": f"/stream/{session_id}"})

    session_id = str(uuid.uuid4())
    paths = [f"/stream/{session_id}", f"/stream/{session_id}/cancel", f"//stream//{session_id}"]
    paths += [f"/stream/{session_id.replace('-', '%2d')}", f"/%0a/stream/{session_id}"]
    paths += [f"/Streams/{session_id.upper()}", f"/{session_id}?id={session_id}"]
    leaky = {**EVENTS, "Origin": ORIGIN, "Referer": f"{ORIGIN}/?session={session_id}"}
    said = ""
    async with standing_in(point) as port, running_proxy(port, port) as proxy:
        for path in paths:
            for method, size in (("GET", 0), ("DELETE", 0), ("POST", 0), ("POST", MAX_BODY + 1)):
                url, data = URL(proxy.url + path, encoded=True), BytesIO(b" " * size)
                async with proxy.page.request(method, url, headers=leaky, data=data) as answer:
                    assert answer.status == (413 if size else 201)
        lines = await proxy.logged(4 * len(paths))
        said += proxy.said()
    # And without any broker, which is when an error log quotes what was asked.
    async with running_proxy() as proxy:
        for path in paths:
            async with proxy.page.get(URL(proxy.url + path, encoded=True), headers=leaky) as answer:
                assert answer.status in {200, 503}
        lines += await proxy.logged(len(paths))
        said += proxy.said()
    assert len(lines) == 5 * len(paths)
    assert all(session_id[:8] in line["path"].lower() for line in lines)
    assert session_id[8:18] not in said.lower()
    assert session_id[8:18].replace("-", "%2d") not in said.lower()


# Pages


@pytest.mark.slow
async def test_the_page_works_over_tls_and_http_2() -> None:
    async with (
        running_broker(env=ROOM) as broker,
        running_proxy(broker.port) as proxy,
        launched_chromium() as chromium,
    ):
        page = await chromium.new_page(ignore_https_errors=True)
        complaints = Complaints(page)
        await page.goto(proxy.url)
        protocol = await page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol")
        turn = await ask(page, "rehearsal/fast", "Tell me everything.")
        await expect(turn).to_contain_text(re.compile(r"\$0\.\d+ · [\d,]+ tokens in"), timeout=60_000)
        assert len(await turn.inner_text()) > 1000
        assert protocol == "h2"
        assert complaints == []


OPEN_EIGHT = """async () => {
  const headers = {"Content-Type": "application/json"};
  const body = JSON.stringify({model: "rehearsal/stall", messages: [{role: "user", content: "Hold the line."}]});
  await Promise.all(Array.from({length: 8}, async () => {
    const {sessionId} = await (await fetch("/prepare", {method: "POST", headers, body})).json();
    const source = new EventSource(`/stream/${sessionId}`);
    await new Promise(resolve => source.addEventListener("chunk", resolve));
  }));
}"""


@pytest.mark.slow
async def test_a_page_may_follow_more_than_six_answers_at_once() -> None:
    async with (
        running_broker(env=ROOM) as broker,
        running_proxy(broker.port) as proxy,
        launched_chromium() as chromium,
    ):
        page = await chromium.new_page(ignore_https_errors=True)
        await page.goto(proxy.url)
        async with asyncio.timeout(PATIENCE):
            await page.evaluate(OPEN_EIGHT)
