from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.bytes_per_token import (
    AGREEMENT,
    ENOUGH,
    LIKELY,
    ROOM,
    SURE,
    Sample,
    estimate,
    sample_of,
    without_variant,
)
from broker.core.chat import ChatRequest
from broker.core.fitting import FitRules, fit
from broker.core.tokens import (
    DEFAULT_BYTES_PER_TOKEN,
    MESSAGE_TOKENS,
    PROMPT_TOKENS,
    TOOLS_TOKENS,
    Size,
    estimate_prompt,
    measure_frame,
    measure_message,
)

RULES = FitRules(max_prompt_tokens=0, max_output_tokens=4096, switch_off_compression=False, user=None)
LONG = Size(8000, 14)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DENSITY = st.floats(1, 8)


def say(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calibration_sample(*messages: dict[str, Any], most: int = 0, **parameters: Any) -> Size | None:
    asked = ChatRequest("a/b", list(messages), parameters)
    return fit(asked, {}, FitRules(most, 4096, switch_off_compression=False, user=None)).calibration_sample


def learned(
    tokens: object,
    size: Size | None = LONG,
    *,
    model: str = "a/b",
    answered: str | None = None,
    client: str = "me",
) -> Sample | None:
    return sample_of(
        model=model, answered=answered, client=client, size=size, usage={"prompt_tokens": tokens}
    )


def samples(client: str, *values: float) -> list[Sample]:
    return [Sample("a/b", client, value) for value in values]


# Which prompts teach


def test_a_prompt_of_text_gives_a_sample() -> None:
    talk = [say("Be terse", "system"), say("é" * 50), say([{"type": "text", "text": "x" * 30}])]
    assert calibration_sample(*talk) == Size(8 + 100 + 30, PROMPT_TOKENS + 3 * MESSAGE_TOKENS)


def test_only_what_is_sent_counts() -> None:
    old, new = say("x" * 3000), say("y" * 300)
    assert calibration_sample(old, say("z" * 300, "assistant"), new, most=400) == calibration_sample(new)


def test_function_calls_give_a_sample() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 300}}]
    talk = [say("Hi"), say(None, "assistant", tool_calls=[CALL]), say("x" * 90, "tool", tool_call_id="c")]
    whole = [measure_frame({"tools": tools}), *map(measure_message, talk)]
    assert calibration_sample(*talk, tools=tools) == Size(
        sum(size.text_bytes for size in whole), sum(size.flat_tokens for size in whole)
    )


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_contents_other_than_text_give_no_sample(kind: str) -> None:
    assert calibration_sample(say("x" * 900), say([{"type": "text", "text": "x"}, {"type": kind}])) is None


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning": "x"},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        {"images": [{"image_url": {"url": "data:,"}}]},
        {"audio": {"id": "a"}},
        {"annotations": [{}]},
    ],
    ids=str,
)
def test_contents_that_only_some_models_read_give_no_sample(more: dict[str, Any]) -> None:
    assert calibration_sample(say("Hi"), say("Hello", "assistant", **more), say("x" * 900)) is None
    assert (
        calibration_sample(say("Hi"), say("Hello", "assistant", **dict.fromkeys(more)), say("x" * 900))
        is not None
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"plugins": [{"id": "web"}]},
        {"transforms": ["middle-out"]},
        {"web_search_options": {"search_context_size": "low"}},
        {"prediction": {"type": "content", "content": "x"}},
        {"tools": [{"type": "openrouter:web_search"}]},
        {"tools": ["opened"]},
        {"tools": {"opened": True}},
    ],
    ids=str,
)
def test_a_prompt_that_is_changed_on_its_way_gives_no_sample(parameters: dict[str, Any]) -> None:
    assert calibration_sample(say("x" * 900), **parameters) is None


def test_parameters_that_change_nothing_allow_a_sample() -> None:
    nothing: dict[str, Any] = {"plugins": [], "transforms": [], "tools": []}
    assert calibration_sample(say("x" * 900), temperature=1, **nothing) == calibration_sample(say("x" * 900))


