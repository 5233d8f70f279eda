"""Clients that the application around the broker identifies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from broker.core.identity import LONGEST_NAME, Client
from broker.mount import setup
from broker.web import application_clients
from broker.web.application_clients import Identify
from tests.broker import QUESTION, Answer
from tests.replies import plain
from tests.scripted import ScriptedUpstream
from tests.web.test_mount import chosen, served, under

USERS = web.AppKey("users", dict[str, str])
USER = web.RequestKey("user", str)


async def asked(
    identify: Identify, valkey_url: str, upstream: ScriptedUpstream, path: str = "/usage", **settings: Any
) -> Answer:
    app = web.Application()
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream, **settings), identify=identify)
    async with served(app) as root:
        return await under(root, "/ai").ask("GET", path)


def cookie(request: web.Request) -> Client:
    if (name := request.cookies.get("name")) is None:
        raise web.HTTPUnauthorized(text="Log in first.")
    return Client(name)


async def test_a_client_is_counted_by_its_name(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    app = web.Application()
    setup(
        app,
        prefix="/ai",
        settings=chosen(valkey_url, upstream, upstream_kind="openrouter", api_keys="a:b"),
        identify=cookie,
    )
    async with served(app) as root:
        broker = under(root, "/ai")
        answer = await broker.post(headers={"Cookie": "name=Anna Müller"})
        assert (await broker.read(answer.json["sessionId"]))[-1].kind == "done"
        for name, requests in (("Anna Müller", 1), ("Ben", 0)):
            usage = await broker.ask("GET", "/usage", headers={"Cookie": f"name={name}"})
            assert usage.json["requests"] == requests
    user = upstream.calls[0].body["user"]
    assert user.startswith("u_")
    assert "Anna" not in user


async def test_an_application_may_set_the_upstreams_user(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    app = web.Application()
    setup(
        app, prefix="/ai", settings=chosen(valkey_url, upstream, upstream_kind="openrouter"), identify=known
    )
    async with served(app) as root:
        broker = under(root, "/ai")
        await broker.read(await broker.prepare())
    assert upstream.calls[0].body["user"] == "customer 7"


def known(_request: web.Request) -> Client:
    return Client("7", user="customer 7")


async def test_an_application_is_asked_as_itself(valkey_url: str, upstream: ScriptedUpstream) -> None:
    @web.middleware
    async def login(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[USER] = request.cookies["name"]
        return await handler(request)

    async def look_up(request: web.Request) -> Client:
        await asyncio.sleep(0)
        return Client(request.app[USERS][request[USER]])

    app = web.Application(middlewares=[login])
    app[USERS] = {"anna": "customer 7"}
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream), identify=look_up)
    async with served(app) as root:
        for path in ("/ai/usage", "/ai/health/live"):
            assert (await root.ask("GET", path, headers={"Cookie": "name=anna"})).status == 200


@pytest.mark.parametrize(
    ("error", "status", "code", "message"),
    [
        (web.HTTPUnauthorized(text="Log in first."), 401, "unauthorized", "Log in first."),
        (web.HTTPUnauthorized(), 401, "unauthorized", "This needs an API key or a token."),
        (web.HTTPForbidden(reason="Customers only"), 403, "forbidden", "Customers only"),
        (web.HTTPForbidden(text="<h1>No</h1>", content_type="text/html"), 403, "forbidden", None),
        (web.HTTPFound("/login"), 401, "unauthorized", None),
        (web.HTTPPaymentRequired(text="x" * 400), 402, "invalid_request", "x" * 300),
        (web.HTTPTooManyRequests(headers={"Retry-After": "7"}), 429, "rate_limited", None),
        (web.HTTPServiceUnavailable(), 503, "overloaded", None),
        (web.HTTPBadGateway(text="The users are away."), 502, "internal_error", "The users are away."),
    ],
)
async def test_a_refusal_is_answered_in_our_form(
    valkey_url: str,
    upstream: ScriptedUpstream,
    error: web.HTTPException,
    status: int,
    code: str,
    message: str | None,
) -> None:
    async def refuse(_request: web.Request) -> Client:
        raise error

    answer = await asked(refuse, valkey_url, upstream)
    assert (answer.status, answer.code) == (status, code)
    told = answer.json["error"]["message"]
    assert told == message if message is not None else told
    assert "<h1>" not in told
    assert answer.headers["X-Request-Id"]
    if status in (429, 503):
        assert answer.headers["Retry-After"] == ("7" if status == 429 else "3")


@pytest.mark.parametrize("path", ["/usage", "/models", "/prepare"])
async def test_other_exceptions_of_an_application_are_hidden(
    valkey_url: str, upstream: ScriptedUpstream, path: str
) -> None:
    def broken(_request: web.Request) -> Client:
        raise LookupError("table users, password hunter2")

    app = web.Application()
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream), identify=broken)
    async with served(app) as root:
        broker = under(root, "/ai")
        answer = await (broker.post(QUESTION) if path == "/prepare" else broker.ask("GET", path))
    assert (answer.status, answer.code) == (500, "internal_error")
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("returned", [None, "anna", {"name": "anna"}])
async def test_a_value_that_is_not_a_client_lets_nobody_in(
    valkey_url: str, upstream: ScriptedUpstream, returned: Any
) -> None:
    answer = await asked(lambda _request: returned, valkey_url, upstream)
    assert (answer.status, answer.code) == (500, "internal_error")


async def test_an_application_has_a_bounded_time(
    valkey_url: str, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_request: web.Request) -> Client:
        await asyncio.Event().wait()
        raise AssertionError

    async def late(_request: web.Request) -> Client:
        raise TimeoutError

    monkeypatch.setattr(application_clients, "TIMEOUT", 0.05)
    answer = await asked(hang, valkey_url, upstream)
    assert (answer.status, answer.code) == (503, "overloaded")
    assert answer.headers["Retry-After"]
    assert (await asked(late, valkey_url, upstream)).status == 500


async def test_streams_and_cancels_ask_nobody(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    app = web.Application()
    setup(app, prefix="/ai", settings=chosen(valkey_url, upstream), identify=cookie)
    async with served(app) as root:
        broker = under(root, "/ai")
        session = (await broker.post(headers={"Cookie": "name=anna"})).json["sessionId"]
        assert (await broker.post()).json["error"] == {"code": "unauthorized", "message": "Log in first."}
        assert (await broker.read(session))[-1].kind == "done"
        assert (await broker.cancel(session)).status == 200


@pytest.mark.parametrize("name", ["", "a\nb", "x" * (LONGEST_NAME + 1), "\ud800", "\x00"])
def test_a_name_is_short_and_printable(name: str) -> None:
    with pytest.raises(ValueError, match="printable"):
        Client(name)
