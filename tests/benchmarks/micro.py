"""What the micro-benchmarks share: the type of pytest-benchmark's fixture, and examples of realistic size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import orjson

CHUNK = (
    b'{"id":"gen-1760000000-abcdefghijklmnopqrst","provider":"Bench","model":"bench/model",'
    b'"object":"chat.completion.chunk","created":1760000000,"choices":[{"index":0,"delta":{"role":"assistant",'
    b'"content":" token"},"finish_reason":null,"native_finish_reason":null,"logprobs":null}]}'
)
"""A usual chunk of OpenRouter's."""

COMMENT = b": OPENROUTER PROCESSING\n\n"


class Benchmark(Protocol):
    """The fixture `benchmark`."""

    extra_info: dict[str, Any]

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function many times, and return its last result."""

    def pedantic(
        self,
        target: Callable[..., Any],
        *,
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
        rounds: int,
    ) -> Any:
        """Call a function so many times, each with what `setup` has made for it outside of the measured time."""


def body_of(turns: int, size: int = 400) -> bytes:
    """Return the body of a chat request: a system message and so many turns of two messages of this size."""
    text = "words of a conversation " * (size // 24)
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for _ in range(turns):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    messages.append({"role": "user", "content": "And then?"})
    return orjson.dumps(
        {"model": "bench/model", "messages": messages, "temperature": 0.7, "max_tokens": 1000}
    )
