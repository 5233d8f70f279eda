"""What an answer cost, once it is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

from broker.core.pricing import Prices, cost_of, to_usd
from broker.core.tokens import DEFAULT_BYTES_PER_TOKEN, estimate_text

if TYPE_CHECKING:
    from broker.core.answer import Answer
    from broker.store.sessions import Prepared

PricesOf = Callable[[str], Awaitable[Prices | None]]
"""Looks up what a model costs; None where that is not known. Does not wait for long."""


class Settlement(NamedTuple):
    """What is to be paid.

    Attributes:
        cost: USD, None where nobody knows.
        estimated: it rests on our own count, because the upstream told no usage.
    """

    cost: float | None
    estimated: bool


async def settle(answer: Answer, prepared: Prepared, prices_of: PricesOf) -> Settlement:
    """What an answer cost: the upstream's word, else its usage times the prices, else our estimate times them."""
    estimated = answer.usage is None
    usage = answer.usage or {
        "prompt_tokens": prepared.prompt_tokens,
        "completion_tokens": estimate_text(answer.text_bytes, DEFAULT_BYTES_PER_TOKEN),
    }
    nano = cost_of(usage, None)
    if nano is None:
        prices = await prices_of(answer.model or prepared.model) or await prices_of(prepared.model)
        nano = cost_of(usage, prices)
    return Settlement(None if nano is None else to_usd(nano), estimated)
