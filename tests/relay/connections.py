"""Connections for tests of viewers, with a pace of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.core.sse import Decoder, Frame
from broker.relay.feed import Feed
from broker.relay.viewer import CLOSED, Viewer

MIB = 1024 * 1024


def end(n: int, epoch: int = 1) -> Terminal:
    return Terminal(State.DONE, "done", Cursor(epoch, n, end=True), b"{}")


class QuickConnection:
    """A connection that takes everything at once.

    Attributes:
        writes: every block that was written.
        wrote: is set at every write.
    """

    def __init__(self) -> None:
        self.bytes = b""
        self.writes: list[bytes] = []
        self.wrote = asyncio.Event()
        self.closed = False

    def is_closed(self) -> bool:
        return self.closed

    def write_now(self, block: bytes) -> int:
        if self.closed:
            return CLOSED
        self.bytes += block
        self.writes.append(block)
        self.wrote.set()
        return self.backlog()

    def backlog(self) -> int:
        return 0

    async def drain(self) -> None:
        await asyncio.sleep(0)

    @property
    def frames(self) -> list[Frame]:
        return Decoder(64 * MIB).feed(self.bytes)

    @property
    def ids(self) -> list[str]:
        return [frame.id for frame in self.frames]


class SlowConnection(QuickConnection):
    """A connection that takes nothing until the test lets it.

    Attributes:
        most: the largest backlog it ever had.
        waited: is set while somebody waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.waited = asyncio.Event()
        self._taken = 0
        self._room = asyncio.Event()

    def write_now(self, block: bytes) -> int:
        super().write_now(block)
        self.most = max(self.most, self.backlog())
        return self.backlog()

    def backlog(self) -> int:
        return len(self.bytes) - self._taken

    async def drain(self) -> None:
        while self.backlog() > 65536:
            self.waited.set()
            await self._room.wait()
            self._room.clear()
        self.waited.clear()

    def take_all(self) -> None:
        self._taken = len(self.bytes)
        self._room.set()


class ClosedConnection(QuickConnection):
    """A connection that is closed."""

    async def drain(self) -> None:
        raise ConnectionAbortedError


async def no_journal(_after: int) -> list[Batch]:
    raise AssertionError("nobody should read the journal")


@asynccontextmanager
async def following(viewer: Viewer) -> AsyncIterator[asyncio.Task[None]]:
    """A viewer at work; it has done what it could before the block begins."""
    task = asyncio.create_task(viewer.follow())
    try:
        await settle()
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def settle() -> None:
    """Let every task run until it waits for input."""
    for _ in range(50):
        await asyncio.sleep(0)


def filled(*batches: Batch, start: int = 0) -> Feed:
    feed = Feed(start)
    for each in batches:
        feed.add(each, 0.0)
    return feed
