"""The sessions of this worker: what runs here, what is followed here, what is kept; and the one owner of their tasks.

The web asks it for a session by id, and gets something to watch or an error that says why not.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from broker.core.errors import (
    AlreadyClaimed,
    Draining,
    NotYetClaimed,
    Overloaded,
    SessionExpired,
    SessionNotFound,
    StoreUnavailable,
)
from broker.core.events import cancelled_before_start
from broker.core.session import Cursor, State
from broker.relay.claiming import Claiming
from broker.relay.finished_cache import FinishedCache
from broker.relay.generation import Generation
from broker.relay.journal_writer import JournalWriter
from broker.relay.late_ends import LateEnds
from broker.relay.membership import Membership
from broker.relay.mirror import Mirror, Mirrors
from broker.relay.ownership import Ownership
from broker.relay.reaper import Reaper
from broker.relay.settlement import Settlement
from broker.relay.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from broker.core.replay import Batch
    from broker.relay.config import GenerationLimits, Money, WorkerConfig
    from broker.relay.feed import Feed
    from broker.relay.viewer import Viewer
    from broker.store.accounts import AccountStore, Reservation
    from broker.store.journal import JournalStore
    from broker.store.sessions import Prepared, SessionStore
    from broker.store.workers import Notification, WorkerStore
    from broker.upstream.client import UpstreamClient

log = structlog.get_logger(__name__)

SHUTDOWN_TIMEOUT = 3.0
"""Seconds that stopped generations have for their ends."""


class Cancelled(NamedTuple):
    """What a cancel has come to: certain to stop, or the state in which the session had ended before."""

    state: State
    accepted: bool


class Registry:
    """This worker's sessions.

    Args:
        sessions: their steps in Redis.
        journal: their events in Redis.
        workers: the workers in Redis, and which of them this one is.
        upstream: the model side.
        bounds: of each generation.
        accounts: slots, budgets and books.
        money: what settling needs to know.
        limits: of this worker.

    Attributes:
        draining: nothing new is begun.
        viewers: all of this worker.
    """

    def __init__(
        self,
        *,
        sessions: SessionStore,
        journal: JournalStore,
        workers: WorkerStore,
        upstream: UpstreamClient,
        bounds: GenerationLimits,
        accounts: AccountStore,
        money: Money,
        limits: WorkerConfig,
    ) -> None:
        self.draining = False
        self.viewers: set[Viewer] = set()
        self._sessions = sessions
        self._journal_store = journal
        self._workers = workers
        self._upstream = upstream
        self._bounds = bounds
        self._accounts = accounts
        self._learn, self._learn_speed = money.learn, money.learn_speed
        self._limits = limits
        self._running: dict[str, Generation] = {}
        self._kept = FinishedCache(limits.resume_ttl)
        self._tasks = Tasks()
        self._settlement = Settlement(accounts, money, spawn=self._tasks.spawn_extra)
        self._claims = Claiming(
            sessions,
            accounts,
            worker=workers.worker,
            give_up_after=limits.session_ttl + limits.running_ttl,
            begin=self._begin,
            spawn=self._tasks.spawn,
        )
        self._membership = Membership(workers)
        self._journal = JournalWriter(journal, interval=limits.journal_interval)
        self._late_ends = LateEnds(self._kept, self._membership, self._journal, spawn=self._tasks.spawn)
        self._ownership = Ownership(
            self._running,
            self._kept,
            worker=workers.worker,
            sessions=sessions,
            accounts=accounts,
            reads=journal,
            writes=self._journal,
            membership=self._membership,
            resuming=limits.resume_ttl > 0,
            spawn=self._tasks.spawn,
        )
        self._reaper = Reaper(accounts, sessions, journal, workers, self._settlement)
        self._mirrors = Mirrors(journal, sessions, workers, self._membership.is_gone, self._disconnect)

    def start(self) -> None:
        """Begin to live among the other workers."""
        self._tasks.keep_running(
            {
                "lease": self._membership.run,
                "bell": partial(self._membership.listen, self._on_notification),
                "writing anew": partial(self._membership.rewrite_sessions, self._ownership.rewrite_sessions),
                "journal": partial(self._journal.run, self._ownership),
                "mirrors": self._mirrors.run,
                "reservations": partial(self._reaper.run, self._reservations),
            }
        )

    def _reservations(self) -> list[Reservation]:
        running = (generation.reservation for generation in self._running.values())
        return list({each.claim_id: each for each in (*running, *self._late_ends.reservations())}.values())

    # Watching

    async def find(self, session_id: str, cursor: Cursor | None) -> Generation | Mirror:
        """What to watch of a session.

        A request without a cursor claims a prepared session. One with a cursor never does.

        Raises:
            SessionNotFound, SessionExpired: there is none (any more).
            AlreadyClaimed: it has been streamed, and resuming is off.
            StoreUnavailable, Draining, Overloaded, NotYetClaimed: not now; the page should come again.
        """
        here = self._running.get(session_id) or self._kept.get(session_id)
        if here is not None:
            self._check_resuming()
            return here
        if cursor is None and (won := await self._claim(session_id)) is not None:
            return won
        return await self._mirror(session_id, cursor)

    @contextmanager
    def watching(self, source: Generation | Mirror, viewer: Viewer) -> Iterator[None]:
        """Count a viewer, and keep its line alive, for as long as the block runs."""
        watched = source.watched() if isinstance(source, Generation) else self._mirrors.watched(source)
        with watched:
            self.viewers.add(viewer)
            try:
                yield
            finally:
                self.viewers.discard(viewer)

    async def read_journal(self, session_id: str, after: int) -> list[Batch]:
        """A part of a session's journal, for a viewer that is behind what is in memory.

        Raises:
            StoreUnavailable: Redis cannot be reached, or does not have it now; the page that comes again learns which.
        """
        batches = await self._journal_store.read(session_id, after)
        if batches is None:
            raise StoreUnavailable
        return batches

    async def _claim(self, session_id: str) -> Generation | None:
        """Claim a session; None where it is not to be had, and why is for `_mirror` to find out."""
        if session_id not in self._claims:
            if self.draining:
                raise Draining
            if len(self._running) + len(self._claims) >= self._limits.max_streams:
                raise Overloaded
        outcome = await self._claims.claim(session_id)
        if isinstance(outcome, Generation):
            if outcome.was_watched:  # by another who waited for the same claim
                self._check_resuming()
            return outcome
        if outcome.state is State.GONE:
            await self._tell_gone(None)
        return None

    async def _mirror(self, session_id: str, cursor: Cursor | None) -> Mirror:
        mirror = self._mirrors.get(session_id)
        if mirror is not None:
            return mirror
        if self.draining:
            raise Draining
        # Whoever is refused must not be registered as a viewer. What was never claimed was never streamed.
        if self._limits.resume_ttl == 0 and (await self._journal_store.look(session_id)).worker:
            raise AlreadyClaimed
        opened = await self._mirrors.open(session_id, cursor.n if cursor is not None else 0)
        if opened is State.GONE:
            await self._tell_gone(cursor)
        if isinstance(opened, State):
            raise NotYetClaimed
        return opened

    def _check_resuming(self) -> None:
        if self._limits.resume_ttl == 0:
            raise AlreadyClaimed

    async def _tell_gone(self, cursor: Cursor | None) -> None:
        if not await self._membership.is_gone():
            raise StoreUnavailable
        raise SessionNotFound if cursor is None else SessionExpired

    def _disconnect(self, feed: Feed) -> None:
        """Send the viewers of a feed away; their pages will come back."""
        for viewer in tuple(self.viewers):
            if viewer.feed is feed:
                viewer.release()

    # Running

    def _begin(self, session_id: str, reservation: Reservation, prepared: Prepared) -> Generation:
        generation = Generation(
            session_id,
            reservation,
            prepared,
            upstream=self._upstream,
            sessions=self._sessions,
            bounds=self._bounds,
            settlement=self._settlement,
            journal=self._journal if self._limits.resume_ttl > 0 else None,
            ownership=self._ownership,
            write_later=self._late_ends.add,
        )
        self._running[session_id] = generation
        self._journal.add(generation)
        task = generation.start()
        task.add_done_callback(lambda _: self._ended(generation))
        self._tasks.adopt(task)
        return generation

    def _ended(self, generation: Generation) -> None:
        self._running.pop(generation.session_id, None)
        self._journal.remove(generation)
        if generation.wrote_its_end:
            self._kept.add(generation, asyncio.get_running_loop().time())
        if (sample := generation.finishing.sample()) is not None:
            self._tasks.spawn_extra(self._learn(sample))
        if (speed := generation.finishing.speed()) is not None:
            self._tasks.spawn_extra(self._learn_speed(speed))

    # Cancelling

    async def cancel(self, session_id: str) -> Cancelled:
        """Stop a session, whoever asks.

        Raises:
            SessionNotFound: there is none.
            StoreUnavailable: it is not this worker's, and Redis is away.
        """
        here = self._running.get(session_id) or self._kept.get(session_id)
        if here is not None:
            accepted = here.cancel()
            state = await here.ended()  # it is certain once it is written: this worker may die at any moment
            return Cancelled(state, accepted=accepted and state is State.CANCELLED)
        withdrawn = self._claims.withdraw(session_id)
        standing = await self._sessions.cancel(session_id, cancelled_before_start())
        if standing.state is State.GONE:
            await self._tell_gone(None)
        if standing.state is State.PREPARED:
            await self._forget(session_id)
        accepted = standing.state in (State.PREPARED, State.RUNNING)
        if withdrawn and standing.state is State.CANCELLED:
            accepted = True  # by the end of the claim's pursuit, which was faster
        return Cancelled(State.CANCELLED if accepted else standing.state, accepted=accepted)

    async def _forget(self, session_id: str) -> None:
        """A session that was cancelled waits no more. If Redis cannot be told now, that ends by itself."""
        with suppress(StoreUnavailable):
            if (session := await self._sessions.describe(session_id)) is not None:
                await self._accounts.forget(session.client, session_id)

    # Among the other workers

    def _on_notification(self, notification: Notification) -> None:
        generation = self._running.get(notification.session_id)
        if notification.kind == "cancel" and generation is not None:
            generation.cancel()
        elif notification.kind == "watched" and generation is not None:
            generation.note_elsewhere(watched=True)
            self._journal.flush_soon(generation)
        elif notification.kind in ("news", "ended"):
            self._mirrors.on_notification(notification.session_id, notification.batch)

    # Time and shutdown

    def check(self, now: float) -> None:
        """Look at the timers of every generation, and drop what has been kept long enough."""
        self._ownership.tick(now)
        for generation in tuple(self._running.values()):
            generation.check(now)
        self._kept.expire(now)

    async def drain(self, timeout: float) -> None:
        """Begin nothing more, let what runs finish for ``timeout`` seconds, and end the rest."""
        self.draining = True
        for viewer in tuple(self.viewers):
            if self._mirrors.has(viewer.feed):
                viewer.release()
        await self._tasks.finish(timeout)
        for generation in tuple(self._running.values()):
            generation.shut_down()
        await self._tasks.finish(SHUTDOWN_TIMEOUT)

    async def close(self) -> None:
        """Cancel whatever is left, and give the lease back."""
        await self._tasks.close()
        try:
            await self._workers.resign()
        except StoreUnavailable:
            log.info("the lease ends by itself")
