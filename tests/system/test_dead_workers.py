"""Workers that die, and workers that were only frozen: one end for all, and never a second call."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from broker.store.connection import SCHEMA
from tests.events import Broken
from tests.system.cluster import BURIED, LEASE, Script, check_chunks, check_whole, number_of, running_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.events import Connection, Event
    from tests.system.cluster import Cluster, NumberedCall, Session, Worker

pytestmark = pytest.mark.slow


async def until_the_end(line: Connection, within: float = BURIED) -> list[Event]:
    """Everything to the terminal, however long the silence before."""
    events: list[Event] = []
    async with asyncio.timeout(within):
        while not events or events[-1].kind == "chunk":
            try:
                event = await line.event()
            except TimeoutError:  # the reader's patience; heartbeats should keep it
                raise AssertionError("silence") from None
            assert event is not None, "the line ended without an end"
            events.append(event)
    return events


def check_lost(events: list[Event], marker: str, after: int = 0) -> Event:
    *chunks, end = events
    last = check_chunks(chunks, marker, after)
    assert (end.kind, end.json["code"]) == ("error", "worker_lost")
    assert end.json["final"]
    assert end.json["retryable"]
    assert end.id == f"2-{last + 1}.end"
    return end


@asynccontextmanager
async def watched_from_afar(
    cluster: Cluster, chunks: int = 3
) -> AsyncIterator[tuple[Session, NumberedCall, Connection, list[Connection]]]:
    """A session of the first worker, which has said so much, with a viewer there and one on each other worker."""
    owner, *others = cluster.workers
    session = await cluster.prepare(owner)
    async with session.stream(owner) as line:
        call = await session.call()
        call.chunks(chunks)
        await line.take(chunks)
        async with session.stream(others[0]) as far, session.stream(others[-1]) as farther:
            check_chunks(await far.take(chunks), session.marker)
            check_chunks(await farther.take(chunks), session.marker)
            yield session, call, line, [far, farther]


async def test_the_end_of_a_killed_worker_is_the_same_for_all() -> None:
    async with running_cluster(3) as cluster:
        owner, *others = cluster.workers
        async with watched_from_afar(cluster) as (session, call, line, far):
            await owner.kill()
            with pytest.raises(Broken):
                await line.rest()
            seen = await asyncio.gather(*(until_the_end(one) for one in far))
            ends = {check_lost(events, session.marker, after=3) for events in seen}
            assert len(ends) == 1
            for worker in others:
                assert check_lost(await session.read(worker), session.marker) in ends
                assert check_lost(await session.read(worker, "1-2"), session.marker, after=2) in ends
            await owner.start()
            assert check_lost(await session.read(owner), session.marker) in ends
            await call.call.wait_gone()
        assert session.calls == 1


async def test_a_page_ahead_of_the_journal_gets_the_end() -> None:
    async with running_cluster(2, journal_interval_ms=10_000) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await session.call()
            call.chunks(40)
            await line.take(40)
            await owner.kill()
        async with session.stream(other, "1-40") as line:
            [end] = await until_the_end(line)
        assert (end.json["code"], (end.id or "")[:2]) == ("worker_lost", "2-")
        assert number_of(end) <= 41
        assert session.calls == 1


async def test_a_late_viewer_of_a_dead_worker_gets_the_end_soon() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await session.call()
            call.chunks(2)
            await line.take(2)
            await cluster.journaled(session, 2)
            await owner.kill()
        await asyncio.sleep(LEASE + 1)  # nothing happens in this time: nobody is there
        async with session.stream(other) as line:
            check_lost(await until_the_end(line), session.marker)


async def test_killed_before_the_first_token() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner), session.stream(other) as far:
            await cluster.upstream.call(session.marker)
            await owner.kill()
            assert check_lost(await until_the_end(far), session.marker).id == "2-1.end"
        assert session.calls == 1


async def test_a_short_freeze_does_not_make_a_worker_dead() -> None:
    async with running_cluster(2) as cluster:
        owner, _ = cluster.workers
        async with watched_from_afar(cluster) as (session, call, line, far):
            owner.freeze()
            call.chunks(5)
            await asyncio.sleep(LEASE * 0.6)  # shorter than the lease, longer than what counts as frozen
            owner.thaw()
            check_chunks(await line.take(5), session.marker, after=3)
            check_chunks(await far[0].take(5), session.marker, after=3)
            call.done()
            end = check_whole(await line.rest(), session.marker, after=8)
            assert end.kind == "done"
            assert check_whole(await far[0].rest(), session.marker, after=8) == end
        assert session.calls == 1


TRIES = 3
"""A worker that wakes waits 0.3 s for Redis. On a machine that is too busy for that it goes on, and says so."""


def showed_nothing(owner: Worker, events: list[Event], end: Event) -> bool:
    """Check that a worker that woke showed nothing of what came meanwhile. Returns False if Redis was too late."""
    assert events[-1] == end
    in_time = "not confirmed in time" not in owner.log()
    assert events == [end] or not in_time, "and nothing of what came meanwhile"
    return in_time


async def in_time(story: Callable[[], Awaitable[bool]]) -> None:
    """Repeat a story until Redis was in time."""
    for _ in range(TRIES):
        if await story():
            return
    pytest.fail("Redis was never in time")


async def test_a_worker_that_wakes_after_it_was_reaped_is_fenced() -> None:
    await in_time(waking_after_it_was_reaped)


async def waking_after_it_was_reaped() -> bool:
    async with running_cluster(3) as cluster:
        owner, *_others = cluster.workers
        async with watched_from_afar(cluster) as (session, call, line, far):
            owner.freeze()
            call.chunks(5)  # what it will find when it wakes
            [end] = await until_the_end(far[0])
            assert (end.json["code"], end.id) == ("worker_lost", "2-4.end")
            owner.thaw()
            was_in_time = showed_nothing(owner, await until_the_end(line), end)
            stopwatch = cluster.stopwatch()
            await call.call.wait_gone()
            assert stopwatch.seconds < 1
            for worker in cluster.workers:
                assert check_lost(await session.read(worker), session.marker) == end
            assert [event async for event in entries(cluster, session)] == [1, 2, 3]
        assert session.calls == 1
        return was_in_time


async def test_a_worker_that_wakes_to_a_finished_answer_is_fenced() -> None:
    await in_time(waking_to_a_finished_answer)


async def waking_to_a_finished_answer() -> bool:
    async with running_cluster(2) as cluster:
        owner, _other = cluster.workers
        async with watched_from_afar(cluster) as (session, call, line, far):
            owner.freeze()
            call.chunks(5)
            call.done()
            [end] = await until_the_end(far[0])
            owner.thaw()
            was_in_time = showed_nothing(owner, await until_the_end(line), end)
            for worker in cluster.workers:
                assert check_lost(await session.read(worker), session.marker) == end
        assert session.calls == 1
        return was_in_time


async def test_a_worker_that_was_fenced_serves_new_sessions() -> None:
    async with running_cluster(2) as cluster:
        owner, _ = cluster.workers
        async with watched_from_afar(cluster) as (_, _, line, far):
            owner.freeze()
            await until_the_end(far[0])
            owner.thaw()
            await until_the_end(line)
        session = await cluster.prepare(owner, Script())
        for worker in cluster.workers:
            assert check_whole(await session.read(worker), session.marker).kind == "done"


async def test_a_freeze_longer_than_the_idle_timeout_ends_no_answer() -> None:
    """Data that came while the worker was frozen is in its socket: the upstream was not silent."""
    async with running_cluster(1, idle_timeout=2) as cluster:
        [owner] = cluster.workers
        session = await cluster.prepare(owner, Script(chunks=100, pause=0.05))
        async with session.stream(owner) as line:
            await line.take(5)
            owner.freeze()
            await asyncio.sleep(3)  # as long as that is
            owner.thaw()
            end = check_whole(await line.rest(), session.marker, after=5)
        assert end.kind == "done", end


async def test_a_freeze_before_the_first_data_ends_no_answer() -> None:
    """The head of the answer takes a few steps to be read, which the timers must not overtake."""
    async with running_cluster(1, first_data_timeout=2) as cluster:
        [owner] = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await cluster.upstream.call(session.marker)
            owner.freeze()
            call.call.open()
            call.chunks(3)
            await asyncio.sleep(3)  # as long as that is
            owner.thaw()
            check_chunks(await line.take(3), session.marker)
            call.done()
            assert check_whole(await line.rest(), session.marker, after=3).kind == "done"


async def test_new_workers_send_the_end_after_all_others_died() -> None:
    async with running_cluster(2) as cluster:
        session = await cluster.prepare(cluster.workers[0])
        async with session.stream(cluster.workers[0]) as line:
            call = await session.call()
            call.chunks(3)
            await line.take(3)
            await cluster.journaled(session, 3)
            for worker in cluster.workers:
                await worker.kill()
        await cluster.workers[1].start()
        async with session.stream(cluster.workers[1], "1-1") as line:
            check_lost(await until_the_end(line), session.marker, after=1)
        assert session.calls == 1


async def entries(cluster: Cluster, session: Session) -> AsyncIterator[int]:
    """Return the numbers of the events in the journal's entries in Redis."""
    async with cluster.redis() as client:
        found: Any = await client.xrange(f"broker:{SCHEMA}:events:{{{session.id}}}", "1-0", "1")
        for entry_id, fields in found:
            for n in range(int(fields[b"first"]), int(entry_id.partition(b"-")[2]) + 1):
                yield n
