"""What `broker chat` prints of a chunk, in the shapes of many services."""

from __future__ import annotations

from typing import Any

import pytest

from broker.cli.pieces import Piece, pieces

THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "12 times 12 … "}]}
DATA = "data:image/png;base64,AAAA"


def said(delta: Any) -> list[tuple[str, bool]]:
    return [(piece.text, piece.thought) for piece in pieces({"choices": [{"index": 0, "delta": delta}]})]


@pytest.mark.parametrize(
    ("delta", "shown"),
    [
        # Text as a list of parts, mixed with plain texts.
        ({"content": [{"type": "text", "text": "1"}, "44"]}, [("1", False), ("44", False)]),
        ({"content": ["1", {"text": "44", "type": "text"}]}, [("1", False), ("44", False)]),
        ({"content": [{"type": "output_text", "text": "144"}]}, [("144", False)]),
        (
            {"content": [THINKING, {"type": "text", "text": "144"}]},
            [("12 times 12 … ", True), ("144", False)],
        ),
        ({"content": [{"type": "thinking", "thinking": "Hm"}]}, [("Hm", True)]),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, [("No.", False)]),
        ({"content": [{"type": "reference", "reference_ids": [1, 2]}]}, []),
        ({"content": []}, []),
        # Refusals.
        ({"content": None, "refusal": "I cannot help with that."}, [("I cannot help with that.", False)]),
        # Thoughts under other names, each once.
        ({"reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]}, [("Hm", True)]),
        (
            {"reasoning": "", "reasoning_details": [{"type": "reasoning.summary", "summary": "S"}]},
            [("S", True)],
        ),
        (
            {"reasoning": "Hm", "reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]},
            [("Hm", True)],
        ),
        ({"reasoning": "", "reasoning_content": "Hm"}, [("Hm", True)]),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "gAAA"}]}, []),
        # Images.
        ({"images": [{"type": "image_url", "image_url": {"url": DATA}}]}, [("[image]", False)]),
        ({"content": [{"type": "image_url", "image_url": DATA}, "!"]}, [("[image]", False), ("!", False)]),
    ],
)
def test_a_delta_is_read_in_every_shape_that_is_known(delta: Any, shown: list[tuple[str, bool]]) -> None:
    assert said(delta) == shown


def test_a_message_in_place_of_a_delta_is_read_like_one() -> None:
    shapes: list[dict[str, Any]] = [{}, {"delta": None}, {"delta": {}}]
    for delta in shapes:
        chunk = {"choices": [{**delta, "message": {"role": "assistant", "content": ["1", "44"]}}]}
        assert pieces(chunk) == [Piece("1"), Piece("44")]


@pytest.mark.parametrize(
    "delta",
    [
        {"content": [None, 5, [], {}, {"type": 7}, {"type": "text"}, {"type": "text", "text": {"value": 5}}]},
        {"content": {"type": "thinking"}},
        {"images": "none", "reasoning_details": [5, None, {"text": 5}], "refusal": 5},
        {"reasoning": {"effort": 5}, "reasoning_details": {}},
    ],
)
def test_a_shape_that_is_not_known_says_nothing(delta: Any) -> None:
    assert said(delta) == []


def test_a_deep_nest_of_parts_costs_nothing() -> None:
    content: Any = "deep"
    for _ in range(50_000):
        content = [content]
    assert said({"content": content}) == []
