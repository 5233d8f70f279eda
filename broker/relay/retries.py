"""Repeats a step in Redis until it succeeds."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

from broker.core.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

RETRY = 1.0
"""Default seconds between two tries."""


async def until_stored(
    step: Callable[[], Awaitable[T]],
    *,
    give_up_after: float,
    retry: float = RETRY,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """Call ``step``, and repeat it while Redis cannot be reached or refuses. Returns its result.

    Args:
        step: the step. It must do no harm if it is done twice.
        give_up_after: seconds after which a failed try is the last.
        retry: seconds between two tries.
        clock: seconds that only go forward.
        pause: waits for so many seconds.

    Raises:
        StoreUnavailable: it was not done in time.
    """
    give_up_at = clock() + give_up_after
    while True:
        try:
            return await step()
        except StoreUnavailable:
            if clock() >= give_up_at:
                raise
        await pause(retry)
