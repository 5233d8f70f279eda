"""The values of the accounts: quotas, worst cases and usage. Money is an integer of nano-USD; no I/O.

An account belongs to one client, or to all clients together. It counts by UTC days, that of a client by calendar
months too. The worst case of a generation is reserved at the claim, in the periods of the claim. The end settles the
reservation with the usage, in the same periods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.core.pricing import completion_of, count_of, detail_of, to_usd

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Quotas:
    """The limits of one client, and of all clients together. 0 means no limit, except for streams and sessions.

    Attributes:
        pending: prepared sessions of a client that are not claimed yet.
        streams: generations of a client at the same time.
        daily_tokens: tokens of a client a day.
        daily_cost: nano-USD of a client a day.
        monthly_cost: nano-USD of a client a calendar month.
        total_daily_cost: nano-USD of all clients together a day.
        pending_bytes: bytes of the stored requests of a client's pending sessions.
        total_pending_bytes: the same of all clients; above half of it, a client may add a sixteenth of the rest.
    """

    pending: int
    streams: int
    daily_tokens: int
    daily_cost: int
    total_daily_cost: int
    pending_bytes: int = 8 * 1024 * 1024
    total_pending_bytes: int = 256 * 1024 * 1024
    monthly_cost: int = 0

    @property
    def limit_cost(self) -> bool:
        """True if there is any budget in money, so that prices matter."""
        return self.daily_cost > 0 or self.monthly_cost > 0 or self.total_daily_cost > 0


class WorstCase(NamedTuple):
    """The most that a request can take: prompt and output tokens together, and nano-USD."""

    tokens: int
    cost: int


class Usage(NamedTuple):
    """The tokens and the cost of a generation.

    Attributes:
        prompt, completion: tokens; ``cached`` are part of the first, ``reasoning`` of the second.
        cost: nano-USD; None where it is unknown.
        estimated: counted by this broker, because the upstream sent no usage.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    cost: int | None = 0
    estimated: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt + self.completion


def beyond_limits(worst: WorstCase, quotas: Quotas, field: str = "max_tokens") -> list[dict[str, Any]]:
    """Return the details of a 422 for a request that no budget can ever cover; an empty list where there is one.

    Each detail has both figures, ``worstCase`` and ``limit``, in tokens or in USD.

    Args:
        worst: the worst case of the request.
        quotas: the limits of its client, and of all clients.
        field: the parameter that caps its answer.
    """
    found = []
    if 0 < quotas.daily_tokens < worst.tokens:
        found.append(_beyond(field, "tokens", worst.tokens, quotas.daily_tokens, "of a day"))
    for limit, whose in (
        (quotas.daily_cost, "of a day"),
        (quotas.monthly_cost, "of a month"),
        (quotas.total_daily_cost, "of all clients of a day"),
    ):
        if 0 < limit < worst.cost:
            found.append(_beyond(field, "USD", to_usd(worst.cost), to_usd(limit), whose))
    return found


def _beyond(field: str, unit: str, worst: float, limit: float, whose: str) -> dict[str, Any]:
    sentence = f"This request may take {worst} {unit}, and the whole budget {whose} is {limit} {unit}."
    return {"field": field, "message": sentence, "worstCase": worst, "limit": limit}


def usage_at_worst(worst: WorstCase) -> Usage:
    """Return the usage to book where nothing is known of a generation that ran: its worst case."""
    return Usage(prompt=worst.tokens, cost=worst.cost or None, estimated=True)


def usage_of(usage: Mapping[str, Any], cost: int | None, *, estimated: bool) -> Usage:
    """Return the `Usage` in an upstream's usage object, whatever that holds."""
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
