"""The service as a part of somebody else's application: what is under its prefix, and that nothing else changes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler
from redis.asyncio import Redis
from structlog.testing import capture_logs

from broker.core.identity import Client
from broker.mount import mount, setup
from broker.settings import Settings, SettingsError
from broker.web import keys
from tests.broker import KEY, NO_LIMITS, QUESTION, Broker
from tests.replies import plain
from tests.scripted import PATIENCE, Call, ScriptedUpstream
from tests.system.harness import eventually

ORIGIN = {"Origin": "http://localhost:8080"}
FOREIGN = {"Origin": "https://evil.example"}


class Shop:
    """An application with its own page, middleware and error.

    Attributes:
        app: it.
        seen: paths that its middleware was asked for.
        order: what started and ended, in its order.
    """

    def __init__(self) -> None:
        self.app = web.Application(middlewares=[self._middleware], client_max_size=100)
        self.seen: list[str] = []
        self.order: list[str] = []
        self.app.add_routes([web.get("/goods", self._goods), web.get("/broken", self._broken)])
        self.app.cleanup_ctx.append(self._database)

    async def _database(self, _app: web.Application) -> AsyncIterator[None]:
        self.order.append("database opened")
        yield
        self.order.append("database closed")

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.seen.append(request.path)
        return await handler(request)

    async def _goods(self, _request: web.Request) -> web.Response:
        return web.Response(text="apples")

    async def _broken(self, _request: web.Request) -> web.Response:
        raise web.HTTPConflict(text="sold out")


def chosen(valkey_url: str, upstream: ScriptedUpstream, **settings: Any) -> Settings:
    usual = {"openrouter_api_key": KEY, "redis_url": valkey_url, "upstream_url": upstream.url}
    return Settings(**{**usual, **NO_LIMITS, "drain_timeout": 0, **settings})


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[Broker]:
    """The whole application, asked from its root."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http:
            yield Broker(f"http://{host}:{port}", app, http, Redis())  # nobody asks it
    finally:
        await runner.cleanup()
        structlog.reset_defaults()  # the first broker of a process decides where its lines go


def under(root: Broker, prefix: str) -> Broker:
    return replace(root, url=root.url + prefix)


