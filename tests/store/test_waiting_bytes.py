"""How much the requests that wait may take in Redis: those of a client, and all together."""

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
from broker.store.accounts import AccountStore, Reservation
from broker.store.connection import Store
from tests.money import until

FREE = Quotas(waiting=1000, streams=1000, daily_tokens=0, daily_cost=0, total_daily_cost=0)


def accounts(store: Store, *, own: int = 10**9, total: int = 10**9) -> AccountStore:
    return AccountStore(store, replace(FREE, waiting_bytes=own, total_waiting_bytes=total))


async def wait(usage_rows: AccountStore, client: str, size: int, *, ttl: int = 600) -> str:
    session = str(uuid4())
    await usage_rows.admit(client, session, WorstCase(1, 0), ttl=ttl, stored=size)
    return session


async def start(usage_rows: AccountStore, client: str, session: str) -> None:
    await usage_rows.reserve(Reservation(str(uuid4()), session, client, "m", WorstCase(1, 0)))


async def totals(store: Store) -> dict[str, int]:
    """The totals that Redis keeps, each of which must be the sum of what it has of the sessions."""
    found = {}
    keys: Any = await store.redis.keys("*waiting_bytes*")
    for key in keys:
        sizes: Any = await store.redis.hgetall(key.decode())
        total = int(sizes.pop(b"total"))
        assert total == sum(map(int, sizes.values()))
        waiting: Any = await store.redis.zrange(key.decode().replace("waiting_bytes", "waiting"), 0, -1)
        assert set(waiting) == sizes.keys()
        found[key.decode().partition("waiting_bytes")[2].lstrip(":")] = total
    return found


async def test_a_client_may_have_so_many_bytes_waiting(store: Store) -> None:
    usage_rows = accounts(store, own=1000)
    await wait(usage_rows, "c", 600)
    with pytest.raises(TooManyStreams) as caught:
        await wait(usage_rows, "c", 401)
    assert caught.value.retry_after is not None
    await wait(usage_rows, "c", 400)
    with pytest.raises(TooManyStreams):
        await wait(usage_rows, "c", 1)
    await wait(usage_rows, "d", 1000)
    assert await totals(store) == {"c": 1000, "d": 1000, "": 2000}


async def test_one_that_is_larger_than_all_that_may_wait_is_refused_too(store: Store) -> None:
    with pytest.raises(TooManyStreams):
        await wait(accounts(store, own=10), "c", 11)


@pytest.mark.parametrize("leave", ["claimed", "cancelled"])
async def test_what_waits_no_more_makes_room(store: Store, leave: str) -> None:
    usage_rows = accounts(store, own=1000)
    first = await wait(usage_rows, "c", 600)
    await wait(usage_rows, "c", 300)
    for _ in range(2):  # both happen twice where a reply is lost
        await (start(usage_rows, "c", first) if leave == "claimed" else usage_rows.forget("c", first))
    assert await totals(store) == {"c": 300, "": 300}
    await wait(usage_rows, "c", 700)


async def test_what_expires_makes_room(store: Store) -> None:
    usage_rows = accounts(store, own=1000)
    await wait(usage_rows, "c", 100)
    await wait(usage_rows, "c", 900, ttl=1)
    await wait(usage_rows, "d", 100)
    with pytest.raises(TooManyStreams):
        await wait(usage_rows, "c", 800)

    async def there_is_room() -> bool:
        try:
            await wait(usage_rows, "c", 800)
        except TooManyStreams:
            return False
        return True

    await until(there_is_room)
    assert await totals(store) == {"c": 900, "d": 100, "": 1000}


async def test_the_same_session_asked_for_again_counts_once(store: Store) -> None:
    usage_rows = accounts(store, own=1000)
    for _ in range(3):
        await usage_rows.admit("c", "s", WorstCase(1, 0), ttl=600, stored=600)
    assert await totals(store) == {"c": 600, "": 600}


async def test_a_redis_that_came_back_empty_starts_from_nothing(store: Store) -> None:
    usage_rows = accounts(store, own=1000)
    first = await wait(usage_rows, "c", 1000)
    await store.redis.flushall()
    await usage_rows.forget("c", first)
    await start(usage_rows, "c", first)
    await wait(usage_rows, "c", 1000)
    assert await totals(store) == {"c": 1000, "": 1000}


async def test_all_together_may_have_so_many_bytes_waiting(store: Store) -> None:
    usage_rows = accounts(store, total=1600)
    await wait(usage_rows, "a", 400)
    await wait(usage_rows, "b", 400)  # half of it is taken, and not more
    await wait(usage_rows, "c", 1)
    with pytest.raises(Overloaded) as caught:
        await wait(
            usage_rows, "c", 50
        )  # with the one that it has more than a sixteenth of the 799 that are left
    assert caught.value.retry_after is not None
    await wait(usage_rows, "c", 48)
    with pytest.raises(Overloaded):
        await wait(usage_rows, "a", 1)
    await wait(usage_rows, "d", 46)
    assert (await totals(store))[""] == 400 + 400 + 49 + 46


async def test_what_is_left_never_runs_out_for_those_who_want_little(store: Store) -> None:
    usage_rows = accounts(store, total=100_000)
    await wait(usage_rows, "greedy", 60_000)
    for n in range(200):
        await wait(usage_rows, f"client {n}", 10)
        with pytest.raises(Overloaded):
            await wait(usage_rows, f"client {n}", 3000)
    with pytest.raises(Overloaded):
        await wait(usage_rows, "new", 100_000)


async def test_of_many_at_once_so_many_pass_as_fit(store: Store) -> None:
    usage_rows = accounts(store, own=1000)
    outcomes = await asyncio.gather(*[wait(usage_rows, "c", 100) for _ in range(50)], return_exceptions=True)
    assert sum(isinstance(outcome, str) for outcome in outcomes) == 10
    assert await totals(store) == {"c": 1000, "": 1000}


async def test_the_totals_are_right_after_any_life(store: Store) -> None:
    chance = random.Random(7)
    usage_rows = accounts(store, own=20_000, total=100_000)
    waiting: list[tuple[str, str, int]] = []
    for _ in range(400):
        client, size = f"c{chance.randrange(8)}", chance.choice([0, 1, 300, 5000, 2**20])
        if waiting and chance.random() < 0.45:
            client, session, _ = waiting.pop(chance.randrange(len(waiting)))
            await (
                start(usage_rows, client, session)
                if chance.random() < 0.5
                else usage_rows.forget(client, session)
            )
            continue
        with suppress(TooManyStreams, Overloaded):
            waiting.append((client, await wait(usage_rows, client, size), size))
    expected: dict[str, int] = {}
    for client, _, size in waiting:
        expected[client] = expected.get(client, 0) + size
        expected[""] = expected.get("", 0) + size
    found = await totals(store)
    assert {client: total for client, total in found.items() if total} == {
        client: total for client, total in expected.items() if total
    }


async def test_what_waits_has_a_time_to_live(store: Store) -> None:
    await wait(accounts(store), "c", 10, ttl=60)
    keys = await store.redis.keys("*waiting*")
    assert len(keys) == 4
    assert all([0 < await store.redis.ttl(key) <= 60 for key in keys])
