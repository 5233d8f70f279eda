"""The tasks of a worker: each has an owner that waits for it, and whatever breaks in one is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

log = structlog.get_logger(__name__)

PAUSE = 1.0
"""Seconds before a loop that broke begins again."""


class Tasks:
    """Work in the background, of three kinds: work that a drain waits for, work that it does not, and loops."""

    def __init__(self) -> None:
        self._work: set[asyncio.Task[Any]] = set()
        self._extra: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run what ends by itself and must come to its end."""
        self.adopt(asyncio.create_task(work))

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Own a task that runs already, as `spawn` does."""
        self._own(task, self._work)

    def spawn_extra(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run what would be nice to have: no drain waits for it."""
        self._own(asyncio.create_task(work), self._extra)

    def keep_running(self, loops: Mapping[str, Callable[[], Awaitable[object]]]) -> None:
        """Run loops until `close`."""
        for name, loop in loops.items():
            self._own(asyncio.create_task(keep_running(name, loop)), self._extra)

    async def finish(self, timeout: float) -> None:
        """Wait until all work is done, for ``timeout`` seconds at most."""
        deadline = self._loop.time() + timeout
        while self._work and (left := deadline - self._loop.time()) > 0:
            await asyncio.wait(self._work, timeout=left)

    async def close(self) -> None:
        """Cancel whatever is left."""
        tasks = (*self._work, *self._extra)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _own(self, task: asyncio.Task[Any], owned: set[asyncio.Task[Any]]) -> None:
        owned.add(task)
        task.add_done_callback(owned.discard)
        task.add_done_callback(_tell)


async def keep_running(name: str, loop: Callable[[], Awaitable[object]]) -> NoReturn:
    """Run ``loop`` until cancelled, and again after a bug in it.

    Without its journal or its lease a worker would go on in silence and lose everything it has.
    """
    while True:
        try:
            await loop()
        except Exception:
            log.exception("background loop broke", loop=name)
        await asyncio.sleep(PAUSE)


def _tell(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background work broke", exc_info=error)
