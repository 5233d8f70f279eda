"""The decisions of `broker chat` on the events of a session, without a connection and a clock."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from broker.cli.pieces import Piece
from broker.cli.turn import MOST_BARREN_LINES, MOST_WAITS, End, Turn
from broker.core.sse import Frame


def chunk(delta: Any, event_id: str = "1-1") -> Frame:
    return Frame("chunk", orjson.dumps({"choices": [{"delta": delta}]}), event_id)


def done(**data: Any) -> Frame:
    whole = {"finishReason": "stop", "cost": 0.00123, "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
    return Frame("done", orjson.dumps({**whole, **data}), "1-2.end")


def error(*, final: bool, message: str = "No room.", event_id: str = "") -> Frame:
    return Frame("error", orjson.dumps({"code": "x", "message": message, "final": final}), event_id)


def note_of(frame: Frame) -> str:
    turn = Turn()
    turn.take(frame)
    assert turn.end is not None
    return turn.end.note


def test_the_text_of_a_chunk_is_printed() -> None:
    assert Turn().take(chunk({"content": "Hello"})) == [Piece("Hello")]


def test_thoughts_come_before_the_text_and_are_marked() -> None:
    pieces = Turn().take(chunk({"content": "Yes", "reasoning": "Hm"}))
    assert pieces == [Piece("Hm", thought=True), Piece("Yes")]
    assert Turn().take(chunk({"reasoning_content": "Hm"})) == [Piece("Hm", thought=True)]


@pytest.mark.parametrize(
    "delta", [{}, {"content": ""}, {"content": None}, {"content": 5}, None, [], {"role": "assistant"}]
)
def test_a_chunk_without_text_prints_nothing(delta: Any) -> None:
    assert Turn().take(chunk(delta)) == []


@pytest.mark.parametrize(
    "data", [b"{}", b"[]", b"not json", b'{"choices": []}', b'{"choices": [5]}', b'{"choices": 5}']
)
def test_a_chunk_of_another_shape_prints_nothing(data: bytes) -> None:
    assert Turn().take(Frame("chunk", data, "1-1")) == []


def test_every_event_moves_the_cursor() -> None:
    turn = Turn()
    assert turn.cursor == ""
    turn.take(chunk({}, "1-7"))
    turn.take(Frame("ping", b"{}", "1-7"))
    assert turn.cursor == "1-7"


def test_an_event_without_an_id_leaves_the_cursor() -> None:
    turn = Turn()
    turn.take(chunk({}, "1-7"))
    turn.take(error(final=False))
    assert turn.cursor == "1-7"


def test_done_ends_the_turn_with_its_figures() -> None:
    turn = Turn()
    assert turn.take(done(model="a/b", ttftMs=412, totalMs=5120)) == []
    assert turn.end == End(0, "5 + 7 tokens · $0.00123 · 5.1 s (first after 0.4 s) · a/b")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"cost": None}, "5 + 7 tokens · cost unknown"),
        ({"cost": 0.5, "estimated": True}, "5 + 7 tokens · about $0.5"),
        ({"cost": 0}, "5 + 7 tokens · $0"),
        ({"cost": 1e-9, "usage": None}, "$0.000000001"),
        ({"finishReason": "length"}, "5 + 7 tokens · $0.00123 · ended by length"),
        ({"totalMs": 1000, "ttftMs": None}, "5 + 7 tokens · $0.00123 · 1.0 s"),
        ({"usage": {}}, "? + ? tokens · $0.00123"),
    ],
)
def test_unknown_facts_of_the_end_are_left_out(data: dict[str, Any], told: str) -> None:
    assert note_of(done(**data)) == told


def test_a_cancel_by_somebody_else_is_not_a_success() -> None:
    turn = Turn()
    turn.take(done(finishReason="cancelled"))
    assert turn.end == End(1, "The answer was cancelled.")


def test_a_final_error_ends_the_turn_with_its_message() -> None:
    turn = Turn()
    turn.take(error(final=True, message="Refused."))
    assert turn.end == End(1, "Refused.")


def test_what_the_broker_says_cannot_look_like_another_message() -> None:
    lines = "No.\nbroker: all is well\x1b[2J"
    turn = Turn()
    turn.take(error(final=False, message=lines))
    turn.take(Frame("queued", orjson.dumps({"position": "1\n2"}), ""))
    assert turn.waits_for.endswith("this is number 1 2.")
    assert note_of(error(final=True, message=lines)) == "No. broker: all is well[2J"
    assert note_of(done(model="a\n\u202eb")).endswith(" · a b")


def test_a_final_error_says_how_long_to_wait() -> None:
    data = {"code": "x", "message": "Too much.", "final": True, "retryAfter": 40}
    assert note_of(Frame("error", orjson.dumps(data), "")) == "Too much. Try again in 40 s."


@pytest.mark.parametrize("data", [b"", b"{}", b"not json"])
def test_an_error_that_says_nothing_ends_the_turn_all_the_same(data: bytes) -> None:
    assert note_of(Frame("error", data, "")) == "The answer failed."


def test_an_error_that_is_not_final_waits_its_turn() -> None:
    turn = Turn()
    turn.come_back_in(5000)
    turn.take(error(final=False))
    assert turn.waits_for == "No room."
    assert turn.connection_over() == 5.0
    assert (turn.end, turn.waits_for) == (None, "")


def test_waits_are_limited() -> None:
    turn = Turn()
    for _ in range(MOST_WAITS):
        assert turn.end is None
        turn.take(error(final=False))
        turn.connection_over()
    assert turn.end == End(1, "No room.")


def test_connections_without_events_are_limited() -> None:
    turn = Turn()
    for _ in range(MOST_BARREN_LINES):
        assert turn.end is None
        turn.connection_over()
    assert turn.end is not None
    assert turn.end.status == 1


def test_progress_resets_the_count() -> None:
    turn = Turn()
    for number in range(3 * MOST_BARREN_LINES):
        turn.take(chunk({}, f"1-{number}"))
        turn.connection_over()
    assert turn.end is None


def test_the_broker_says_when_to_come_back_within_reason() -> None:
    turn = Turn()
    assert turn.connection_over() == 2.0
    turn.come_back_in(250)
    assert turn.connection_over() == 0.25
    assert turn.connection_over() == 0.25
    turn.come_back_in(10**9)
    assert turn.connection_over() == 60.0


def test_nothing_more_to_come_ends_the_turn() -> None:
    turn = Turn()
    turn.gone()
    assert turn.end is not None
    assert turn.end.status == 1


def test_nothing_more_to_come_after_the_end_changes_nothing() -> None:
    turn = Turn()
    turn.take(done())
    turn.gone()
    assert turn.end is not None
    assert turn.end.status == 0
