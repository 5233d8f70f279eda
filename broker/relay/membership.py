"""This worker among the others: its lease, its notifications, and whether Redis has come back empty."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, NoReturn

import structlog

from broker.core.errors import StoreUnavailable
from broker.store.workers import WIPED_FOR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from broker.store.workers import Notification, WorkerStore

log = structlog.get_logger(__name__)

BEAT = 0.5
"""Seconds between two renewals of the lease; one that fails takes a second at most, and is tried again."""

LISTEN_AGAIN = 0.5
"""Seconds before a broken subscription is made again."""


class Membership:
    """Keeps this worker known.

    Args:
        workers: where.
    """

    def __init__(self, workers: WorkerStore) -> None:
        self._workers = workers
        self._marker: str | None = None
        self._unwritten = asyncio.Event()
        self._born_without = False
        self._wiped_at = float("-inf")
        self._told_wiped = False
        self._loop = asyncio.get_running_loop()

    async def is_gone(self) -> bool:
        """Whether a session that Redis does not know is gone; not while it may only have to be written again.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        await self.renew()
        return not self._told_wiped and self._loop.time() - self._wiped_at >= WIPED_FOR

    async def renew(self) -> None:
        """Renew the lease; where Redis turns out to have come back empty, have everything written again.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        try:
            marker, wiped = await self._workers.renew()
        except StoreUnavailable:
            self._born_without = self._born_without or self._marker is None
            raise
        self._told_wiped = wiped
        if self._marker is None and self._born_without:
            self._wiped_at = self._loop.time()  # it may have come back empty, and who owns what will say so
        if self._marker not in (None, marker):
            self._wiped_at = self._loop.time()
            await self._workers.tell_wiped()
            log.warning("redis came back empty")
            self._unwritten.set()
        self._marker = marker

    async def rewrite_sessions(self, write: Callable[[], Awaitable[None]]) -> NoReturn:
        """Have everything written again each time that Redis came back empty; the lease is renewed meanwhile."""
        while True:
            await self._unwritten.wait()
            self._unwritten.clear()
            try:
                await write()
            except StoreUnavailable:
                self._unwritten.set()
                await asyncio.sleep(BEAT)

    async def run(self) -> NoReturn:
        """Renew until cancelled."""
        away = False
        while True:
            try:
                await self.renew()
            except StoreUnavailable:
                if not away:
                    log.warning("redis cannot be reached")
                away = True
            else:
                if away:
                    log.info("redis is back")
                away = False
            await asyncio.sleep(BEAT)

    async def listen(self, heard: Callable[[Notification], None]) -> NoReturn:
        """Pass on the notifications of this worker, until cancelled."""
        while True:
            try:
                async with aclosing(self._workers.listen()) as notifications:
                    async for notification in notifications:
                        heard(notification)
            except StoreUnavailable:
                await asyncio.sleep(LISTEN_AGAIN)
