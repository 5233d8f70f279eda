"""No log has our key, a prompt, an answer or a whole session id, whatever happens."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator
from uuid import UUID

import pytest
import structlog

from broker.logs import configure_logs
from tests.broker import KEY, QUESTION, Broker
from tests.scripted import Call, Reply, ScriptedUpstream, chunk
from tests.system.harness import ValkeyProcess

PROMPT = "Quetzalcoatl"
ANSWER = "Huitzilopochtli"
ASKED = {**QUESTION, "messages": [{"role": "user", "content": f"Who is {PROMPT}?"}], "user": "Moctezuma"}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, down to the last detail."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    configure_logs(
        "debug", "json", secrets=[], out=out
    )  # without cleaning, to see that lines are clean before
    yield out
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def good(call: Call) -> None:
    call.open()
    call.chunk(ANSWER, finish="stop")
    call.done()


def refusing(call: Call) -> None:
    call.reply(400, {"error": {"message": f"{PROMPT} with {KEY} is {ANSWER}"}})


def failing(call: Call) -> None:
    call.open()
    call.chunk(ANSWER)
    call.event(b'{"error": {"code": 500, "message": "%b"}}' % ANSWER.encode())


def nonsense(call: Call) -> None:
    call.open()
    call.chunk(ANSWER)
    call.event(f"<html>{ANSWER} {PROMPT}".encode())


def a_page(call: Call) -> None:
    call.reply(200, f"<html>{ANSWER} {KEY}</html>")


def breaking(call: Call) -> None:
    call.open()
    call.chunk(ANSWER)
    call.close()


def busy(call: Call) -> None:
    call.reply(503, {"error": {"message": f"{PROMPT} {ANSWER} {KEY}"}}, {"Retry-After": "0"})


def odd(call: Call) -> None:
    call.open()
    call.event(b'{"half": "%b \\ud83d"}' % ANSWER.encode())
    call.event(str(chunk(ANSWER)).encode())


def check(log: io.StringIO, *sessions: str) -> None:
    text = log.getvalue()
    assert text.count("\n") > 0
    for secret in (KEY, PROMPT, ANSWER, "Moctezuma", *sessions, *(UUID(session).hex for session in sessions)):
        assert secret not in text
    for session in sessions:
        assert session[:8] in text
        assert session[:10] not in text


@pytest.mark.parametrize("reply", [good, refusing, failing, nonsense, a_page, breaking, busy, odd])
async def test_no_secret_appears_whatever_the_upstream_does(
    broker: Broker, upstream: ScriptedUpstream, log: io.StringIO, reply: Reply
) -> None:
    upstream.replies = [reply]
    answer = await broker.post(ASKED, {"Idempotency-Key": PROMPT})
    session = answer.json["sessionId"]
    await broker.read(session)
    await broker.cancel(session)
    await broker.ask("POST", f"/stream/{session}/cancel?secret={PROMPT}")
    await broker.ask("GET", f"/stream/{session}/{session}")
    check(log, session)


async def test_no_secret_appears_whatever_a_page_sends(broker: Broker, log: io.StringIO) -> None:
    for body in (b"{" + PROMPT.encode(), {**ASKED, PROMPT: 1}, {**ASKED, "temperature": PROMPT}, [PROMPT]):
        await broker.post(body)
    await broker.post(ASKED, {"Content-Type": "text/plain"})
    await broker.post(ASKED, {"Content-Encoding": "gzip"})
    await broker.post(ASKED, {"Origin": "https://evil.example"})
    check(log)


async def test_no_secret_appears_for_invalid_http(broker: Broker, log: io.StringIO) -> None:
    host, port = broker.url.removeprefix("http://").split(":")
    head = f"Host: {host}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    for request in (
        f"{PROMPT}\r\n\r\n",
        f"GET /{PROMPT * 1000} HTTP/1.1\r\n\r\n",
        f"GET / HTTP/1.1\r\nAuthorization: Bearer {KEY}\0\r\n\r\n",
        f"POST /prepare HTTP/1.1\r\n{head}\r\n{PROMPT}\r\n",
        f"POST /prepare HTTP/1.1\r\n{head}\r\n5\r\n[1234{PROMPT}\r\n",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request.encode())
        writer.write_eof()
        answer = await reader.read()
        assert not answer or b" 400 " in answer.partition(b"\r\n")[0]
        writer.close()
        await writer.wait_closed()
    await broker.ask("GET", "/health/live")
    check(log)


async def test_no_secret_appears_whatever_redis_does(
    log: io.StringIO, exposed_broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    broker = exposed_broker
    session = (await broker.post(ASKED)).json["sessionId"]
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk(ANSWER)
        await connection.take(1)
        valkey.kill()
        await broker.post(ASKED)
        call.chunk(ANSWER, finish="stop")
        call.done()
        await connection.rest()
    await valkey.start()
    check(log, session)
