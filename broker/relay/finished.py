"""A session that has ended on this worker: what is kept of its generation for replay, and to write it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.relay.feed import Feed
from broker.relay.finishing import ALL

if TYPE_CHECKING:
    from broker.core.replay import Batch
    from broker.core.session import State, Terminal
    from broker.relay.generation import Generation

OVERHEAD = 2048
"""Bytes that a finished session takes besides its events and the data of its end, rounded up."""


class FinishedSession:
    """What is left of a generation, in one small object; a `relay.source.Source`.

    The generation itself has tasks, buffers, and an object for each read of its answer: several times as much.

    Args:
        generation: the generation.
        end: its end.

    Attributes:
        session_id, claim_id, reservation, prepared, saved: those of the generation.
        end: its end.
        size: bytes of memory that it takes, about.
    """

    __slots__ = (
        "_bill",
        "_events",
        "claim_id",
        "end",
        "prepared",
        "reservation",
        "saved",
        "session_id",
        "size",
    )

    def __init__(self, generation: Generation, end: Terminal) -> None:
        self.session_id = generation.session_id
        self.claim_id = generation.claim_id
        self.reservation = generation.reservation
        self.prepared = generation.prepared
        self.saved = generation.saved
        self.end = end
        self._events: Batch = generation.feed.unsaved(0, ALL)
        self._bill = generation.finishing.bill
        self.size = len(self._events.events) + len(end.data) + OVERHEAD

    def replace_end(self, end: Terminal) -> None:
        """Take another end, which has the number of the one before."""
        self.size += len(end.data) - len(self.end.data)
        self.end = end

    @property
    def feed(self) -> Feed:
        """A new feed with its events and its end, for one reader."""
        feed = Feed(self._events.first - 1)
        if self._events.events:
            feed.add(self._events, 0.0)
        feed.finish(self.end)
        return feed

    @property
    def prepared_by(self) -> str:
        """The id of the request that prepared the session."""
        return self.prepared.request_id

    @property
    def state(self) -> State:
        """The state in which it ended."""
        return self.end.state

    def add_viewer(self, *, resumed: bool = False) -> None:
        """Do nothing: no viewer is counted, because nothing depends on viewers any more."""

    def remove_viewer(self) -> None:
        """Do nothing, likewise."""

    def cancel(self) -> bool:
        """Return False: it has ended."""
        return False

    async def ended(self) -> State:
        """Return the state in which it ended."""
        return self.state

    async def settle(self) -> None:
        """Book the usage again, because Redis may have lost it.

        Raises:
            StoreUnavailable: it could not be booked now.
        """
        await self._bill.settle(self.state)
