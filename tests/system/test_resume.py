"""A page that lost its connection continues at its cursor, on any worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.scripted import PATIENCE
from tests.system.cluster import (
    Cluster,
    Script,
    Session,
    came_again,
    check_chunks,
    check_whole,
    number_of,
    running_cluster,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVERYWHERE = pytest.mark.parametrize("where", [0, 1, 2])
EITHER_WAY = pytest.mark.parametrize("query", [False, True])
LIVE = 200
"""Milliseconds of the journal's interval."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster(3, journal_interval_ms=LIVE) as cluster:
        yield cluster


async def finished(cluster: Cluster, chunks: int = 8) -> Session:
    session = await cluster.prepare(cluster.workers[0], Script(chunks))
    check_whole(await session.read(cluster.workers[0]), session.marker)
    return session


@EVERYWHERE
@EITHER_WAY
async def test_after_the_end_the_rest_is_replayed_from_any_cursor(
    cluster: Cluster, where: int, query: bool
) -> None:
    session = await finished(cluster)
    for n in range(11):
        events = await session.read(cluster.workers[where], f"1-{n}", query=query)
        end = check_whole(events, session.marker, after=n)
        assert end.id == "1-11.end"
        assert end.json["finishReason"] == "stop"
    assert session.calls == 1


@EVERYWHERE
@EITHER_WAY
async def test_in_the_middle_it_goes_on_without_a_gap(cluster: Cluster, where: int, query: bool) -> None:
    owner, worker = cluster.workers[0], cluster.workers[where]
    session = await cluster.prepare(owner)
    async with session.stream(owner) as line:
        call = await session.call()
        call.chunks(5)
        check_chunks(await line.take(5), session.marker)
        line.cut()
    call.chunks(2)  # while nobody watches
    async with session.stream(worker, "1-5", query=query) as line:
        check_chunks(await line.take(2), session.marker, after=5)
        call.chunks(1)
        check_chunks(await line.take(1), session.marker, after=7)
        call.done()
        assert check_whole(await line.rest(), session.marker, after=8).kind == "done"
    assert session.calls == 1


@EVERYWHERE
async def test_before_the_first_event_it_is_followed_from_the_start(cluster: Cluster, where: int) -> None:
    owner = cluster.workers[0]
    session = await cluster.prepare(owner)
    async with session.stream(owner):
        call = await session.call()
        for cursor in (None, "1-0"):
            async with session.stream(cluster.workers[where], cursor) as line:
                assert line.status == 200
    async with session.stream(cluster.workers[where]) as line:
        call.chunks(3)
        call.done()
        check_whole(await line.rest(), session.marker)
    assert session.calls == 1


@EVERYWHERE
async def test_a_cursor_inside_a_batch_resumes_exactly(cluster: Cluster, where: int) -> None:
    """Everything that comes in one read is one batch, in memory and in the journal."""
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as line:
        call = await session.call()
        call.chunks(50)
        await line.take(50)
        for n in (1, 17, 49):
            async with session.stream(cluster.workers[where], f"1-{n}") as other:
                check_chunks(await other.take(50 - n), session.marker, after=n)
        call.done()
        await line.rest()


@pytest.mark.parametrize("where", [1, 2])
async def test_a_cursor_ahead_of_the_journal_waits_for_it(cluster: Cluster, where: int) -> None:
    """The page has just got a live event and reconnects elsewhere before that is journaled."""
    owner = cluster.workers[0]
    for size in (1, 3, 10):
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await session.call()
            call.chunks(size)
            events = await line.take(size)
            line.cut()
        async with session.stream(cluster.workers[where], events[-1].id) as line:
            call.chunks(2)
            check_chunks(await line.take(2), session.marker, after=size)
            call.done()
            check_whole(await line.rest(), session.marker, after=size + 2)


@pytest.mark.parametrize("where", [1, 2])
async def test_a_page_that_moves_with_every_event_misses_nothing(cluster: Cluster, where: int) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as line:
        call = await session.call()
        call.chunks(1)
        [event] = await line.take(1)
    for n in range(2, 30):
        async with session.stream(cluster.workers[(0, where)[n % 2]], event.id) as line:
            call.chunks(1)
            [event] = await line.take(1)
            check_chunks([event], session.marker, after=n - 1)
    call.done()
    check_whole(await session.read(cluster.workers[where], event.id), session.marker, after=29)


