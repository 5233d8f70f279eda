"""One viewer: reads a session from its cursor to the end, at the pace of its line.

Most of the time a viewer is live: the feed pushes each batch straight into its line and no task is woken, which is
worth a third of a relay's CPU (measured). The viewer's own task works only at the beginning, at the end, and while the
line lags behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from broker.core.errors import ReplayGap, StoreUnavailable
from broker.core.events import refusal_event, terminal_event
from broker.core.replay import Batch, JournalGap, Next, read_on, what_next
from broker.core.session import START, Cursor

if TYPE_CHECKING:
    from broker.relay.feed import Feed

MAX_BACKLOG = 256 * 1024
"""Bytes that may wait in this process for a line to take them; with more, a viewer stops being live and waits."""

MAX_BLOCK = 64 * 1024
"""Bytes that a viewer which catches up writes at a time. An event may be cut there: a line is a stream of bytes."""

ReadJournal = Callable[[int], Awaitable[list[Batch]]]
"""Reads a part of the session's journal after the event of a number; raises `StoreUnavailable`."""


class Connection(Protocol):
    """A connection to a page."""

    def write_now(self, block: bytes) -> None:
        """Take the bytes without waiting. A line that is gone takes them too and forgets them."""

    def backlog(self) -> int:
        """Bytes taken that the system has not accepted yet."""

    def is_closed(self) -> bool:
        """Return True if the page has left."""

    async def drain(self) -> None:
        """Wait until the backlog is small.

        Raises:
            ConnectionError: the line is gone, or took nothing for too long and was cut.
        """


class Viewer:
    """Follows a feed. `follow` is its task; the rest is for the feed, the ticker and the drain.

    Args:
        feed: what to follow.
        read_journal: where to look for what the feed no longer has.
        connection: where to write.
        cursor: what the page has already.
        now: the monotonic clock, in seconds.

    Attributes:
        feed: what it follows.
        written_at: monotonic time of the last write, for the heartbeat.
    """

    __slots__ = (
        "_connection",
        "_epoch",
        "_halfway",
        "_n",
        "_read_journal",
        "_released",
        "_woken",
        "feed",
        "written_at",
    )

    def __init__(
        self, feed: Feed, read_journal: ReadJournal, connection: Connection, cursor: Cursor | None, now: float
    ) -> None:
        self.feed = feed
        self.written_at = now
        self._read_journal = read_journal
        self._connection = connection
        self._epoch, self._n, _ = cursor or START
        self._woken = asyncio.Event()
        self._released = False
        self._halfway = False

    def push(self, batch: Batch, now: float) -> None:
        """Write what the feed has just got."""
        if batch.first != self._n + 1:  # the cursor is ahead of the feed, which has to come past it first
            if batch.last > self._n:
                self.wake()
            return
        if len(batch.events) > MAX_BACKLOG:
            self.wake()
            return
        self._connection.write_now(batch.events)
        self._n = batch.last
        self.written_at = now
        if self._connection.backlog() > MAX_BACKLOG:
            self.wake()

    def wake(self) -> None:
        """Let the viewer's own task go on."""
        self.feed.leave(self)
        self._woken.set()

    def beat(self, block: bytes, now: float) -> None:
        """Write a heartbeat, unless the line is in the middle of an event or has enough to do with what came before."""
        self.written_at = now
        if not self._halfway and self._connection.backlog() <= MAX_BACKLOG:
            self._connection.write_now(block)

    def check(self) -> None:
        """Stop following for a page that has left: a server need not cancel the request of a client that leaves."""
        if self._connection.is_closed():
            self.release()

    def release(self) -> None:
        """Let the line go without an end: the page will come back, to another worker."""
        self._released = True
        self.wake()

    async def follow(self) -> None:
        """Write everything from the cursor to the end. Returns when the line may be closed.

        Raises:
            ConnectionError: the line is gone.
        """
        try:
            while not self._released and await self._step():
                await self._connection.drain()
            await self._connection.drain()
        finally:
            self.feed.leave(self)

    async def _step(self) -> bool:
        """Do what is next, and tell whether there is more to come."""
        feed = self.feed
        step = what_next(Cursor(self._epoch, self._n), feed.first, feed.shown, feed.end)
        if step is Next.MEMORY:
            await self._write(feed.after(self._n, MAX_BLOCK))
        elif step is Next.JOURNAL:
            return await self._read_on()
        elif step is Next.WAIT:
            self._woken.clear()
            feed.go_live(self)
            await self._woken.wait()
        elif step is Next.END and feed.end is not None:
            self._connection.write_now(terminal_event(feed.end))
            return False
        else:
            self._tell_gap()
            return False
        return True

    async def _read_on(self) -> bool:
        try:
            batches = await self._read_journal(self._n)
            events, last = read_on(batches, self._n)
        except StoreUnavailable:
            return False  # the page comes again, and perhaps Redis too
        except JournalGap:
            last = self._n
        if last == self._n:
            if self.feed.first <= self._n + 1:  # the feed was skipped or filled meanwhile: decide again
                return True
            self._tell_gap()
            return False
        await self._write(Batch(self._n + 1, last, events))
        return True

    async def _write(self, batch: Batch) -> None:
        """Write events in parts, so that however many come at once, few wait in this process."""
        self._halfway = True  # a part may end within an event
        for start in range(0, len(batch.events), MAX_BLOCK):
            self._connection.write_now(batch.events[start : start + MAX_BLOCK])
            await self._connection.drain()
        self._halfway = False
        self._n = batch.last

    def _tell_gap(self) -> None:
        self._connection.write_now(refusal_event(ReplayGap(), Cursor(self._epoch, self._n)))
