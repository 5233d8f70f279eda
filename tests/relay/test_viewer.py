from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.core.session import parse_cursor
from broker.relay.feed import Feed
from broker.relay.viewer import MAX_BACKLOG, Connection, Viewer
from tests.chunks import events_of
from tests.relay.connections import (
    MIB,
    ClosedConnection,
    QuickConnection,
    SlowConnection,
    end,
    filled,
    following,
    no_journal,
    settle,
)


def batch(first: int, last: int, size: int = 3) -> Batch:
    data = b'"' + b"x" * (size - 2) + b'"'
    return Batch(first, last, events_of([data] * (last + 1 - first), first))


def viewer(
    feed: Feed,
    connection: Connection,
    cursor: str = "",
    journal: Callable[[int], object] = no_journal,
) -> Viewer:
    return Viewer(feed, journal, connection, parse_cursor(cursor), 0.0)  # type: ignore[arg-type]  # a journal awaits


async def test_a_viewer_gets_old_events_and_then_new_ones() -> None:
    feed, connection = filled(batch(1, 2)), QuickConnection()
    async with following(viewer(feed, connection)) as task:
        assert connection.ids == ["1-1", "1-2"]
        feed.add(batch(3, 3), 1.0)
        assert connection.ids[2:] == ["1-3"]  # without a task being woken
        feed.add(batch(4, 5), 2.0)
        feed.finish(end(6))
        await task
    assert connection.ids == ["1-1", "1-2", "1-3", "1-4", "1-5", "1-6.end"]


async def test_a_viewer_of_an_ended_session_gets_all_of_it() -> None:
    feed, connection = filled(*(batch(n, n, 5000) for n in range(1, 100))), QuickConnection()
    feed.finish(end(100))
    await viewer(feed, connection).follow()
    assert connection.ids == [*(f"1-{n}" for n in range(1, 100)), "1-100.end"]


@pytest.mark.parametrize("seen", range(5))
async def test_a_cursor_is_continued_from(seen: int) -> None:
    feed, connection = filled(batch(1, 2), batch(3, 4)), QuickConnection()
    feed.finish(end(5))
    await viewer(feed, connection, f"1-{seen}").follow()
    assert connection.ids == [*(f"1-{n}" for n in range(seen + 1, 5)), "1-5.end"]


async def test_a_cursor_ahead_waits_for_its_turn() -> None:
    feed, connection = filled(batch(1, 1)), QuickConnection()
    async with following(viewer(feed, connection, "1-4")) as task:
        for each in (batch(2, 2), batch(3, 5), batch(6, 6)):
            feed.add(each, 0.0)
            await settle()
        assert connection.ids == ["1-5", "1-6"]
        feed.finish(end(7))
        await task
    assert connection.ids[-1] == "1-7.end"


@pytest.mark.parametrize("cursor", ["1-5", "1-4", "2-1", "2-99"])
async def test_an_impossible_cursor_gets_a_gap_error(cursor: str) -> None:
    feed, connection = filled(batch(1, 3)), QuickConnection()
    feed.finish(end(4))
    await viewer(feed, connection, cursor).follow()
    [frame] = connection.frames
    assert (json.loads(frame.data)["code"], frame.id) == ("replay_gap", f"{cursor}.end")


async def test_a_viewer_may_have_more_than_a_dead_workers_journal() -> None:
    feed, connection = filled(batch(1, 3)), QuickConnection()
    feed.finish(end(4, epoch=2))
    await viewer(feed, connection, "1-9").follow()
    assert connection.ids == ["2-4.end"]


# The journal


async def test_events_that_left_memory_are_read_from_the_journal() -> None:
    async def journal(after: int) -> list[Batch]:
        return [batch(1, 3), batch(4, 6)] if after < 3 else [batch(4, 6)]

    feed, connection = filled(batch(7, 8), start=6), QuickConnection()
    async with following(viewer(feed, connection, "1-1", journal)):
        assert connection.ids == [f"1-{n}" for n in range(2, 9)]
        feed.add(batch(9, 9), 0.0)
        assert connection.ids[-1] == "1-9"


@pytest.mark.parametrize("found", [[], [batch(4, 6)], [batch(1, 1), batch(3, 6)]])
async def test_a_gap_in_the_journal_is_an_error_and_never_skipped(found: list[Batch]) -> None:
    async def journal(after: int) -> list[Batch]:
        return [each for each in found if each.last > after]

    feed, connection = filled(batch(7, 8), start=6), QuickConnection()
    await viewer(feed, connection, "", journal).follow()
    assert json.loads(connection.frames[-1].data)["code"] == "replay_gap"
    assert [each for each in connection.ids if not each.endswith(".end")] in ([], ["1-1"])


async def test_an_unavailable_journal_ends_the_connection() -> None:
    async def journal(_after: int) -> list[Batch]:
        raise StoreUnavailable

    feed, connection = filled(batch(7, 8), start=6), QuickConnection()
    await viewer(feed, connection, "1-2", journal).follow()
    assert connection.bytes == b""