async def test_a_session_lives_under_the_prefix(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    shop = Shop()
    setup(shop.app, prefix="/ai", settings=chosen(valkey_url, upstream))
    async with served(shop.app) as root:
        broker = under(root, "/ai")
        answer = await broker.post()
        session = answer.json["sessionId"]
        assert answer.headers["Location"] == f"/ai/stream/{session}"
        assert (await broker.read(session))[-1].kind == "done"
        assert (await root.ask("GET", f"/stream/{session}")).status == 404


async def test_an_outer_prefix_counts_as_well(valkey_url: str, upstream: ScriptedUpstream) -> None:
    inner, outer = web.Application(), web.Application()
    setup(inner, prefix="/ai", settings=chosen(valkey_url, upstream))
    outer.add_subapp("/shop", inner)
    async with served(outer) as root:
        answer = await under(root, "/shop/ai").post()
        assert answer.headers["Location"] == f"/shop/ai/stream/{answer.json['sessionId']}"


async def test_nothing_of_the_broker_shows_outside(valkey_url: str, upstream: ScriptedUpstream) -> None:
    shop = Shop()
    setup(shop.app, prefix="/ai", settings=chosen(valkey_url, upstream))
    async with served(shop.app) as root:
        for path, status, text in (
            ("/goods", 200, "apples"),
            ("/broken", 409, "sold out"),
            ("/aim", 404, "404: Not Found"),
        ):
            answer = await root.ask("GET", path, headers=FOREIGN)
            assert (answer.status, answer.text) == (status, text)
            for header in ("X-Request-Id", "Access-Control-Allow-Origin", "Vary", "RateLimit"):
                assert header not in answer.headers
        answer = await root.ask(
            "OPTIONS", "/goods", headers={**ORIGIN, "Access-Control-Request-Method": "GET"}
        )
        assert answer.status == 405
        assert shop.seen == ["/goods", "/broken", "/aim", "/goods"]


async def test_errors_under_the_prefix_are_the_brokers(valkey_url: str, upstream: ScriptedUpstream) -> None:
    shop = Shop()
    setup(shop.app, prefix="/ai", settings=chosen(valkey_url, upstream))
    async with served(shop.app) as root:
        for method, path, status, code in (
            ("GET", "/ai/nowhere", 404, "not_found"),
            ("GET", "/ai/prepare", 405, "method_not_allowed"),
            ("GET", "/ai/stream/nonsense", 404, "session_not_found"),
        ):
            answer = await root.ask(method, path, headers=ORIGIN)
            assert (answer.status, answer.code) == (status, code)
            assert answer.headers["X-Request-Id"]
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN["Origin"]
        assert (await root.ask("GET", "/ai/models", headers=FOREIGN)).code == "origin_not_allowed"
        assert shop.seen[-1] == "/ai/models"


async def test_the_limit_of_a_body_is_the_brokers(valkey_url: str, upstream: ScriptedUpstream) -> None:
    shop = Shop()
    setup(shop.app, prefix="/ai", settings=chosen(valkey_url, upstream, max_body=2000))
    async with served(shop.app) as root:
        broker = under(root, "/ai")
        assert (await broker.post({**QUESTION, "stop": "x" * 500})).status == 201
        for sent in (b"x" * 2001, pieces(b"x" * 2001)):
            answer = await broker.ask(
                "POST", "/prepare", data=sent, headers={"Content-Type": "application/json"}
            )
            assert (answer.status, answer.code) == (413, "body_too_large")


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def test_a_middleware_may_have_read_the_body(valkey_url: str, upstream: ScriptedUpstream) -> None:
    @web.middleware
    async def reading(request: web.Request, handler: Handler) -> web.StreamResponse:
        await request.read()
        return await handler(request)

    app = web.Application(middlewares=[reading])
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream, max_body=2000))
    async with served(app) as root:
        broker = under(root, "/ai")
        assert (await broker.post()).status == 201
        answer = await broker.ask(
            "POST", "/prepare", data=pieces(b"x" * 2001), headers={"Content-Type": "application/json"}
        )
        assert (answer.status, answer.code) == (413, "body_too_large")


async def test_a_middleware_may_prepare_the_response(valkey_url: str, upstream: ScriptedUpstream) -> None:
    @web.middleware
    async def preparing(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        await response.prepare(request)
        return response

    app = web.Application(middlewares=[preparing])
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream))
    async with served(app) as root:
        assert (await under(root, "/ai").ask("GET", "/health/live")).headers["X-Request-Id"]


async def test_any_host_is_answered_by_default(valkey_url: str, upstream: ScriptedUpstream) -> None:
    app = web.Application()
    setup(app, prefix="/open", settings=chosen(valkey_url, upstream))
    setup(app, prefix="/local", settings=chosen(valkey_url, upstream, host="127.0.0.1", key_prefix="local"))
    async with served(app) as root:
        elsewhere = {"Host": "shop.example"}
        assert (await root.ask("GET", "/open/health/live", headers=elsewhere)).status == 200
        assert (await root.ask("GET", "/local/health/live", headers=elsewhere)).code == "host_not_allowed"


