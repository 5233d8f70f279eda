"""The events of one session on this worker: kept in memory, and handed to the viewers as they come.

A feed is where the upstream's side and the viewers' side meet. Whoever produces events appends them and, once, finishes
it; a viewer either is live, and then is given each block of events the moment it is there, without a task being woken,
or reads from the feed at its own pace. A feed knows neither where events come from nor how a viewer is connected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from broker.core.events import chunk_event

if TYPE_CHECKING:
    from broker.core.session import Terminal


class LiveViewer(Protocol):
    """What a feed needs to know of a viewer that has caught up."""

    def push(self, block: bytes, first: int, last: int, now: float) -> None:
        """Take the events ``first`` to ``last``, framed, at once and without waiting."""

    def wake(self) -> None:
        """Read on by yourself: the feed has ended."""


class Feed:
    """Events 1 to `last` of a session, and its end once there is one.

    Attributes:
        last: number of the last event, 0 before the first.
        size: bytes of all events.
        end: the terminal, which is not counted in `last`.
    """

    __slots__ = ("_events", "_live", "end", "last", "size")

    def __init__(self) -> None:
        self.last = 0
        self.size = 0
        self.end: Terminal | None = None
        self._events: list[bytes] = []
        self._live: set[LiveViewer] = set()

    def append(self, chunks: list[bytes], now: float) -> None:
        """Add the chunks of one read, and give them to every live viewer in one piece.

        Args:
            chunks: JSON of upstream chunks, not empty.
            now: the monotonic clock, in seconds.
        """
        first = self.last + 1
        events = [chunk_event(n, data) for n, data in enumerate(chunks, first)]
        self._events += events
        self.last += len(events)
        block = events[0] if len(events) == 1 else b"".join(events)
        self.size += len(block)
        for viewer in tuple(self._live):
            viewer.push(block, first, self.last, now)

    def finish(self, end: Terminal) -> None:
        """Set the end. Nothing can follow."""
        self.end = end
        for viewer in tuple(self._live):
            viewer.wake()

    def after(self, n: int, limit: int) -> tuple[bytes, int]:
        """Events from number ``n + 1`` on, framed, and the number of the last of them.

        Args:
            n: what the reader has.
            limit: bytes to stop at; one event is given even if it is larger.
        """
        taken: list[bytes] = []
        size = 0
        for event in self._events[n : n + 1000]:
            if taken and size + len(event) > limit:
                break
            taken.append(event)
            size += len(event)
        return b"".join(taken), n + len(taken)

    def go_live(self, viewer: LiveViewer) -> None:
        """From now on push to this viewer, which has everything so far."""
        self._live.add(viewer)

    def leave(self, viewer: LiveViewer) -> None:
        """Push no more to this viewer; does nothing where it was not live."""
        self._live.discard(viewer)
