"""Tells the operator of pages that were refused for their origin, and which setting would let them in.

An origin is text of a stranger: it is cut, shown as a literal, and told seldom, however many there are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW: Final = 60.0
"""Seconds in which an origin is told once."""

MOST: Final = 10
"""Origins that are told in a window; the rest of them only count."""

_SHOWN_CHARACTERS: Final = 100

log = structlog.get_logger(__name__)


class RefusedOrigins:
    """Logs refused origins, each at most once a minute with the number of times since it was last told.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._counts: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def note(self, origin: str) -> None:
        """Count a refusal, and tell of it where that is due."""
        now = self._clock()
        if now - self._began >= WINDOW:
            self._before = self._counts if now - self._began < 2 * WINDOW else {}
            self._began, self._counts = now, {}
        shown = repr(origin[:_SHOWN_CHARACTERS])
        if shown in self._counts:
            self._counts[shown] += 1
        elif len(self._counts) < MOST:
            self._counts[shown] = 0  # those that are not told yet
            times = 1 + self._before.get(shown, 0)
            log.warning("origin refused", origin=shown, times=times, allowed_by="BROKER_CORS_ORIGINS")
