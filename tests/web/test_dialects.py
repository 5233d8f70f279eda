"""Answers in the shapes of other services than OpenRouter, and of OpenRouter's own providers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.broker import Broker, running
from tests.events import Event
from tests.replies import body_of, dripping, streaming
from tests.scripted import Call, ScriptedUpstream, chunk
from tests.web.outcomes import outcome

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "cost": 0.25}
THOUGHT = {"index": 0, "delta": {"reasoning": "hm"}, "finish_reason": "stop"}
TEXT = json.dumps(chunk("Hello"))
STOP = json.dumps(chunk(finish="stop"))
BILL = json.dumps(chunk(choices=[], usage=USAGE))


def lines(*data: str) -> str:
    return "".join(f"data: {item}\n\n" for item in data)


GOOD = lines(TEXT, STOP, BILL, "[DONE]")


async def ended_well(broker: Broker) -> tuple[list[Event], dict[str, Any]]:
    """The chunks and the end of a new session that ends in `done`."""
    events = await broker.read(await broker.prepare())
    assert [event.kind for event in events[:-1]] == ["chunk"] * (len(events) - 1)
    assert events[-1].kind == "done", events[-1].data
    done: dict[str, Any] = events[-1].json
    return events[:-1], done


@pytest.mark.parametrize(
    "body",
    [
        GOOD,
        lines(TEXT, "null", STOP, BILL, "[DONE]"),
        lines(TEXT, "", STOP, BILL, "", "[DONE]"),
        lines(TEXT, STOP, BILL, "null", '"[DONE]"'),
        lines(TEXT, STOP, BILL, '{"broken'),
        lines(TEXT, STOP, '{"broken', BILL, "[DONE]"),
        lines(TEXT, STOP, BILL, "<html>502</html>"),
        lines(TEXT, STOP, BILL) + "data: [DONE]",
        lines(TEXT, STOP, BILL) + "data: [DONE]\n",
        lines(TEXT, STOP) + "data: " + BILL,
        lines(TEXT, STOP, BILL) + 'data: {"choices": [{"del',
        "event: ping\n\n" + lines(TEXT, STOP, BILL, "[DONE]"),
        lines(TEXT, STOP, json.dumps({"x_groq": {"id": "req_1", "usage": USAGE}}), "[DONE]"),
        lines(
            TEXT, STOP, json.dumps({"error": {"code": 502, "message": "Token limit reached"}, "usage": USAGE})
        ),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        "\ufeff" + GOOD,
    ],
)
async def test_an_answer_is_whole(broker: Broker, upstream: ScriptedUpstream, body: str) -> None:
    upstream.replies = [body_of("text/event-stream", body)]
    chunks, done = await ended_well(broker)
    assert chunks[0].data == TEXT
    assert (done["finishReason"], done["usage"], done["cost"], done["estimated"]) == (
        "stop",
        USAGE,
        0.25,
        False,
    )


@pytest.mark.parametrize("last", [STOP, BILL, "[DONE]"])
async def test_a_body_may_end_without_a_blank_line(
    broker: Broker, upstream: ScriptedUpstream, last: str
) -> None:
    before = [TEXT, STOP, BILL, "[DONE]"]
    before = before[: before.index(last)]
    upstream.replies = [body_of("text/event-stream", lines(*before) + f"data: {last}")]
    _, done = await ended_well(broker)
    assert done["finishReason"] == "stop"


async def test_half_an_event_at_the_end_is_not_a_finish(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [body_of("text/event-stream", lines(TEXT) + "data: " + STOP[:-5])]
    assert (await outcome(broker, chunks=1))["code"] == "upstream_interrupted"


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json"},
        {"Content-Type": "text/event-stream, application/json"},
        {"Content-Type": ""},
        {"content-type": "Text/Event-Stream;charset=UTF-8"},
    ],
)
@pytest.mark.parametrize("lead", ["", ": hello\n\n", "\n\n", "retry: 100\n", "id: 7\n", "x: y\n"])
async def test_an_odd_content_type_hides_no_stream(
    broker: Broker, upstream: ScriptedUpstream, head: dict[str, str], lead: str
) -> None:
    def reply(call: Call) -> None:
        call.head(200, {**head, "Connection": "close"})
        for byte in (lead + GOOD).encode():
            call.write(bytes([byte]))
        call.close()

    upstream.replies = [reply]
    chunks, done = await ended_well(broker)
    assert len(chunks) == 3
    assert done["usage"] == USAGE


@pytest.mark.parametrize(
    "kind", ["application/json", "text/event-stream", "text/plain", "application/json; charset=x"]
)
async def test_a_json_completion_is_relayed_and_booked(
    broker: Broker, upstream: ScriptedUpstream, kind: str
) -> None:
    message = {"role": "assistant", "content": "Hello", "reasoning": "hm"}
    completion = {
        "usage": USAGE | {"completion_tokens": 1500, "cost": 0.5},
        "choices": [
            {"message": message, "finish_reason": "length", "native_finish_reason": "max", "index": 0}
        ],
        "object": "chat.completion",
        "model": "some/model",
        "id": "gen-1",
    }
    upstream.replies = [body_of(kind, json.dumps(completion, indent=2))]
    chunks, done = await ended_well(broker)
    assert [event.json["choices"] for event in chunks] == [
        [{"finish_reason": "length", "native_finish_reason": "max", "index": 0, "delta": message}]
    ]
    assert (done["finishReason"], done["nativeFinishReason"], done["model"]) == (
        "length",
        "max",
        "some/model",
    )
    assert (done["usage"], done["cost"], done["estimated"]) == (completion["usage"], 0.5, False)
    assert len(upstream.calls) == 1


async def test_a_large_completion_is_read_whole(broker: Broker, upstream: ScriptedUpstream) -> None:
    text = "x" * 300_000
    upstream.replies = [
        body_of("application/json", json.dumps({"choices": [{"message": {"content": text}}], "usage": USAGE}))
    ]
    chunks, done = await ended_well(broker)
    assert chunks[0].json["choices"][0]["delta"]["content"] == text
    assert done["usage"] == USAGE


@pytest.mark.parametrize(
    ("end", "kind"), [(Call.reset, "error"), (Call.close, "error"), (Call.end, "done"), (Call.done, "done")]
)
async def test_content_takes_a_finish_reason_back(
    broker: Broker, upstream: ScriptedUpstream, end: Callable[[Call], None], kind: str
) -> None:
    async with broker.stream(await broker.prepare()) as connection:
        call = (await upstream.call()).open()
        call.event(json.dumps(chunk(choices=[THOUGHT])).encode())
        call.chunk("Hello")
        await connection.take(2)
        end(call)
        (event,) = await connection.rest()
    assert event.kind == kind
    assert event.json.get("code") == ("upstream_interrupted" if kind == "error" else None)


async def test_a_stopped_answer_may_go_on_after_a_pause(
    broker: Broker, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.relay.upstream_reader.QUIET_END", 1.5)
    async with broker.stream(await broker.prepare()) as connection:
        call = (await upstream.call()).open()
        call.chunk("a", finish="stop")
        await connection.take(1)
        async with dripping(call.comment):
            call.chunk("b")
            call.chunk(finish="stop")
            call.usage(cost=0.5)
            events = await connection.rest()  # comments are not data: it ends all the same
    assert [event.kind for event in events] == ["chunk", "chunk", "chunk", "done"]
    assert events[-1].json["cost"] == 0.5


@pytest.mark.parametrize(
    "drip", [b"data:\n\n", b"data: \n\n", b"data: null\n\n", b": x\n\n", b"event: ping\n\n"]
)
async def test_empty_events_are_not_data(valkey_url: str, upstream: ScriptedUpstream, drip: bytes) -> None:
    async with (
        running(valkey_url, upstream, idle_timeout=0.4) as broker,
        broker.stream(await broker.prepare()) as connection,
    ):
        call = (await upstream.call()).open()
        call.chunk("Hello")
        async with dripping(lambda: call.send(drip)):
            events = await connection.rest()
    assert events[-1].json["code"] == "upstream_timeout"


@pytest.mark.parametrize(
    "event",
    [
        'error: {"code":500,"message":"context shift is disabled","type":"server_error"}\n\n',
        'error: {"message":"context shift is disabled"}',
        "error:context shift is disabled\n\n",
        'event: error\ndata: {"message":"context shift is disabled"}\n\n',
        'data: {"error":{"message":"context shift is disabled"}}\nevent: error\n\n',
        "event: error\ndata: context shift is disabled\n\n",
        lines('{"error_type":"x","error_message":"context shift is disabled"}'),
        lines('{"base_resp":{"status_msg":"context shift is disabled","status_code":2013}}'),
        lines('{"error":"context shift is disabled"}'),
        lines('{"object":"error","message":"context shift is disabled"}'),
        lines('{"detail":"no","error":{"message":{"detail":"context shift is disabled"}}}'),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
async def test_an_error_in_any_shape_ends_the_session_with_its_message(
    broker: Broker, upstream: ScriptedUpstream, event: str, ends: str
) -> None:
    upstream.replies = [body_of("text/event-stream", (lines(TEXT) + event).replace("\n", ends))]
    error = await outcome(broker, chunks=1)
    assert (error["code"], error["message"]) == ("upstream_error", "context shift is disabled")


@pytest.mark.parametrize(
    "fields",
    [
        {"error": None},
        {"error": {}},
        {"error": ""},
        {"error_message": ""},
        {"base_resp": {"status_code": 0, "status_msg": "success"}},
        {"base_resp": None},
    ],
)
async def test_an_empty_error_field_is_not_an_error(
    broker: Broker, upstream: ScriptedUpstream, fields: dict[str, Any]
) -> None:
    upstream.replies = [streaming(chunk("Hello", **fields), chunk(finish="stop", **fields))]
    assert len((await ended_well(broker))[0]) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 500, 502])
async def test_an_error_in_the_stream_that_will_come_again_says_so(
    broker: Broker, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.replies = [streaming(chunk("Hello"), {"error": {"code": status, "message": "x"}})]
    error = await outcome(broker, chunks=1)
    assert (error["code"], error["retryable"]) == ("upstream_error", status >= 500)


async def test_the_providers_own_reason_is_passed_on(broker: Broker, upstream: ScriptedUpstream) -> None:
    bad = {
        "index": 0,
        "delta": {},
        "finish_reason": "error",
        "native_finish_reason": "MALFORMED_FUNCTION_CALL",
    }
    shapes: list[dict[str, Any]] = [{}, {"error": {"code": 502, "message": "It broke."}}]
    for fields in shapes:
        upstream.replies = [streaming(chunk("Hello"), chunk(choices=[bad], **fields))]
        assert "MALFORMED_FUNCTION_CALL" in (await outcome(broker, chunks=1))["message"]
