"""One viewer: reads a session from its cursor to the end, at the pace of its connection.

Most of the time a viewer is live: the feed writes each batch directly to its connection and no task is woken, which
saves a third of a relay's CPU (measured). The viewer's own task works only at the beginning, at the end, and while the
connection lags behind.
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
    from broker.relay.feed import Added, Feed

MAX_BACKLOG = 256 * 1024
"""Bytes that may wait in this process for a connection. With more, a viewer is not live any more, and waits."""

CLOSED = 1 << 62
"""The backlog of a closed connection: above any limit, so that a viewer finds out at its next write."""

MAX_BLOCK = 64 * 1024
"""Bytes that a viewer writes at a time while it catches up. A block may end within an event."""

ReadJournal = Callable[[int], Awaitable[list[Batch]]]
"""Reads a part of the session's journal after the event with a number; raises `StoreUnavailable`."""


class Connection(Protocol):
    """A connection to a page."""

    def write_now(self, block: bytes) -> int:
        """Take the bytes without waiting, and return the backlog. A closed connection drops them: `CLOSED`."""

    def backlog(self) -> int:
        """Return the bytes that were taken and that the system has not accepted yet."""

    def is_closed(self) -> bool:
        """Return True if the page has left."""

    async def drain(self) -> None:
        """Wait until the backlog is small.

        Raises:
            ConnectionError: the connection is closed, or took nothing for too long and was closed.
        """


class Viewer:
    """Follows a feed. `follow` is its task; the other methods are for the feed, the ticker and the drain.

    Args:
        feed: the feed to follow.
        read_journal: reads events that have left the feed.
        connection: writes to the page.
        cursor: the last event that the page has; None for none.
        now: the monotonic clock, in seconds.

    Attributes:
        feed: the feed that it follows.
        written_at: monotonic time of the last write, for the heartbeat.
    """

    __slots__ = (
        "_connection",
        "_epoch",
        "_halfway",
        "_n",
        "_read_journal",
        "_released",
        "_waking",
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
        # A new future for each wait, as an `asyncio.Event` would take 0.75 KiB for each viewer.
        self._waking: asyncio.Future[None] | None = None
        self._released = False
        self._halfway = False

    def push(self, batch: Added, now: float) -> None:
        """Write new events of the feed."""
        first, last, events = batch
        if first != self._n + 1:  # the cursor is ahead of the feed, which has to pass it first
            if last > self._n:
                self.wake()
            return
        if len(events) > MAX_BACKLOG:
            self.wake()
            return
        self._n = last
        self.written_at = now
        if self._connection.write_now(events) > MAX_BACKLOG:
            self.check()
            self.wake()

    def wake(self) -> None:
        """Let the viewer's own task continue."""
        self.feed.leave(self)
        if self._waking is not None and not self._waking.done():
            self._waking.set_result(None)

    def beat(self, block: bytes, now: float) -> None:
        """Write a heartbeat, unless the connection is in the middle of an event or lags behind."""
        self.written_at = now
        if not self._halfway and self._connection.backlog() <= MAX_BACKLOG:
            self._connection.write_now(block)

    def check(self) -> None:
        """Stop following if the page has left. The server need not cancel the request of a client that leaves."""
        if self._connection.is_closed():
            self.release()

    def release(self) -> None:
        """Disconnect without an end: the page will reconnect, to another worker."""
        self._released = True
        self.wake()

    async def follow(self) -> None:
        """Write all events from the cursor to the end. Returns when the connection may be closed.

        Raises:
            ConnectionError: the connection is closed.
        """
        try:
            while not self._released and await self._step():
                await self._connection.drain()
            await self._connection.drain()
        finally:
            self.feed.leave(self)

    async def _step(self) -> bool:
        """Do the next step. Returns True if there is more to do."""
        feed = self.feed
        step = what_next(Cursor(self._epoch, self._n), feed.first, feed.shown, feed.end)
        if step is Next.MEMORY:
            await self._write(feed.after(self._n, MAX_BLOCK))
        elif step is Next.JOURNAL:
            return await self._read_on()
        elif step is Next.WAIT:
            self._waking = asyncio.get_running_loop().create_future()
            feed.go_live(self)
            await self._waking
        elif step is Next.END and feed.end is not None:
            self._connection.write_now(terminal_event(feed.end))
            return False
        else:
            self._write_gap()
            return False
        return True

    async def _read_on(self) -> bool:
        try:
            batches = await self._read_journal(self._n)
            events, last = read_on(batches, self._n)
        except StoreUnavailable:
            return False  # the page will reconnect, and perhaps Redis will be back then
        except JournalGap:
            last = self._n
        if last == self._n:
            if self.feed.first <= self._n + 1:  # the feed has changed meanwhile: decide again
                return True
            self._write_gap()
            return False
        await self._write(Batch(self._n + 1, last, events))
        return True

    async def _write(self, batch: Batch) -> None:
        """Write events in parts, so that only few bytes wait in this process."""
        self._halfway = True  # a part may end within an event
        for start in range(0, len(batch.events), MAX_BLOCK):
            self._connection.write_now(batch.events[start : start + MAX_BLOCK])
            await self._connection.drain()
        self._halfway = False
        self._n = batch.last

    def _write_gap(self) -> None:
        self._connection.write_now(refusal_event(ReplayGap(), Cursor(self._epoch, self._n)))
