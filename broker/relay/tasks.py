"""The background tasks of a worker. Each has an owner that waits for it, and an exception in one is logged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

log = structlog.get_logger(__name__)

PAUSE = 1.0
"""Seconds before a loop that raised or returned is started again."""


class Tasks:
    """Background tasks of three kinds: work that a drain waits for, work that it does not wait for, and loops."""

    def __init__(self) -> None:
        self._work: set[asyncio.Task[Any]] = set()
        self._extra: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run work that ends by itself and that a drain waits for."""
        self.adopt(asyncio.create_task(work))

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Own a task that runs already, as if `spawn` had started it."""
        self._own(task, self._work)

    def spawn_extra(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run work that no drain waits for."""
        self._own(asyncio.create_task(work), self._extra)

    def keep_running(self, loops: Mapping[str, Callable[[], Awaitable[object]]]) -> None:
        """Run loops until `close`, by the names that the log gives them."""
        for name, loop in loops.items():
            self._own(asyncio.create_task(keep_running(name, loop)), self._extra)

    async def finish(self, timeout: float) -> None:
        """Wait until all work of `spawn` and `adopt` is done, for ``timeout`` seconds at most."""
        deadline = self._loop.time() + timeout
        while self._work and (left := deadline - self._loop.time()) > 0:
            await asyncio.wait(self._work, timeout=left)

    async def close(self) -> None:
        """Cancel all tasks that are left, and wait until they have ended."""
        tasks = (*self._work, *self._extra)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _own(self, task: asyncio.Task[Any], owned: set[asyncio.Task[Any]]) -> None:
        owned.add(task)
        task.add_done_callback(owned.discard)
        task.add_done_callback(_log_error)


async def keep_running(
    name: str,
    loop: Callable[[], Awaitable[object]],
    *,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> NoReturn:
    """Run ``loop`` until cancelled, and start it again after an exception.

    A worker whose journal or lease stopped without notice would lose its sessions.

    Args:
        name: of the loop, for the log.
        loop: is called without arguments and awaited.
        pause: waits for so many seconds.
    """
    while True:
        try:
            await loop()
        except Exception:
            log.exception("background loop broke", loop=name)
        await pause(PAUSE)


def _log_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background work broke", exc_info=error)
