"""The contents of a chunk in the shapes of many services; an answer is counted by the same rules."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.answer import size_of
from broker.core.chat_answer import ChatAnswer
from broker.core.chat_said import DeltasUnknown, said_in_chunk
from broker.core.said import NOTHING, Said

THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}}


def chunk(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **choice}]}


@pytest.mark.parametrize(
    ("delta", "text", "reasoning"),
    [
        ({"content": "a"}, "a", ""),
        ({"role": "assistant", "content": "a"}, "a", ""),
        ({"role": "assistant", "content": ""}, "", ""),
        ({"role": "assistant", "content": None}, "", ""),
        ({"content": ["a", {"type": "text", "text": "b"}]}, "ab", ""),
        ({"content": [{"type": "output_text", "text": "a"}, [["b"]]]}, "ab", ""),
        ({"content": [THINKING, {"type": "text", "text": "a"}]}, "a", "Hm"),
        ({"content": {"type": "text", "text": "a"}}, "a", ""),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No.", ""),
        ({"content": None, "refusal": "No."}, "No.", ""),
        ({"content": [PICTURE, "a"], "images": [PICTURE]}, "a", ""),
        ({"content": "", "reasoning": "Hm"}, "", "Hm"),
        ({"reasoning_content": "Hm", "content": "a"}, "a", "Hm"),
        ({"reasoning": "Hm", "reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]}, "", "Hm"),
        ({"reasoning": "", "reasoning_details": [{"summary": "S"}, {"text": "T"}]}, "", "ST"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]}, "", ""),
        ({"audio": {"data": "AAAA"}, "annotations": [{"url": "x"}]}, "", ""),
    ],
)
@pytest.mark.parametrize("key", ["delta", "message"])
def test_text_and_reasoning_are_found_in_every_known_shape(
    key: str, delta: dict[str, Any], text: str, reasoning: str
) -> None:
    told, deltas = said_in_chunk(chunk(**{key: delta}), deltas=False)
    assert told == Said(text, reasoning)
    assert deltas is (key == "delta")


def test_tool_calls_are_given_as_the_upstream_sent_them() -> None:
    call = {**CALL, "extra_content": {"google": {"thought_signature": "x"}}}
    told, _ = said_in_chunk(chunk(delta={"content": None, "tool_calls": [call, None, "x"]}), deltas=True)
    assert told == Said(calls=(call,))


@pytest.mark.parametrize("choice", [{}, {"delta": None}, {"delta": {}}])
def test_a_message_counts_in_place_of_deltas_but_not_after_them(choice: dict[str, Any]) -> None:
    repeated = chunk(**choice, message={"content": "a"})
    assert said_in_chunk(repeated, deltas=False) == (Said("a"), False)
    assert said_in_chunk(repeated, deltas=True) == (NOTHING, True)
    with pytest.raises(DeltasUnknown):
        said_in_chunk(repeated, deltas=None)
    assert said_in_chunk(chunk(**choice, message={"content": ""}), deltas=None) == (NOTHING, None)


def test_the_text_of_an_old_completion_is_given() -> None:
    assert said_in_chunk(chunk(text="a"), deltas=False) == (Said("a"), False)


def test_only_the_first_of_several_choices_counts() -> None:
    choices = [{"index": n, "delta": {"content": str(n)}} for n in (1, 0, 2)]
    assert said_in_chunk({"choices": choices}, deltas=False) == (Said("0"), True)


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"choices": None},
        {"choices": []},
        {"choices": [None, 1, {}]},
        {"choices": [], "usage": {"cost": 1}},
        chunk(delta={}, finish_reason="stop"),
        chunk(delta={"content": 1, "reasoning": 2, "tool_calls": 3, "images": 4, "refusal": 5}),
        chunk(delta={"content": [1, None, {"text": 7}, {"type": 8}], "reasoning_details": [1, {"text": 2}]}),
    ],
)
def test_unknown_shapes_give_nothing(nothing: dict[str, Any]) -> None:
    assert said_in_chunk(nothing, deltas=False)[0] == NOTHING


def test_endless_lists_of_lists_give_nothing() -> None:
    content: Any = "a"
    for _ in range(200):
        content = [content]
    assert said_in_chunk(chunk(delta={"content": content}), deltas=False) == (NOTHING, True)


# Any answer

TEXT = st.text(max_size=5)


def plain(text: str) -> dict[str, Any]:
    return {"content": text}


def with_role(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def in_parts(text: str) -> dict[str, Any]:
    return {"content": [text[:2], {"type": "text", "text": text[2:]}]}


def refused(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "refusal": text}


def thought(text: str) -> dict[str, Any]:
    return {"content": "", "reasoning": text}


def thought_twice(text: str) -> dict[str, Any]:
    return {"reasoning_content": text, "reasoning_details": [{"type": "reasoning.text", "text": text}]}


def thought_in_parts(text: str) -> dict[str, Any]:
    return {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": text}]}]}


def called(text: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}


TEXT_SHAPES = [plain, with_role, in_parts, refused]
REASONING_SHAPES = [thought, thought_twice, thought_in_parts]
SAYINGS = st.lists(st.tuples(st.sampled_from([*TEXT_SHAPES, *REASONING_SHAPES, called]), TEXT), max_size=8)


@given(SAYINGS, st.sampled_from(["deltas", "messages", "both"]))
def test_the_pieces_are_the_whole_counted_answer(sayings: Any, shape: str) -> None:
    """In deltas, in messages in their place, or in deltas and then a message that repeats them."""
    answer, so_far = ChatAnswer(), ""
    deltas: bool | None = False
    found: list[Said] = []
    for render, text in sayings:
        so_far += text
        choice = {"delta": render(text)} if shape != "messages" else {"message": render(text)}
        if shape == "both":
            choice["message"] = {"content": so_far}
        told, deltas = said_in_chunk(chunk(**choice), deltas)
        found.append(told)
        answer.read(json.dumps(chunk(**choice)).encode())
    if sayings and shape == "both":
        found.append(said_in_chunk(chunk(delta={}, message={"content": so_far}), deltas)[0])
        answer.read(json.dumps(chunk(delta={}, message={"content": so_far})).encode())
    assert "".join(each.text for each in found) == "".join(t for shape, t in sayings if shape in TEXT_SHAPES)
    thoughts = "".join(t for shape, t in sayings if shape in REASONING_SHAPES)
    assert "".join(each.reasoning for each in found) == thoughts
    arguments = [call["function"]["arguments"] for each in found for call in each.calls]
    assert "".join(arguments) == "".join(t for shape, t in sayings if shape is called)
    assert answer.text_bytes == sum(size_of(text) for _, text in sayings)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("choices", "delta", "message", "content", "text", "type", "index", "refusal"),
                    *("reasoning", "reasoning_details", "tool_calls", "images", "item", "response"),
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["choices", "type", "delta", "response"]), JSON), st.booleans())
def test_no_chunk_makes_it_fail(anything: dict[str, Any], deltas: bool) -> None:
    said_in_chunk(anything, deltas)
