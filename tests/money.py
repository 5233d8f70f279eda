"""Helpers for tests of money: a list of prices, and the accounts in Redis."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.store.accounts import ESTIMATE_BUCKETS
from broker.store.buckets import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio import Redis

    from broker.store.accounts import AccountStore, Estimate

NANO = 1_000_000_000
MODEL = "scripted/model-1"
PRICE = 1000
"""Nano-USD of one token, prompt or completion, of the first model."""


def price_list(**others: Any) -> bytes:
    """Return the body of GET /models: the first model, and others by their names with their `pricing`."""
    prices = {MODEL: {"prompt": "0.000001", "completion": "0.000001"}, **others}
    entries = [
        {"id": name, "context_length": 100_000, **({"pricing": pricing} if pricing is not None else {})}
        for name, pricing in prices.items()
    ]
    return json.dumps({"data": entries}).encode()


class Ledger(NamedTuple):
    """The sums of accounts over all days or all months, in tokens and nano-USD. Months have no tokens."""

    requests: int = 0
    estimated: int = 0
    spent_tokens: int = 0
    spent_cost: int = 0
    reserved_tokens: int = 0
    reserved_cost: int = 0


CLIENTS = "*:{a*}:account:*"
TOTAL = "*:{total}:account:all"


async def ledger(redis: Redis, accounts: str = CLIENTS, *, months: bool = False) -> Ledger:
    """Return the sum of the accounts of all clients, or of those whose keys match.

    It is that of their days, or of their months.
    """
    sums = dict.fromkeys(Ledger._fields, 0)
    for key in await redis.keys(accounts):
        fields: Any = await redis.hgetall(key)
        for field, value in fields.items():
            period, _, name = field.decode().partition(":")
            if name in sums and ("-" in period) == months:
                sums[name] += int(value)
    return Ledger(**sums)


async def slots(redis: Redis) -> int:
    """Return the number of slots that are taken, of all clients."""
    return sum([await redis.scard(key) for key in await redis.keys("*:{a*}:slots:*")])


async def open_reservations(redis: Redis) -> int:
    """Return the number of reservations that are neither settled nor given back."""
    return sum([await redis.zcard(key) for key in await redis.keys("*:{a*}:open")])


async def due_records(redis: Redis) -> int:
    """Return the number of estimates whose record is still to be fetched."""
    return sum([await redis.zcard(key) for key in await redis.keys("*:{a*}:estimates")])


async def let_time_pass(redis: Redis, name: str) -> None:
    """Make every member of these sets due: `open` or `estimates`, in all buckets."""
    for key in await redis.keys(f"*:{{a*}}:{name}"):
        members: Any = await redis.zrange(key, 0, -1)
        await redis.zadd(key, dict.fromkeys(members, 1))


async def due_estimates(accounts: AccountStore, limit: int = 10_000) -> list[Estimate]:
    """Return the estimates that are due, of all buckets."""
    rounds = BUCKETS // ESTIMATE_BUCKETS
    return [each for _ in range(rounds) for each in await accounts.due_estimates(limit)]


async def until(happened: Callable[[], Awaitable[object]], within: float = 20.0) -> None:
    """Wait until a condition that only Redis knows is true."""
    async with asyncio.timeout(within):
        while not await happened():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.02)
