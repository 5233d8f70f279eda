"""Connections byte by byte: invalid requests, requests that are too long, and when the server hangs up."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import pytest

from broker.web import keys
from broker.web.server import MAX_LINE
from tests.broker import QUESTION
from tests.scripted import PATIENCE, chunk

if TYPE_CHECKING:
    from tests.broker import Broker
    from tests.scripted import Call, ScriptedUpstream

SECRET = "sk-or-v1-somebody-elses"


class Reply(NamedTuple):
    """Everything that came until the server hung up."""

    status: int
    headers: dict[str, str]
    body: bytes


async def sent(broker: Broker, data: bytes) -> Reply:
    """Send bytes, and read until the server closes the connection."""
    address = urlsplit(broker.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(data)
        async with asyncio.timeout(PATIENCE):
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Reply(int(first.split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}, body)


def get(path: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: localhost", *headers, "", ""]).encode()


@pytest.mark.parametrize(
    "rubbish",
    [
        f"\x00\x01{SECRET}\r\n\r\n".encode(),
        f"{SECRET}\r\n\r\n".encode(),
        get("/models", f"Authorization: Bearer {SECRET}\x00"),
        get("/models", f"{SECRET} : x"),
        get("/models", "Host: other", f"X: {SECRET}"),
        get("/models", "Content-Length: 1", "Transfer-Encoding: chunked"),
        get("/models", version="9.9"),
    ],
)
async def test_invalid_http_gets_an_error_that_quotes_nothing(broker: Broker, rubbish: bytes) -> None:
    reply = await sent(broker, rubbish)
    assert reply.status == 400
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["x-request-id"]
    assert reply.headers["vary"] == "Origin"
    error = json.loads(reply.body)["error"]
    assert error == {"code": "invalid_request", "message": "This is not a valid HTTP request."}


async def test_a_header_may_be_long_and_not_without_bound(broker: Broker) -> None:
    cookies = f"Cookie: {'c' * (MAX_LINE - 1000)}"
    reply = await sent(broker, get("/health/live", cookies, "Connection: close"))
    assert reply.status == 200
    reply = await sent(broker, get("/health/live", cookies + cookies, "Connection: close"))
    assert reply.status == 400
    assert str(MAX_LINE) in json.loads(reply.body)["error"]["message"]


@pytest.mark.parametrize("expected", ["miracles", "100-continue, miracles", "100-continue=x"])
@pytest.mark.parametrize("path", ["/health/live", "/prepare", "/nowhere"])
async def test_an_unsupported_expectation_gets_an_error(broker: Broker, path: str, expected: str) -> None:
    page = "Origin: http://localhost:8080"
    reply = await sent(broker, get(path, f"Expect: {expected}", page, "Connection: close"))
    assert reply.status == 417
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["x-request-id"]
    assert reply.headers["access-control-allow-origin"] == "http://localhost:8080"
    error = json.loads(reply.body)["error"]
    assert error["code"] == "invalid_request"
    assert "Expect" in error["message"]


async def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(broker: Broker) -> None:
    body = json.dumps(QUESTION).encode()
    head = "POST /prepare HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    asks = f"{head}Expect: 100-Continue\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    reply = await sent(broker, asks.encode() + body)
    assert reply.status == 100
    assert reply.body.startswith(b"HTTP/1.1 201 ")


async def test_a_compressed_body_is_refused_unread(broker: Broker) -> None:
    for _ in range(2):
        answer = await broker.post(b"not gzip at all", {"Content-Encoding": "gzip"})
        assert (answer.status, answer.code) == (415, "unsupported_media_type")


def whole(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.done()


@pytest.mark.parametrize(
    "asked", [("1.0", "Connection: keep-alive"), ("1.0", "X: y"), ("1.1", "Connection: close")]
)
async def test_a_stream_without_chunks_ends_with_its_connection(
    broker: Broker, upstream: ScriptedUpstream, asked: tuple[str, str]
) -> None:
    upstream.replies = [whole]
    version, header = asked
    session = await broker.prepare()
    reply = await sent(
        broker, get(f"/stream/{session}", "Accept: text/event-stream", header, version=version)
    )
    assert reply.status == 200
    assert b"event: done" in reply.body
    assert reply.headers.get("connection", "close") == "close"
    assert json.dumps(chunk("Hello")["choices"][0]["delta"]).encode() in reply.body


async def test_a_connection_is_reused_for_the_next_request(broker: Broker) -> None:
    answers = await sent(broker, get("/health/live") + get("/health/live", "Connection: close"))
    assert answers.status == 200
    assert "connection" not in answers.headers
    assert answers.body.count(b'{"status":"ok"}') == 2


async def test_a_worker_that_drains_says_that_it_hangs_up(broker: Broker) -> None:
    await broker.app[keys.WORKER].drain(0)
    body = json.dumps(QUESTION).encode()
    asked = b"POST /prepare HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for request in (
        asked + b"Content-Length: %d\r\n\r\n%b" % (len(body), body),
        get("/health/live"),
        get("/stream/nonsense", "Accept: text/event-stream"),
    ):
        assert (await sent(broker, request)).headers["connection"] == "close"
