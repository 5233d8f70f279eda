"""The secret that clients are named with: one for all workers, and the oldest counts."""

from __future__ import annotations

import asyncio

from broker.store.connection import Store
from broker.store.names import NameStore


async def test_all_workers_agree_on_the_secret_of_the_first(store: Store) -> None:
    first = await NameStore(store).agree(None)
    assert {await NameStore(store).agree(None) for _ in range(3)} == {first}
    assert await NameStore(store).agree(first) == first
    assert len(first.partition(":")[2]) == 64


async def test_workers_that_come_at_once_agree_too(store: Store) -> None:
    assert len(set(await asyncio.gather(*[NameStore(store).agree(None) for _ in range(20)]))) == 1


async def test_the_secret_is_kept_for_ever(store: Store) -> None:
    await NameStore(store).agree(None)
    [key] = await store.redis.keys("*")
    assert await store.redis.ttl(key) == -1


async def test_a_worker_restores_it_when_redis_came_back_empty(store: Store) -> None:
    first = await NameStore(store).agree(None)
    await store.redis.flushall()
    assert await NameStore(store).agree(first) == first
    assert await NameStore(store).agree(None) == first


async def test_the_older_one_counts_where_a_new_worker_was_quicker(store: Store) -> None:
    old = await NameStore(store).agree(None)
    await store.redis.flushall()
    await asyncio.sleep(0.002)
    new = await NameStore(store).agree(None)
    assert new != old
    assert await NameStore(store).agree(old) == old
    assert await NameStore(store).agree(new) == old
