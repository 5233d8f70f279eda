"""Decide what a viewer gets next, and join batches of the journal. No I/O.

The events of a session are in two places that overlap: the memory of this worker has the newest ones, and the journal
in Redis has all that were written to it. The cursor of a viewer names the last event that it has. The next events must
follow it without a gap; where that is not possible, the viewer is sent an error.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.core.session import Cursor, Terminal


class Next(Enum):
    """The next thing for a viewer."""

    MEMORY = "memory"
    JOURNAL = "journal"
    WAIT = "wait"
    END = "end"
    GAP = "gap"


def what_next(cursor: Cursor, first: int, last: int, end: Terminal | None) -> Next:
    """Decide what a viewer at ``cursor`` gets next.

    Args:
        cursor: the last event of the viewer. A cursor with epoch 2 and without an end is never handed out.
        first: number of the oldest event in memory; ``last + 1`` where there is none.
        last: number of the newest event.
        end: the terminal, once the session has one.
    """
    if cursor.epoch != 1:
        return Next.GAP
    if cursor.n < last:
        return Next.MEMORY if cursor.n + 1 >= first else Next.JOURNAL
    if end is None:
        return Next.WAIT  # for new events, or until the feed has passed the cursor
    # A cursor beyond the end can only be wrong, with one exception: where another worker wrote the end for a dead one,
    # viewers of the dead worker may have seen more events than were journaled.
    return Next.END if cursor.n == last or end.id.epoch == 2 else Next.GAP


class Batch(NamedTuple):
    """One entry of the journal: the events ``first`` to ``last``, encoded as they are sent."""

    first: int
    last: int
    events: bytes


class JournalGap(Exception):  # noqa: N818 - says what happened, as the tree of errors does
    """Events are missing that should be in the journal."""


def read_on(batches: Sequence[Batch], after: int) -> tuple[bytes, int]:
    """Return the encoded events that follow number ``after``, and the number of the last of them.

    Batches may begin earlier, overlap, and repeat.

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
    # An event ends at a blank line and contains none: each line of its data begins with "data: ".
    events = batch.events.split(b"\n\n")
    return b"\n\n".join(events[after + 1 - batch.first :])
