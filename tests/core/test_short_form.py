"""The short form of a session: made of framed events, in batches of any size, from any event on."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.answer import parse_relayed
from broker.core.chat_answer import ChatAnswer
from broker.core.chat_said import DeltasUnknown
from broker.core.short_form import START, begins_with_deltas, count_events, portions, shorten
from broker.core.sse import Decoder
from tests.chunks import events_of


def delta(**members: Any) -> bytes:
    return json.dumps({"id": "gen-1", "choices": [{"index": 0, "delta": members}]}).encode()


def message(text: str, **choice: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, **choice, "message": {"content": text}}]}).encode()


def frames(events: bytes) -> list[tuple[str, str, Any]]:
    return [
        (frame.id, frame.event, json.loads(frame.data)) for frame in Decoder(1 << 20).feed(START + events)[1:]
    ]


def test_a_chunk_becomes_a_token_event_with_its_number() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": "{"}}
    chunks = [
        delta(role="assistant", content=""),
        delta(content="a\nb"),
        delta(reasoning="Hm", content=None),
        delta(tool_calls=[call]),
        delta(content="c", reasoning="d", tool_calls=[call]),
        b'{"choices":[],"usage":{"cost":1}}',
    ]
    short = shorten(events_of(chunks, 5), deltas=False)
    assert frames(short.events) == [
        ("1-6", "token", {"text": "a\nb"}),
        ("1-7", "token", {"reasoning": "Hm"}),
        ("1-8", "token", {"toolCalls": [call]}),
        ("1-9", "token", {"text": "c", "reasoning": "d", "toolCalls": [call]}),
    ]
    assert short.deltas


def test_the_start_has_no_id() -> None:
    assert START == b"event: start\ndata: {}\n\n"


def test_a_chunk_of_several_lines_is_read() -> None:
    chunk = b'{"choices":\n[{"delta":\n{"content":"a"}}]}'
    assert frames(shorten(events_of([chunk], 1), deltas=False).events) == [("1-1", "token", {"text": "a"})]


def test_halves_of_a_character_are_whole_again_on_the_page() -> None:
    chunks = [b'{"choices":[{"delta":{"content":"%b"}}]}' % half for half in (b"\\ud83d", b"\\ude00")]
    relayed = [ChatAnswer().read(chunk) or b"" for chunk in chunks]
    found = frames(shorten(events_of(relayed, 1), deltas=False).events)
    text = "".join(data["text"] for _, _, data in found)
    assert text.encode("utf-16", "surrogatepass").decode("utf-16") == "😀"


@pytest.mark.parametrize(
    "chunk", [b'{"x": 1e999, "choices":[{"delta":{"content":"\\ud800"}}]}', b'{"a":1}', b'{"choices": 1}']
)
def test_any_chunk_that_is_relayed_can_be_read(chunk: bytes) -> None:
    relayed = ChatAnswer().read(chunk)
    assert relayed is not None
    assert parse_relayed(relayed).keys() == json.loads(chunk).keys()


@pytest.mark.parametrize("data", [b"[]", b"1", b"{", b'{"a":' * 5000, b""])
def test_data_that_is_not_a_chunk_gives_nothing(data: bytes) -> None:
    assert parse_relayed(data) == {}
    assert shorten(events_of([data], 1), deltas=False).events == b""


def test_a_tool_call_that_cannot_be_written_is_left_out() -> None:
    deep = b"[" * 900 + b"]" * 900
    chunk = b'{"choices":[{"delta":{"tool_calls":[{"a":%b}]}}]}' % deep
    assert shorten(events_of([chunk, delta(content="a")], 1), deltas=False).events.endswith(
        b'{"text":"a"}\n\n'
    )


def test_a_message_after_a_cursor_needs_to_know_what_came_before() -> None:
    events = events_of([delta(role="assistant")], 4) + events_of([message("a")], 5)
    assert shorten(events, deltas=None).events == b""
    alone = events_of([message("a")], 5)
    with pytest.raises(DeltasUnknown):
        shorten(alone, deltas=None)
    assert frames(shorten(alone, deltas=False).events) == [("1-5", "token", {"text": "a"})]
    assert shorten(alone, deltas=True).events == b""


def test_the_first_events_tell_whether_an_answer_comes_in_deltas() -> None:
    assert begins_with_deltas(events_of([b'{"choices":[]}', delta(content="a")], 1), 2)
    assert not begins_with_deltas(events_of([message("a"), message("b")], 1), 2)
    assert not begins_with_deltas(events_of([message("a"), delta(content="b")], 1), 1)


def test_events_of_a_response_become_token_events_too() -> None:
    item = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
    events = [
        {"type": "response.created", "sequence_number": 0, "response": {}},
        {"type": "response.reasoning_summary_text.delta", "delta": "Hm"},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "response.output_item.done", "item": item},
        {"type": "response.completed", "sequence_number": 9, "response": {"output": [item]}},
    ]
    short = shorten(events_of([json.dumps(event).encode() for event in events], 1), deltas=None)
    assert frames(short.events) == [
        ("1-2", "token", {"reasoning": "Hm"}),
        ("1-3", "token", {"text": "a"}),
        ("1-4", "token", {"toolCalls": [item]}),
    ]


@given(st.lists(st.text(max_size=30), max_size=30), st.integers(1, 400))
def test_portions_join_to_the_whole_and_are_cut_between_events(texts: list[str], size: int) -> None:
    events = events_of([delta(content=text) for text in texts], 1)
    parts = list(portions(events, size))
    assert b"".join(parts) == events
    assert sum(count_events(part) for part in parts) == len(texts)
    assert all(part.startswith(b"id: ") and part.endswith(b"\n\n") for part in parts)


@given(st.lists(st.text(max_size=4), min_size=1, max_size=20), st.booleans(), st.sets(st.integers(1, 20)))
def test_the_texts_join_to_the_answer_however_it_is_cut(
    texts: list[str],
    in_messages: bool,
    cuts: set[int],
) -> None:
    chunks = [message(text) if in_messages else delta(content=text) for text in texts]
    deltas: bool | None = False
    found = []
    for start, end in pairwise(sorted({0, *(cut for cut in cuts if cut < len(texts)), len(texts)})):
        events, deltas = shorten(events_of(chunks[start:end], start + 1), deltas)
        found += frames(events)
    assert [(n, "token", {"text": text}) for n, text in numbered(texts)] == found
    assert "".join(data["text"] for _, _, data in found) == "".join(texts)


def numbered(texts: list[str]) -> list[tuple[str, str]]:
    return [(f"1-{n}", text) for n, text in enumerate(texts, 1) if text]
