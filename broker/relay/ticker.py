"""One timer for the whole worker: the limits of every generation, and the heartbeat of every viewer.

Timers of their own for thousands of streams, each moved at every chunk, would cost more than the relaying.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from broker.core.sse import encode_comment, encode_event

if TYPE_CHECKING:
    from broker.relay.worker import Worker

TICK = 0.1
"""Seconds between two looks, and so the precision of every limit."""


async def tick(worker: Worker, *, heartbeat: float, ping_events: bool) -> NoReturn:
    """Run until cancelled.

    Args:
        worker: whose generations and viewers.
        heartbeat: seconds of silence after which a viewer is sent a comment.
        ping_events: send a `ping` event as well, for pages that want to see it.
    """
    loop = asyncio.get_running_loop()
    beat = encode_comment("heartbeat") + (encode_event("ping", b"{}") if ping_events else b"")
    while True:
        await asyncio.sleep(TICK)
        now = loop.time()
        worker.check(now)
        for viewer in tuple(worker.viewers):
            if now - viewer.written_at >= heartbeat:
                viewer.beat(beat, now)
