"""The clock of Redis, as a worker has seen it in replies, for calls that must not take effect later."""

from __future__ import annotations

import time

KNOWN_FOR = 5.0
"""Seconds for which the clock is known after it was seen, which is twice a second. It may be moved, or become that of
another server."""

IN_TIME_MS = 500
"""Milliseconds after which a call that must not be late does nothing any more: half the time for which Redis is waited
for. If Redis stood still, or the call took long to come there, nobody may wait any more."""


class RedisClock:
    """The time in ms since 1970 by the clock of Redis."""

    def __init__(self) -> None:
        self._seen_at = float("-inf")
        self._seen_ms = 0

    def saw(self, ms: int) -> None:
        """Note the time in a reply that has just come."""
        self._seen_at, self._seen_ms = time.monotonic(), ms

    def now_ms(self) -> int | None:
        """Return the time, late by a round trip at most; None if it was not seen for `KNOWN_FOR` seconds."""
        passed = time.monotonic() - self._seen_at
        return self._seen_ms + int(passed * 1000) if passed < KNOWN_FOR else None
