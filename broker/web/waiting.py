"""The pages that wait in line for a slot, as this worker knows them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from broker.store.accounts import LINE

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 10_000
"""Maximum number of pages that are counted."""


class WaitingPages:
    """Counts the pages that were told here to wait, until they come back or should have come back.

    A page that comes back to another worker is counted there from then on, and here until its time is over.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def note_waiting(self, session_id: str, retry_ms: int) -> None:
        """Note that the page of a session was told to come back after so many milliseconds."""
        self._until.pop(session_id, None)
        self._until[session_id] = self._clock() + (retry_ms + LINE["LATE_MS"]) / 1000
        if len(self._until) > MOST:
            del self._until[next(iter(self._until))]

    def left(self, session_id: str) -> None:
        """Note that a session does not wait any more."""
        self._until.pop(session_id, None)

    def __len__(self) -> int:
        now = self._clock()
        for session_id in [each for each, until in self._until.items() if until <= now]:
            del self._until[session_id]
        return len(self._until)
