"""Sessions of other workers, followed by this one for its viewers.

A mirror is a feed that is filled from a session's journal. All mirrors of a worker are served together: events come
with notifications, and twice a second missing events are read in one round trip, which also keeps this worker
registered as a viewer. The end of a session whose owner has died is written by `relay.reaper`.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch, JournalGap, read_on
from broker.core.session import State
from broker.relay.feed import Feed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    from broker.relay.viewer import Viewer
    from broker.store.journal import Followed, JournalStore

log = structlog.get_logger(__name__)

ROUND = 0.5
"""Seconds between two rounds over all mirrors."""

SESSIONS_AT_ONCE = 64
"""Sessions in one round trip."""


class Mirror:
    """A session of another worker that is followed here; a `relay.source.Source`.

    Args:
        session_id: the session.
        worker: the worker that runs it.
        last: number of the last event before those of `feed`.
        unwatched: is called when the last viewer has left.
        prepared_by: the id of the request that prepared the session.

    Attributes:
        feed: its events since it was first watched here; earlier ones are in the journal.
        prepared_by: as given.
    """

    def __init__(
        self,
        session_id: str,
        worker: str,
        last: int,
        unwatched: Callable[[Mirror], None],
        prepared_by: str = "",
    ) -> None:
        self.session_id = session_id
        self.worker = worker
        self.prepared_by = prepared_by
        self.feed = Feed(last)
        self._unwatched = unwatched
        self._viewers = 0

    def add_viewer(self, *, resumed: bool = False) -> None:  # noqa: ARG002 - as of a `Source`
        """Count a viewer."""
        self._viewers += 1

    def remove_viewer(self) -> None:
        """Stop counting a viewer: it has left. After the last one, the session is followed no longer."""
        self._viewers -= 1
        if not self._viewers:
            self._unwatched(self)


class _Opening:
    """A mirror that is being opened: the number of viewers that wait, and the notifications that came meanwhile."""

    def __init__(self) -> None:
        self.viewers = 0
        self.notified: list[Batch | None] = []


class Mirrors:
    """Keeps the mirrors of this worker.

    Args:
        journal: reads from Redis.
        is_gone: returns True if a session that Redis does not have is gone for good.
        viewers: all viewers of this worker; those of a session that is gone are disconnected.
    """

    def __init__(
        self,
        journal: JournalStore,
        is_gone: Callable[[], Awaitable[bool]],
        viewers: Collection[Viewer],
    ) -> None:
        self._journal = journal
        self._is_gone = is_gone
        self._viewers = viewers
        self._open_mirrors: dict[str, Mirror] = {}
        self._opening: dict[str, _Opening] = {}
        self._read_next: set[str] = set()
        self._left: set[str] = set()
        self._leaving: set[str] = set()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def get(self, session_id: str) -> Mirror | None:
        """Return the mirror of a session that is watched here, or None."""
        return self._open_mirrors.get(session_id)

    def release_viewers(self) -> None:
        """Disconnect the viewers of all mirrors. Their pages will reconnect to another worker."""
        for mirror in tuple(self._open_mirrors.values()):
            self._release(mirror)

    def _release(self, mirror: Mirror) -> None:
        for viewer in tuple(self._viewers):
            if viewer.feed is mirror.feed:
                viewer.release()

    async def open(self, session_id: str, after: int) -> Mirror | State:
        """Register this worker as a viewer and return the mirror, or the state of a session that cannot be watched.

        Args:
            session_id: the session.
            after: number of the last event that its first viewer has.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        with self._noting(session_id) as notified:
            followed = await self._journal.follow(session_id, after, with_request_id=True)
        if followed.status.state in (State.GONE, State.PREPARED):
            return followed.status.state
        mirror = self._open_mirrors.get(session_id)
        if mirror is None:
            mirror = self._open_mirrors[session_id] = self._new_mirror(session_id, followed, after)
            for batch in notified:  # they came before the mirror was there
                self._take_notified(mirror, batch)
        if followed.status.end is not None and mirror.feed.end is None:
            self._finish(mirror, followed)
        if session_id in self._leaving:
            self._read_soon(session_id)  # `_unregister` may just have removed the registration
        return mirror

    @contextmanager
    def _noting(self, session_id: str) -> Iterator[list[Batch | None]]:
        """Collect notifications of a session while its mirror is opened, so that it need not be read twice."""
        opening = self._opening.setdefault(session_id, _Opening())
        opening.viewers += 1
        try:
            yield opening.notified
        finally:
            opening.viewers -= 1
            if not opening.viewers:
                del self._opening[session_id]

    def _read_soon(self, session_id: str) -> None:
        """Read the journal of this session in the next round, and start that at once."""
        self._read_next.add(session_id)
        self._wake.set()

    def _on_unwatched(self, mirror: Mirror) -> None:
        if self._open_mirrors.get(mirror.session_id) is mirror:
            del self._open_mirrors[mirror.session_id]
            if mirror.feed.end is None:
                self._left.add(mirror.session_id)
                self._wake.set()

    def on_notification(self, session_id: str, batch: Batch | None) -> None:
        """Handle a notification: it brings events, or says that there is something to read."""
        mirror = self._open_mirrors.get(session_id)
        if mirror is not None:
            self._take_notified(mirror, batch)
        elif (opening := self._opening.get(session_id)) is not None:
            opening.notified.append(batch)

    def _take_notified(self, mirror: Mirror, batch: Batch | None) -> None:
        if mirror.feed.end is not None:
            return
        if batch is None or batch.first > mirror.feed.last + 1:
            self._read_soon(mirror.session_id)
        else:
            self._add(mirror, [batch])

    async def run(self) -> NoReturn:
        """Serve the mirrors until cancelled."""
        round_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, round_at - self._loop.time())):
                    await self._wake.wait()
            self._wake.clear()
            now = self._loop.time()
            everything = now >= round_at
            if everything:
                round_at = now + ROUND
            try:
                await self._unregister()
                await self._read_missing(everything=everything)
            except StoreUnavailable:
                await asyncio.sleep(ROUND)

    async def _unregister(self) -> None:
        self._leaving, self._left = self._left - self._open_mirrors.keys(), set()
        try:
            if self._leaving:
                await self._journal.leave(self._leaving)
                self._read_next |= self._leaving & self._open_mirrors.keys()  # a viewer came meanwhile
        finally:
            self._leaving = set()

    async def _read_missing(self, *, everything: bool) -> None:
        soon, self._read_next = self._read_next, set()
        wanted = [
            mirror
            for mirror in self._open_mirrors.values()
            if mirror.feed.end is None and (everything or mirror.session_id in soon)
        ]
        for start in range(0, len(wanted), SESSIONS_AT_ONCE):
            part = wanted[start : start + SESSIONS_AT_ONCE]
            answers = await self._journal.follow_many([(m.session_id, m.feed.last) for m in part])
            for mirror, followed in zip(part, answers, strict=True):
                if followed is None:
                    continue  # refused: the next round asks again
                if followed.status.state is not State.GONE:
                    self._note(mirror, followed)
                elif await self._is_gone():
                    self._release(mirror)

    def _note(self, mirror: Mirror, followed: Followed) -> None:
        if mirror.feed.end is not None:
            return
        if followed.batches:
            self._add(mirror, followed.batches)
        elif followed.last > mirror.feed.last:
            mirror.feed.skip_to(followed.last)  # events are missing: viewers will find the gap
        if followed.last > mirror.feed.last:
            self._read_soon(mirror.session_id)
        elif followed.status.end is not None:
            self._finish(mirror, followed)

    def _add(self, mirror: Mirror, batches: list[Batch]) -> None:
        feed = mirror.feed
        try:
            events, last = read_on(batches, feed.last)
        except JournalGap:
            feed.skip_to(batches[-1].last)
            return
        if last > feed.last:
            feed.add(Batch(feed.last + 1, last, events), self._loop.time())
            feed.trim(last)

    @staticmethod
    def _finish(mirror: Mirror, followed: Followed) -> None:
        end = followed.status.end
        if end is None:
            return
        if mirror.feed.last != end.id.n - 1:
            mirror.feed.skip_to(end.id.n - 1)
        mirror.feed.finish(end)

    def _new_mirror(self, session_id: str, followed: Followed, after: int) -> Mirror:
        """Return a mirror that starts with the events after the first viewer's last one, if all of them were read."""
        try:
            events, last = read_on(followed.batches, after)
        except JournalGap:
            last = after
        has_part = followed.last == last > after
        mirror = Mirror(
            session_id,
            followed.status.worker,
            after if has_part else followed.last,
            self._on_unwatched,
            followed.request_id,
        )
        if not has_part:
            return mirror
        mirror.feed.add(Batch(after + 1, last, events), 0.0)
        return mirror
