"""A session: its states, its ids, the cursors of its events, and its end. No I/O.

The table of its state changes is in `core.lifecycle`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from broker.core.errors import InvalidCursor


class State(StrEnum):
    """The state of a session.

    `CANCELLING` means that it runs and a cancel was accepted. `GONE` means that Redis has no such key.
    """

    PREPARED = "prepared"
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    LOST = "lost"
    GONE = "gone"


ENDED = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.ABANDONED, State.LOST})


SESSION_ID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
"""The pattern of a session id, a UUID of version 4 in the form that /prepare returns."""

CURSOR = r"([12])-(0|[1-9][0-9]{0,15})(\.end)?"
"""The pattern of a cursor: epoch, number, and the mark of the end."""

_SESSION_ID = re.compile(SESSION_ID)
_CURSOR = re.compile(CURSOR)


def is_session_id(text: str) -> bool:
    """Return True if ``text`` has the form of a session id."""
    return _SESSION_ID.fullmatch(text) is not None


def short(session_id: str) -> str:
    """Return the part of a session id that may be logged. The whole id is a bearer secret."""
    return session_id[:8]


class Cursor(NamedTuple):
    """The position of a viewer: the id of the last event that it has seen.

    Attributes:
        epoch: 1 for events of the session's owner, 2 for a terminal that another worker wrote for a dead owner.
        n: number of the event. Events of a session are numbered from 1 without gaps; 0 means no event.
        end: the event was the terminal.
    """

    epoch: int
    n: int
    end: bool = False

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}.end" if self.end else f"{self.epoch}-{self.n}"


START = Cursor(1, 0)


def parse_cursor(text: str) -> Cursor | None:
    """Parse a ``Last-Event-ID``. Returns None if it is empty: so a browser says that it has no id.

    Raises:
        InvalidCursor: it does not have the form of a cursor.
    """
    if not text:
        return None
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise InvalidCursor
    return Cursor(int(match[1]), int(match[2]), match[3] is not None)


class Terminal(NamedTuple):
    """The event that ends a session, the same for all viewers.

    Attributes:
        state: the state of the session from now on.
        event: ``done`` or ``error``.
        id: its cursor, whose ``end`` is true.
        data: its JSON.
    """

    state: State
    event: str
    id: Cursor
    data: bytes
