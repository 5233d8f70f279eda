"""Micro-benchmarks of what a body of /prepare passes through, without Redis."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from broker.core.chat import ChatRequest, parse_chat
from broker.core.checking import RequestRules
from broker.core.document import parse_json
from broker.core.fitting import FitRules, FittedRequest, ModelLimits, fit
from broker.core.trimming import droppable_units, trim
from tests.benchmarks.micro import Benchmark, body_of

RULES = RequestRules(default_model=None, extra_parameters=(), allowed_models=("*",), max_messages=500)
FIT = FitRules(
    max_prompt_tokens=0, max_output_tokens=4096, switch_off_compression=True, user="0123456789abcdef"
)
TURNS = [0, 10, 100]


def chat(turns: int) -> ChatRequest:
    """A valid request."""
    return parse_chat(parse_json(body_of(turns)), RULES)


@pytest.mark.parametrize("turns", TURNS)
def test_parse_a_body(benchmark: Benchmark, turns: int) -> None:
    assert benchmark(parse_json, body_of(turns))


@pytest.mark.parametrize("turns", TURNS)
def test_validate_a_request(benchmark: Benchmark, turns: int) -> None:
    document = orjson.loads(body_of(turns))

    def validate() -> ChatRequest:
        return parse_chat(dict(document), RULES)

    assert len(benchmark(validate).messages) == 2 * turns + 2


@pytest.mark.parametrize("turns", TURNS)
def test_fit_a_request_that_stays_whole(benchmark: Benchmark, turns: int) -> None:
    fitted: FittedRequest = benchmark(fit, chat(turns), {"bench/model": ModelLimits(200_000, 8192)}, FIT)
    assert fitted.dropped == 0


def test_fit_a_request_that_is_trimmed(benchmark: Benchmark) -> None:
    fitted: FittedRequest = benchmark(fit, chat(100), {"bench/model": ModelLimits(8192, 4096)}, FIT)
    assert fitted.dropped > 0


def test_trim_messages(benchmark: Benchmark) -> None:
    messages: list[dict[str, Any]] = chat(100).messages
    tokens = [100] * len(messages)

    def drop() -> list[int]:
        return trim(droppable_units(messages), tokens, 5000)

    assert len(benchmark(drop)) == 50


@pytest.mark.parametrize("turns", TURNS)
def test_encode_the_body_for_the_upstream(benchmark: Benchmark, turns: int) -> None:
    assert benchmark(orjson.dumps, fit(chat(turns), {}, FIT).body)
