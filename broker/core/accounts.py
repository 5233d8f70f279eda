"""Who may spend what: the values that the accounts are kept in. Money is nano-USD, an integer; no I/O.

An account is a client's, or that of everyone together, for one UTC day. What a generation may cost at worst is
reserved at the claim and settled at the end with what it cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.core.pricing import completion_of, count_of, detail_of, to_usd

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Quotas:
    """What one client, and everyone together, may have. 0 is no limit, but for the numbers of streams.

    Attributes:
        waiting: sessions of a client that are prepared and not yet claimed.
        streams: generations of a client at once.
        daily_tokens: of a client.
        daily_cost: of a client, nano-USD.
        total_daily_cost: of everyone together, nano-USD.
        waiting_bytes: of a client's waiting sessions, as their requests are stored.
        total_waiting_bytes: of everyone's; above half of them, a client may hold a sixteenth of what is left.
    """

    waiting: int
    streams: int
    daily_tokens: int
    daily_cost: int
    total_daily_cost: int
    waiting_bytes: int = 8 * 1024 * 1024
    total_waiting_bytes: int = 256 * 1024 * 1024

    @property
    def limit_cost(self) -> bool:
        """Whether any budget of money is on, so that prices matter."""
        return self.daily_cost > 0 or self.total_daily_cost > 0


class WorstCase(NamedTuple):
    """The most that a request can take: prompt and output tokens together, and nano-USD."""

    tokens: int
    cost: int


class Usage(NamedTuple):
    """What a generation took.

    Attributes:
        prompt, completion: tokens; ``cached`` are part of the first, ``reasoning`` of the second.
        cost: nano-USD; None where nobody knows.
        estimated: it is our own count, because the upstream told no usage.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    cost: int | None = 0
    estimated: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt + self.completion


def beyond_limits(worst: WorstCase, quotas: Quotas) -> list[dict[str, Any]]:
    """Return what is wrong with a request that no budget can ever cover, as details of a 422; empty if nothing is.

    Each detail has both figures: ``worstCase`` and ``limit``, in tokens or in USD.
    """
    found = []
    if 0 < quotas.daily_tokens < worst.tokens:
        found.append(_beyond("tokens", worst.tokens, quotas.daily_tokens, "of a day"))
    for limit, whose in (
        (quotas.daily_cost, "of a day"),
        (quotas.total_daily_cost, "of all clients of a day"),
    ):
        if 0 < limit < worst.cost:
            found.append(_beyond("USD", to_usd(worst.cost), to_usd(limit), whose))
    return found


def _beyond(unit: str, worst: float, limit: float, whose: str) -> dict[str, Any]:
    sentence = f"This request may take {worst} {unit}, and the whole budget {whose} is {limit} {unit}."
    return {"field": "max_tokens", "message": sentence, "worstCase": worst, "limit": limit}


def usage_at_worst(worst: WorstCase) -> Usage:
    """What to book where nothing is known any more of a generation that ran: all that it may have taken."""
    return Usage(prompt=worst.tokens, cost=worst.cost or None, estimated=True)


def usage_of(usage: Mapping[str, Any], cost: int | None, *, estimated: bool) -> Usage:
    """Read an upstream's usage, whatever it holds."""
    prompt = count_of(usage.get("prompt_tokens")) or 0
    completion = completion_of({**usage, "prompt_tokens": prompt}) or 0
    return Usage(
        prompt,
        completion,
        min(detail_of(usage, "prompt_tokens_details", "cached_tokens"), prompt),
        min(detail_of(usage, "completion_tokens_details", "reasoning_tokens"), completion),
        cost,
        estimated,
    )