# The pace of a connection


async def test_a_slow_connection_catches_up() -> None:
    feed, connection = Feed(), SlowConnection()
    async with following(viewer(feed, connection)) as task:
        for n in range(1, 201):
            feed.add(batch(n, n, 20_000), 0.0)
            await settle()
        assert connection.waited.is_set()
        assert connection.most <= MIB
        feed.finish(end(201))
        while not task.done():
            connection.take_all()
            await settle()
    assert connection.ids == [*(f"1-{n}" for n in range(1, 201)), "1-201.end"]
    assert connection.most <= MIB


async def test_a_slow_connection_slows_no_other() -> None:
    feed, slow, quick = Feed(), SlowConnection(), QuickConnection()
    async with following(viewer(feed, slow)), following(viewer(feed, quick)):
        for n in range(1, 101):
            feed.add(batch(n, n, 20_000), 0.0)
            assert quick.ids[-1] == f"1-{n}"
            quick.bytes = b""


async def test_an_event_larger_than_the_bound_is_written_in_parts() -> None:
    feed, connection = filled(batch(1, 1, 3 * MIB)), SlowConnection()
    async with following(viewer(feed, connection)):
        assert 0 < connection.most <= MIB


@pytest.mark.parametrize("where", ["memory", "journal", "live"])
async def test_many_events_that_came_as_one_batch_are_written_in_parts(where: str) -> None:
    whole, connection = batch(1, 400, 10_000), SlowConnection()

    async def journal(_after: int) -> list[Batch]:
        return [whole]

    feed = filled(whole) if where == "memory" else Feed(400 if where == "journal" else 0)
    async with following(viewer(feed, connection, "", journal)):
        if where == "live":
            feed.add(whole, 0.0)
            await settle()
        assert connection.most <= MIB


async def test_a_closed_connection_ends_the_viewer() -> None:
    feed = filled(batch(1, 1))
    with pytest.raises(ConnectionAbortedError):
        await viewer(feed, ClosedConnection()).follow()


async def test_a_viewer_that_left_is_given_nothing_more() -> None:
    feed, connection = Feed(), QuickConnection()
    async with following(viewer(feed, connection)):
        pass
    feed.add(batch(1, 1), 0.0)
    feed.finish(end(2))
    assert connection.bytes == b""


async def test_a_released_viewer_gets_no_end() -> None:
    feed, connection = filled(batch(1, 1)), QuickConnection()
    watching = viewer(feed, connection)
    async with following(watching) as task:
        watching.release()
        await task
    assert connection.ids == ["1-1"]


async def test_a_slow_connection_gets_its_end_before_it_is_closed() -> None:
    feed, connection = filled(batch(1, 10, 50_000)), SlowConnection()
    feed.finish(end(11))
    async with following(viewer(feed, connection)) as task:
        assert not task.done()
        while not task.done():
            connection.take_all()
            await settle()
    assert connection.ids[-1] == "1-11.end"


# Heartbeats


async def test_a_heartbeat_and_every_event_are_noted() -> None:
    feed, connection = Feed(), QuickConnection()
    watching = viewer(feed, connection)
    async with following(watching):
        watching.beat(b": beat\n\n", 5.0)
        assert (connection.bytes, watching.written_at) == (b": beat\n\n", 5.0)
        feed.add(batch(1, 1), 7.0)
        assert watching.written_at == 7.0


async def test_a_connection_with_a_backlog_gets_no_heartbeat() -> None:
    connection = SlowConnection()
    watching = viewer(Feed(), connection)
    connection.write_now(b"x" * (MAX_BACKLOG + 1))
    watching.beat(b": beat\n\n", 5.0)
    assert connection.backlog() == MAX_BACKLOG + 1


async def test_no_heartbeat_is_written_inside_an_event() -> None:
    """A waiting connection has no backlog between two parts, and silence enough for a heartbeat."""

    class BeatenLine(QuickConnection):
        async def drain(self) -> None:
            watching.beat(b": beat\n\n", 5.0)
            await asyncio.sleep(0)

    whole, connection = batch(1, 3, 200_000), BeatenLine()
    feed = filled(whole)
    feed.finish(end(4))
    watching = viewer(feed, connection)
    await watching.follow()
    assert connection.bytes.replace(b"\n\n: beat", b"").startswith(whole.events)


async def test_a_page_that_left_is_noticed_by_the_next_write() -> None:
    connection = QuickConnection()
    async with following(viewer(feed := Feed(), connection)) as task:
        feed.add(batch(1, 1), 0.0)
        connection.closed = True
        feed.add(batch(2, 2), 0.0)
        await settle()
        assert task.done()
        assert feed.live == 0
        assert connection.ids == ["1-1"]


async def test_a_page_that_left_is_noticed_without_a_write() -> None:
    connection = QuickConnection()
    async with following(watching := viewer(filled(), connection)) as task:
        watching.check()
        await settle()
        assert not task.done()
        connection.closed = True
        watching.check()
        await settle()
        assert task.done()
