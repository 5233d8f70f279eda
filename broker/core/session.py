"""A session: its states, its ids, the cursors of its events, and its end. No I/O.

Which step leads from which state to which is in `core.lifecycle`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from broker.core.errors import InvalidCursor


class State(StrEnum):
    """Where a session stands.

    It is `CANCELLING` while it runs and a cancel was accepted, and `GONE` where Redis has no such key (any more).
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


_SESSION_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_CURSOR = re.compile(r"([12])-(0|[1-9][0-9]{0,15})(\.end)?")


def is_session_id(text: str) -> bool:
    """Whether ``text`` is a UUID of version 4 in the form that /prepare hands out."""
    return _SESSION_ID.fullmatch(text) is not None


def short(session_id: str) -> str:
    """What a log may carry of a session's id, which is a bearer secret."""
    return session_id[:8]


class Cursor(NamedTuple):
    """How far a viewer has got: the id of the last event it has seen.

    Attributes:
        epoch: 1 for what the session's owner wrote, 2 for a terminal that another worker wrote for a dead owner.
        n: the event's number; events of a session count from 1 without a gap, so 0 is "nothing yet".
        end: the event was the terminal.
    """

    epoch: int
    n: int
    end: bool = False

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}.end" if self.end else f"{self.epoch}-{self.n}"


START = Cursor(1, 0)


def parse_cursor(text: str) -> Cursor | None:
    """Read a ``Last-Event-ID``; None where it is empty, which is how a browser says that it has none.

    Raises:
        InvalidCursor: it is none of ours.
    """
    if not text:
        return None
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise InvalidCursor
    return Cursor(int(match[1]), int(match[2]), match[3] is not None)


class Terminal(NamedTuple):
    """The one event that ends a session, for every viewer alike.

    Attributes:
        state: what the session is from now on.
        event: ``done`` or ``error``.
        id: its cursor, whose ``end`` is true.
        data: its JSON.
    """

    state: State
    event: str
    id: Cursor
    data: bytes
