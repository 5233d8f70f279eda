"""How much pending requests may take in Redis: those of a client, and all together."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from broker.core.accounts import Quotas, WorstCase
from broker.core.errors import Overloaded, TooManyStreams
from broker.store.connection import Store
from broker.store.pending import PendingStore

FREE = Quotas(pending=1000, streams=1000, daily_tokens=0, daily_cost=0, total_daily_cost=0)


def pending_in(store: Store, *, own: int = 10**9, total: int = 10**9, ttl: int = 600) -> PendingStore:
    quotas = replace(FREE, pending_bytes=own, total_pending_bytes=total)
    return PendingStore(store, quotas, session_ttl=ttl)


async def wait(pending: PendingStore, client: str, size: int) -> str:
    session = str(uuid4())
    await pending.admit(client, session, WorstCase(1, 0), stored=size)
    return session


async def totals(store: Store) -> dict[str, int]:
    """The bytes that Redis counts, by client and for all. Each must be the sum of what it has of the sessions."""
    found: dict[str, int] = {}
    keys: Any = await store.redis.keys("*:pending_sizes:*")
    for key in keys:
        fields: Any = await store.redis.hgetall(key.decode())
        sizes = {name.decode(): value.decode() for name, value in fields.items()}
        total = int(sizes.pop("total"))
        of_clients = {name: int(sizes.pop(name)) for name in list(sizes) if name.startswith("of:")}
        assert total == sum(int(size.split(" ")[0]) for size in sizes.values())
        assert total == sum(of_clients.values())
        members: Any = await store.redis.zrange(key.decode().replace("pending_sizes", "pending"), 0, -1)
        assert {member.decode() for member in members} == sizes.keys()
        found["" if b"{total}" in key else key.decode().rpartition(":")[2]] = total
    return found


async def test_the_bytes_of_a_clients_pending_sessions_are_bounded(store: Store) -> None:
    pending = pending_in(store, own=1000)
    await wait(pending, "c", 600)
    with pytest.raises(TooManyStreams) as caught:
        await wait(pending, "c", 401)
    assert caught.value.retry_after is not None
    await wait(pending, "c", 400)
    with pytest.raises(TooManyStreams):
        await wait(pending, "c", 1)
    await wait(pending, "d", 1000)
    assert await totals(store) == {"c": 1000, "d": 1000, "": 2000}


async def test_one_that_is_larger_than_the_bound_is_refused(store: Store) -> None:
    with pytest.raises(TooManyStreams):
        await wait(pending_in(store, own=10), "c", 11)


async def test_a_session_that_is_claimed_or_cancelled_makes_room(store: Store) -> None:
    pending = pending_in(store, own=1000)
    first = await wait(pending, "c", 600)
    await wait(pending, "c", 300)
    for _ in range(2):  # it is done again where a reply is lost
        await pending.forget("c", first)
    assert await totals(store) == {"c": 300, "": 300}
    await wait(pending, "c", 700)


async def test_a_session_that_expires_makes_room(store: Store) -> None:
    pending = pending_in(store, own=1000, ttl=600)
    await wait(pending, "c", 100)
    session = await wait(pending, "c", 900)
    await wait(pending, "d", 100)
    with pytest.raises(TooManyStreams):
        await wait(pending, "c", 800)
    now = await store.now_ms()
    keys: Any = await store.redis.keys("*:pending:*")
    for key in keys:
        expires: Any = await store.redis.zscore(key.decode(), session)
        assert expires is None or now < expires <= now + 600_000
        await store.redis.zadd(key.decode(), {session: now}, xx=True)  # as if its time had passed
    await wait(pending, "c", 800)
    assert await totals(store) == {"c": 900, "d": 100, "": 1000}


async def test_the_same_session_asked_for_again_counts_once(store: Store) -> None:
    pending = pending_in(store, own=1000)
    for _ in range(3):
        await pending.admit("c", "s", WorstCase(1, 0), stored=600)
    assert await totals(store) == {"c": 600, "": 600}


async def test_a_redis_that_came_back_empty_starts_from_nothing(store: Store) -> None:
    pending = pending_in(store, own=1000)
    first = await wait(pending, "c", 1000)
    await store.redis.flushall()
    await pending.forget("c", first)
    await wait(pending, "c", 1000)
    assert await totals(store) == {"c": 1000, "": 1000}


async def test_the_bytes_of_all_pending_sessions_are_bounded(store: Store) -> None:
    pending = pending_in(store, total=1600)
    await wait(pending, "a", 400)
    await wait(pending, "b", 400)  # half of it is taken, and not more
    await wait(pending, "c", 1)
    with pytest.raises(Overloaded) as caught:
        await wait(
            pending, "c", 50
        )  # with the one that it has more than a sixteenth of the 799 that are left
    assert caught.value.retry_after is not None
    await wait(pending, "c", 48)
    with pytest.raises(Overloaded):
        await wait(pending, "a", 1)
    await wait(pending, "d", 46)
    assert (await totals(store))[""] == 400 + 400 + 49 + 46


async def test_small_requests_pass_while_large_ones_are_refused(store: Store) -> None:
    pending = pending_in(store, total=100_000)
    await wait(pending, "greedy", 60_000)
    for n in range(200):
        await wait(pending, f"client {n}", 10)
        with pytest.raises(Overloaded):
            await wait(pending, f"client {n}", 3000)
    with pytest.raises(Overloaded):
        await wait(pending, "new", 100_000)


async def test_sessions_prepared_at_once_pass_while_there_is_room(store: Store) -> None:
    pending = pending_in(store, own=1000)
    outcomes = await asyncio.gather(*[wait(pending, "c", 100) for _ in range(50)], return_exceptions=True)
    assert sum(isinstance(outcome, str) for outcome in outcomes) == 10
    assert await totals(store) == {"c": 1000, "": 1000}


async def test_the_totals_are_right_after_any_order_of_steps(store: Store) -> None:
    chance = random.Random(7)
    pending = pending_in(store, own=20_000, total=100_000)
    waiting: list[tuple[str, str, int]] = []
    for _ in range(400):
        client, size = f"c{chance.randrange(8)}", chance.choice([0, 1, 300, 5000, 2**20])
        if waiting and chance.random() < 0.45:
            client, session, _ = waiting.pop(chance.randrange(len(waiting)))
            await pending.forget(client, session)
            continue
        with suppress(TooManyStreams, Overloaded):
            waiting.append((client, await wait(pending, client, size), size))
    expected: dict[str, int] = {}
    for client, _, size in waiting:
        expected[client] = expected.get(client, 0) + size
        expected[""] = expected.get("", 0) + size
    found = await totals(store)
    assert {client: total for client, total in found.items() if total} == {
        client: total for client, total in expected.items() if total
    }


async def test_keys_of_pending_sessions_have_a_time_to_live(store: Store) -> None:
    await wait(pending_in(store, ttl=60), "c", 10)
    keys = await store.redis.keys("*pending*")
    assert len(keys) == 4
    assert all([0 < await store.redis.ttl(key) <= 60 for key in keys])
