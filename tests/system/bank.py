"""What the tests of money among workers share: a cluster whose upstream has prices, and when everything is settled."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from broker.store.accounts import ASKED_AFTER, LEASE
from tests.money import due_records, ledger, open_reservations, price_list, slots
from tests.system.cluster import running_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

    from tests.system.cluster import Cluster

SETTLED = LEASE + 30
"""Seconds within which the sessions of a dead worker are settled by another."""


ASKED = 30 + ASKED_AFTER
"""Seconds within which another worker has asked about an estimate: its third look is 30 s after the end."""


@asynccontextmanager
async def running_bank(
    workers: int = 2, *, keeps: bool = False, key: str = "", **settings: Any
) -> AsyncIterator[tuple[Cluster, Redis]]:
    """A cluster whose upstream has prices, which every worker knows when the block begins.

    Args:
        workers: how many.
        keeps: their Valkey survives a power cut.
        key: an API key of a client, where the settings ask for one.
        settings: as those of a cluster.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        running_cluster(workers, keeps=keeps, models=price_list(), **settings) as cluster,
        cluster.redis() as redis,
    ):
        for worker in cluster.workers:
            answer = await cluster.ask("GET", worker, "/models", headers=headers)  # waits for the list
            assert answer.status == 200, answer
        yield cluster, redis


async def all_closed(redis: Redis) -> bool:
    account = await ledger(redis)
    return (
        account.reserved_tokens == account.reserved_cost == 0
        and await open_reservations(redis) == await slots(redis) == 0
    )


async def all_settled(redis: Redis) -> bool:
    """Return True if no generation has a slot or an open reservation; estimates may keep a part of theirs."""
    return await open_reservations(redis) == await slots(redis) == 0


async def all_asked(redis: Redis) -> bool:
    return await due_records(redis) == 0
