"""One timer for the whole worker: the limits of every generation, and the heartbeat of every viewer.

A separate timer for each of thousands of streams, moved at every chunk, would cost more than the relaying.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn, Protocol

from broker.core.sse import encode_comment, encode_event
from broker.relay.reports import ignore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from broker.relay.viewer import Viewer

TICK = 0.1
"""Seconds between two checks, and so the precision of every limit."""

SILENT = 2 * TICK
"""Seconds without a write after which it is checked whether the page has left. A write finds out by itself."""


class Checked(Protocol):
    """What the ticker needs of the worker."""

    @property
    def viewers(self) -> Collection[Viewer]:
        """All viewers of the worker."""

    def check(self, now: float) -> None:
        """Check the limits of every generation."""


async def tick(
    worker: Checked,
    *,
    heartbeat: float,
    ping_events: bool,
    clock: Callable[[], float] | None = None,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    lagged: Callable[[float], None] = ignore,
) -> NoReturn:
    """Check all limits and send heartbeats until cancelled.

    Args:
        worker: its generations are checked and its viewers get heartbeats.
        heartbeat: seconds of silence after which a viewer is sent a comment.
        ping_events: send a `ping` event as well, for pages that want to see it.
        clock: seconds that only go forward; by default the event loop's.
        pause: waits for so many seconds.
        lagged: is called with the seconds by which each pause was too long.
    """
    clock = clock or asyncio.get_running_loop().time
    beat = encode_comment("heartbeat") + (encode_event("ping", b"{}") if ping_events else b"")
    while True:
        wanted = clock() + TICK
        await pause(TICK)
        now = clock()
        lagged(max(0.0, now - wanted))
        worker.check(now)
        for viewer in tuple(worker.viewers):
            silent = now - viewer.written_at
            if silent >= SILENT:
                viewer.check()
            if silent >= heartbeat:
                viewer.beat(beat, now)
