"""How a session ends when the upstream refuses, breaks, stalls or talks nonsense: one `error`, paid for once."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.broker import KEY, Broker, running
from tests.events import Event
from tests.scripted import NOTHING, Call, Reply, ScriptedUpstream, chunk

AT_ONCE = {"Retry-After": "0"}


def refuse(status: int, error: object = None, headers: Any = NOTHING) -> Reply:
    """A reply of OpenRouter's shape."""
    body = {
        "error": error if error is not None else {"code": status, "message": f"Secret words about {KEY}."}
    }
    return lambda call: call.reply(status, body, headers)


def plain(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.done()


def streaming(*events: object) -> Reply:
    """A stream of chunks or raw data that ends cleanly, without a word of its end."""

    def reply(call: Call) -> None:
        call.open()
        for event in events:
            call.event(event if isinstance(event, bytes) else json.dumps(event).encode())
        call.end()

    return reply


def body_of(kind: str, text: str) -> Reply:
    """Status 200 and a body that is no event stream."""

    def reply(call: Call) -> None:
        call.open(kind)
        call.send(text.encode())
        call.end()

    return reply


async def outcome(broker: Broker, *, chunks: int = 0) -> dict[str, Any]:
    """The data of the `error` that ends a new session after so many chunks."""
    events = await broker.read(await broker.prepare())
    assert [event.kind for event in events] == ["chunk"] * chunks + ["error"]
    assert [event.id for event in events] == [*(f"1-{n + 1}" for n in range(chunks)), f"1-{chunks + 1}.end"]
    error: dict[str, Any] = events[-1].json
    assert error["final"] is True
    assert error["message"]
    assert KEY not in events[-1].data
    return error


def told(error: dict[str, Any], *names: str) -> list[Any]:
    return [error.get(name) for name in names]


@asynccontextmanager
async def dripping(drip: Callable[[], None]) -> AsyncIterator[None]:
    """Send something again and again, faster than any timer of these tests."""

    async def run() -> None:
        while True:
            drip()
            await asyncio.sleep(0.03)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


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
async def test_a_refusal_is_told_and_not_tried_again(
    broker: Broker, upstream: ScriptedUpstream, status: int, error: Any, code: str, retryable: bool
) -> None:
    upstream.replies = [refuse(status, error, AT_ONCE)]
    data = await outcome(broker)
    assert told(data, "code", "retryable", "upstreamStatus") == [code, retryable, status]
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("status", [401, 402, 500, 504])
async def test_what_the_upstream_says_of_itself_is_not_passed_on(
    broker: Broker, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.replies = [refuse(status)]
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
async def test_a_rejection_is_told_in_the_upstreams_words_cut_and_without_secrets(
    broker: Broker, upstream: ScriptedUpstream, body: Any
) -> None:
    upstream.replies = [lambda call: call.reply(400, body)]
    message = (await outcome(broker))["message"]
    assert message.startswith("No … model. xxx")
    assert len(message) == 300


async def test_a_rejection_that_is_a_page_is_told_in_our_words(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [lambda call: call.reply(404, "<html>nginx</html>")]
    data = await outcome(broker)
    assert data["code"] == "upstream_rejected"
    assert "nginx" not in data["message"]


async def test_a_rejection_with_half_a_character_is_told(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: call.reply(400, {"error": {"message": "cut \ud83d"}})]
    assert (await outcome(broker))["message"] == "cut ?"


async def test_a_redirect_is_not_followed(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: call.reply(307, {}, {"Location": upstream.url + "/chat/completions"})]
    assert (await outcome(broker))["upstreamStatus"] == 307
    assert len(upstream.calls) == 1


async def test_a_refusal_of_endless_words_is_cut_off(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as line:
        call = await upstream.call()
        call.head(400, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
        block = b'{"error": {"message": "' + b"x" * 65536
        async with dripping(lambda: call.write(b"%x\r\n%b\r\n" % (len(block), block))):
            [event] = await line.rest()
            await call.wait_gone()
    assert event.json["code"] == "upstream_rejected"


# Tried again


@pytest.mark.parametrize("status", [429, 502, 503, 529])
async def test_what_did_not_generate_is_asked_again(
    broker: Broker, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.replies = [refuse(status, headers=AT_ONCE), refuse(status, headers=AT_ONCE), plain]
    events = await broker.read(await broker.prepare())
    assert [event.kind for event in events] == ["chunk", "done"]
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
    assert told(data, "code", "retryable", "upstreamStatus") == [code, True, status]
    assert len(upstream.calls) == 1 + retries


async def test_a_told_wait_is_kept(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [refuse(503, headers={"Retry-After": "1"}), plain]
    loop = asyncio.get_running_loop()
    async with broker.stream(await broker.prepare()) as line:
        await upstream.call(1)
        first = loop.time()
        await upstream.call(2)
        assert 0.9 < loop.time() - first < 2
        assert (await line.rest())[-1].kind == "done"


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
    assert told(data, "code", "retryAfter", "retryable") == ["upstream_rate_limited", 40, True]
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
    assert told(data, "code", "retryable", "upstreamStatus") == ["upstream_unavailable", True, None]


async def test_a_stream_opens_with_a_comment_for_each_try(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [refuse(502, headers=AT_ONCE), plain]
    events = await broker.read(await broker.prepare())
    assert [event.id for event in events] == ["1-1", "1-2.end"]


# The line breaks


@pytest.mark.parametrize("breaking", [Call.reset, Call.close])
async def test_a_line_that_breaks_before_the_answer_is_not_tried_again(
    broker: Broker, upstream: ScriptedUpstream, breaking: Reply
) -> None:
    upstream.replies = [breaking]
    data = await outcome(broker)
    assert told(data, "code", "retryable") == ["upstream_interrupted", True]
    assert len(upstream.calls) == 1


def after_a_chunk(*then: Reply) -> Reply:
    def reply(call: Call) -> None:
        call.open()
        call.chunk("Hello")
        for step in then:
            step(call)

    return reply


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
    assert told(await outcome(broker, chunks=1), "code", "retryable") == ["upstream_interrupted", True]
    assert len(upstream.calls) == 1


async def test_an_answer_that_is_reset_is_interrupted(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with broker.stream(await broker.prepare()) as line:
        call = (await upstream.call()).open()
        call.chunk("Hello")
        await line.take(1)
        call.reset()
        [event] = await line.rest()
    assert event.json["code"] == "upstream_interrupted"
    assert len(upstream.calls) == 1


async def test_an_empty_answer_is_interrupted(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [streaming()]
    assert (await outcome(broker))["code"] == "upstream_interrupted"


async def test_a_body_that_ends_with_the_line_ends_well(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.head(200, {"Content-Type": "text/event-stream", "Connection": "close"})
        call.chunk("Hello")
        call.event(b"[DONE]")
        call.close()

    upstream.replies = [reply]
    assert [event.kind for event in await broker.read(await broker.prepare())] == ["chunk", "done"]


async def test_done_alone_is_an_end(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [after_a_chunk(lambda call: call.event(b"[DONE]"))]  # and the line stays open
    events = await broker.read(await broker.prepare())
    assert [event.kind for event in events] == ["chunk", "done"]


@pytest.mark.parametrize("then", [Call.end, Call.close])
async def test_a_reason_alone_is_an_end(broker: Broker, upstream: ScriptedUpstream, then: Reply) -> None:
    upstream.replies = [after_a_chunk(lambda call: call.chunk("", finish="length"), then)]
    events = await broker.read(await broker.prepare())
    assert events[-1].json["finishReason"] == "length"


async def test_a_reset_after_the_reason_is_an_end(broker: Broker, upstream: ScriptedUpstream) -> None:
    async with broker.stream(await broker.prepare()) as line:
        call = (await upstream.call()).open()
        call.chunk("Hello", finish="stop")
        await line.take(1)
        call.reset()
        [event] = await line.rest()
    assert (event.kind, event.json["finishReason"]) == ("done", "stop")


async def test_five_seconds_of_silence_after_the_reason_are_an_end(
    valkey_url: str, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Comments are silence, and the other timers are shorter.
    monkeypatch.setattr("tests.events.PATIENCE", 8.0)
    async with running(valkey_url, upstream, idle_timeout=0.5, first_data_timeout=0.5) as broker:
        async with broker.stream(await broker.prepare()) as line:
            call = (await upstream.call()).open()
            call.chunk("Hello", finish="stop")
            await line.take(1)
            said = asyncio.get_running_loop().time()
            async with dripping(call.comment):
                [event] = await line.rest()
            assert 4.9 < asyncio.get_running_loop().time() - said < 6
            assert event.kind == "done"
            await call.wait_gone()


# Errors inside an answer


@pytest.mark.parametrize(
    ("event", "code", "status"),
    [
        (chunk(finish="error", error={"code": 429, "message": "x"}), "upstream_rate_limited", 429),
        (chunk(finish="error", error={"code": "server_error", "message": "x"}), "upstream_error", None),
        (chunk(error={"code": 502, "message": "x"}), "upstream_error", 502),
        ({"error": {"code": 402, "message": "x"}}, "upstream_payment_required", 402),
        ({"error": {"code": 403, "message": "x", "metadata": {"reasons": ["a"]}}}, "upstream_moderated", 403),
        ({"error": {"message": "x"}}, "upstream_error", None),
        ({"error": "x"}, "upstream_error", None),
        ({"object": "error", "message": "x", "code": 500}, "upstream_error", 500),
        (chunk(finish="error"), "upstream_error", None),
        (
            {"error": {"message": "x", "error_type": "rate_limit_exceeded", "http_status": 429}},
            "upstream_rate_limited",
            429,
        ),
        (b'{"error": {"message": "cut \\ud83d"}}', "upstream_error", None),
        (b"<html>", "upstream_invalid", None),
        (b"[]", "upstream_invalid", None),
        (b"{", "upstream_invalid", None),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
async def test_an_error_in_the_stream_ends_the_session(
    broker: Broker, upstream: ScriptedUpstream, event: Any, code: str, status: int | None, before: int
) -> None:
    upstream.replies = [streaming(*[chunk("Hello")] * before, event, chunk("never seen"), b"[DONE]")]
    assert told(await outcome(broker, chunks=before), "code", "upstreamStatus") == [code, status]
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    ("kind", "text", "code", "status"),
    [
        ("application/json", '{"error": {"code": 429, "message": "x"}}', "upstream_rate_limited", 429),
        ("application/json", '{"error": {"code": 402, "message": "x"}}', "upstream_payment_required", 402),
        ("application/json", '{"error": {"code": 503, "message": "x"}}', "upstream_error", 503),
        ("application/json", '{"error": {"message": "cut \\ud83d"}}', "upstream_error", None),
        ("application/json", '{"object": "error", "message": "x"}', "upstream_error", None),
        (
            "application/json",
            '{"choices": [{"finish_reason": "error", "message": {}}]}',
            "upstream_error",
            None,
        ),
        (
            "application/json",
            '{"choices": [{"error": {"code": 502, "message": "x"}}]}',
            "upstream_error",
            502,
        ),
        ("application/json", '{"choices": [{"message": {"content": "whole"}}]}', "upstream_invalid", None),
        ("application/json", "[]", "upstream_invalid", None),
        ("application/json", '"text"', "upstream_invalid", None),
        ("application/json", "null", "upstream_invalid", None),
        ("application/json", "{", "upstream_invalid", None),
        ("application/json", "", "upstream_invalid", None),
        ("application/json", "x" * 200_000, "upstream_invalid", None),
        ("text/html", "<html>nginx</html>", "upstream_invalid", None),
        ("text/plain", "data: {}\n\n", "upstream_invalid", None),
    ],
)
async def test_an_answer_that_is_no_stream_ends_the_session(
    broker: Broker, upstream: ScriptedUpstream, kind: str, text: str, code: str, status: int | None
) -> None:
    upstream.replies = [body_of(kind, text)]
    data = await outcome(broker)
    assert told(data, "code", "upstreamStatus") == [code, status]
    assert "nginx" not in data["message"]
    assert len(upstream.calls) == 1


async def test_an_error_after_the_reason_is_still_one(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [streaming(chunk("Hello", finish="stop"), {"error": {"code": 500, "message": "x"}})]
    assert (await outcome(broker, chunks=1))["code"] == "upstream_error"


# Timers


async def test_an_upstream_that_never_answers_runs_into_the_first_timer(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, first_data_timeout=0.3) as broker:
        data = await outcome(broker)
        await (await upstream.call()).wait_gone()
    assert told(data, "code", "retryable", "upstreamStatus") == ["upstream_timeout", True, None]
    assert len(upstream.calls) == 1


async def ends_by_timer(broker: Broker, upstream: ScriptedUpstream, begin: Reply, drip: Reply) -> Event:
    """The end of a session whose upstream drips after its beginning, and whose line is then closed."""
    async with broker.stream(await broker.prepare()) as line:
        call = await upstream.call()
        begin(call)
        async with dripping(lambda: drip(call)):
            event = (await line.rest())[-1]
            await call.wait_gone()
    assert len(upstream.calls) == 1
    return event


async def test_comments_are_no_first_data(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, first_data_timeout=0.4) as broker:
        event = await ends_by_timer(broker, upstream, lambda call: (call.open(), None)[1], Call.comment)
    assert event.json["code"] == "upstream_timeout"


async def test_comments_are_no_data_between_data(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, idle_timeout=0.4) as broker:
        event = await ends_by_timer(broker, upstream, after_a_chunk(), Call.comment)
    assert event.json["code"] == "upstream_timeout"


async def test_half_an_event_is_no_data(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, idle_timeout=0.4) as broker:
        event = await ends_by_timer(broker, upstream, after_a_chunk(), lambda call: call.send(b"data: {"))
    assert event.json["code"] == "upstream_timeout"


async def test_data_that_keeps_coming_ends_at_the_deadline(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(
        valkey_url, upstream, deadline=0.6, idle_timeout=0.4, first_data_timeout=0.4
    ) as broker:
        event = await ends_by_timer(broker, upstream, after_a_chunk(), lambda call: call.chunk("x"))
    assert told(event.json, "code", "retryable") == ["deadline_exceeded", True]


async def test_each_try_has_its_own_time_for_the_first_data(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [refuse(503, headers={"Retry-After": "1"}), plain]
    async with running(valkey_url, upstream, first_data_timeout=0.5) as broker:
        assert (await broker.read(await broker.prepare()))[-1].kind == "done"


async def test_the_deadline_counts_the_waits_between_tries(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [refuse(503, headers={"Retry-After": "10"})]
    async with running(valkey_url, upstream, deadline=0.4) as broker:
        assert (await outcome(broker))["code"] == "deadline_exceeded"


# Sizes


async def test_an_answer_over_the_limit_is_cut_off(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_response=5000) as broker:
        async with broker.stream(await broker.prepare()) as line:
            call = (await upstream.call()).open()
            async with dripping(lambda: call.chunk("x" * 500)):
                events = await line.rest()
                await call.wait_gone()
    assert len(events) > 4
    assert sum(len(event.data) for event in events[:-1]) <= 5000
    assert told(events[-1].json, "code", "retryable") == ["response_too_large", False]


@pytest.mark.parametrize("piece", [b"x" * 20_000, b"data: x\n" * 1000])
async def test_one_event_without_an_end_is_cut_off(
    valkey_url: str, upstream: ScriptedUpstream, piece: bytes
) -> None:
    async with running(valkey_url, upstream, max_response=5000) as broker:
        async with broker.stream(await broker.prepare()) as line:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            await line.take(1)
            async with dripping(lambda: call.send(piece)):
                [event] = await line.rest()
                await call.wait_gone()
    assert event.json["code"] == "response_too_large"


async def test_a_large_event_within_the_limit_is_relayed_whole(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [streaming(chunk("x" * 3_000_000), b"[DONE]")]
    events = await broker.read(await broker.prepare())
    assert events[0].json == chunk("x" * 3_000_000)
    assert events[1].kind == "done"
