"""A viewer in the short form, ``?events=token``: it gets the contents of each chunk and not the chunk.

While viewers are live, each chunk is parsed once for all of them: the feed remembers the short form of its newest
batch. A viewer that catches up parses the events that it missed, in parts of limited size, and lets the event loop run
in between.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from broker.core.chat_said import DeltasUnknown
from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.core.short_form import START, begins_with_deltas, count_events, portions, shorten
from broker.relay.viewer import MAX_BACKLOG, Viewer

if TYPE_CHECKING:
    from broker.core.session import Cursor
    from broker.core.short_form import Short
    from broker.relay.feed import Added, Feed
    from broker.relay.viewer import Connection, ReadJournal

MAX_PARSED = 64 * 1024
"""Bytes of events that are parsed at a time, or one event; this takes a few milliseconds."""


class TokenViewer(Viewer):
    """Follows a feed in the short form. Ids and cursors are those of the long form.

    Args:
        feed, read_journal, connection, cursor, now: as for `Viewer`.
    """

    __slots__ = ("_deltas",)

    def __init__(
        self, feed: Feed, read_journal: ReadJournal, connection: Connection, cursor: Cursor | None, now: float
    ) -> None:
        super().__init__(feed, read_journal, connection, cursor, now)
        self._deltas = None if self._n else False

    def push(self, batch: Added, now: float) -> None:
        """Write new events of the feed."""
        first, last, added = batch
        if last <= self._n:
            return  # the cursor is ahead of the feed, which has to pass it first
        if first != self._n + 1 or len(added) > MAX_PARSED:
            self.wake()
            return
        try:
            events, self._deltas = self.feed.shorten(batch, self._deltas)
        except DeltasUnknown:
            self.wake()
            return
        self._n = last
        if events:  # an empty block would end the body
            self.written_at = now
            if self._connection.write_now(events) > MAX_BACKLOG:
                self.check()
                self.wake()

    async def follow(self) -> None:
        """Write all events from the cursor to the end. Returns when the connection may be closed.

        Raises:
            ConnectionError: the connection is closed.
        """
        if not self._n:
            self._connection.write_now(START)
        with suppress(StoreUnavailable):  # the page will reconnect, and perhaps Redis will be back then
            await super().follow()

    async def _write(self, batch: Batch) -> None:
        for events in portions(batch.events, MAX_PARSED):
            short, self._deltas = await self._shorten(events)
            await super()._write(Batch(self._n + 1, self._n + count_events(events), short))
            await asyncio.sleep(0)

    async def _shorten(self, events: bytes) -> Short:
        try:
            return shorten(events, self._deltas)
        except DeltasUnknown:
            return shorten(events, await self._began_with_deltas())

    async def _began_with_deltas(self) -> bool:
        """Find out whether the answer began with deltas, up to the cursor. Only answers in another shape need this.

        Raises:
            StoreUnavailable: the beginning of the answer cannot be read now.
        """
        feed = self.feed
        beginning = [feed.after(0, MAX_PARSED)] if feed.first == 1 else await self._read_journal(0)
        seen = [batch for batch in beginning if batch.first <= self._n]
        return any(begins_with_deltas(batch.events, self._n + 1 - batch.first) for batch in seen)
