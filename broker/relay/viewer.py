"""One viewer: reads a feed from its cursor to the end, at the pace of its line.

Most of the time a viewer is live: the feed pushes each block straight into its line and no task is woken, which is
worth a third of a relay's CPU (measured). The viewer's own task works only at the beginning, at the end, and while the
line lags behind.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from broker.core.errors import ReplayGap
from broker.core.events import refusal_event, terminal_event
from broker.core.session import START, Cursor

if TYPE_CHECKING:
    from broker.relay.feed import Feed

MAX_BACKLOG = 256 * 1024
"""Bytes that may wait in this process for a line to take them; with more, a viewer stops being live and waits."""

MAX_BLOCK = 64 * 1024
"""Bytes that a viewer which catches up writes at a time."""


class Line(Protocol):
    """A connection to a page."""

    def write_now(self, block: bytes) -> None:
        """Take the bytes without waiting. A line that is gone takes them too and forgets them."""

    def backlog(self) -> int:
        """Bytes taken that the system has not accepted yet."""

    async def drain(self) -> None:
        """Wait until the backlog is small.

        Raises:
            ConnectionError: the line is gone, or took nothing for too long and was cut.
        """


class Viewer:
    """Follows a feed. `follow` is its task; the rest is for the feed and the ticker.

    Attributes:
        written_at: monotonic time of the last write, for the heartbeat.
    """

    __slots__ = ("_cursor", "_feed", "_line", "_n", "_woken", "written_at")

    def __init__(self, feed: Feed, line: Line, cursor: Cursor | None, now: float) -> None:
        self.written_at = now
        self._feed = feed
        self._line = line
        self._cursor = cursor or START
        self._n = self._cursor.n
        self._woken = asyncio.Event()

    def push(self, block: bytes, first: int, last: int, now: float) -> None:
        """Write what the feed has just got."""
        if first != self._n + 1:  # the cursor is ahead of the feed, which has to come past it first
            if last > self._n:
                self.wake()
            return
        self._line.write_now(block)
        self._n = last
        self.written_at = now
        if self._line.backlog() > MAX_BACKLOG:
            self.wake()

    def wake(self) -> None:
        """Let the viewer's own task go on."""
        self._feed.leave(self)
        self._woken.set()

    def beat(self, block: bytes, now: float) -> None:
        """Write a heartbeat."""
        self._line.write_now(block)
        self.written_at = now

    async def follow(self) -> None:
        """Write everything from the cursor to the end. Returns when the line may be closed.

        Raises:
            ConnectionError: the line is gone.
        """
        try:
            while not self._is_at_end():
                await self._catch_up()
                if self._feed.end is None:
                    self._woken.clear()
                    self._feed.go_live(self)
                    await self._woken.wait()
                    await self._line.drain()
            self._line.write_now(self._last_words())
        finally:
            self._feed.leave(self)

    def _is_at_end(self) -> bool:
        return self._feed.end is not None and self._n >= self._feed.last

    async def _catch_up(self) -> None:
        while self._n < self._feed.last:
            block, self._n = self._feed.after(self._n, MAX_BLOCK)
            self._line.write_now(block)
            await self._line.drain()

    def _last_words(self) -> bytes:
        end = self._feed.end
        if end is None:
            raise RuntimeError("a viewer at the end of a feed that has none")
        # Of a session that has ended, a cursor beyond its last event can only be wrong. The exception is an end that
        # another worker wrote for a dead one: viewers of that one may have seen more than was kept.
        if self._n > self._feed.last and end.id.epoch == self._cursor.epoch:
            return refusal_event(ReplayGap(), self._cursor)
        return terminal_event(end)
