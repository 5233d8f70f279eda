"""Log pages that were refused because of their origin, with the setting that would allow them.

An origin is text of a stranger: it is cut, quoted, and logged rarely, however many there are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW: Final = 60.0
"""Seconds in which an origin is logged once."""

MOST: Final = 10
"""Origins that are logged in a window; others are only counted."""

_SHOWN_CHARACTERS: Final = 100

log = structlog.get_logger(__name__)


class RefusedOrigins:
    """Logs refused origins, each at most once a minute, with the number of refusals since the last line.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._counts: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def note(self, origin: str) -> None:
        """Count a refusal, and log it where that is due."""
        now = self._clock()
        if now - self._began >= WINDOW:
            self._before = self._counts if now - self._began < 2 * WINDOW else {}
            self._began, self._counts = now, {}
        shown = repr(origin[:_SHOWN_CHARACTERS])
        if shown in self._counts:
            self._counts[shown] += 1
        elif len(self._counts) < MOST:
            self._counts[shown] = 0  # refusals that are not logged yet
            times = 1 + self._before.get(shown, 0)
            log.warning("origin refused", origin=shown, times=times, allowed_by="BROKER_CORS_ORIGINS")
