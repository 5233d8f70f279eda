"""Ends of a session by errors inside the answer, by timers, and by size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.broker import Broker, running
from tests.replies import after_a_chunk, body_of, dripping, plain, refuse, streaming
from tests.scripted import Call, Reply, ScriptedUpstream, chunk
from tests.web.outcomes import fields_of, outcome

if TYPE_CHECKING:
    from tests.events import Event


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
    assert fields_of(await outcome(broker, chunks=before), "code", "upstreamStatus") == [code, status]
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
        ("application/json", '[{"error": {"code": 400, "message": "x"}}]', "upstream_error", 400),
        ("application/json", '{"choices": []}', "upstream_invalid", None),
        ("application/json", "[]", "upstream_invalid", None),
        ("application/json", '"text"', "upstream_invalid", None),
        ("application/json", "null", "upstream_invalid", None),
        ("application/json", "{", "upstream_invalid", None),
        ("application/json", "", "upstream_invalid", None),
        ("application/json", "x" * 200_000, "upstream_invalid", None),
        ("text/html", "<html>nginx</html>", "upstream_invalid", None),
        ("text/plain", "the data: {}\n\n", "upstream_invalid", None),
        ("text/plain", "x" * 5000 + "\ndata: {}\n\n", "upstream_invalid", None),
    ],
)
async def test_an_answer_that_is_not_a_stream_ends_the_session(
    broker: Broker, upstream: ScriptedUpstream, kind: str, text: str, code: str, status: int | None
) -> None:
    upstream.replies = [body_of(kind, text)]
    data = await outcome(broker)
    assert fields_of(data, "code", "upstreamStatus") == [code, status]
    assert "nginx" not in data["message"]
    assert len(upstream.calls) == 1


async def test_an_error_on_the_chunk_with_the_reason_is_one(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [streaming(chunk("Hello"), chunk(finish="stop", error={"code": 500, "message": "x"}))]
    assert (await outcome(broker, chunks=1))["code"] == "upstream_error"


# Timers


async def test_an_upstream_that_never_answers_times_out(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, first_data_timeout=0.3) as broker:
        data = await outcome(broker)
        await (await upstream.call()).wait_gone()
    assert fields_of(data, "code", "retryable", "upstreamStatus") == ["upstream_timeout", True, None]
    assert len(upstream.calls) == 1


async def ends_by_timer(broker: Broker, upstream: ScriptedUpstream, begin: Reply, drip: Reply) -> Event:
    """Return the end of a session whose upstream drips after its beginning, and then closes the connection."""
    async with broker.stream(await broker.prepare()) as connection:
        call = await upstream.call()
        begin(call)
        async with dripping(lambda: drip(call)):
            event = (await connection.rest())[-1]
            await call.wait_gone()
    assert len(upstream.calls) == 1
    return event


async def test_comments_are_not_the_first_data(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, first_data_timeout=0.4) as broker:
        event = await ends_by_timer(broker, upstream, lambda call: (call.open(), None)[1], Call.comment)
    assert event.json["code"] == "upstream_timeout"


async def test_comments_do_not_count_between_data(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, idle_timeout=0.4) as broker:
        event = await ends_by_timer(broker, upstream, after_a_chunk(), Call.comment)
    assert event.json["code"] == "upstream_timeout"


async def test_half_an_event_is_not_data(valkey_url: str, upstream: ScriptedUpstream) -> None:
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
    assert fields_of(event.json, "code", "retryable") == ["deadline_exceeded", True]


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
        async with broker.stream(await broker.prepare()) as connection:
            call = (await upstream.call()).open()
            async with dripping(lambda: call.chunk("x" * 500)):
                events = await connection.rest()
                await call.wait_gone()
    assert len(events) > 4
    assert sum(len(event.data) for event in events[:-1]) <= 5000
    assert fields_of(events[-1].json, "code", "retryable") == ["response_too_large", False]


@pytest.mark.parametrize("piece", [b"x" * 20_000, b"data: x\n" * 1000])
async def test_one_event_without_an_end_is_cut_off(
    valkey_url: str, upstream: ScriptedUpstream, piece: bytes
) -> None:
    async with running(valkey_url, upstream, max_response=5000) as broker:
        async with broker.stream(await broker.prepare()) as connection:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            await connection.take(1)
            async with dripping(lambda: call.send(piece)):
                [event] = await connection.rest()
                await call.wait_gone()
    assert event.json["code"] == "response_too_large"


async def test_a_large_event_within_the_limit_is_relayed_whole(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [streaming(chunk("x" * 3_000_000), b"[DONE]")]
    events = await broker.read(await broker.prepare())
    assert events[0].json == chunk("x" * 3_000_000)
    assert events[1].kind == "done"