# Samples of answers


def test_a_sample_is_text_bytes_by_billed_text_tokens() -> None:
    assert learned(2007) == Sample("a/b", "me", 4.0)
    assert learned(1007, Size(1500, 14)) == Sample("a/b", "me", 1.5)


@pytest.mark.parametrize(
    ("tokens", "density"), [(10**15, 1.0), (8007, 1.0), (9000, 1.0), (1007, 8.0), (400, 8.0)]
)
def test_a_sample_keeps_to_the_bounds(tokens: int, density: float) -> None:
    assert learned(tokens) == Sample("a/b", "me", density)


@pytest.mark.parametrize("tokens", [None, "2000", 2000.5, True, 0, -5, [], 1])
def test_a_usage_without_tokens_gives_no_sample(tokens: object) -> None:
    assert learned(tokens) is None


def test_a_missing_usage_or_size_gives_no_sample() -> None:
    assert sample_of(model="a/b", answered=None, client="me", size=LONG, usage=None) is None
    assert sample_of(model="a/b", answered=None, client="me", size=LONG, usage={}) is None
    assert learned(2000, None) is None


def test_a_short_prompt_gives_no_sample() -> None:
    assert learned(100, Size(199, 14)) is None
    assert learned(100, Size(200, 14)) is not None


def test_a_prompt_of_many_short_messages_gives_no_sample() -> None:
    twenty = PROMPT_TOKENS + 20 * MESSAGE_TOKENS
    assert learned(4 * twenty - 1, Size(1200, twenty)) is None
    assert learned(4 * twenty, Size(1200, twenty)) is not None


def test_tools_give_a_sample_only_in_a_long_prompt() -> None:
    flat = PROMPT_TOKENS + MESSAGE_TOKENS + TOOLS_TOKENS
    assert learned(1000, Size(3000, flat)) is None
    assert learned(2000, Size(6000, flat)) is not None


@pytest.mark.parametrize(
    ("asked", "answered", "teaches_something"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b-2025-01-01", True),
        ("a/b:nitro", "a/b", True),
        ("a/b", "b-2025", True),
        ("deployment", "vendor/b", True),
        ("a/b", "c/d", False),
        ("openrouter/auto", "a/b", False),
        ("a/b:online", None, False),
        ("a/b:Online", "a/b", False),
    ],
)
def test_another_model_or_a_search_gives_no_sample(
    asked: str, answered: str | None, teaches_something: bool
) -> None:
    found = learned(2007, model=asked, answered=answered)
    assert (found is not None) is teaches_something


@pytest.mark.parametrize(
    ("model", "plain"), [("a/b", "a/b"), ("a/b:free", "a/b"), ("a/b:free:nitro", "a/b"), (":x", ":x")]
)
def test_a_variant_gives_a_sample_of_its_model(model: str, plain: str) -> None:
    assert without_variant(model) == plain
    found = learned(2007, model=model)
    assert found is not None
    assert found.model == plain


# The result of several samples


def test_too_few_samples_say_nothing() -> None:
    assert estimate([]) is None
    assert estimate(samples("me", *[5.0] * (ENOUGH - 1))) is None


def test_low_values_are_trusted_at_once_and_high_ones_in_steps() -> None:
    assert estimate(samples("me", *[1.5] * ENOUGH)) == pytest.approx(1.5)
    steps = [estimate(samples("me", *[6.0] * count)) or 0 for count in range(ENOUGH, SURE + 1)]
    assert steps == sorted(steps)
    assert DEFAULT_BYTES_PER_TOKEN < steps[0] <= 4
    assert steps[-1] == pytest.approx(6.0)


