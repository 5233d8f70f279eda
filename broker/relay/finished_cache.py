"""Finished sessions in the memory of this worker, for replay: for a limited time, within bounds, oldest out first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from broker.relay.generation import Generation

MAX_BYTES = 64 * 1024 * 1024
"""Bytes of events of all finished sessions together."""

MAX_SESSIONS = 10_000
"""Finished sessions, however small."""


class _Entry(NamedTuple):
    """A finished generation.

    Attributes:
        size: bytes of its events when it was added. Its feed may shrink later.
        expires_at: monotonic time.
    """

    generation: Generation
    size: int
    expires_at: float


class FinishedCache:
    """Generations that have ended.

    Args:
        seconds: how long each one stays; 0 or less keeps none.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0

    def get(self, session_id: str) -> Generation | None:
        """Return the finished generation of a session, or None."""
        entry = self._entries.get(session_id)
        return entry.generation if entry is not None else None

    def values(self) -> list[Generation]:
        """Return all finished generations, the oldest first."""
        return [entry.generation for entry in self._entries.values()]

    def add(self, generation: Generation, now: float) -> None:
        """Add a generation, and drop the oldest ones until all are within the bounds."""
        if self._seconds <= 0:
            return
        self.drop(generation.session_id)
        entry = _Entry(generation, generation.feed.size, now + self._seconds)
        self._entries[generation.session_id] = entry
        self._bytes += entry.size
        while self._bytes > MAX_BYTES or len(self._entries) > MAX_SESSIONS:
            self._drop_oldest()

    def drop(self, session_id: str) -> None:
        """Remove a session; does nothing where it is not here."""
        if (entry := self._entries.pop(session_id, None)) is not None:
            self._bytes -= entry.size

    def expire(self, now: float) -> None:
        """Drop the sessions whose time is over."""
        while self._entries and next(iter(self._entries.values())).expires_at <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.drop(next(iter(self._entries)))
