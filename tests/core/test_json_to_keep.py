"""What stays in memory takes about as much of it as it counts."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import orjson
import pytest

from broker.core.errors import SessionNotFound
from broker.core.events import cancelled_unseen, error_data, unknown_done
from broker.core.json_to_keep import json_to_keep
from broker.core.model_entry import parse_models
from broker.web.errors import json_response

if TYPE_CHECKING:
    from collections.abc import Callable

MANY = 200
OVERHEAD = 512  # bytes: an object and its place in a list, with room; what is not copied takes 4 KiB


def _answer() -> bytes:
    body = json_response({"sessionId": "x" * 36, "promptTokens": 12}).body
    assert isinstance(body, bytes)
    return body


def _entry() -> bytes:
    models = parse_models(b'{"data": [{"id": "a/b", "name": "B", "context_length": 4096}]}')
    return models.index["a/b"].entry


@pytest.mark.parametrize(
    "make",
    [
        lambda: json_to_keep({"a": 1}),
        lambda: unknown_done("stop"),
        lambda: cancelled_unseen(0.5),
        lambda: error_data(SessionNotFound()),
        _answer,
        _entry,
    ],
)
def test_json_that_is_kept_takes_no_more_memory_than_its_length(make: Callable[[], bytes]) -> None:
    make()
    tracemalloc.start()
    try:
        kept = [make() for _ in range(MANY)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / MANY < len(kept[0]) + OVERHEAD


def test_it_is_the_same_json() -> None:
    value = {"text": 'é"\n', "number": 1.5, "none": None, "of": [1, {}]}
    assert json_to_keep(value) == orjson.dumps(value)
    assert json_to_keep({"a": 1j}, default=str) == b'{"a":"1j"}'
    with pytest.raises(orjson.JSONEncodeError):
        json_to_keep({"a": 1j})
