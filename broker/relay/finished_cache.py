"""Finished sessions that this worker keeps for replay: for a time, and within a bound. The oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.relay.generation import Generation

MAX_BYTES = 64 * 1024 * 1024
"""Events in memory of all finished sessions together."""

MAX_SESSIONS = 10_000
"""How many, however small."""


class FinishedCache:
    """Generations that have ended.

    Args:
        seconds: how long each is kept.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held: OrderedDict[str, tuple[Generation, float]] = OrderedDict()
        self._bytes = 0

    def get(self, session_id: str) -> Generation | None:
        """A generation that ended a short while ago."""
        held = self._held.get(session_id)
        return held[0] if held is not None else None

    def values(self) -> Iterable[Generation]:
        """All of them, the oldest first."""
        return [generation for generation, _ in self._held.values()]

    def add(self, generation: Generation, now: float) -> None:
        """Keep one more."""
        if self._seconds <= 0:
            return
        self._held[generation.session_id] = (generation, now + self._seconds)
        self._bytes += generation.feed.size
        while self._bytes > MAX_BYTES or len(self._held) > MAX_SESSIONS:
            self._drop_oldest()

    def drop(self, session_id: str) -> None:
        """Keep this one no longer."""
        if (held := self._held.pop(session_id, None)) is not None:
            self._bytes -= held[0].feed.size

    def expire(self, now: float) -> None:
        """Drop what has been kept long enough."""
        while self._held and next(iter(self._held.values()))[1] <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.drop(next(iter(self._held)))
