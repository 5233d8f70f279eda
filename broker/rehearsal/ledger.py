"""What the service remembers between requests: past generations, and how often questions came.

Both keep the last thousand entries and drop the oldest first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.rehearsal.answer import PROVIDER, Answer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

KEPT = 1000


class _Generation(NamedTuple):
    told_from: float
    entry: Mapping[str, Any]


class Generations:
    """The generations that GET /generation knows.

    The real service writes its records a moment after the end; ``delay`` is that time in seconds.
    """

    def __init__(self, delay: float, kept: int = KEPT) -> None:
        self._delay = delay
        self._kept = kept
        self._generations: OrderedDict[str, _Generation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._generations)

    def record(self, entry: Mapping[str, Any], now: float) -> None:
        """Store a generation that ended now."""
        self._generations[entry["id"]] = _Generation(now + self._delay, entry)
        if len(self._generations) > self._kept:
            self._generations.popitem(last=False)

    def find(self, generation_id: str, now: float) -> Mapping[str, Any] | None:
        """Return the entry of a generation, once the delay since its end is over; None before."""
        found = self._generations.get(generation_id)
        return found.entry if found is not None and found.told_from <= now else None


class Attempts:
    """Counts how often each question came."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def count(self, fingerprint: bytes) -> int:
        """Count this question, and return its number; 1 for a new question."""
        self._counts[fingerprint] = times = self._counts.pop(fingerprint, 0) + 1
        if len(self._counts) > self._kept:
            self._counts.popitem(last=False)
        return times


def generation_entry(
    answer: Answer, *, cancelled: bool, seconds: float, created_at: datetime
) -> dict[str, Any]:
    """Return the ``data`` of GET /generation; ``seconds`` is the duration of the answer."""
    cost = float(sum(answer.costs()))
    prompt_tokens = answer.ask.prompt_tokens
    return {
        "id": answer.id,
        "model": answer.model,
        "provider_name": PROVIDER,
        "streamed": answer.ask.stream,
        "cancelled": cancelled,
        "finish_reason": answer.finish_reason,
        "native_finish_reason": answer.finish_reason,
        "total_cost": cost,
        "usage": cost,
        "upstream_inference_cost": None,
        "cache_discount": None,
        "is_byok": False,
        "tokens_prompt": prompt_tokens,
        "tokens_completion": answer.completion_tokens,
        "native_tokens_prompt": prompt_tokens,
        "native_tokens_completion": answer.completion_tokens,
        "native_tokens_reasoning": answer.reasoning_tokens,
        "native_tokens_cached": 0,
        "latency": None,
        "generation_time": round(seconds * 1000),
        "created_at": created_at.isoformat(),
        "session_id": None,
        "external_user": answer.ask.user,
    }
