"""Which pages may use the broker: CORS on every answer, and the host names it answers to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from broker.web.refused_origins import MOST, WINDOW, RefusedOrigins
from tests.broker import Answer, Broker, running
from tests.scripted import Call, ScriptedUpstream

UNKNOWN = "/stream/00000000-1111-4222-8333-444444444444"
PAGE = "https://chat.example"
EXPOSED = {"Location", "Retry-After", "ETag", "RateLimit", "RateLimit-Policy", "X-Request-Id"}


def names(value: str) -> set[str]:
    return {name.strip() for name in value.split(",")}


def allows(answer: Answer | Any, origin: str, *, credentials: bool) -> bool:
    headers = answer.headers
    return (
        headers.get("Access-Control-Allow-Origin") == origin
        and (headers.get("Access-Control-Allow-Credentials") == "true") is credentials
        and "Origin" in names(headers["Vary"])
    )


@pytest_asyncio.fixture
async def listing(valkey_url: str, upstream: ScriptedUpstream) -> AsyncIterator[Broker]:
    """A broker with one listed origin."""
    async with running(valkey_url, upstream, cors_origins=(PAGE,)) as broker:
        yield broker


async def test_a_page_of_this_machine_is_allowed(broker: Broker) -> None:
    origin = "http://localhost:5173"
    answer = await broker.post(headers={"Origin": origin})
    assert answer.status == 201
    assert allows(answer, origin, credentials=False)
    assert names(answer.headers["Access-Control-Expose-Headers"]) == EXPOSED


async def test_the_own_page_may_come(listing: Broker) -> None:
    assert allows(await listing.post(headers={"Origin": listing.url}), listing.url, credentials=False)


async def test_a_listed_page_may_come_with_credentials(listing: Broker) -> None:
    answer = await listing.post(headers={"Origin": PAGE})
    assert answer.status == 201
    assert allows(answer, PAGE, credentials=True)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:5173", "null", "http://[::1", "*"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/prepare"), ("GET", UNKNOWN), ("DELETE", UNKNOWN), ("GET", "/models"), ("GET", "/nothing")],
)
async def test_another_page_may_not(listing: Broker, origin: str, method: str, path: str) -> None:
    answer = await listing.ask(method, path, headers={"Origin": origin, "Accept": "text/event-stream"})
    assert (answer.status, answer.code) == (403, "origin_not_allowed")
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Origin" in names(answer.headers["Vary"])


async def test_another_page_claims_nothing(listing: Broker, upstream: ScriptedUpstream) -> None:
    session = await listing.prepare()
    async with listing.stream(session, headers={"Origin": "https://evil.example"}) as connection:
        assert connection.status == 403
    assert upstream.calls == []


async def test_a_caller_that_is_not_a_page_is_allowed(listing: Broker) -> None:
    answer = await listing.post()
    assert answer.status == 201
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Origin" in names(answer.headers["Vary"])


@pytest.mark.parametrize("origin", ["https://anybody.example", "null"])
async def test_a_star_lets_all_pages_in_without_credentials(
    valkey_url: str, upstream: ScriptedUpstream, origin: str
) -> None:
    async with running(valkey_url, upstream, cors_origins=("*",)) as broker:
        assert allows(await broker.post(headers={"Origin": origin}), origin, credentials=False)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/prepare", 415),
        ("GET", UNKNOWN, 404),
        ("DELETE", UNKNOWN, 404),
        ("POST", f"{UNKNOWN}/cancel", 404),
        ("GET", "/models", 502),
        ("GET", "/nothing", 404),
        ("PUT", "/prepare", 405),
        ("GET", "/health/live", 200),
        ("HEAD", UNKNOWN, 204),
    ],
)
async def test_every_path_and_every_error_echoes_an_allowed_origin(
    listing: Broker, method: str, path: str, status: int
) -> None:
    answer = await listing.ask(method, path, headers={"Origin": PAGE})
    assert answer.status == status
    assert allows(answer, PAGE, credentials=True)


async def test_a_stream_echoes_an_allowed_origin(listing: Broker, upstream: ScriptedUpstream) -> None:
    def plain(call: Call) -> None:
        call.open()
        call.chunk("Hello", finish="stop")
        call.done()

    upstream.replies = [plain]
    for path in (f"/stream/{await listing.prepare()}", UNKNOWN):
        headers = {"Origin": PAGE, "Accept": "text/event-stream"}
        answer = await listing.ask("GET", path, headers=headers)
        assert answer.status == 200
        assert allows(answer, PAGE, credentials=True)


@pytest.mark.parametrize("path", ["/prepare", UNKNOWN, f"{UNKNOWN}/cancel", "/models", "/usage"])
async def test_a_preflight_gets_what_is_allowed(listing: Broker, path: str) -> None:
    headers = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": "x",
    }
    answer = await listing.ask("OPTIONS", path, headers=headers)
    assert answer.status == 204
    assert allows(answer, PAGE, credentials=True)
    assert names(answer.headers["Access-Control-Allow-Methods"]) == {"GET", "POST", "DELETE"}
    assert names(answer.headers["Access-Control-Allow-Headers"]) == {
        *("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "If-None-Match"),
    }


async def test_a_preflight_of_another_page_is_refused(listing: Broker) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = await listing.ask("OPTIONS", "/prepare", headers=headers)
    assert (answer.status, answer.code) == (403, "origin_not_allowed")
    assert "Access-Control-Allow-Origin" not in answer.headers


async def test_an_options_request_without_preflight_is_a_wrong_method(broker: Broker) -> None:
    answer = await broker.ask("OPTIONS", "/prepare")
    assert (answer.status, answer.code) == (405, "method_not_allowed")


# DNS rebinding


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3000", "127.0.0.1.evil.example", "", "[::1", "a:b:c"]
)
@pytest.mark.parametrize("path", ["/prepare", UNKNOWN, "/health/live", "/"])
async def test_on_the_loopback_another_name_is_refused(broker: Broker, host: str, path: str) -> None:
    answer = await broker.ask("GET", path, headers={"Host": host})
    assert (answer.status, answer.code) == (403, "host_not_allowed")


async def test_a_rebound_page_is_not_its_own_origin(broker: Broker) -> None:
    headers = {"Host": "evil.example:3000", "Origin": "http://evil.example:3000"}
    answer = await broker.post(headers=headers)
    assert (answer.status, answer.code) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "localhost:3000", "127.0.0.1:1", "[::1]:3000"])
async def test_the_names_of_this_machine_are_accepted(broker: Broker, host: str) -> None:
    assert (await broker.post(headers={"Host": host})).status == 201


async def test_the_host_of_a_listed_origin_is_accepted(listing: Broker) -> None:
    assert (await listing.post(headers={"Host": "chat.example"})).status == 201


async def test_a_broker_that_all_can_reach_answers_to_any_name(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, host="0.0.0.0") as broker:
        assert (await broker.post(headers={"Host": "broker.example"})).status == 201


@pytest.mark.parametrize(
    "origin",
    ["tauri://localhost", "chrome-extension://abcdefgh", "moz-extension://1-2-3", "app://obsidian.md"],
)
async def test_pages_of_apps_and_extensions_may_be_listed(
    origin: str, valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, cors_origins=f"{origin},{PAGE}") as broker:
        answer = await broker.post(headers={"Origin": origin})
        assert answer.status == 201
        assert allows(answer, origin, credentials=True)
        assert (await broker.post(headers={"Origin": f"{origin}x"})).status == 403


@pytest.mark.parametrize("listed", ["null", f"null,{PAGE}", "*", "*,null"])
async def test_the_origin_null_never_gets_credentials(
    listed: str, valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, cors_origins=listed) as broker:
        answer = await broker.post(headers={"Origin": "null"})
        assert answer.status == 201
        assert allows(answer, "null", credentials=False)
        refused = await broker.ask("GET", UNKNOWN, headers={"Origin": "null"})
        assert allows(refused, "null", credentials=False)


async def test_a_refused_origin_is_logged_with_the_setting(
    listing: Broker,
) -> None:
    with capture_logs() as lines:
        for _ in range(3):
            assert (
                await listing.post(headers={"Origin": "https://other.example"})
            ).code == "origin_not_allowed"
    told = [line for line in lines if line["event"] == "origin refused"]
    assert [(line["origin"], line["allowed_by"]) for line in told] == [
        ("'https://other.example'", "BROKER_CORS_ORIGINS")
    ]


def test_refused_origins_are_logged_cut_quoted_and_rarely() -> None:
    now = 0.0
    refused = RefusedOrigins(lambda: now)
    with capture_logs() as lines:
        for n in range(1000):
            refused.note(f"https://{n}.example")
            refused.note("https://a\n\x1b[31m" + "x" * 5000)
        assert len(lines) == MOST
        assert all(len(line["origin"]) < 130 and line["origin"].isprintable() for line in lines)
        now = WINDOW
        refused.note("https://a\n\x1b[31m" + "x" * 5000)
        assert lines[-1]["times"] == 1000
        refused.note("https://0.example")
        assert lines[-1]["times"] == 1