def test_two_contradicting_estimates_give_the_default() -> None:
    assert estimate(samples("one", *[2.0] * 12) + samples("two", *[5.0] * 12)) == DEFAULT_BYTES_PER_TOKEN
    assert estimate(samples("one", *[4.0] * 12) + samples("two", *[6.0] * 12)) == 4
    assert estimate(samples("one", *[1.6] * 12) + samples("two", *[2.4] * 12)) == pytest.approx(2.4)


@pytest.mark.parametrize("odd", [1.0, 8.0])
@pytest.mark.parametrize("truth", [1.5, 2.0, 3.0, 4.0, 5.0, 6.0])
def test_an_unlikely_estimate_of_two_is_left_out(truth: float, odd: float) -> None:
    assert estimate(samples("me", *[truth] * 20) + samples("odd", *[odd] * 24)) == pytest.approx(truth)


def test_an_unusual_model_is_trusted_without_contradiction() -> None:
    assert estimate(samples("me", *[1.1] * 20)) == pytest.approx(1.1)
    assert estimate(samples("me", *[7.5] * 20) + samples("you", *[7.4] * 20)) == pytest.approx(7.45, rel=0.01)


def test_clients_with_few_samples_make_one_estimate() -> None:
    many = [sample for number in range(20) for sample in samples(f"c{number}", 4.0 + number / 100)]
    assert estimate(many) == pytest.approx(4.1, rel=0.01)
    assert estimate([*many, *samples("odd", *[1.0] * 24)]) == pytest.approx(4.1, rel=0.01)
    assert estimate([*many, *samples("one", *[4.2] * 5), *samples("odd", *[1.5] * 24)]) == pytest.approx(
        4.1, rel=0.04
    )


def test_one_sample_does_not_contradict_many_of_one_client() -> None:
    assert estimate(samples("me", *[4.0] * 20) + samples("new", 2.0, 2.0, 2.0)) == pytest.approx(4.0)


@given(st.lists(DENSITY))
def test_a_result_lies_between_the_samples_and_the_default(values: list[float]) -> None:
    found = estimate(samples("me", *values))
    assert (found is None) == (len(values) < ENOUGH)
    if found is not None:
        assert min(*values, DEFAULT_BYTES_PER_TOKEN) <= found <= max(values) + 1e-9


@given(st.permutations(samples("a", 4, 4, 5, 5) + samples("b", *[2.0] * 5) + samples("c", 3, 6, 6)))
def test_the_order_of_samples_does_not_matter(shuffled: list[Sample]) -> None:
    assert estimate(shuffled) == estimate(sorted(shuffled))


# One odd answer, one odd client

HONEST = st.floats(LIKELY[0] + 0.01, LIKELY[1] - 0.01)


@given(st.lists(HONEST, min_size=SURE, max_size=40), DENSITY, st.booleans())
def test_one_odd_answer_stays_between_its_neighbours(
    honest: list[float], odd: float, of_a_stranger: bool
) -> None:
    found = estimate(samples("me", *honest) + samples("you" if of_a_stranger else "me", odd))
    ordered = sorted(honest)
    middle = len(ordered) // 2
    assert found is not None
    assert ordered[max(0, middle - 1)] - 1e-9 <= found <= ordered[min(len(ordered) - 1, middle)] + 1e-9 or (
        len(ordered) % 2 and ordered[middle - 1] - 1e-9 <= found <= ordered[middle + 1] + 1e-9
    )


