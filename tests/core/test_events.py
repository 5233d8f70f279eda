from __future__ import annotations

import json
from typing import Any

import pytest

from broker.core.chat_answer import ChatAnswer
from broker.core.errors import (
    BudgetExceeded,
    InvalidCursor,
    ReplayGap,
    ResponseTooLarge,
    SessionError,
    SessionNotFound,
    UpstreamRateLimited,
    UpstreamTimeout,
)
from broker.core.events import (
    cancelled_before_start,
    done_data,
    error_data,
    refusal_event,
    terminal_event,
)
from broker.core.session import Cursor, State, Terminal
from broker.core.sse import Decoder, Frame
from tests.chunks import events_of


def frames(data: bytes) -> list[Frame]:
    return Decoder(100_000).feed(data)


def told(answer: ChatAnswer, **changes: Any) -> Any:
    facts: dict[str, Any] = {
        "finish_reason": "stop",
        "model": "asked",
        "cost": 0.5,
        "estimated": False,
        "ttft_ms": 12,
        "total_ms": 34,
    }
    return json.loads(done_data(answer, **{**facts, **changes}))


def test_a_chunk_is_one_event_under_its_number() -> None:
    assert events_of([b'{"a": 1}'], 7) == b'id: 1-7\nevent: chunk\ndata: {"a": 1}\n\n'


@pytest.mark.parametrize(
    "data", [b"{}", b'{\n  "a": 1\n}', '{"a": "€ 😀 \u2028"}'.encode(), b'{"a": "\\ud83d"}']
)
def test_a_chunk_comes_out_byte_for_byte(data: bytes) -> None:
    assert frames(events_of([data], 1)) == [Frame("chunk", data, "1-1")]


def test_a_terminal_carries_its_own_id() -> None:
    end = Terminal(State.DONE, "done", Cursor(1, 5, end=True), b'{"x":1}')
    assert frames(terminal_event(end)) == [Frame("done", b'{"x":1}', "1-5.end")]


def test_a_refusal_ends_one_viewer_at_its_cursor() -> None:
    [frame] = frames(refusal_event(ReplayGap(), Cursor(1, 9)))
    assert (frame.event, frame.id) == ("error", "1-9.end")
    assert json.loads(frame.data)["final"] is True


def test_a_refusal_without_a_cursor_ends_at_the_first_event() -> None:
    [frame] = frames(refusal_event(SessionNotFound(), None))
    assert frame.id == "1-1.end"


def test_a_refusal_for_now_carries_no_id() -> None:
    event = refusal_event(BudgetExceeded(), Cursor(1, 4), final=False)
    assert b"id:" not in event
    assert json.loads(frames(event)[0].data)["final"] is False


@pytest.mark.parametrize(
    ("error", "data"),
    [
        (
            UpstreamTimeout(upstream_status=504),
            {"code": "upstream_timeout", "retryable": True, "upstreamStatus": 504},
        ),
        (
            UpstreamRateLimited(retry_after=40.0, upstream_status=429),
            {"code": "upstream_rate_limited", "retryable": True, "retryAfter": 40, "upstreamStatus": 429},
        ),
        (ResponseTooLarge(), {"code": "response_too_large", "retryable": False}),
        (InvalidCursor(), {"code": "invalid_cursor", "retryable": False}),
        (SessionError(retry_after=1.5), {"code": "internal_error", "retryable": True, "retryAfter": 1.5}),
    ],
)
def test_an_error_has_only_known_fields(error: SessionError, data: dict[str, Any]) -> None:
    assert json.loads(error_data(error)) == {"message": error.message, "final": True, **data}


def test_whole_seconds_are_written_as_an_integer() -> None:
    assert b'"retryAfter":40,' in error_data(UpstreamRateLimited(retry_after=40.0, upstream_status=429))


def test_done_has_all_facts_of_the_upstream() -> None:
    answer = ChatAnswer()
    answer.read(
        b'{"id":"gen-1","model":"m","provider":"P","choices":'
        b'[{"delta":{},"finish_reason":"stop","native_finish_reason":"end_turn"}],"usage":{"total_tokens":3}}'
    )
    assert told(answer) == {
        "finishReason": "stop",
        "nativeFinishReason": "end_turn",
        "model": "m",
        "provider": "P",
        "generationId": "gen-1",
        "usage": {"total_tokens": 3},
        "cost": 0.5,
        "estimated": False,
        "ttftMs": 12,
        "totalMs": 34,
    }


def test_unknown_facts_of_an_answer_are_null() -> None:
    assert told(ChatAnswer(), finish_reason=None, cost=None, ttft_ms=None) == {
        "finishReason": None,
        "nativeFinishReason": None,
        "model": "asked",
        "provider": None,
        "generationId": None,
        "usage": None,
        "cost": None,
        "estimated": False,
        "ttftMs": None,
        "totalMs": 34,
    }


@pytest.mark.parametrize(
    "fields",
    [
        b'"model": "half a smile \\ud83d", "provider": "\\ude00", "id": "\\ud83d"',
        b'"usage": {"cost": 1, "note": "\\ud83d"}, "x": "\\ud83d"',
        b'"usage": {"\\ud83d": 1}',
        b'"usage": {"prompt_tokens": 123456789012345678901234567890}, "x": "\\ud83d"',
        b'"choices": [{"delta": {}, "finish_reason": "\\ud83d", "native_finish_reason": "\\ud83d"}]',
    ],
)
def test_an_answer_with_odd_text_and_numbers_can_be_written(fields: bytes) -> None:
    answer = ChatAnswer()
    answer.read(b"{%b}" % fields)
    assert told(answer, finish_reason=answer.finish_reason)["totalMs"] == 34


def test_a_session_cancelled_before_it_began_cost_nothing() -> None:
    end = cancelled_before_start()
    assert (end.state, end.event, str(end.id)) == (State.CANCELLED, "done", "1-1.end")
    data = json.loads(end.data)
    assert (data["finishReason"], data["cost"], data["estimated"]) == ("cancelled", 0, False)
    assert set(data) == set(told(ChatAnswer()))
