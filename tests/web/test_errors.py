"""Ends of a session when the upstream refuses or the connection to it breaks: one `error`, paid once."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from tests.broker import KEY, Broker, running
from tests.replies import after_a_chunk, dripping, plain, refuse, streaming
from tests.scripted import NOTHING, Call, Reply, ScriptedUpstream
from tests.stopwatch import Stopwatch
from tests.web.outcomes import fields_of, outcome

AT_ONCE = {"Retry-After": "0"}


# Refused before the first byte


@pytest.mark.parametrize(
    ("status", "error", "code", "retryable"),
    [
        (401, None, "upstream_unauthorized", False),
        (402, None, "upstream_payment_required", False),
        (
            403,
            {"code": 403, "message": "x", "metadata": {"reasons": ["violence"]}},
            "upstream_moderated",
            False,
        ),
        (403, None, "upstream_rejected", False),
        (400, None, "upstream_rejected", False),
        (404, None, "upstream_rejected", False),
        (422, None, "upstream_rejected", False),
        (500, None, "upstream_unavailable", True),
        (501, None, "upstream_unavailable", True),
        (408, None, "upstream_timeout", True),
        (504, None, "upstream_timeout", True),
        (524, None, "upstream_timeout", True),
    ],
)
async def test_a_refusal_is_passed_on_and_not_retried(
    broker: Broker, upstream: ScriptedUpstream, status: int, error: Any, code: str, retryable: bool
) -> None:
    upstream.replies = [refuse(status, error, AT_ONCE, secret=KEY)]
    data = await outcome(broker)
    assert fields_of(data, "code", "retryable", "upstreamStatus") == [code, retryable, status]
    assert len(upstream.calls) == 1


async def test_messages_about_our_key_are_not_passed_on(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [refuse(401, secret=KEY)]
    assert "Secret words" not in (await outcome(broker))["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 400, "message": f"No {KEY} model. " + "x" * 1000}},
        {
            "error": {
                "message": f"No {KEY} model. " + "x" * 1000,
                "error_type": "not_found",
                "http_status": 400,
            }
        },
        {"error": f"No {KEY} model. " + "x" * 1000},
        {"object": "error", "message": f"No {KEY} model. " + "x" * 1000},
    ],
)
async def test_a_rejection_has_the_upstreams_message_cut_and_cleaned(
    broker: Broker, upstream: ScriptedUpstream, body: Any
) -> None:
    upstream.replies = [lambda call: call.reply(400, body)]
    message = (await outcome(broker))["message"]
    assert message.startswith("No … model. xxx")
    assert len(message) == 300


async def test_a_rejection_as_an_html_page_has_our_message(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [lambda call: call.reply(404, "<html>nginx</html>")]
    data = await outcome(broker)
    assert data["code"] == "upstream_rejected"
    assert "nginx" not in data["message"]


async def test_a_rejection_with_half_a_character_is_passed_on(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [lambda call: call.reply(400, {"error": {"message": "cut \ud83d"}})]
    assert (await outcome(broker))["message"] == "cut ?"


async def test_a_redirect_is_not_followed(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: call.reply(307, {}, {"Location": upstream.url + "/chat/completions"})]
    assert (await outcome(broker))["upstreamStatus"] == 307
    assert len(upstream.calls) == 1


async def test_an_endless_refusal_is_cut(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = await upstream.call()
        call.head(400, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
        block = b'{"error": {"message": "' + b"x" * 65536
        async with dripping(lambda: call.write(b"%x\r\n%b\r\n" % (len(block), block))):
            [event] = await connection.rest()
            await call.wait_gone()
    assert event.json["code"] == "upstream_rejected"


# Tried again


@pytest.mark.parametrize("status", [429, 502, 503, 529])
async def test_a_refusal_without_generation_is_retried(
    broker: Broker, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.replies = [refuse(status, headers=AT_ONCE), refuse(status, headers=AT_ONCE), plain]
    events = await broker.read(await broker.prepare())
    assert events[-1].kind == "done"
    assert [call.body for call in upstream.calls] == [upstream.calls[0].body] * 3


@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "upstream_rate_limited"), (502, "upstream_unavailable"), (529, "upstream_unavailable")],
)
@pytest.mark.parametrize("retries", [0, 1, 2])
async def test_it_is_asked_so_often_and_no_more(
    valkey_url: str, upstream: ScriptedUpstream, status: int, code: str, retries: int
) -> None:
    upstream.replies = [refuse(status, headers=AT_ONCE)]
    async with running(valkey_url, upstream, max_retries=retries) as broker:
        data = await outcome(broker)
    assert fields_of(data, "code", "retryable", "upstreamStatus") == [code, True, status]
    assert len(upstream.calls) == 1 + retries


async def test_a_given_wait_is_honoured(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [refuse(503, headers={"Retry-After": "1"}), plain]
    async with broker.stream(await broker.prepare()) as connection:
        await upstream.call(1)
        stopwatch = Stopwatch()
        await upstream.call(2)
        assert stopwatch.elapsed > 0.9
        assert stopwatch.seconds < 2
        assert (await connection.rest())[-1].kind == "done"


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"Retry-After": "40"}, None),
        (NOTHING, {"code": 429, "message": "x", "availability": {"retryable": True, "retry_after": 40}}),
    ],
)
async def test_a_long_wait_is_left_to_the_page(
    broker: Broker, upstream: ScriptedUpstream, headers: Any, error: Any
) -> None:
    upstream.replies = [refuse(429, error, headers)]
    data = await outcome(broker)
    assert fields_of(data, "code", "retryAfter", "retryable") == ["upstream_rate_limited", 40, True]
    assert len(upstream.calls) == 1


async def test_a_refused_connection_is_tried_again(valkey_url: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and nobody listens
        url = "http://{}:{}".format(*nobody.getsockname())
        loop = asyncio.get_running_loop()
        async with running(valkey_url, url, max_retries=2) as broker:
            started = loop.time()
            data = await outcome(broker)
            assert loop.time() - started > 0.3 + 0.7  # the two waits between three tries
    assert fields_of(data, "code", "retryable", "upstreamStatus") == ["upstream_unavailable", True, None]


async def test_a_retry_is_not_an_event(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [refuse(502, headers=AT_ONCE), plain]
    events = await broker.read(await broker.prepare())
    assert events[0].id == "1-1"


# The connection breaks


@pytest.mark.parametrize("breaking", [Call.reset, Call.close])
async def test_a_connection_broken_before_the_answer_is_not_retried(
    broker: Broker, upstream: ScriptedUpstream, breaking: Reply
) -> None:
    upstream.replies = [breaking]
    data = await outcome(broker)
    assert fields_of(data, "code", "retryable") == ["upstream_interrupted", True]
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    "reply",
    [
        after_a_chunk(Call.close),
        after_a_chunk(Call.end),
        after_a_chunk(Call.end, Call.close),
        after_a_chunk(lambda call: call.write(b"ffff\r\ndata: {"), Call.close),
    ],
)
async def test_an_answer_that_ends_without_a_finish_is_interrupted(
    broker: Broker, upstream: ScriptedUpstream, reply: Reply
) -> None:
    upstream.replies = [reply]
    assert fields_of(await outcome(broker, chunks=1), "code", "retryable") == ["upstream_interrupted", True]
    assert len(upstream.calls) == 1


async def test_an_answer_that_is_reset_is_interrupted(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with broker.stream(await broker.prepare()) as connection:
        call = (await upstream.call()).open()
        call.chunk("Hello")
        await connection.take(1)
        call.reset()
        [event] = await connection.rest()
    assert event.json["code"] == "upstream_interrupted"
    assert len(upstream.calls) == 1


async def test_an_empty_answer_is_interrupted(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [streaming()]
    assert (await outcome(broker))["code"] == "upstream_interrupted"


async def test_a_body_that_ends_with_the_connection_is_complete(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    def reply(call: Call) -> None:
        call.head(200, {"Content-Type": "text/event-stream", "Connection": "close"})
        call.chunk("Hello")
        call.event(b"[DONE]")
        call.close()

    upstream.replies = [reply]
    assert [event.kind for event in await broker.read(await broker.prepare())] == ["chunk", "done"]


async def test_done_alone_is_an_end(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [after_a_chunk(lambda call: call.event(b"[DONE]"))]  # and the connection stays open
    events = await broker.read(await broker.prepare())
    assert [event.kind for event in events] == ["chunk", "done"]


@pytest.mark.parametrize("then", [Call.end, Call.close])
async def test_a_reason_alone_is_an_end(broker: Broker, upstream: ScriptedUpstream, then: Reply) -> None:
    upstream.replies = [after_a_chunk(lambda call: call.chunk("", finish="length"), then)]
    events = await broker.read(await broker.prepare())
    assert events[-1].json["finishReason"] == "length"


async def test_a_reset_after_the_reason_is_an_end(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with broker.stream(await broker.prepare()) as connection:
        call = (await upstream.call()).open()
        call.chunk("Hello", finish="stop")
        await connection.take(1)
        call.reset()
        [event] = await connection.rest()
    assert (event.kind, event.json["finishReason"]) == ("done", "stop")


@pytest.mark.slow
async def test_ten_seconds_of_silence_after_the_finish_are_an_end(
    valkey_url: str, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Comments are silence, and the other timers are shorter.
    monkeypatch.setattr("tests.events.PATIENCE", 30.0)
    async with running(valkey_url, upstream, idle_timeout=0.5, first_data_timeout=0.5) as broker:
        async with broker.stream(await broker.prepare()) as connection:
            call = (await upstream.call()).open()
            call.chunk("Hello", finish="stop")
            await connection.take(1)
            said = asyncio.get_running_loop().time()
            async with dripping(call.comment):
                [event] = await connection.rest()
            assert asyncio.get_running_loop().time() - said > 9.9
            assert event.kind == "done"
            await call.wait_gone()
