"""Workers in a real Valkey: leases, the marker by which a Redis that came back empty is known, and bells."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.store.connection import Store
from broker.store.workers import LEASE_MS, Notification, WorkerStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SESSION = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


def worker(store: Store, name: str = "one") -> WorkerStore:
    return WorkerStore(store, worker=name)


async def test_a_worker_that_renews_is_not_absent(store: Store) -> None:
    await worker(store).renew()
    assert await worker(store, "two").absent(["one", "three"]) == {"three"}


async def test_nobody_is_asked_for_and_nobody_is_absent(store: Store) -> None:
    assert await worker(store).absent([]) == set()


async def test_a_lease_ends_by_itself(store: Store) -> None:
    await worker(store).renew()
    left = await store.redis.pttl(f"{store.prefix}:{{workers}}:lease:one")
    assert LEASE_MS - 1000 < left <= LEASE_MS


async def test_renewing_prolongs_the_lease(store: Store) -> None:
    await worker(store).renew()
    await store.redis.pexpire(f"{store.prefix}:{{workers}}:lease:one", 100)
    await worker(store).renew()
    assert await store.redis.pttl(f"{store.prefix}:{{workers}}:lease:one") > LEASE_MS - 1000


async def test_a_worker_that_resigns_is_absent_at_once(store: Store) -> None:
    await worker(store).renew()
    await worker(store).resign()
    assert await worker(store, "two").absent(["one"]) == {"one"}


async def test_all_workers_know_the_same_marker(store: Store) -> None:
    marker, _ = await worker(store).renew()
    assert await worker(store, "two").renew() == (marker, False)
    assert await worker(store).renew() == (marker, False)


async def test_a_redis_that_came_back_empty_has_another_marker(store: Store) -> None:
    marker, _ = await worker(store).renew()
    await store.redis.flushall()
    after, _ = await worker(store, "two").renew()
    assert after != marker
    assert await worker(store).renew() == (after, False)


async def test_that_it_came_back_empty_is_told_to_workers_that_could_not_know(store: Store) -> None:
    await worker(store).tell_wiped()
    assert (await worker(store, "two").renew()).wiped
    assert 9000 < await store.redis.pttl(f"{store.prefix}:{{workers}}:wiped") <= 10_000


async def test_leases_and_marker_have_their_time(store: Store) -> None:
    await worker(store).renew()
    ttls = {key.decode(): await store.redis.ttl(key) async for key in store.redis.scan_iter()}
    assert len(ttls) == 2
    assert all(ttl > 0 for ttl in ttls.values()), ttls


# Bells


async def subscribed(store: Store, name: str) -> None:
    """Wait until a worker's bell is heard by somebody."""
    async with asyncio.timeout(5):
        while (await store.redis.pubsub_numsub(f"{store.channels}{name}"))[0][1] == 0:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0)


async def first(notifications: AsyncIterator[Notification]) -> Notification:
    async for notification in notifications:
        return notification
    raise AssertionError("the bell is silent")


@pytest.mark.parametrize(
    ("notified", "heard"),
    [
        (f"cancel {SESSION}".encode(), Notification("cancel", SESSION, None)),
        (f"ended {SESSION}".encode(), Notification("ended", SESSION, None)),
        (f"watched {SESSION}".encode(), Notification("watched", SESSION, None)),
        (
            f"news {SESSION} 3 5\nid: 1-3\n\nx\ny".encode(),
            Notification("news", SESSION, Batch(3, 5, b"id: 1-3\n\nx\ny")),
        ),
    ],
)
async def test_a_bell_says_what_was_rung(store: Store, notified: bytes, heard: Notification) -> None:
    async with aclosing(worker(store).listen()) as notifications:
        notification = asyncio.create_task(first(notifications))
        await subscribed(store, "one")
        await store.redis.publish(f"{store.channels}one", notified)
        async with asyncio.timeout(5):
            assert await notification == heard


async def test_a_bell_is_one_workers_own(store: Store) -> None:
    async with aclosing(worker(store).listen()) as notifications:
        notification = asyncio.create_task(first(notifications))
        await subscribed(store, "one")
        await store.redis.publish(f"{store.channels}two", f"cancel {SESSION}".encode())
        await store.redis.publish(f"{store.channels}one", f"ended {SESSION}".encode())
        async with asyncio.timeout(5):
            assert (await notification).kind == "ended"


async def test_a_subscription_that_is_cut_says_so(store: Store) -> None:
    async with aclosing(worker(store).listen()) as notifications:
        notification = asyncio.create_task(first(notifications))
        await subscribed(store, "one")
        await store.redis.client_kill_filter(_type="pubsub")
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailable):
                await notification


async def test_listening_can_be_cancelled(store: Store) -> None:
    async with aclosing(worker(store).listen()) as notifications:
        notification = asyncio.create_task(first(notifications))
        await subscribed(store, "one")
        notification.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await notification


# Away


async def test_where_there_is_no_redis_every_question_says_so() -> None:
    store = Store("redis://127.0.0.1:1/0", "test")
    alone = worker(store)
    for question in (alone.renew, alone.resign, lambda: alone.absent(["two"]), lambda: first(alone.listen())):
        with pytest.raises(StoreUnavailable):
            await question()
    await store.close()
