"""The events of one session on this worker: the newest ones in memory, passed to viewers as they come.

A generation adds the events that it reads from the upstream, and a mirror adds those of another worker's journal. A
live viewer gets each batch at once, without waking a task. Any other viewer reads from the feed at its own pace. Events
that have left memory are in the journal. A feed knows neither where events come from nor how a viewer is connected.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from broker.core.replay import Batch, read_on
from broker.core.short_form import shorten

if TYPE_CHECKING:
    from broker.core.session import Terminal
    from broker.core.short_form import Short

WINDOW = 256 * 1024
"""Bytes of journaled events that stay in memory, because most viewers that lag, lag by less."""

_last_of = attrgetter("last")


class LiveViewer(Protocol):
    """What a feed needs of a viewer that has caught up."""

    def push(self, batch: Batch, now: float) -> None:
        """Take events at once, without waiting."""

    def wake(self) -> None:
        """Continue to read in the viewer's own task."""


class Feed:
    """The events `first` to `last` of a session, and its end once there is one.

    Attributes:
        first: number of the oldest event in memory; ``last + 1`` where there is none.
        last: number of the newest event.
        shown: number of the newest event that viewers may have; less than `last` only while new events are hidden.
        size: bytes in memory.
        end: the terminal, which is not counted in `last`.
    """

    __slots__ = ("_batches", "_hidden", "_live", "_shortened", "end", "first", "last", "shown", "size")

    def __init__(self, start: int = 0) -> None:
        self.first = start + 1
        self.last = self.shown = start
        self.size = 0
        self.end: Terminal | None = None
        self._batches: list[Batch] = []
        self._live: tuple[LiveViewer, ...] = ()  # a tuple, since it is read at every chunk and changes seldom
        self._hidden = False
        self._shortened: tuple[Batch, bool | None, Short] | None = None

    def add(self, batch: Batch, now: float) -> None:
        """Add the events that follow `last`, and push them to all live viewers as one block.

        Args:
            batch: the events.
            now: the monotonic clock, in seconds.
        """
        self._batches.append(batch)
        self.last = batch.last
        self.size += len(batch.events)
        if self._hidden:
            return
        self.shown = batch.last
        for viewer in self._live:
            viewer.push(batch, now)

    def shorten(self, batch: Batch, deltas: bool | None) -> Short:
        """Return a batch in the short form, which is made once for all live viewers.

        Args:
            batch: the batch that was pushed.
            deltas: of the events before it, see `core.short_form`.

        Raises:
            DeltasUnknown: `deltas` is None, but is needed.
        """
        made = self._shortened
        if made is None or made[0] is not batch or made[1] is not deltas:
            made = self._shortened = (batch, deltas, shorten(batch.events, deltas))
        return made[2]

    def finish(self, end: Terminal) -> None:
        """Set the end. Nothing can follow; hidden events are shown up to the number of the end."""
        keep = max(self.shown, end.id.n - 1)
        while self._batches and self._batches[-1].last > keep:
            self.size -= len(self._batches.pop().events)
        self.last = self.shown = min(self.last, keep)
        self._hidden = False
        self._shortened = None
        self.end = end
        self._wake_all()

    def hide(self) -> None:
        """Show viewers nothing new until `show`."""
        self._hidden = True

    def show(self) -> None:
        """Show the events that came since `hide`, and later ones."""
        self._hidden = False
        if self.shown < self.last:
            self.shown = self.last
            self._wake_all()

    def skip_to(self, n: int) -> None:
        """Drop all events and continue after event ``n``. Earlier events are in the journal, or missing."""
        self._batches.clear()
        self.size = 0
        self.first = n + 1
        self.last = self.shown = n
        self._wake_all()

    def after(self, n: int, limit: int) -> Batch:
        """Return events that viewers may have, after number ``n``: at most ``limit`` bytes or one batch."""
        return self._gather(n, limit, self.shown)

    def unsaved(self, n: int, limit: int) -> Batch:
        """Return events after number ``n``, or from `first` on, shown or not: at most ``limit`` bytes or one batch."""
        return self._gather(max(n, self.first - 1), limit, self.last)

    def trim(self, saved: int, keep: int = WINDOW) -> None:
        """Drop old events up to number ``saved``, except the newest ``keep`` bytes."""
        dropped = 0
        for batch in self._batches:
            if self.size <= keep or batch.last > saved:
                break
            self.size -= len(batch.events)
            dropped += 1
        if dropped:
            del self._batches[:dropped]
            self.first = self._batches[0].first if self._batches else self.last + 1

    @property
    def live(self) -> int:
        """The number of viewers that have all shown events."""
        return len(self._live)

    def go_live(self, viewer: LiveViewer) -> None:
        """Push to this viewer from now on. It must have all shown events."""
        if viewer not in self._live:
            self._live = (*self._live, viewer)

    def leave(self, viewer: LiveViewer) -> None:
        """Stop pushing to this viewer; does nothing if it was not live."""
        self._live = tuple([each for each in self._live if each is not viewer])

    def _gather(self, n: int, limit: int, newest: int) -> Batch:
        batches = self._batches
        at = bisect_right(batches, n, key=_last_of)
        taken: list[Batch] = []
        size = 0
        while at < len(batches) and batches[at].last <= newest and (not taken or size < limit):
            taken.append(batches[at])
            size += len(batches[at].events)
            at += 1
        events, last = read_on(taken, n)
        return Batch(n + 1, last, events)

    def _wake_all(self) -> None:
        for viewer in self._live:
            viewer.wake()
