"""What tests of money share: a list of prices, and the accounts as Redis holds them."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio import Redis

NANO = 1_000_000_000
MODEL = "scripted/model-1"
PRICE = 1000
"""Nano-USD of one token, prompt or completion, of the first model."""


def price_list(**others: Any) -> bytes:
    """The body of GET /models: the first model, and others by their names with their `pricing`."""
    prices = {MODEL: {"prompt": "0.000001", "completion": "0.000001"}, **others}
    entries = [
        {"id": name, "context_length": 100_000, **({"pricing": pricing} if pricing is not None else {})}
        for name, pricing in prices.items()
    ]
    return json.dumps({"data": entries}).encode()


class Ledger(NamedTuple):
    """Everyone's account on all days together: tokens, and nano-USD."""

    requests: int = 0
    estimated: int = 0
    spent_tokens: int = 0
    spent_cost: int = 0
    reserved_tokens: int = 0
    reserved_cost: int = 0


async def ledger(redis: Redis) -> Ledger:
    """Everyone's account as it is now."""
    [key] = await redis.keys("*:{accounts}:everyone") or [b"none"]
    sums = dict.fromkeys(Ledger._fields, 0)
    fields: Any = await redis.hgetall(key)
    for field, value in fields.items():
        name = field.decode().partition(":")[2]
        if name in sums:
            sums[name] += int(value)
    return Ledger(**sums)


async def slots(redis: Redis) -> int:
    """Slots that are held, by whomever."""
    return sum([await redis.zcard(key) for key in await redis.keys("*:{accounts}:slots:*")])


async def open_reservations(redis: Redis) -> int:
    """Reservations that are neither settled nor given back."""
    return sum([await redis.zcard(key) for key in await redis.keys("*:{accounts}:open")])


async def unasked(redis: Redis) -> int:
    """Estimates for whose truth the upstream is still to be asked."""
    return sum([await redis.zcard(key) for key in await redis.keys("*:{accounts}:estimates")])


async def until(happened: Callable[[], Awaitable[object]], within: float = 5.0) -> None:
    """Wait until something has happened that only Redis knows."""
    async with asyncio.timeout(within):
        while not await happened():  # noqa: ASYNC110 - nothing of ours tells when it happens
            await asyncio.sleep(0.02)
