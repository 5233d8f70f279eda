"""What to give a viewer next, and how the journal is read. No I/O.

The events of a session lie in two places that overlap: this worker's memory holds the newest of them, the journal in
Redis all that were written there. A viewer says by its cursor what it has. Whatever it is given follows on that without
a hole; where that cannot be, it is told.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.core.session import Cursor, Terminal


class Next(Enum):
    """What a viewer gets next."""

    MEMORY = "memory"
    JOURNAL = "journal"
    WAIT = "wait"
    END = "end"
    GAP = "gap"


def what_next(cursor: Cursor, first: int, last: int, end: Terminal | None) -> Next:
    """Decide for a viewer at ``cursor``.

    Args:
        cursor: what it has; epoch 2 without an end is no cursor that anybody was given.
        first: number of the oldest event in memory, ``last + 1`` where there is none.
        last: number of the newest event.
        end: the terminal, once the session has one.
    """
    if cursor.epoch != 1:
        return Next.GAP
    if cursor.n < last:
        return Next.MEMORY if cursor.n + 1 >= first else Next.JOURNAL
    if end is None:
        return Next.WAIT  # for more, or for the events that the cursor is ahead by
    # A cursor beyond the end can only be wrong. The exception is an end that another worker wrote for a dead one:
    # viewers of that one may have seen more than was journaled.
    return Next.END if cursor.n == last or end.id.epoch == 2 else Next.GAP


class Batch(NamedTuple):
    """One entry of the journal: the events ``first`` to ``last``, framed as they are sent."""

    first: int
    last: int
    events: bytes


class JournalGap(Exception):  # noqa: N818 - says what happened, as the tree of errors does
    """Events that should be in the journal are not."""


def read_on(batches: Sequence[Batch], after: int) -> tuple[bytes, int]:
    """The events that follow number ``after``, framed, and the number of the last of them.

    Batches may begin before what is asked for, overlap, and repeat.

    Raises:
        JournalGap: an event between ``after`` and the last batch is missing.
    """
    pieces = []
    for batch in batches:
        if batch.last <= after:
            continue
        if batch.first > after + 1:
            raise JournalGap(f"event {after + 1} is missing before {batch.first}")
        pieces.append(_cut(batch, after))
        after = batch.last
    return b"".join(pieces), after


def _cut(batch: Batch, after: int) -> bytes:
    if batch.first == after + 1:
        return batch.events
    # An event ends at a blank line and holds none: each line of its data begins with "data: ".
    events = batch.events.split(b"\n\n")
    return b"\n\n".join(events[after + 1 - batch.first :])
