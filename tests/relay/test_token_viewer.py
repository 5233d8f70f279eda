"""A viewer in the short form: the same numbers and the same end as in the long one, at any pace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.core.session import parse_cursor
from broker.relay.feed import Feed
from broker.relay.token_viewer import MAX_PARSED, TokenViewer
from broker.relay.viewer import Connection, Viewer
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


def said(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode()


def told_again(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"content": text}}]}).encode()


def batch(first: int, *chunks: bytes) -> Batch:
    return Batch(first, first + len(chunks) - 1, events_of(list(chunks), first))


def words(first: int, last: int, size: int = 0) -> Batch:
    """Events whose data is their number."""
    return batch(first, *(said(f"{n} " + "x" * size) for n in range(first, last + 1)))


def viewer(
    feed: Feed,
    connection: Connection,
    cursor: str = "",
    journal: Callable[[int], object] = no_journal,
) -> TokenViewer:
    return TokenViewer(feed, journal, connection, parse_cursor(cursor), 0.0)  # type: ignore[arg-type]  # awaits


def events(connection: QuickConnection) -> list[str]:
    return [frame.event for frame in connection.frames]


def data(connection: QuickConnection) -> list[Any]:
    return [json.loads(frame.data) for frame in connection.frames if frame.event == "token"]


def text(connection: QuickConnection) -> str:
    return "".join(each.get("text", "") for each in data(connection))


async def test_a_start_comes_first_then_tokens_then_the_end() -> None:
    feed, connection = filled(words(1, 2)), QuickConnection()
    async with following(viewer(feed, connection)) as task:
        assert events(connection) == ["start", "token", "token"]
        feed.add(words(3, 4), 1.0)
        assert events(connection)[3:] == ["token", "token"]  # without a task being woken
        feed.finish(end(5))
        await task
    assert events(connection) == ["start", *["token"] * 4, "done"]
    assert connection.ids == ["", "1-1", "1-2", "1-3", "1-4", "1-5.end"]
    assert text(connection) == "1 2 3 4 "


async def test_a_chunk_that_says_nothing_is_left_out() -> None:
    feed, connection = Feed(), QuickConnection()
    watching = viewer(feed, connection)
    async with following(watching) as task:
        feed.add(batch(1, said(""), b'{"choices":[]}'), 3.0)
        assert (connection.bytes.count(b"token"), watching.written_at) == (0, 0.0)
        assert feed.live == 1
        feed.add(batch(3, said("a")), 4.0)
        assert (connection.ids[-1], watching.written_at) == ("1-3", 4.0)
        feed.add(batch(4, said("")), 5.0)
        feed.finish(end(5))
        await task
    assert connection.ids == ["", "1-3", "1-5.end"]
    assert b"" not in connection.writes  # it would end the body


async def test_a_page_that_left_is_noticed_by_the_next_write() -> None:
    connection = QuickConnection()
    async with following(viewer(feed := filled(words(1, 1)), connection)) as task:
        connection.closed = True
        feed.add(words(2, 2), 1.0)
        await task
        assert feed.live == 0


@pytest.mark.parametrize("seen", range(1, 5))
async def test_a_cursor_is_continued_from_without_a_start(seen: int) -> None:
    feed, connection = filled(words(1, 2), words(3, 4)), QuickConnection()
    feed.finish(end(5))
    await viewer(feed, connection, f"1-{seen}").follow()
    assert connection.ids == [*(f"1-{n}" for n in range(seen + 1, 5)), "1-5.end"]


@pytest.mark.parametrize("seen", range(1, 5))
async def test_deltas_behind_a_cursor_change_nothing_in_front_of_them(seen: int) -> None:
    """An answer that comes in messages, and ends in a delta."""
    whole = [b'{"choices":[{"message":{"content":"%d"}}]}' % n for n in range(1, 4)]
    feed = filled(batch(1, *whole, said("4")))
    feed.finish(end(5))
    first, later = QuickConnection(), QuickConnection()
    await viewer(feed, first).follow()
    await viewer(feed, later, f"1-{seen}").follow()
    assert text(first) == "1234"
    assert text(later) == "1234"[seen:]


async def test_a_cursor_ahead_waits_for_its_turn() -> None:
    feed, connection = filled(words(1, 1)), QuickConnection()
    async with following(viewer(feed, connection, "1-4")) as task:
        for each in (words(2, 2), words(3, 5), words(6, 6)):
            feed.add(each, 0.0)
            await settle()
        assert connection.ids == ["1-5", "1-6"]
        feed.finish(end(7))
        await task


async def test_events_that_left_memory_are_read_from_the_journal() -> None:
    async def journal(after: int) -> list[Batch]:
        return [words(1, 3), words(4, 6)] if after < 3 else [words(4, 6)]

    feed, connection = filled(words(7, 8), start=6), QuickConnection()
    async with following(viewer(feed, connection, "1-1", journal)):
        assert connection.ids == [f"1-{n}" for n in range(2, 9)]
        feed.add(words(9, 9), 0.0)
        assert connection.ids[-1] == "1-9"


async def test_an_unavailable_journal_ends_the_connection() -> None:
    async def journal(_after: int) -> list[Batch]:
        raise StoreUnavailable

    feed, connection = filled(words(7, 8), start=6), QuickConnection()
    await viewer(feed, connection, "1-2", journal).follow()
    assert connection.bytes == b""


async def test_a_chunk_is_parsed_once_for_all_who_watch_live() -> None:
    feed, added = Feed(), words(1, 3)
    lines = [QuickConnection() for _ in range(3)]
    async with following(viewer(feed, lines[0])), following(viewer(feed, lines[1])):
        feed.add(added, 0.0)
        assert feed.shorten(added, deltas=False) is feed.shorten(added, deltas=False)
        async with following(viewer(feed, lines[2])):
            feed.add(words(4, 4), 0.0)
    assert [text(line) for line in lines] == ["1 2 3 4 "] * 3


async def test_viewers_of_both_forms_see_the_same_numbers() -> None:
    feed, long, short = Feed(), QuickConnection(), QuickConnection()
    async with (
        following(Viewer(feed, no_journal, long, None, 0.0)) as first,
        following(viewer(feed, short)) as second,
    ):
        for n in range(1, 6):
            feed.add(words(n, n), 0.0)
        feed.finish(end(6))
        await asyncio.gather(first, second)
    assert short.ids[1:] == long.ids


# A message in place of deltas, or behind them


async def test_an_answer_of_messages_is_sent_and_continued() -> None:
    feed = filled(*(batch(n, told_again(f"{n} ")) for n in range(1, 5)))
    feed.finish(end(5))
    whole, rest = QuickConnection(), QuickConnection()
    await viewer(feed, whole).follow()
    await viewer(feed, rest, "1-2").follow()
    assert (text(whole), text(rest)) == ("1 2 3 4 ", "3 4 ")


@pytest.mark.parametrize("where", ["memory", "journal", "live"])
async def test_an_answer_repeated_at_its_end_is_sent_once(where: str) -> None:
    said_before, again = [words(1, 2), words(3, 3)], batch(4, told_again("1 2 3 "))

    async def journal(after: int) -> list[Batch]:
        return [each for each in [*said_before, again] if each.last > after]

    feed = filled(*said_before) if where != "journal" else Feed(4)
    connection = QuickConnection()
    if where == "memory":
        feed.add(again, 0.0)
    async with following(viewer(feed, connection, "1-3", journal)) as task:
        if where == "live":
            feed.add(again, 0.0)
            await settle()
        feed.finish(end(5))
        await task
    assert connection.ids == ["1-5.end"]


async def test_a_missing_beginning_ends_the_connection() -> None:
    async def journal(_after: int) -> list[Batch]:
        raise StoreUnavailable

    feed, connection = filled(batch(4, told_again("a")), start=3), QuickConnection()
    await viewer(feed, connection, "1-3", journal).follow()
    assert connection.bytes == b""


# The pace of a connection, and of the event loop


class ReadyLine(QuickConnection):
    """A connection that takes everything at once."""

    async def drain(self) -> None:
        pass


@pytest.mark.parametrize("where", ["memory", "journal", "live"])
async def test_the_event_loop_runs_while_much_is_parsed(where: str) -> None:
    whole, connection = words(1, 4000, size=200), ReadyLine()
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def journal(_after: int) -> list[Batch]:
        return [whole]

    feed = filled(whole) if where == "memory" else Feed(4000 if where == "journal" else 0)
    turning = asyncio.create_task(turn())
    task = asyncio.create_task(viewer(feed, connection, "", journal).follow())
    if where == "live":
        await settle()
        feed.add(whole, 0.0)
    before = turns
    feed.finish(end(4001))
    await task
    turning.cancel()
    await asyncio.gather(turning, return_exceptions=True)
    assert connection.ids == ["", *(f"1-{n}" for n in range(1, 4001)), "1-4001.end"]
    assert turns - before >= len(whole.events) // (2 * MAX_PARSED)


async def test_a_slow_connection_catches_up() -> None:
    feed, connection = Feed(), SlowConnection()
    async with following(viewer(feed, connection)) as task:
        for n in range(1, 201):
            feed.add(words(n, n, size=20_000), 0.0)
            await settle()
        assert connection.waited.is_set()
        assert connection.most <= MIB
        feed.finish(end(201))
        while not task.done():
            connection.take_all()
            await settle()
    assert connection.ids == ["", *(f"1-{n}" for n in range(1, 201)), "1-201.end"]
    assert connection.most <= MIB


async def test_no_heartbeat_is_written_inside_a_token_event() -> None:
    class BeatenLine(QuickConnection):
        async def drain(self) -> None:
            watching.beat(b": beat\n\n", 5.0)
            await asyncio.sleep(0)

    connection = BeatenLine()
    feed = filled(words(1, 3, size=200_000))
    feed.finish(end(4))
    watching = viewer(feed, connection)
    await watching.follow()
    assert text(connection) == "".join(f"{n} " + "x" * 200_000 for n in range(1, 4))


async def test_a_closed_connection_ends_the_viewer() -> None:
    feed = filled(words(1, 1))
    with pytest.raises(ConnectionAbortedError):
        await viewer(feed, ClosedConnection()).follow()


async def test_a_viewer_that_left_is_given_nothing_more() -> None:
    feed, connection = Feed(), QuickConnection()
    async with following(viewer(feed, connection)):
        pass
    feed.add(words(1, 1), 0.0)
    feed.finish(end(2))
    assert events(connection) == ["start"]
