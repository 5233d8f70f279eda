"""Checks whether Redis answers, came back empty, or is another server than before.

All workers know one marker, a random word in Redis. If it is missing or has changed, Redis has lost all data. If the
server is another process, its last writes may be lost, as after a failover to a replica. In both cases owners write
their sessions again if they know more than Redis (`relay.ownership`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NoReturn

import structlog

from broker.core.errors import StoreUnavailable
from broker.store.connection import cause_of
from broker.store.workers import WIPED_FOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.store.workers import WorkerStore

log = structlog.get_logger(__name__)

CHECK = 0.5
"""Seconds between two checks. A failed check takes a second at most, and is repeated."""

CLAIMS_PAUSE = 5.0
"""Seconds after the discovery of a new server in which no older session is claimed, so that owners can write first."""


class RedisWatch:
    """Checks Redis twice a second.

    Args:
        workers: reads the marker.
        clock: seconds that only go forward.

    Attributes:
        to_rewrite: set when Redis may have lost data that the owners know.
    """

    def __init__(self, workers: WorkerStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.to_rewrite = asyncio.Event()
        self._workers = workers
        self._clock = clock
        self._marker: str | None = None
        self._servers: frozenset[str] = frozenset()
        self._started_without_redis = False
        self._wiped_here_at = float("-inf")
        self._wiped_elsewhere = False
        self._claims_paused_until = float("-inf")
        self._new_since_ms = 0
        self._new_since = float("-inf")
        self._connections_seen = -1

    async def is_gone(self) -> bool:
        """Returns True if a session that Redis does not have is gone, False while its owner may still write it again.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        await self.check()
        return not self._wiped_elsewhere and self._clock() - self._wiped_here_at >= WIPED_FOR

    async def claims_paused_since(self) -> int | None:
        """While claims are paused, return the time of the new server's discovery, in ms by its clock; else None.

        Sessions prepared before that time may run already, although the server has no claim of them. A new server can
        only be reached by a new connection, so it is discovered before the first claim there.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        await self._check_connections()
        return self._new_since_ms if self._clock() < self._claims_paused_until else None

    async def same_since(self) -> float:
        """Return the time of the clock at which a new server was discovered last; minus infinity if none was.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        await self._check_connections()
        return self._new_since

    async def _check_connections(self) -> None:
        """Check a server that is reached for the first time, now or by the next call."""
        if self._workers.is_lost or self._connections_seen != self._workers.connections_made:
            await self.check()

    async def check(self) -> None:
        """Check whether Redis came back empty, or is another server than before.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        connections = self._workers.connections_made
        try:
            marker, wiped, servers, now_ms = await self._workers.marker()
        except StoreUnavailable:
            self._started_without_redis = self._started_without_redis or self._marker is None
            raise
        self._connections_seen = connections
        self._wiped_elsewhere = wiped
        if self._marker is None and self._started_without_redis:
            # It may have come back empty, and owners may still write their sessions.
            self._wiped_here_at = self._clock()
        if self._marker not in (None, marker):
            self._wiped_here_at = self._clock()
            await self._workers.tell_wiped()
            log.warning("redis came back empty")
            self.to_rewrite.set()
        elif servers and not self._servers <= servers:  # one is gone; one that has come has lost nothing
            self._new_since_ms = now_ms
            self._new_since = self._clock()
            self._claims_paused_until = self._clock() + CLAIMS_PAUSE
            log.warning("redis is another server than before", claims_paused_s=CLAIMS_PAUSE)
            self.to_rewrite.set()
        self._marker, self._servers = marker, servers

    async def run(self) -> NoReturn:
        """Check again and again until cancelled."""
        why: str | None = None
        while True:
            await self._workers.leave_old_primary()
            try:
                await self.check()
            except StoreUnavailable as error:
                # The first reason may say little: a server that refuses a certificate may only seem to hang up.
                if (found := cause_of(error)) != why:
                    log.warning("redis cannot be reached", why=found)
                why = found
            else:
                if why is not None:
                    log.info("redis is back")
                why = None
            await asyncio.sleep(CHECK)
