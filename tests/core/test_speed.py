"""Tokens a second: what teaches, and what many samples say together."""

from __future__ import annotations

from typing import Any

import pytest

from broker.core.bytes_per_token import Sample
from broker.core.speed import ENOUGH, LEAST, MOST, estimate_speed, speed_of


def usage(completion: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": 10, "completion_tokens": completion, **more}


def learned(usage: Any, seconds: float | None) -> float | None:
    sample = speed_of(model="a/b:nitro", client="me", usage=usage, seconds=seconds)
    assert sample is None or (sample.model, sample.client) == ("a/b", "me")
    return None if sample is None else sample.value


def test_an_answer_gives_tokens_by_seconds() -> None:
    assert learned(usage(500), 10.0) == 50.0


def test_hidden_reasoning_was_written_too() -> None:
    assert learned(usage(2, total_tokens=1012), 10.0) == 100.2


@pytest.mark.parametrize(
    ("usage", "seconds"),
    [
        (None, 10.0),
        ({}, 10.0),
        (usage(500), None),
        (usage(500), 0.0),
        (usage(3), 10.0),
        (usage(0), 10.0),
        ({"prompt_tokens": 1, "completion_tokens": "many"}, 10.0),
    ],
)
def test_an_answer_without_facts_gives_no_sample(usage: Any, seconds: float | None) -> None:
    assert learned(usage, seconds) is None


def test_a_sample_is_bounded() -> None:
    assert learned(usage(1_000_000), 0.2) == MOST
    assert learned(usage(20), 600.0) == LEAST


def samples(client: str, *values: float) -> list[Sample]:
    return [Sample("a/b", client, value) for value in values]


def test_too_few_samples_say_nothing() -> None:
    assert estimate_speed([]) is None
    assert estimate_speed(samples("me", *[50.0] * (ENOUGH - 1))) is None


def test_one_odd_answer_does_not_count() -> None:
    assert estimate_speed(samples("me", 50.0, 52.0, 3000.0)) == 52.0
    assert estimate_speed(samples("me", 50.0, 52.0, 0.5)) == 50.0


@pytest.mark.parametrize("odd", [0.5, 3000.0])
def test_one_odd_client_does_not_count_however_much_it_asks(odd: float) -> None:
    others = samples("a", 50.0, 50.0, 50.0) + samples("b", 51.0, 51.0, 51.0)
    assert estimate_speed(samples("odd", *[odd] * 24) + others) in (50.0, 51.0)


def test_clients_with_few_samples_speak_together() -> None:
    few = [sample for client in "abc" for sample in samples(client, 40.0)]
    assert estimate_speed(few) == 40.0
