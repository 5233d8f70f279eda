"""One answer while it is written: the form of its chunks, and the count of its tokens and their cost.

The scripts decide what is written and when. Here the answer is a chat completion; `responses` has the same in the
Responses dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from broker.rehearsal.steps import Reply, Script, Send, event

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
    """An answer that is being written.

    Attributes:
        model: the id in the chunks.
        id: the id of the generation.
        created: seconds since 1970, for the chunks.
        room: the most tokens that it may have.
        attempt: 1 when this question comes for the first time, 2 when it comes again, ...
        cut: True if the text did not fit into ``room``.
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
        """Yield the tokens while the answer has room, and count them."""
        for token in tokens:
            if self.completion_tokens >= self.room:
                self.cut = True
                return
            self.completion_tokens += 1
            yield token

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None, **more: Any) -> Send:
        """Return a chunk with one choice; ``more`` is added beside ``choices``."""
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": finish_reason,
            "native_finish_reason": NATIVE_REASONS.get(finish_reason or "", finish_reason),
            "logprobs": None,
        }
        return event({**self.head("chat.completion.chunk"), "choices": [choice], **more})

    def content(self, token: str) -> Send:
        """Return a chunk with a piece of text."""
        return self.chunk({"role": "assistant", "content": token})

    def refusal(self, token: str) -> Send:
        """Return a chunk with a piece of a refusal."""
        return self.chunk({"role": "assistant", "content": None, "refusal": token})

    def thought(self, token: str) -> Send:
        """Return a chunk with a piece of reasoning."""
        detail = {"type": "reasoning.text", "text": token, "signature": None, "format": "unknown", "index": 0}
        delta = {"role": "assistant", "content": "", "reasoning": token, "reasoning_details": [detail]}
        return self.chunk(delta)

    def call(self, index: int, call_id: str, name: str) -> Send:
        """Return the chunk that begins a call of a function."""
        function = {"name": name, "arguments": ""}
        first = {"index": index, "id": call_id, "type": "function", "function": function}
        return self.chunk({"role": "assistant", "content": None, "tool_calls": [first]})

    def call_piece(self, index: int, piece: str) -> Send:
        """Return a chunk with a piece of the arguments of a call."""
        return self.chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})

    def cited(self, annotations: list[dict[str, Any]]) -> Send:
        """Return a chunk with the pages that the text leans on."""
        return self.chunk({"role": "assistant", "content": "", "annotations": annotations})

    def finish(self, reason: str = "stop", *, last: bool = False, **more: Any) -> Send:
        """Return the chunk with the finish reason, which is ``length`` where the text was cut.

        Args:
            reason: the finish reason.
            last: no bill follows. Matters in dialects that end with their bill.
            more: is added beside ``choices``.
        """
        del last
        self.finish_reason = "length" if self.cut and reason != "error" else reason
        return self.chunk({"role": "assistant", "content": ""}, self.finish_reason, **more)

    def bill(self) -> Send:
        """Return the chunk without choices that ends a stream with its usage."""
        return event({**self.head("chat.completion.chunk"), "choices": [], "usage": self.usage()})

    def whole(self, text: str) -> Reply:
        """Return the answer as one JSON document."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": self.finish_reason,
            "native_finish_reason": self.finish_reason,
            "logprobs": None,
        }
        body = {**self.head("chat.completion"), "choices": [choice], "usage": self.usage()}
        return Reply(200, orjson.dumps(body), headers={"X-Generation-Id": self.id})

    def head(self, kind: str) -> dict[str, Any]:
        """Return the first members of every chunk, and of a completion."""
        return {
            "id": self.id,
            "provider": PROVIDER,
            "model": self.model,
            "object": kind,
            "created": self.created,
        }

    def costs(self) -> tuple[Decimal, Decimal]:
        """Return the cost of the prompt and of the tokens so far, in USD."""
        prompt = Decimal(self.prices.prompt) * self.ask.prompt_tokens
        return prompt, Decimal(self.prices.completion) * self.completion_tokens

    def usage(self) -> dict[str, Any]:
        """Return the ``usage`` object as of now."""
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
"""A function that returns the script for an answer."""