@given(
    st.lists(st.lists(HONEST, min_size=SURE // 2, max_size=24), min_size=2, max_size=6),
    st.lists(DENSITY, min_size=1, max_size=300),
)
def test_one_odd_client_stays_within_the_other_estimates(
    clients: list[list[float]], odd: list[float]
) -> None:
    honest = [sample for number, values in enumerate(clients) for sample in samples(f"c{number}", *values)]
    voices = [median(values) for values in clients]
    found = estimate([*honest, *samples("odd", *odd)])
    assert found is not None
    assert min(voices) / ROOM - 1e-9 <= found <= max(voices) * ROOM + 1e-9


@given(HONEST, st.lists(DENSITY, min_size=1, max_size=300))
def test_one_odd_client_of_two_cannot_pass_the_default(honest: float, odd: list[float]) -> None:
    found = estimate(samples("me", *[honest] * SURE) + samples("odd", *odd))
    assert found is not None
    room = 1 + (AGREEMENT - 1) / 2 + 1e-9
    assert min(honest, DEFAULT_BYTES_PER_TOKEN) / room <= found <= max(honest, DEFAULT_BYTES_PER_TOKEN) * room


# Convergence


class Model:
    """A model of a true density, whose bills are as unsteady as those of real ones."""

    def __init__(self, bytes_per_token: float, seed: int) -> None:
        self.bytes_per_token = bytes_per_token
        self._random = random.Random(seed)
        self._message_tokens = self._random.choice([0, 3, 4, 5])
        self._prompt_tokens = self._random.choice([0, 1, 3, 8])

    def answer(self, client: str) -> Sample | None:
        """Asks something of some length and learns from the bill; one in twenty is odd."""
        count = self._random.choice([1, 1, 2, 3, 5, 9])
        texts = [round(self._random.lognormvariate(math.log(900), 0.8)) for _ in range(count)]
        unlike = math.exp(self._random.gauss(0, 0.1))
        tokens = sum(texts) / (self.bytes_per_token * unlike)
        tokens += self._prompt_tokens + self._message_tokens * count
        if self._random.random() < 0.05:
            tokens *= self._random.choice([0.2, 5])
        size = Size(sum(texts), PROMPT_TOKENS + MESSAGE_TOKENS * count)
        return sample_of(
            model="a/b", answered="a/b", client=client, size=size, usage={"prompt_tokens": round(tokens)}
        )

    def error(self, found: float | None) -> float:
        """By what share an estimate is wrong."""
        return abs((found or DEFAULT_BYTES_PER_TOKEN) / self.bytes_per_token - 1)


def ask(model: Model, clients: Sequence[int]) -> list[Sample]:
    """Lets clients ask as many times each as the list says."""
    answers = [model.answer(f"client {number}") for number, times in enumerate(clients) for _ in range(times)]
    return [sample for sample in answers if sample is not None]


@pytest.mark.parametrize("truth", [1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0])
@pytest.mark.parametrize(
    "clients",
    [
        [20],
        [10, 10],
        [15, 5],
        [19, 1],
        [7, 7, 6],
        [18, 1, 1],
        [5] * 4,
        [2] * 10,
        [8, 4, 3, 2, 1, 1, 1],
        [1] * 20,
    ],
    ids=str,
)
def test_twenty_answers_are_enough_from_any_clients(clients: list[int], truth: float) -> None:
    errors = sorted(
        model.error(estimate(ask(model, clients))) for model in (Model(truth, seed) for seed in range(200))
    )
    assert errors[100] < 0.04
    assert errors[195] < 0.10  # 98 of 100


@pytest.mark.parametrize("truth", [1.5, 2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("odd", [1.0, 1.5, 2.0, 4.0, 6.0, 8.0])
@pytest.mark.parametrize("clients", [[10, 10], [7, 7, 6], [5] * 4, [1] * 20 + [20]], ids=str)
def test_one_odd_client_among_several_does_not_count(clients: list[int], odd: float, truth: float) -> None:
    errors = []
    for seed in range(100):
        model = Model(truth, seed)
        errors.append(model.error(estimate(ask(model, clients) + samples("odd", *[odd] * 24))))
    assert sorted(errors)[94] < 0.13


def test_the_result_estimates_the_next_prompt() -> None:
    learning = [learned(round(1000 / 4.5) + 7, Size(1000, 14)) for _ in range(20)]
    density = estimate([sample for sample in learning if sample is not None]) or 0
    for size in (300, 1000, 30_000):
        assert estimate_prompt([say("x" * size)], {}, density) == pytest.approx(size / 4.5 + 7, rel=0.1)
