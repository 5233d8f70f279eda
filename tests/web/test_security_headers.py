"""The security headers: on every answer of every route, whatever went wrong."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import pytest
from aiohttp import hdrs

from broker.prepare import Admission
from broker.web.page import client_routes, page_routes
from tests.broker import QUESTION, running
from tests.replies import plain
from tests.web.test_server import get, sent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.broker import Broker
    from tests.scripted import ScriptedUpstream

EVENTS = {"Accept": "text/event-stream"}
NOWHERE = "00000000-0000-4000-8000-000000000000"
FOREIGN = {"Origin": "https://evil.example"}
PREFLIGHT = {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}


def check(headers: Mapping[str, str]) -> None:
    """Check what every answer has. Names of headers are in any case."""
    named = {name.lower(): value for name, value in headers.items()}
    assert named["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in named["content-security-policy"]
    assert "frame-ancestors 'none'" in named["content-security-policy"]
    assert named["referrer-policy"] in {"no-referrer", "same-origin"}
    assert named["server"] == "session-broker"
    assert "origin" in named["vary"].lower()
    assert named["x-request-id"]


@pytest.mark.parametrize("form", ["", "/ai"], indirect=True)
async def test_every_route_and_method_has_the_headers(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, page=True) as broker:
        routes = [
            (route.method, route.resource.canonical)
            for route in broker.app.router.routes()
            if route.resource is not None
        ]
        assert len(routes) > 20
        for method, path in routes:
            prefix = broker.url.partition("//")[2].partition("/")[2]
            asked = path.replace("{session_id}", NOWHERE).removeprefix(f"/{prefix}" if prefix else "")
            methods = ["GET", "POST", "PUT"] if method == hdrs.METH_ANY else [method]
            for one in methods:
                for headers in ({}, EVENTS, FOREIGN, {"If-None-Match": "*"}):
                    check((await broker.ask(one, asked, headers=headers, allow_redirects=False)).headers)


@pytest.mark.parametrize(
    ("status", "method", "path", "options"),
    [
        (404, "GET", "/nowhere", {}),
        (405, "PUT", "/prepare", {}),
        (403, "GET", "/models", {"headers": FOREIGN}),
        (403, "GET", "/models", {"headers": {"Host": "evil.example"}}),
        (204, "OPTIONS", "/prepare", {"headers": PREFLIGHT}),
        (400, "POST", "/prepare", {"data": b"{", "headers": {"Content-Type": "application/json"}}),
        (413, "POST", "/prepare", {"data": BytesIO(bytes(2_000_000)), "headers": {"Content-Type": "application/json"}}),
        (415, "POST", "/prepare", {"data": b"x", "headers": {"Content-Type": "text/plain"}}),
        (422, "POST", "/prepare", {"json": {**QUESTION, "plugins": []}}),
        (422, "GET", f"/stream/{NOWHERE}?events=all", {}),
        (204, "GET", f"/stream/{NOWHERE}?lastEventId=1-1.end", {"headers": EVENTS}),
    ],
)  # fmt: skip
async def test_every_error_has_the_headers(
    broker: Broker, status: int, method: str, path: str, options: dict[str, object]
) -> None:
    answer = await broker.ask(method, path, **options)
    assert answer.status == status, answer.text
    check(answer.headers)


async def test_what_is_no_http_has_the_headers(broker: Broker) -> None:
    for rubbish in (b"\x00\r\n\r\n", get("/models", "Expect: miracles", "Connection: close")):
        check((await sent(broker, rubbish)).headers)


async def test_a_stream_has_the_headers(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    answer = await broker.ask("GET", f"/stream/{session}", headers=EVENTS)
    assert "event: done" in answer.text
    check(answer.headers)


async def test_a_bug_has_the_headers(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Admission, "check_rate", broken)
    answer = await broker.post()
    assert answer.status == 500
    check(answer.headers)


async def test_the_page_alone_may_load_its_own_files(valkey_url: str, upstream: ScriptedUpstream) -> None:
    page = {route.path for route in page_routes()}
    async with running(valkey_url, upstream, page=True) as broker:
        for path in (*page, *(route.path for route in client_routes())):
            answer = await broker.ask("GET", path)
            assert ("script-src 'self'" in answer.headers["Content-Security-Policy"]) == (path in page)
            assert len(answer.headers.getall("Content-Security-Policy")) == 1  # type: ignore[attr-defined]
