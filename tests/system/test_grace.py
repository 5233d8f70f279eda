"""A session without viewers waits for its page, on any worker, for a limited time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.events import opened
from tests.system.cluster import Cluster, Script, check_chunks, check_whole, running_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.events import Connection, Event
    from tests.system.cluster import NumberedCall, Session

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

GRACE = 2
LEFT = 5.5
"""Seconds for which a worker counts as watching after it last said so, and a little."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster(3, disconnect_grace=GRACE) as cluster:
        yield cluster


async def begin(session: Session, connection: Connection, chunks: int = 2) -> NumberedCall:
    call = await session.call()
    call.chunks(chunks)
    check_chunks(await connection.take(chunks), session.marker)
    return call


async def gone(cluster: Cluster, call: NumberedCall, within: float) -> float:
    """Wait until the upstream was closed, which has to be within so many seconds, and return how long that took."""
    stopwatch = cluster.stopwatch()
    await call.call.wait_gone()
    assert stopwatch.seconds < within
    return stopwatch.elapsed


async def stays(call: NumberedCall, seconds: float) -> None:
    """Check that the upstream is not closed in this time."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await call.call.gone.wait()


def is_abandoned(end: Event) -> bool:
    return end.kind == "error" and end.json["code"] == "abandoned"


@pytest.mark.parametrize("where", [0, 1])
async def test_a_viewer_that_returns_in_time_continues(cluster: Cluster, where: int) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as connection:
        call = await begin(session, connection)
    async with session.stream(cluster.workers[where], "1-2") as connection:
        await stays(call, GRACE * 2)
        call.chunks(1)
        check_chunks(await connection.take(1), session.marker, after=2)
        call.done()
        assert check_whole(await connection.rest(), session.marker, after=3).kind == "done"
    assert session.calls == 1


async def test_where_nobody_comes_it_is_abandoned_for_all(cluster: Cluster) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as connection:
        call = await begin(session, connection)
    assert await gone(cluster, call, GRACE + 1.5) > GRACE - 0.5
    ends = [check_whole(await session.read(worker), session.marker) for worker in cluster.workers]
    assert len(set(ends)) == 1
    assert is_abandoned(ends[0])
    assert session.calls == 1


async def test_a_page_that_never_returned_is_not_waited_for(cluster: Cluster) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]):
        call = await session.call()
    await gone(cluster, call, GRACE + 1.5)
    assert is_abandoned(check_whole(await session.read(cluster.workers[1]), session.marker))


async def test_a_viewer_elsewhere_keeps_a_session_alive(cluster: Cluster) -> None:
    owner, *others = cluster.workers
    session = await cluster.prepare(owner)
    async with session.stream(owner) as connection:
        call = await begin(session, connection)
        first = others[0]
        async with session.stream(first) as far:
            await far.take(2)
            connection.cut()
            await stays(call, GRACE + LEFT)
            async with session.stream(others[1]) as farther:
                await farther.take(2)
                far.cut()
                await stays(call, GRACE + LEFT)
        # a viewer that leaves says so
        assert await gone(cluster, call, GRACE + 2) > GRACE - 0.5
    assert is_abandoned((await session.read(first))[-1])


async def test_a_viewer_elsewhere_whose_worker_dies_is_forgotten(cluster: Cluster) -> None:
    owner, other, _ = cluster.workers
    session = await cluster.prepare(owner)
    async with session.stream(owner) as connection, session.stream(other) as far:
        call = await begin(session, connection)
        await far.take(2)
        connection.cut()
        await other.kill()
        assert await gone(cluster, call, GRACE + LEFT + 1.5) > GRACE
    await other.start()
    assert is_abandoned((await session.read(other))[-1])


async def test_viewers_elsewhere_count_while_redis_is_away(cluster: Cluster) -> None:
    owner, other, _ = cluster.workers
    session = await cluster.prepare(owner)
    async with session.stream(owner) as connection, session.stream(other) as far:
        call = await begin(session, connection)
        await far.take(2)
        cluster.valkey.freeze()
        try:
            connection.cut()
            await stays(call, GRACE + LEFT)
        finally:
            cluster.valkey.thaw()
        call.done()
        check_whole(await far.rest(), session.marker, after=2)


async def test_without_redis_and_without_viewers_it_is_abandoned(cluster: Cluster) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as connection:
        call = await begin(session, connection)
        await cluster.journaled(session, 2)
        cluster.valkey.freeze()
    try:
        await gone(cluster, call, GRACE + 1.5)
        [end] = await session.read(cluster.workers[0], "1-2")
        assert is_abandoned(end)
    finally:
        cluster.valkey.thaw()
    for worker in cluster.workers:
        assert check_whole(await session.read(worker), session.marker) == end


async def test_the_grace_of_one_session_does_not_affect_another(cluster: Cluster) -> None:
    owner = cluster.workers[0]
    left, watched = await cluster.prepare(owner), await cluster.prepare(owner)
    async with watched.stream(owner) as stays, left.stream(owner) as leaves:
        watched_call, left_call = await begin(watched, stays), await begin(left, leaves)
        leaves.cut()
        await gone(cluster, left_call, GRACE + 1.5)
        watched_call.done()
        assert check_whole(await stays.rest(), watched.marker, after=2).kind == "done"


async def test_without_grace_leaving_ends_it_at_once() -> None:
    async with running_cluster(2, disconnect_grace=0) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection:
            call = await begin(session, connection)
        assert await gone(cluster, call, 1)
        assert is_abandoned((await session.read(other))[-1])
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection, session.stream(other) as far:
            call = await begin(session, connection)
            await far.take(2)
            connection.cut()
            call.done()
            assert check_whole(await far.rest(), session.marker, after=2).kind == "done"


async def test_a_stalled_connection_does_not_count_for_ever() -> None:
    """A peer has vanished without a close: its data piles up until it is disconnected, and the grace begins."""
    async with running_cluster(1, disconnect_grace=1, send_timeout=1, max_response="64MiB") as cluster:
        [worker] = cluster.workers
        session = await cluster.prepare(worker, Script(chunks=4000, pause=0.001, size=10_000))
        async with opened(worker.url, f"/stream/{session.id}", receive_buffer=4096):
            call = await cluster.upstream.call(session.marker)
            await gone(cluster, call, 20)
        assert is_abandoned((await session.read(worker))[-1])
