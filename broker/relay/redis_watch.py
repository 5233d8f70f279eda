"""What has become of Redis: whether it answers, came back empty, or is another server than before.

All workers know one marker, a random word in Redis. Where it is missing or another, Redis has lost everything. Where
the server is another process, its last writes may be lost, as after a failover to a replica. In both cases owners write
their sessions again where they know more than Redis (`relay.ownership`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NoReturn

import structlog

from broker.core.errors import StoreUnavailable
from broker.store.workers import WIPED_FOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.store.workers import WorkerStore

log = structlog.get_logger(__name__)

LOOK = 0.5
"""Seconds between two looks. One that fails takes a second at most, and is tried again."""

CLAIMS_PAUSE = 5.0
"""Seconds after a new server was seen in which no older session is claimed, while owners write what they know."""


class RedisWatch:
    """Looks at Redis twice a second.

    Args:
        workers: where the marker is.
        clock: seconds that only go forward.

    Attributes:
        to_rewrite: set when Redis may have lost what the owners know.
    """

    def __init__(self, workers: WorkerStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.to_rewrite = asyncio.Event()
        self._workers = workers
        self._clock = clock
        self._marker: str | None = None
        self._server: str | None = None
        self._started_without_redis = False
        self._wiped_here_at = float("-inf")
        self._wiped_elsewhere = False
        self._claims_paused_until = float("-inf")
        self._new_since_ms = 0
        self._connections_seen = -1

    async def is_gone(self) -> bool:
        """Returns True if a session that Redis does not know is gone, False while it may have to be written again.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        await self.look()
        return not self._wiped_elsewhere and self._clock() - self._wiped_here_at >= WIPED_FOR

    async def claims_paused_since(self) -> int | None:
        """Return since when the server is new, in ms by its clock, while claims are paused; else None.

        What was prepared before may run already, although the server says that it does not. A server that is new can
        only be reached by a new connection, so it is seen before the first claim there.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        if self._connections_seen != self._workers.connections_made:
            await self.look()
        return self._new_since_ms if self._clock() < self._claims_paused_until else None

    async def look(self) -> None:
        """Find out whether Redis came back empty, or is another server than before.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        connections = self._workers.connections_made
        try:
            marker, wiped, server, now_ms = await self._workers.marker()
        except StoreUnavailable:
            self._started_without_redis = self._started_without_redis or self._marker is None
            raise
        self._connections_seen = connections
        self._wiped_elsewhere = wiped
        if self._marker is None and self._started_without_redis:
            self._wiped_here_at = self._clock()  # it may have come back empty, and who owns what will say so
        if self._marker not in (None, marker):
            self._wiped_here_at = self._clock()
            await self._workers.tell_wiped()
            log.warning("redis came back empty")
            self.to_rewrite.set()
        elif self._server not in (None, server):
            self._new_since_ms = now_ms
            self._claims_paused_until = self._clock() + CLAIMS_PAUSE
            log.warning("redis is another server than before", claims_paused_s=CLAIMS_PAUSE)
            self.to_rewrite.set()
        self._marker, self._server = marker, server

    async def run(self) -> NoReturn:
        """Look until cancelled."""
        away = False
        while True:
            try:
                await self.look()
            except StoreUnavailable:
                if not away:
                    log.warning("redis cannot be reached")
                away = True
            else:
                if away:
                    log.info("redis is back")
                away = False
            await asyncio.sleep(LOOK)
