"""The events of one session on this worker: the newest ones in memory, passed to viewers as they come.

A generation adds the events that it reads from the upstream, and a mirror adds those of another worker's journal. A
live viewer gets each batch at once, without waking a task. Any other viewer reads from the feed at its own pace. Events
that have left memory are in the journal. A feed knows neither where events come from nor how a viewer is connected.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

from broker.core.replay import Batch, read_on
from broker.core.short_form import shorten

if TYPE_CHECKING:
    from typing import TypeAlias

    from broker.core.session import Terminal
    from broker.core.short_form import Short

    Added: TypeAlias = tuple[int, int, bytes]
    """The fields of a `Batch`. For each chunk a plain tuple is enough, and takes a third of the time (measured)."""

WINDOW = 256 * 1024
"""Bytes of journaled events that stay in memory, because most viewers that lag, lag by less."""


class LiveViewer(Protocol):
    """What a feed needs of a viewer that has caught up."""

    def push(self, batch: Added, now: float) -> None:
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

    __slots__ = (
        "_blocks",
        "_hidden",
        "_lasts",
        "_live",
        "_shortened",
        "end",
        "first",
        "last",
        "shown",
        "size",
    )

    def __init__(self, start: int = 0) -> None:
        self.first = start + 1
        self.last = self.shown = start
        self.size = 0
        self.end: Terminal | None = None
        # The events of each batch in memory, and the numbers of their last ones.
        self._blocks: list[bytes] = []
        self._lasts: list[int] = []
        self._live: tuple[LiveViewer, ...] = ()  # a tuple, since it is read at every chunk and changes seldom
        self._hidden = False
        self._shortened: tuple[Added, bool | None, Short] | None = None

    def add(self, batch: Added, now: float) -> None:
        """Add the events that follow `last`, and push them to all live viewers as one block.

        Args:
            batch: the events.
            now: the monotonic clock, in seconds.
        """
        _, last, events = batch
        self._blocks.append(events)
        self._lasts.append(last)
        self.last = last
        self.size += len(events)
        if self._hidden:
            return
        self.shown = last
        for viewer in self._live:
            viewer.push(batch, now)

    def shorten(self, batch: Added, deltas: bool | None) -> Short:
        """Return a batch in the short form, which is made once for all live viewers.

        Args:
            batch: the batch that was pushed.
            deltas: of the events before it, see `core.short_form`.

        Raises:
            DeltasUnknown: `deltas` is None, but is needed.
        """
        made = self._shortened
        if made is None or made[0] is not batch or made[1] is not deltas:
            made = self._shortened = (batch, deltas, shorten(batch[2], deltas))
        return made[2]

    def finish(self, end: Terminal) -> None:
        """Set the end. Nothing can follow; hidden events are shown up to the number of the end."""
        keep = max(self.shown, end.id.n - 1)
        while self._lasts and self._lasts[-1] > keep:
            del self._lasts[-1]
            self.size -= len(self._blocks.pop())
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
        self._blocks.clear()
        self._lasts.clear()
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
        if self.size <= keep:
            return
        dropped = 0
        for last, block in zip(self._lasts, self._blocks, strict=True):
            if self.size <= keep or last > saved:
                break
            self.size -= len(block)
            dropped += 1
        if dropped:
            self.first = self._lasts[dropped - 1] + 1
            del self._lasts[:dropped], self._blocks[:dropped]

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
        lasts, blocks = self._lasts, self._blocks
        at = end = bisect_right(lasts, n)
        size = 0
        while end < len(lasts) and lasts[end] <= newest and (end == at or size < limit):
            size += len(blocks[end])
            end += 1
        before = lasts[at - 1] if at else self.first - 1
        if end > at and before != n:  # the cursor is within a batch
            first = Batch(before + 1, lasts[at], blocks[at])
            return Batch(n + 1, lasts[end - 1], read_on([first], n)[0] + b"".join(blocks[at + 1 : end]))
        return Batch(n + 1, lasts[end - 1] if end > at else n, b"".join(blocks[at:end]))

    def _wake_all(self) -> None:
        for viewer in self._live:
            viewer.wake()
