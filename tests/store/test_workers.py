"""Workers in a real Valkey: the marker by which a Redis that came back empty is known, and notifications."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

import pytest

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.store.connection import Store
from broker.store.workers import Notification, WorkerStore
from tests.redis_client import info_of_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SESSION = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


def worker(store: Store, name: str = "one") -> WorkerStore:
    return WorkerStore(store, worker=name)


async def test_all_workers_know_the_same_marker(store: Store) -> None:
    status = await worker(store).marker()
    assert not status.wiped
    for name in ("two", "one"):
        assert (await worker(store, name).marker())._replace(now_ms=status.now_ms) == status


async def test_a_redis_that_came_back_empty_has_another_marker(store: Store) -> None:
    before = await worker(store).marker()
    await store.redis.flushall()
    after = await worker(store, "two").marker()
    assert after.marker != before.marker
    assert after.servers == before.servers
    assert (await worker(store).marker()).marker == after.marker


async def test_the_server_is_named_by_its_process(store: Store) -> None:
    infos = await info_of_all(store.redis, "server")
    assert (await worker(store).marker()).servers == {info["run_id"] for info in infos}


async def test_a_user_without_info_names_no_server(store: Store, valkey_url: str) -> None:
    await store.redis.acl_setuser("small", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-info"])
    try:
        small = Store(valkey_url.replace("://", "://small:any@"), "test")
        one = worker(small)
        for _ in range(2):
            assert not (await one.marker()).servers
        await small.close()
    finally:
        await store.redis.acl_deluser("small")


async def test_connections_are_counted_also_those_made_again(store: Store) -> None:
    one = worker(store)
    await one.marker()
    before = one.connections_made
    assert before > 0
    await store.redis.client_kill_filter(_type="normal", skipme=False)
    with suppress(StoreUnavailable):
        await one.marker()
    await one.marker()
    assert one.connections_made > before


async def test_new_workers_are_told_that_redis_came_back_empty(store: Store) -> None:
    await worker(store).tell_wiped()
    assert (await worker(store, "two").marker()).wiped
    assert 9000 < await store.redis.pttl(f"{store.prefix}:{{workers}}:wiped") <= 10_000


async def test_the_marker_has_a_time_to_live(store: Store) -> None:
    await worker(store).marker()
    ttls = {key.decode(): await store.redis.ttl(key) async for key in store.redis.scan_iter()}
    assert sorted(ttls) == [f"{store.prefix}:{{workers}}:{name}" for name in ("alive", "marker")]
    assert all(ttl > 0 for ttl in ttls.values()), ttls


# Notifications


async def subscribed(store: Store, name: str) -> None:
    """Wait until a worker listens."""
    async with asyncio.timeout(5):
        while (await store.redis.pubsub_numsub(f"{store.channels}{name}"))[0][1] == 0:  # noqa: ASYNC110 - Redis tells nobody
            await asyncio.sleep(0)


async def first(notifications: AsyncIterator[Notification]) -> Notification:
    async for notification in notifications:
        return notification
    raise AssertionError("nothing was notified")


@pytest.mark.parametrize(
    ("notified", "heard"),
    [
        (f"cancel {SESSION}".encode(), Notification("cancel", SESSION, None)),
        (f"ended {SESSION}".encode(), Notification("ended", SESSION, None)),
        (f"watched {SESSION}".encode(), Notification("watched", SESSION, None)),
        (
            f"events {SESSION} 3 5\nid: 1-3\n\nx\ny".encode(),
            Notification("events", SESSION, Batch(3, 5, b"id: 1-3\n\nx\ny")),
        ),
    ],
)
async def test_a_notification_is_read_as_it_was_sent(
    store: Store, notified: bytes, heard: Notification
) -> None:
    async with aclosing(worker(store).listen()) as notifications:
        notification = asyncio.create_task(first(notifications))
        await subscribed(store, "one")
        await store.redis.publish(f"{store.channels}one", notified)
        async with asyncio.timeout(5):
            assert await notification == heard


async def test_a_notification_reaches_one_worker(store: Store) -> None:
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
    for question in (alone.marker, alone.tell_wiped, lambda: first(alone.listen())):
        with pytest.raises(StoreUnavailable):
            await question()
    await store.close()
