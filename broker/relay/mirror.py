"""Sessions of other workers, as the viewers of this one see them.

A mirror is a feed that is filled from a session's journal. All mirrors of a worker are served together: events come
with notifications, and twice a second what is missing is read in one round trip, which also keeps this worker
registered as watching. The end of a session whose owner has died is written by `relay.reaper`.
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

LOOK = 0.5
"""Seconds between two looks at everything that is followed."""

LOOK_AT_ONCE = 64
"""Sessions looked at in one round trip."""


class Mirror:
    """A session of another worker, followed here; a `relay.source.Source`.

    Args:
        session_id: of the session.
        worker: the worker that runs it.
        last: number of the last event before those of `feed`.
        unwatched: is told when the last viewer has left.

    Attributes:
        feed: its events from the moment it was first watched here; what came before is in the journal.
    """

    def __init__(self, session_id: str, worker: str, last: int, unwatched: Callable[[Mirror], None]) -> None:
        self.session_id = session_id
        self.worker = worker
        self.feed = Feed(last)
        self._unwatched = unwatched
        self._viewers = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count a viewer for as long as the block runs."""
        self._viewers += 1
        try:
            yield
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._unwatched(self)


class _Opening:
    """A mirror that is being made: for how many viewers, and the notifications that came meanwhile."""

    def __init__(self) -> None:
        self.viewers = 0
        self.notified: list[Batch | None] = []


class Mirrors:
    """Keeps the mirrors of this worker.

    Args:
        journal: where to read.
        is_gone: whether a session that Redis does not know is gone for good.
        viewers: all of this worker; those of a session that is gone are disconnected.
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
        """The mirror of a session that is being watched here."""
        return self._open_mirrors.get(session_id)

    def release_viewers(self) -> None:
        """Disconnect the viewers of all mirrors; their pages will come back, to another worker."""
        for mirror in tuple(self._open_mirrors.values()):
            self._release(mirror)

    def _release(self, mirror: Mirror) -> None:
        for viewer in tuple(self._viewers):
            if viewer.feed is mirror.feed:
                viewer.release()

    async def open(self, session_id: str, after: int) -> Mirror | State:
        """Register as watching a session, and mirror it; or the state of one that cannot be watched.

        Args:
            session_id: which.
            after: number of the last event that its first viewer has.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        with self._noting(session_id) as notified:
            followed = await self._journal.follow(session_id, after)
        if followed.standing.state in (State.GONE, State.PREPARED):
            return followed.standing.state
        mirror = self._open_mirrors.get(session_id)
        if mirror is None:
            mirror = self._open_mirrors[session_id] = self._new_mirror(session_id, followed, after)
            for batch in notified:  # before it was there
                self._tell(mirror, batch)
        if followed.standing.end is not None and mirror.feed.end is None:
            self._finish(mirror, followed)
        if session_id in self._leaving:
            self._read_soon(session_id)  # its registration may just have been taken back
        return mirror

    @contextmanager
    def _noting(self, session_id: str) -> Iterator[list[Batch | None]]:
        """Note what is rung for a session whose mirror is being made, or it would need a second look."""
        opening = self._opening.setdefault(session_id, _Opening())
        opening.viewers += 1
        try:
            yield opening.notified
        finally:
            opening.viewers -= 1
            if not opening.viewers:
                del self._opening[session_id]

    def _read_soon(self, session_id: str) -> None:
        """Look at this one at once."""
        self._read_next.add(session_id)
        self._wake.set()

    def _on_unwatched(self, mirror: Mirror) -> None:
        if self._open_mirrors.get(mirror.session_id) is mirror:
            del self._open_mirrors[mirror.session_id]
            if mirror.feed.end is None:
                self._left.add(mirror.session_id)
                self._wake.set()

    def on_notification(self, session_id: str, batch: Batch | None) -> None:
        """Take a notification: here are events, or there is something to read."""
        mirror = self._open_mirrors.get(session_id)
        if mirror is not None:
            self._tell(mirror, batch)
        elif (opening := self._opening.get(session_id)) is not None:
            opening.notified.append(batch)

    def _tell(self, mirror: Mirror, batch: Batch | None) -> None:
        if mirror.feed.end is not None:
            return
        if batch is None or batch.first > mirror.feed.last + 1:
            self._read_soon(mirror.session_id)
        else:
            self._add(mirror, [batch])

    async def run(self) -> NoReturn:
        """Look after the mirrors until cancelled."""
        look_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, look_at - self._loop.time())):
                    await self._wake.wait()
            self._wake.clear()
            now = self._loop.time()
            everything = now >= look_at
            if everything:
                look_at = now + LOOK
            try:
                await self._unregister()
                await self._look(everything=everything)
            except StoreUnavailable:
                await asyncio.sleep(LOOK)

    async def _unregister(self) -> None:
        self._leaving, self._left = self._left - self._open_mirrors.keys(), set()
        try:
            if self._leaving:
                await self._journal.leave(self._leaving)
                self._read_next |= self._leaving & self._open_mirrors.keys()  # somebody came at that moment
        finally:
            self._leaving = set()

    async def _look(self, *, everything: bool) -> None:
        hurried, self._read_next = self._read_next, set()
        wanted = [
            mirror
            for mirror in self._open_mirrors.values()
            if mirror.feed.end is None and (everything or mirror.session_id in hurried)
        ]
        for start in range(0, len(wanted), LOOK_AT_ONCE):
            part = wanted[start : start + LOOK_AT_ONCE]
            answers = await self._journal.follow_many([(m.session_id, m.feed.last) for m in part])
            for mirror, followed in zip(part, answers, strict=True):
                if followed is None:
                    continue  # refused: the next look asks again
                if followed.standing.state is not State.GONE:
                    self._note(mirror, followed)
                elif await self._is_gone():
                    self._release(mirror)

    def _note(self, mirror: Mirror, followed: Followed) -> None:
        if mirror.feed.end is not None:
            return
        if followed.batches:
            self._add(mirror, followed.batches)
        elif followed.last > mirror.feed.last:
            mirror.feed.skip_to(followed.last)  # not there although it should be: viewers will find the gap
        if followed.last > mirror.feed.last:
            self._read_soon(mirror.session_id)
        elif followed.standing.end is not None:
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
        end = followed.standing.end
        if end is None:
            return
        if mirror.feed.last != end.id.n - 1:
            mirror.feed.skip_to(end.id.n - 1)
        mirror.feed.finish(end)

    def _new_mirror(self, session_id: str, followed: Followed, after: int) -> Mirror:
        """Return a mirror that begins with what its first viewer wants next, if that was read to the journal's end."""
        try:
            events, last = read_on(followed.batches, after)
        except JournalGap:
            last = after
        worker = followed.standing.worker
        if not followed.last == last > after:
            return Mirror(session_id, worker, followed.last, self._on_unwatched)
        mirror = Mirror(session_id, worker, after, self._on_unwatched)
        mirror.feed.add(Batch(after + 1, last, events), 0.0)
        return mirror
