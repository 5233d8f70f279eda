"""Finished sessions in the memory of this worker, for replay: for a limited time, within bounds, oldest out first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from broker.core.session import Terminal
    from broker.relay.finished import FinishedSession

MAX_BYTES = 54 * 1024 * 1024
"""Bytes of all finished sessions together. The process takes a sixth more for them, so less than 64 MiB (measured)."""

MAX_SESSIONS = 10_000
"""Finished sessions, however small."""


class _Entry(NamedTuple):
    """A finished session, and the monotonic time at which it expires."""

    session: FinishedSession
    expires_at: float


class FinishedCache:
    """Sessions that have ended on this worker.

    Args:
        seconds: how long each one stays; 0 or less keeps none.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0

    def get(self, session_id: str) -> FinishedSession | None:
        """Return a finished session, or None."""
        entry = self._entries.get(session_id)
        return entry.session if entry is not None else None

    def values(self) -> list[FinishedSession]:
        """Return all finished sessions, the oldest first."""
        return [entry.session for entry in self._entries.values()]

    def add(self, session: FinishedSession, now: float) -> None:
        """Add a session, and drop the oldest ones until all are within the bounds."""
        if self._seconds <= 0:
            return
        self.drop(session.session_id)
        self._entries[session.session_id] = _Entry(session, now + self._seconds)
        self._bytes += session.size
        while self._bytes > MAX_BYTES or len(self._entries) > MAX_SESSIONS:
            self._drop_oldest()

    def drop(self, session_id: str) -> None:
        """Remove a session; does nothing where it is not here."""
        if (entry := self._entries.pop(session_id, None)) is not None:
            self._bytes -= entry.session.size

    def replace_end(self, session_id: str, end: Terminal) -> None:
        """Give a session the end that Redis has. Does nothing where the session is not here.

        If another worker wrote that end, the session is dropped: the events may go on behind it. Else it stays, because
        this worker may have to write it again.
        """
        entry = self._entries.get(session_id)
        if entry is None:
            return
        if end.id.epoch != 1:
            self.drop(session_id)
            return
        self._bytes -= entry.session.size
        entry.session.replace_end(end)
        self._bytes += entry.session.size

    def expire(self, now: float) -> None:
        """Drop the sessions whose time is over."""
        while self._entries and next(iter(self._entries.values())).expires_at <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.drop(next(iter(self._entries)))
