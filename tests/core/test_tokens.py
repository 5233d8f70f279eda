from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import PartType
from broker.core.tokens import (
    AUDIO_TOKENS,
    IMAGE_TOKENS,
    MESSAGE_TOKENS,
    PART_TOKENS,
    PROMPT_TOKENS,
    TOOLS_TOKENS,
    Size,
    estimate_prompt,
    estimate_text,
    measure_frame,
    measure_message,
)

DENSITIES = st.floats(1, 8)
TEXTS = st.text(max_size=30)


def say(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(
    ("size", "density", "tokens"), [(0, 3.0, 0), (1, 3.0, 1), (3, 3.0, 1), (4, 3.0, 2), (10, 4.0, 3)]
)
def test_text_is_rounded_up(size: int, density: float, tokens: int) -> None:
    assert estimate_text(size, density) == tokens


@pytest.mark.parametrize(
    ("text", "size"), [("", 0), ("hello", 5), ("é", 2), ("你好", 6), ("😀", 4), ("a\x00", 2)]
)
def test_text_is_measured_in_utf8(text: str, size: int) -> None:
    assert measure_message(say(text)) == Size(size, MESSAGE_TOKENS)
    assert measure_message(say([{"type": "text", "text": text}])) == Size(size, MESSAGE_TOKENS)


def test_each_message_costs_something_for_itself() -> None:
    assert estimate_prompt([say("")], {}) == PROMPT_TOKENS + MESSAGE_TOKENS
    assert estimate_prompt([say("")] * 5, {}) == PROMPT_TOKENS + 5 * MESSAGE_TOKENS


def test_an_empty_key_of_a_message_costs_nothing() -> None:
    bare: dict[str, Any] = {
        "role": "assistant",
        "content": None,
        "tool_calls": None,
        "audio": None,
        "images": [],
        "refusal": None,
    }
    assert measure_message(bare) == Size(0, MESSAGE_TOKENS)


@pytest.mark.parametrize("url", ["https://example.com/a.png", "data:image/png;base64," + "A" * 400_000])
def test_an_image_costs_the_same_whatever_its_length_in_base64(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    assert measure_message(say([part, part])) == Size(0, MESSAGE_TOKENS + 2 * IMAGE_TOKENS)


def test_every_kind_of_part_but_text_has_a_flat_rate() -> None:
    assert {*PART_TOKENS, "text"} == {*get_args(PartType)}
    for kind, tokens in PART_TOKENS.items():
        assert measure_message(
            say([{"type": kind, "file": {"file_data": "data:" + "A" * 99}}])
        ).flat_tokens == (MESSAGE_TOKENS + tokens)


def test_earlier_outputs_of_the_model_count_as_well() -> None:
    made = {"images": [{"image_url": {"url": "data:," + "A" * 9999}}], "audio": {"data": "A" * 9999}}
    assert measure_message({"role": "assistant", **made}) == Size(
        0, MESSAGE_TOKENS + IMAGE_TOKENS + AUDIO_TOKENS
    )
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "x" * 600}}
    assert 600 < measure_message({"role": "assistant", "tool_calls": [call]}).text_bytes < 700
    assert measure_message({"role": "assistant", "reasoning": "x" * 600}).text_bytes == 600


def test_tools_the_schema_of_the_answer_and_its_prediction_count() -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "é" * 300}}]
    assert measure_frame({"tools": tools}).text_bytes > 600
    assert measure_frame({"tools": tools}).flat_tokens == PROMPT_TOKENS + TOOLS_TOKENS
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"description": "x" * 600}}}
    assert measure_frame({"response_format": schema}).text_bytes > 600
    assert measure_frame({"prediction": {"type": "content", "content": "x" * 600}}).text_bytes > 600
    assert measure_frame({"temperature": 1, "user": "x" * 600, "tools": []}) == Size(0, PROMPT_TOKENS)


@given(st.lists(TEXTS, min_size=1), TEXTS, DENSITIES)
def test_more_text_is_never_fewer_tokens(texts: list[str], more: str, density: float) -> None:
    messages = [say(text) for text in texts]
    longer = [say(texts[0] + more), *messages[1:]]
    assert estimate_prompt(longer, {}, density) >= estimate_prompt(messages, {}, density)
    assert estimate_prompt([*messages, say(more)], {}, density) > estimate_prompt(messages, {}, density)


@given(st.lists(TEXTS), DENSITIES, DENSITIES)
def test_more_bytes_per_token_are_never_more_tokens(texts: list[str], one: float, other: float) -> None:
    messages = [say(text) for text in texts]
    assert estimate_prompt(messages, {}, min(one, other)) >= estimate_prompt(messages, {}, max(one, other))


@given(st.lists(TEXTS), DENSITIES)
def test_a_prompt_is_never_fewer_tokens_than_its_text(texts: list[str], density: float) -> None:
    whole = estimate_text(len("".join(texts).encode()), density)
    assert estimate_prompt([say(text) for text in texts], {}, density) >= whole
