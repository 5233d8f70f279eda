"""The ticker checks limits ten times a second and sends heartbeats to viewers that were silent for long enough."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import pytest

from broker.relay.tasks import keep_running
from broker.relay.ticker import TICK, tick
from tests.clock import Clock

if TYPE_CHECKING:
    from broker.relay.viewer import Viewer

HEARTBEAT = 15.0
COMMENT = b": heartbeat\n\n"
PING = b"event: ping\ndata: {}\n\n"


class Silent:
    """A viewer to which nothing is written but heartbeats."""

    def __init__(self, written_at: float) -> None:
        self.written_at = written_at
        self.beats: list[bytes] = []
        self.checks = 0

    def check(self) -> None:
        self.checks += 1

    def beat(self, block: bytes, now: float) -> None:
        self.beats.append(block)
        self.written_at = now


class FakeWorker:
    """Notes when it was checked.

    Attributes:
        error: is raised by the next check.
    """

    def __init__(self) -> None:
        self.viewers: set[Viewer] = set()
        self.checked_at: list[float] = []
        self.error: Exception | None = None

    def check(self, now: float) -> None:
        self.checked_at.append(now)
        if (error := self.error) is not None:
            self.error = None
            raise error

    def add(self, viewer: Silent) -> Silent:
        self.viewers.add(cast("Viewer", viewer))
        return viewer


@asynccontextmanager
async def ticking(worker: FakeWorker, clock: Clock, *, ping_events: bool = False) -> AsyncIterator[None]:
    task = asyncio.create_task(
        tick(worker, heartbeat=HEARTBEAT, ping_events=ping_events, clock=clock, pause=clock.pause)
    )
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_limits_are_checked_at_every_tick_with_the_time() -> None:
    worker, clock = FakeWorker(), Clock(now=0.0)
    async with ticking(worker, clock):
        await clock.advance(5 * TICK + 0.01)
    assert worker.checked_at == pytest.approx([TICK, 2 * TICK, 3 * TICK, 4 * TICK, 5 * TICK])


async def test_a_silent_viewer_gets_a_comment_at_each_heartbeat() -> None:
    worker, clock = FakeWorker(), Clock()
    async with ticking(worker, clock):
        viewer = worker.add(Silent(clock.now))
        await clock.advance(HEARTBEAT - TICK)
        assert viewer.beats == []
        await clock.advance(2 * TICK)
        assert viewer.beats == [COMMENT]
        await clock.advance(HEARTBEAT + TICK)
        assert viewer.beats == [COMMENT, COMMENT]


async def test_a_viewer_that_was_written_to_gets_no_heartbeat() -> None:
    worker, clock = FakeWorker(), Clock()
    async with ticking(worker, clock):
        viewer = worker.add(Silent(clock.now))
        for _ in range(3):
            await clock.advance(HEARTBEAT - 1)
            viewer.written_at = clock.now
        assert viewer.beats == []


async def test_only_a_silent_viewer_is_asked_whether_its_page_has_left() -> None:
    """Each write finds that out by itself."""
    worker, clock = FakeWorker(), Clock()
    async with ticking(worker, clock):
        busy, silent = worker.add(Silent(clock.now)), worker.add(Silent(clock.now))
        for _ in range(5):
            await clock.advance(TICK)
            busy.written_at = clock.now
        assert (busy.checks, silent.checks) == (0, 4)


async def test_a_ping_event_follows_the_comment_where_asked_for() -> None:
    worker, clock = FakeWorker(), Clock()
    async with ticking(worker, clock, ping_events=True):
        viewer = worker.add(Silent(clock.now))
        await clock.advance(HEARTBEAT + TICK)
    assert viewer.beats == [COMMENT + PING]


async def test_viewers_may_leave_while_heartbeats_are_sent() -> None:
    worker, clock = FakeWorker(), Clock()

    class Leaving(Silent):
        def beat(self, block: bytes, now: float) -> None:
            super().beat(block, now)
            worker.viewers.clear()

    async with ticking(worker, clock):
        viewers = [worker.add(Leaving(clock.now)) for _ in range(3)]
        await clock.advance(HEARTBEAT + TICK)
    assert sum(len(viewer.beats) for viewer in viewers) == 3


async def test_a_check_that_raises_does_not_end_the_ticking() -> None:
    """The ticker runs in `keep_running`, which starts it again."""
    worker, clock = FakeWorker(), Clock()
    worker.error = RuntimeError("a bug")
    task = asyncio.create_task(
        keep_running(
            "timers",
            lambda: tick(worker, heartbeat=HEARTBEAT, ping_events=False, clock=clock, pause=clock.pause),
            pause=clock.pause,
        )
    )
    await clock.advance(TICK)
    assert len(worker.checked_at) == 1
    await clock.advance(2.0)
    assert len(worker.checked_at) > 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
