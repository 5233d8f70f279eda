"""Loops that run for as long as the worker does, and that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

log = structlog.get_logger(__name__)

PAUSE = 1.0
"""Seconds before a loop that broke begins anew."""


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
