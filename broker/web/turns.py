"""Let requests begin one at a time, so that a rush of new sessions does not hold up the streams that run.

A new session takes as much of a worker's time as 40 chunks. Without a limit, all requests that came while the event
loop was busy begin in its next turn. That turn then takes longer than the one before, more requests come meanwhile, and
the chunks of all streams wait for them. With the limit the requests wait instead, in the order in which they came.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

A_TURN: Final = 1
"""Requests that begin in one turn of the event loop. With little to do, a turn takes less than a millisecond. With two,
the slowest chunks of a busy worker came 1.6 times as late (measured)."""


class Turns:
    """Makes requests wait for a turn of the event loop in which they may begin. Each connection has one at most.

    Args:
        streaming: returns True if there are streams that could be held up.
    """

    def __init__(self, streaming: Callable[[], bool]) -> None:
        self._streaming = streaming
        self._loop = asyncio.get_running_loop()
        self._begun = 0
        self._counting = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return at once, or in a later turn if enough requests have begun in this one."""
        if not self._waiting and not self._streaming():
            return
        if not self._counting:
            self._counting = True
            self._loop.call_soon(self._next_turn)
        if self._begun < A_TURN and not self._waiting:
            self._begun += 1
            return
        place = self._loop.create_future()
        self._waiting.append(place)
        await place

    def _next_turn(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < A_TURN:
            place = self._waiting.popleft()
            if not place.done():  # else its client has left
                place.set_result(None)
                self._begun += 1
        self._counting = self._begun > 0
        if self._counting:
            self._loop.call_soon(self._next_turn)
