"""The sessions of this worker: what runs here, what is followed here, what is kept; and the one owner of their tasks.

The web asks it for a session by id, and gets something to watch or an error that says why not.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from broker.core.errors import (
    AlreadyClaimed,
    Draining,
    NotYetClaimed,
    Overloaded,
    ServerShutdown,
    SessionExpired,
    SessionNotFound,
    StoreUnavailable,
)
from broker.core.events import cancelled_before_start
from broker.core.session import Cursor, State, Terminal, short
from broker.relay.bookkeeper import Bookkeeper
from broker.relay.claims import Claims
from broker.relay.follower import Follower, Mirror
from broker.relay.generation import ALL, NOTHING, Generation
from broker.relay.journal import Journal
from broker.relay.kept import Kept
from broker.relay.loops import keep_running
from broker.relay.membership import Membership
from broker.relay.settling import Settler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from broker.core.density import Sample
    from broker.core.replay import Batch
    from broker.relay.feed import Feed
    from broker.relay.reading import Bounds
    from broker.relay.settling import FetchGeneration, PricesOf
    from broker.relay.viewer import Viewer
    from broker.store.accounts import AccountStore, Reservation
    from broker.store.journal import JournalStore
    from broker.store.sessions import Prepared, SessionStore
    from broker.store.workers import Ring, WorkerStore
    from broker.upstream.client import UpstreamClient

log = structlog.get_logger(__name__)

FREEZE = 1.5
"""Seconds without a tick after which this process must have been frozen: others may have buried it meanwhile."""

CONFIRM_TIMEOUT = 0.3
"""Seconds that viewers of a worker that was frozen wait for Redis to confirm it."""

END_RETRY = 1.0
"""Seconds between two tries to write an end that Redis could not be told of."""

SHUTDOWN_TIMEOUT = 3.0
"""Seconds that stopped generations have for their ends."""


class Limits(NamedTuple):
    """Numbers that the registry keeps to.

    Attributes:
        max_streams: generations at once, and as many viewers.
        session_ttl: seconds that a prepared session waits.
        running_ttl: seconds that a claimed one is kept at most.
        resume_ttl: seconds that a finished one is kept; 0 streams each session once.
        journal_interval: seconds that a journal may lag.
    """

    max_streams: int
    session_ttl: int
    running_ttl: int
    resume_ttl: int
    journal_interval: float


class Money(NamedTuple):
    """What settling needs to know of the outside.

    Attributes:
        prices_of: what models cost.
        fetch_generation: the upstream's own books.
        learn: is given what an answer teaches of its model's tokenizer.
    """

    prices_of: PricesOf
    fetch_generation: FetchGeneration
    learn: Callable[[Sample], Coroutine[Any, Any, None]]


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
        bounds: Bounds,
        accounts: AccountStore,
        money: Money,
        limits: Limits,
    ) -> None:
        self.draining = False
        self.viewers: set[Viewer] = set()
        self._sessions = sessions
        self._journal_store = journal
        self._workers = workers
        self._upstream = upstream
        self._bounds = bounds
        self._accounts = accounts
        self._learn = money.learn
        self._limits = limits
        self._running: dict[str, Generation] = {}
        self._kept = Kept(limits.resume_ttl)
        self._corrections: set[asyncio.Task[Any]] = set()
        self._settler = Settler(
            accounts,
            prices_of=money.prices_of,
            fetch=money.fetch_generation,
            spawn=self._spawn_correction,
        )
        self._work: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[Any]] = []
        self._loop = asyncio.get_running_loop()
        self._ticked_at = self._loop.time()
        self._claims = Claims(
            sessions,
            accounts,
            worker=workers.worker,
            give_up_after=limits.session_ttl + limits.running_ttl,
            begin=self._begin,
            spawn=self._spawn,
        )
        self._membership = Membership(workers, self._write_anew)
        self._journal = Journal(journal, interval=limits.journal_interval)
        self._bookkeeper = Bookkeeper(accounts, sessions, journal, workers, self._settler)
        self._follower = Follower(journal, sessions, workers, self._membership.is_gone, self._let_go)

    def start(self) -> None:
        """Begin to live among the other workers."""
        loops: dict[str, Callable[[], Awaitable[object]]] = {
            "lease": self._membership.run,
            "bell": partial(self._membership.listen, self._hear),
            "writing anew": self._membership.write_anew,
            "journal": partial(self._journal.run, self),
            "mirrors": self._follower.run,
            "reservations": partial(self._bookkeeper.run, self._reservations),
        }
        self._loops = [asyncio.create_task(keep_running(name, loop)) for name, loop in loops.items()]

    def _reservations(self) -> list[Reservation]:
        return [generation.reservation for generation in self._running.values()]

    # Watching

    async def find(self, session_id: str, cursor: Cursor | None) -> Generation | Mirror:
        """What to watch of a session.

        A request without a cursor claims a prepared session. One with a cursor never does.

        Raises:
            SessionNotFound, SessionExpired: there is none (any more).
            AlreadyClaimed: it has been streamed, and resuming is off.
            StoreUnavailable, Draining, Overloaded, NotYetClaimed: not now; the page should come again.
        """
        if len(self.viewers) >= self._limits.max_streams:
            raise Overloaded
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
        watched = source.watched() if isinstance(source, Generation) else self._follower.watched(source)
        with watched:
            self.viewers.add(viewer)
            try:
                yield
            finally:
                self.viewers.discard(viewer)

    async def read_journal(self, session_id: str, after: int) -> list[Batch]:
        """A part of a session's journal, for a viewer that is behind what is in memory."""
        return await self._journal_store.read(session_id, after)

    async def _claim(self, session_id: str) -> Generation | None:
        """Claim a session; None where it is not to be had, and why is for `_mirror` to find out."""
        if self._claims.get(session_id) is None:
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
        mirror = self._follower.get(session_id)
        if mirror is not None:
            return mirror
        if self.draining:
            raise Draining
        # Whoever is refused must not be registered as a viewer. What was never claimed was never streamed.
        if self._limits.resume_ttl == 0 and (await self._journal_store.look(session_id)).worker:
            raise AlreadyClaimed
        opened = await self._follower.open(session_id, cursor.n if cursor is not None else 0)
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

    def _let_go(self, feed: Feed) -> None:
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
            settler=self._settler,
            journaled=self._limits.resume_ttl > 0,
            write_later=self._write_later,
            took=self._took,
        )
        self._running[session_id] = generation
        self._journal.add(generation)
        task = generation.start()
        self._work.add(task)
        task.add_done_callback(lambda task: self._ended(generation, task))
        return generation

    def _took(self, generation: Generation, now: float) -> None:
        """A generation has read events and is about to show them."""
        if now - self._ticked_at > FREEZE:
            self._thaw(now)
        if generation.watched_elsewhere:
            self._journal.hurry(generation)

    def _ended(self, generation: Generation, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        self._running.pop(generation.session_id, None)
        self._journal.remove(generation)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("generation broke", session=short(generation.session_id), exc_info=error)
        if (sample := generation.sample()) is not None:
            self._spawn_correction(self._learn(sample))
        if generation.feed.end is not None and not generation.fenced:
            self._kept.add(generation, self._loop.time())

    def _write_later(self, generation: Generation, end: Terminal) -> None:
        """Redis could not be told of an end: go on trying for as long as anybody could ask for it."""
        self._spawn(self._write_end(generation, end))

    async def _write_end(self, generation: Generation, end: Terminal) -> None:
        give_up_at = self._loop.time() + max(self._limits.resume_ttl, SHUTDOWN_TIMEOUT)
        await generation.ended()
        while self._loop.time() < give_up_at:
            await asyncio.sleep(END_RETRY)
            try:
                standing = await generation.write_end(end)
                if standing is None and not await self._membership.is_gone():
                    continue
                await generation.settle((standing or end).state)
            except StoreUnavailable:
                continue
            if standing not in (None, end):
                self._kept.drop(generation.session_id)  # later readers get the end that stands
            return

    # Cancelling

    async def cancel(self, session_id: str) -> Cancelled:
        """Stop a session, whoever asks.

        Raises:
            SessionNotFound: there is none.
            StoreUnavailable: it is not this worker's, and Redis is away.
        """
        if (claim := self._claims.get(session_id)) is not None:
            await asyncio.wait([claim])
        here = self._running.get(session_id) or self._kept.get(session_id)
        if here is not None:
            accepted = await here.cancel()
            state = await here.ended()  # it is certain once it is written: this worker may die at any moment
            return Cancelled(state, accepted=accepted and state is State.CANCELLED)
        standing = await self._sessions.cancel(session_id, cancelled_before_start())
        if standing.state is State.GONE:
            await self._tell_gone(None)
        if (
            standing.state is State.PREPARED
            and (session := await self._sessions.describe(session_id)) is not None
        ):
            await self._accounts.forget(session.client, session_id)
        accepted = standing.state in (State.PREPARED, State.RUNNING)
        return Cancelled(State.CANCELLED if accepted else standing.state, accepted=accepted)

    # Among the other workers

    def _hear(self, ring: Ring) -> None:
        generation = self._running.get(ring.session_id)
        if ring.kind == "cancel" and generation is not None:
            self._spawn(generation.cancel())
        elif ring.kind == "watched" and generation is not None:
            generation.note_elsewhere(watched=True)
            self._journal.hurry(generation)
        elif ring.kind in ("news", "ended"):
            self._follower.hear(ring.session_id, ring.batch)

    async def lost_hold(self, generation: Generation) -> None:
        """Redis does not have a running session as ours: write it anew if all was lost, else it is another's."""
        try:
            gone = await self._membership.is_gone()
            standing = await self._journal_store.look(generation.session_id)
            ours = standing.worker == self._workers.worker
            if ours and (standing.end is None or standing.end.id.epoch == 1):
                return  # it is there, or has ended by our own word meanwhile
            if standing.state is State.GONE and not gone:
                await self._restore(generation)
                return
        except StoreUnavailable:
            return  # asked again with the next write
        log.warning("fenced", session=short(generation.session_id), state=standing.state)
        generation.fence(standing.end)

    async def _write_anew(self) -> None:
        """Redis came back empty: write every session that is held here."""
        for generation in (*self._running.values(), *self._kept.values()):
            await self._restore(generation)

    async def _restore(self, generation: Generation) -> None:
        if generation.state is State.RUNNING:
            await self._accounts.reserve(generation.reservation, force=True)
        held = generation.feed.unsaved(0, ALL) if self._limits.resume_ttl else NOTHING
        await self._sessions.restore(
            generation.session_id,
            generation.token,
            self._workers.worker,
            generation.prepared,
            state=generation.state,
            held=held,
            end=generation.feed.end,
        )
        generation.saved = held.last

    def _thaw(self, now: float) -> None:
        """This process was frozen. Nothing is shown until Redis has confirmed that the sessions are still ours."""
        self._ticked_at = now
        frozen = list(self._running.values())
        if frozen:
            log.warning("was frozen", sessions=len(frozen))
            for generation in frozen:
                generation.feed.pause()
            self._spawn(self._confirm(frozen))

    async def _confirm(self, frozen: list[Generation]) -> None:
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await self._journal.confirm(frozen, self)
        except TimeoutError:
            log.warning("not confirmed in time")
        finally:
            for generation in frozen:
                if not generation.fenced:
                    generation.feed.resume()

    # Time and shutdown

    def check(self, now: float) -> None:
        """Look at the timers of every generation, and drop what has been kept long enough."""
        if now - self._ticked_at > FREEZE:
            self._thaw(now)
        self._ticked_at = now
        for generation in tuple(self._running.values()):
            generation.check(now)
        self._kept.expire(now)

    async def drain(self, timeout: float) -> None:
        """Begin nothing more, let what runs finish for ``timeout`` seconds, and end the rest."""
        self.draining = True
        for viewer in tuple(self.viewers):
            if self._follower.has(viewer.feed):
                viewer.release()
        await self._finish(timeout)
        for generation in tuple(self._running.values()):
            generation.stop(ServerShutdown())
        await self._finish(SHUTDOWN_TIMEOUT)

    async def _finish(self, timeout: float) -> None:
        """Wait until nothing is at work that ends by itself, for ``timeout`` seconds at most."""
        deadline = self._loop.time() + timeout
        while self._work and (left := deadline - self._loop.time()) > 0:
            await asyncio.wait(self._work, timeout=left)

    async def close(self) -> None:
        """Cancel whatever is left, and give the lease back."""
        tasks = (*self._loops, *self._work, *self._corrections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._workers.resign()
        except StoreUnavailable:
            log.info("the lease ends by itself")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._reap)

    def _spawn_correction(self, work: Coroutine[Any, Any, Any]) -> None:
        """Work that no drain waits for: it only makes the books better."""
        task = asyncio.create_task(work)
        self._corrections.add(task)
        task.add_done_callback(self._corrections.discard)

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work broke", exc_info=error)
