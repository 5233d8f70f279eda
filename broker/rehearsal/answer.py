"""One answer while it is written: the shape of its chunks, and the count of its tokens and their cost.

What is said and when is the scripts' business; this knows only how a chunk looks and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from broker.rehearsal.steps import Script, Send, event

if TYPE_CHECKING:
    from broker.rehearsal.ask import Ask

PROVIDER = "Rehearsal"
NATIVE_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "error": None}


@dataclass(frozen=True, slots=True)
class Prices:
    """USD per token, as the decimal strings of the catalog."""

    prompt: str
    completion: str


@dataclass(slots=True)
class Answer:
    """An answer on its way.

    Attributes:
        model: the id that the chunks name.
        id: the generation's.
        created: seconds since 1970, for the chunks.
        room: the most tokens that it may have.
        attempt: 1 when this question comes for the first time, 2 when it comes again, ...
        cut: the text did not fit into ``room``.
    """

    ask: Ask
    model: str
    prices: Prices
    id: str
    created: int
    room: int
    attempt: int = 1
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    finish_reason: str | None = None
    cut: bool = False

    def fit(self, tokens: Iterable[str]) -> Iterator[str]:
        """Counts the tokens as they pass, and stops where the answer's room ends."""
        for token in tokens:
            if self.completion_tokens >= self.room:
                self.cut = True
                return
            self.completion_tokens += 1
            yield token

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None, **more: Any) -> Send:
        """A chunk with one choice; ``more`` goes beside ``choices``."""
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": finish_reason,
            "native_finish_reason": NATIVE_REASONS.get(finish_reason or "", finish_reason),
            "logprobs": None,
        }
        return event({**self.head("chat.completion.chunk"), "choices": [choice], **more})

    def content(self, token: str) -> Send:
        """A chunk with a piece of text."""
        return self.chunk({"role": "assistant", "content": token})

    def finish(self, reason: str = "stop", **more: Any) -> Send:
        """The chunk that gives the finish reason, ``length`` in place of a good one where the text was cut."""
        self.finish_reason = "length" if self.cut and reason != "error" else reason
        return self.chunk({"role": "assistant", "content": ""}, self.finish_reason, **more)

    def bill(self) -> Send:
        """The chunk without choices that ends a stream with its usage."""
        return event({**self.head("chat.completion.chunk"), "choices": [], "usage": self.usage()})

    def head(self, kind: str) -> dict[str, Any]:
        """What every chunk, and a whole completion, begins with."""
        return {
            "id": self.id,
            "provider": PROVIDER,
            "model": self.model,
            "object": kind,
            "created": self.created,
        }

    def costs(self) -> tuple[Decimal, Decimal]:
        """USD for the prompt and for the tokens so far."""
        prompt = Decimal(self.prices.prompt) * self.ask.prompt_tokens
        return prompt, Decimal(self.prices.completion) * self.completion_tokens

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object as of now."""
        prompt, completion = self.costs()
        prompt_tokens = self.ask.prompt_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "cost": float(prompt + completion),
            "is_byok": False,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "cost_details": {
                "upstream_inference_cost": None,
                "upstream_inference_prompt_cost": float(prompt),
                "upstream_inference_completions_cost": float(completion),
            },
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


Play: TypeAlias = Callable[[Answer], Script]
"""A script before it is given the answer that it writes."""
