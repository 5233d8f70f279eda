"""The contents of an answer, collected from its chunks."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from broker.core.result import Result, Transcript


def gathered(*deltas: dict[str, Any], **choice: Any) -> Transcript:
    transcript = Transcript()
    transcript.add(
        json.dumps({"choices": [{"index": 0, "delta": delta, **choice}]}).encode() for delta in deltas
    )
    return transcript


def test_text_and_reasoning_are_put_together() -> None:
    found = gathered(
        {"role": "assistant", "content": "", "reasoning": "Let me "},
        {"reasoning": "see.", "reasoning_details": [{"type": "reasoning.text", "text": "see."}]},
        {"content": "Hel"},
        {"content": "lo"},
    )
    assert (found.text, found.reasoning, found.tool_calls) == ("Hello", "Let me see.", ())


def test_the_shapes_of_other_services_are_read() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm. "}]}
    found = gathered(
        {"content": [thinking, {"type": "text", "text": "One"}, " two"]},
        {"reasoning_content": "So. "},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "In short."}]},
        {"refusal": " and no more"},
    )
    assert found.text == "One two and no more"
    assert found.reasoning == "Hm. So. In short."


def test_a_tool_call_is_put_together_of_its_pieces() -> None:
    found = gathered(
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "sum"}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 1, "id": "", "function": {"name": None, "arguments": ": 1}"}}]},
        {"tool_calls": [{"id": "c", "function": {"name": "whole", "arguments": "{}"}, "extra_content": 1}]},
    )
    assert found.tool_calls == (
        {"id": "b", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}},
        {
            "id": "c",
            "type": "function",
            "function": {"name": "whole", "arguments": "{}"},
            "extra_content": 1,
        },
    )


def test_a_message_counts_only_in_place_of_deltas() -> None:
    whole = Transcript()
    whole.add([json.dumps({"choices": [{"message": {"content": "Hello"}}]}).encode()])
    assert whole.text == "Hello"
    assert gathered({"content": "He"}, {}, message={"content": "Hello"}).text == "He"


def test_a_character_that_was_cut_in_two_is_whole_again() -> None:
    transcript = Transcript()
    for half in (r"\ud83d", r"\ude00", r"\ud83d"):
        transcript.add([b'{"choices":[{"delta":{"content":"%b"}}]}' % half.encode()])
    assert transcript.text == "😀\ufffd"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["content", "tool_calls", "function", "index", "type", "text", "reasoning_details", "message"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values, json_values)
def test_no_chunk_breaks_the_result(choice: Any, delta: Any) -> None:
    transcript = Transcript()
    for chunk in (choice, {"choices": choice}, {"choices": [choice]}, {"choices": [{"delta": delta}]}):
        transcript.add([json.dumps(chunk).encode()])
    transcript.add([b"{", b'"' + b"[" * 10_000, b"\xff"])
    assert isinstance(transcript.text + transcript.reasoning, str)
    json.dumps(transcript.tool_calls)


def test_a_result_does_not_show_its_text() -> None:
    now = dt.datetime.now(dt.UTC)
    call = {"function": {"name": "x", "arguments": "hunter2"}}
    result = Result(
        id="0123-secret",
        client="anna",
        model="a/b",
        state="done",
        text="hunter2",
        reasoning="hunter2",
        tool_calls=(call,),
        usage={"prompt_tokens": 1},
        cost=0.5,
        estimated=False,
        finish_reason="stop",
        error=None,
        started_at=now,
        first_chunk_at=None,
        ended_at=now,
    )
    assert "anna" in repr(result)
    assert "hunter2" not in repr(result)
    assert "secret" not in repr(result)