async def test_two_brokers_have_settings_of_their_own(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    app = web.Application()
    setup(app, prefix="/one", settings=chosen(valkey_url, upstream, max_output_tokens=100))
    setup(
        app,
        prefix="/two",
        settings=chosen(valkey_url, upstream, max_output_tokens=200, key_prefix="two", api_keys="a:secret"),
    )
    async with served(app) as root:
        one, two = under(root, "/one"), under(root, "/two")
        first = await one.post()
        assert first.json["maxOutputTokens"] == 100
        assert (await two.post()).status == 401
        second = await two.post(headers={"Authorization": "Bearer secret"})
        assert second.json["maxOutputTokens"] == 200
        for broker, other, session in ((one, two, first), (two, one, second)):
            assert (await other.ask("GET", f"/stream/{session.json['sessionId']}")).status == 404
            assert (await broker.read(session.json["sessionId"]))[-1].kind == "done"


async def test_running_answers_end_before_the_application(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    shop = Shop()
    mounted = [
        mount(shop.app, prefix, chosen(valkey_url, upstream, drain_timeout=PATIENCE, key_prefix=prefix[1:]))
        for prefix in ("/one", "/two")
    ]

    async def closing(_app: web.Application) -> None:
        shop.order.append("drained")

    shop.app.on_shutdown.append(closing)
    async with asyncio.timeout(PATIENCE):
        async with served(shop.app) as root:
            lines, calls = [], []
            for number, prefix in enumerate(("/one", "/two"), 1):
                broker = under(root, prefix)
                lines.append(asyncio.create_task(broker.read(await broker.prepare())))
                calls.append((await upstream.call(number)).open())
            finishing = asyncio.create_task(finish(mounted, calls))
        await finishing
        for line in lines:
            assert [event.kind for event in await line] == ["chunk", "done"]
    assert shop.order == ["database opened", "drained", "database closed"]


async def finish(parts: list[web.Application], calls: list[Call]) -> None:
    """End the answers once the application shuts down, the last first: all drain at once."""
    await eventually(lambda: all(part[keys.WORKER].draining for part in parts))
    for call in reversed(calls):
        call.chunk("Hello", finish="stop")
        call.done()


async def test_the_log_has_no_session_and_no_key(
    valkey_url: str, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.replies = [plain]
    caplog.set_level("INFO")
    app = web.Application()
    setup(app, prefix="/my/stream", settings=chosen(valkey_url, upstream))
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream, key_prefix="two"))
    async with served(app) as root:
        for prefix in ("/ai", "/my/stream"):
            broker = under(root, prefix)
            session = await broker.prepare()
            await broker.read(session)
            await broker.ask("POST", f"/stream/{session}/cancel")
            assert f"path={prefix}/stream/{session[:8]}" in caplog.text
            assert session not in caplog.text
            assert session[9:] not in caplog.text
    assert KEY not in caplog.text


async def test_an_application_may_drain_before_it_closes(valkey_url: str, upstream: ScriptedUpstream) -> None:
    shop = Shop()
    part = mount(shop.app, "/ai", chosen(valkey_url, upstream, drain_timeout=PATIENCE))
    async with served(shop.app) as root:
        broker = under(root, "/ai")
        running, prepared = await broker.prepare(), await broker.prepare()
        async with broker.stream(running) as connection:
            call = (await upstream.call()).open()
            draining = asyncio.create_task(shop.app.shutdown())
            await eventually(lambda: part[keys.WORKER].draining)
            ready = await broker.ask("GET", "/health/ready")
            assert (ready.status, ready.code, ready.headers["Connection"]) == (503, "draining", "close")
            async with broker.stream(prepared) as refused:
                assert await refused.rest() == []  # comes again, to another worker
            goods = await root.ask("GET", "/goods")
            assert (goods.status, "Connection" in goods.headers) == (200, False)
            call.chunk("Hello", finish="stop")
            call.done()
            assert [event.kind for event in await connection.rest()] == ["chunk", "done"]
        await draining


async def test_answers_that_take_too_long_are_ended(valkey_url: str, upstream: ScriptedUpstream) -> None:
    app = web.Application()
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream))
    async with served(app) as root:
        broker = under(root, "/ai")
        line = asyncio.create_task(broker.read(await broker.prepare()))
        call = (await upstream.call()).open()
    assert [event.json["code"] for event in await line] == ["server_shutdown"]
    await call.wait_gone()


async def test_a_start_that_fails_leaves_nothing_running(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async def failing(_app: web.Application) -> None:
        raise ZeroDivisionError

    shop = Shop()
    setup(shop.app, prefix="/ai", settings=chosen(valkey_url, upstream))
    shop.app.on_startup.append(failing)
    before = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError):
        async with served(shop.app):
            pass
    await shop.app.cleanup()
    assert asyncio.all_tasks() <= before
    assert shop.order == ["database opened", "database closed"]