@EVERYWHERE
@pytest.mark.parametrize("beyond", ["1-11", "1-12", "1-9007199254740993", "2-3"])
async def test_a_cursor_beyond_the_end_gets_a_gap_error(cluster: Cluster, where: int, beyond: str) -> None:
    session = await finished(cluster)  # 10 events and the end
    [event] = await session.read(cluster.workers[where], beyond)
    assert (event.kind, event.json["code"], event.json["final"]) == ("error", "replay_gap", True)
    assert event.id == f"{beyond}.end"


@EVERYWHERE
async def test_a_cursor_beyond_all_events_gets_a_gap_error_at_the_end(cluster: Cluster, where: int) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]):
        call = await session.call()
        async with session.stream(cluster.workers[where], "1-50") as line:
            call.chunks(3)
            call.done()
            [event] = await line.rest()
    assert event.json["code"] == "replay_gap"


@EVERYWHERE
async def test_a_terminal_cursor_gets_204(cluster: Cluster, where: int) -> None:
    session = await finished(cluster)
    for cursor in ("1-11.end", "1-3.end", "2-7.end"):
        async with session.stream(cluster.workers[where], cursor) as line:
            assert line.status == 204


@EVERYWHERE
async def test_a_cursor_never_claims(cluster: Cluster, where: int) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[where], "1-0") as line:
        assert await came_again(line)
    assert session.calls == 0


async def test_all_viewers_see_one_sequence_and_one_end(cluster: Cluster) -> None:
    session = await cluster.prepare(cluster.workers[0], Script(chunks=200, pause=0.002, size=200))
    seen = await asyncio.gather(*(session.read(worker) for worker in cluster.workers * 10))
    for events in seen:
        check_whole(events, session.marker)
    assert len({events[-1] for events in seen}) == 1
    assert len(seen[0]) == 203
    assert session.calls == 1


async def test_pages_that_come_and_go_everywhere_see_one_sequence(cluster: Cluster) -> None:
    session = await cluster.prepare(cluster.workers[0], Script(chunks=300, pause=0.002))

    async def page(number: int) -> str | None:
        cursor, seen = None, 0
        while True:
            async with session.stream(cluster.workers[(number + seen) % 3], cursor) as line:
                for _ in range(1 + number):
                    if (event := await line.event()) is None:
                        break
                    if event.kind != "chunk":
                        assert number_of(event) == seen + 1
                        return event.id
                    seen = check_chunks([event], session.marker, after=seen)
                    cursor = event.id

    ends = await asyncio.gather(*(page(number) for number in range(12)))
    assert set(ends) == {"1-303.end"}
    assert session.calls == 1


@pytest.mark.parametrize("where", [0, 1])
async def test_a_late_viewer_reads_a_long_answer_from_the_start(cluster: Cluster, where: int) -> None:
    """Longer than what stays in memory, so that the beginning comes from the journal."""
    session = await cluster.prepare(cluster.workers[0], Script(chunks=400, size=3000))
    check_whole(await session.read(cluster.workers[0]), session.marker)
    check_whole(await session.read(cluster.workers[where]), session.marker)
    check_whole(await session.read(cluster.workers[where], "1-7"), session.marker, after=7)
    assert session.calls == 1


async def test_a_journal_follows_a_fast_answer(cluster: Cluster) -> None:
    """Far more than one write carries must not pile up behind it."""
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as line:
        call = await session.call()
        call.chunks(2500, size=3000)
        await line.take(2500)
        stopwatch = cluster.stopwatch()
        async with asyncio.timeout(2 * PATIENCE):
            await cluster.journaled(session, 2500)
        assert stopwatch.seconds < 10  # at one write an interval it would be 15
        call.done()
        await line.rest()


@EVERYWHERE
async def test_an_unknown_session_is_not_found_or_expired(cluster: Cluster, where: int) -> None:
    session = Session(cluster, "00000000-0000-4000-8000-000000000000", "none")
    [event] = await session.read(cluster.workers[where])
    assert (event.json["code"], event.id) == ("session_not_found", "1-1.end")
    [event] = await session.read(cluster.workers[where], "1-5")
    assert (event.json["code"], event.id) == ("session_expired", "1-5.end")


async def test_claims_at_once_on_all_workers_make_one_call(cluster: Cluster) -> None:
    for _ in range(10):
        session = await cluster.prepare(cluster.workers[0], Script(chunks=3))
        seen = await asyncio.gather(*(session.read(worker) for worker in cluster.workers * 4))
        for events in seen:
            check_whole(events, session.marker)
        assert session.calls == 1