async def test_the_bare_prefix_leads_to_the_page(valkey_url: str, upstream: ScriptedUpstream) -> None:
    app = web.Application()
    setup(app, prefix="/ai/", settings=chosen(valkey_url, upstream))
    setup(app, prefix="/bare", settings=chosen(valkey_url, upstream, page=False, key_prefix="bare"))
    async with served(app) as root:
        answer = await root.ask("GET", "/ai?q=1", allow_redirects=False)
        assert (answer.status, answer.headers["Location"]) == (308, "/ai/?q=1")
        assert "page.js" in (await root.ask("GET", "/ai")).text
        assert (await root.ask("GET", "/ai/page.js")).status == 200
        assert (await root.ask("GET", "/bare")).status == 404


async def test_without_redis_url_a_local_application_has_a_valkey(upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    app = web.Application()
    setup(app, prefix="/ai", settings=Settings(host="127.0.0.1", upstream_url=upstream.url))
    async with served(app) as root:
        broker = under(root, "/ai")
        assert (await broker.read(await broker.prepare()))[-1].kind == "done"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"redis_url": "redis://localhost"}, "openrouter_api_key"),
        ({"openrouter_api_key": KEY}, "redis_url"),
        ({"openrouter_api_key": KEY, "host": "0.0.0.0"}, "redis_url"),
    ],
)
def test_a_setting_that_is_missing_is_named(settings: dict[str, Any], named: str) -> None:
    app = web.Application()
    with pytest.raises(SettingsError, match=named):
        setup(app, prefix="/ai", settings=Settings(**settings))
    assert not list(app.router.routes())


@pytest.mark.parametrize("setting", ["system_file", "clients_file"])
def test_a_missing_file_is_reported(tmp_path: Path, setting: str) -> None:
    given: dict[str, Any] = {"host": "127.0.0.1", "openrouter_api_key": KEY, setting: tmp_path / "nowhere"}
    with pytest.raises(SettingsError, match=f"BROKER_{setting.upper()}"):
        setup(web.Application(), prefix="/ai", settings=Settings(**given))


async def test_an_open_broker_causes_a_warning_at_the_start(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    for identify, warned in ((None, True), (lambda _: Client("anna"), False)):
        app = web.Application()
        setup(app, prefix="/ai", settings=chosen(valkey_url, upstream), identify=identify)
        with capture_logs() as lines:
            async with served(app):
                pass
        told = [line["event"] for line in lines if line["event"].startswith("anybody who can connect")]
        assert bool(told) is warned


def test_a_prefix_begins_with_a_slash() -> None:
    with pytest.raises(ValueError, match="slash"):
        setup(web.Application(), prefix="ai", settings=Settings(host="127.0.0.1", openrouter_api_key=KEY))


def test_a_wrong_secret_is_not_shown() -> None:
    with pytest.raises(ValueError, match="openrouter_api_key") as caught:
        Settings(openrouter_api_key="sk-or-v1 secret")
    assert "secret" not in str(caught.value).replace("openrouter", "")


async def test_the_whole_application_may_be_the_brokers(valkey_url: str, upstream: ScriptedUpstream) -> None:
    app = web.Application()
    setup(app, settings=chosen(valkey_url, upstream))
    async with served(app) as root:
        answer = await root.post()
        assert answer.headers["Location"] == f"/stream/{answer.json['sessionId']}"
        assert json.loads((await root.ask("GET", "/nowhere")).text)["error"]["code"] == "not_found"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
async def test_the_kernel_waits_for_a_page_of_a_server_that_is_not_ours(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    """Our own server sets this limit for each connection. Another one does not."""
    upstream.replies = [plain]
    limits: list[tuple[str, int, int]] = []

    def limit(request: web.Request) -> int:
        assert request.transport is not None
        tcp = request.transport.get_extra_info("socket")
        return int(tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))

    @web.middleware
    async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
        before = limit(request)
        response = await handler(request)
        limits.append((request.path.split("/")[2], before, limit(request)))
        return response

    app = web.Application(middlewares=[note])
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream, send_timeout=7))
    async with served(app) as root:
        broker = under(root, "/ai")
        session = (await broker.post()).json["sessionId"]
        assert (await broker.read(session))[-1].kind == "done"
        await broker.ask("GET", "/models")  # on the connection of the stream
    assert limits == [("prepare", 0, 0), ("stream", 0, 7000), ("models", 0, 0)]
