"""The sessions of this worker: who claims, who watches, what runs, what is kept for replay.

The one owner of the generations' tasks. The web asks it for a session by id and gets a generation to watch, or an
error that says why not.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from broker.core.errors import (
    AlreadyClaimed,
    Draining,
    Overloaded,
    ServerShutdown,
    SessionExpired,
    SessionNotFound,
    StoreUnavailable,
)
from broker.core.events import cancelled_before_start
from broker.core.session import Cursor, State, Terminal, short
from broker.relay.generation import Bounds, Generation, Halt
from broker.store.connection import CALL_TIMEOUT
from broker.store.sessions import Prepared, SessionStore, Standing

if TYPE_CHECKING:
    from broker.relay.settling import PricesOf
    from broker.relay.viewer import Viewer
    from broker.upstream.client import UpstreamClient

log = structlog.get_logger(__name__)

CLAIM_RETRY = 0.3
"""Seconds between two tries to learn the outcome of a claim."""

END_RETRY = 1.0
"""Seconds between two tries to write an end that Redis could not be told of."""

SHUTDOWN_TIMEOUT = 3.0
"""Seconds that stopped generations have for their ends."""

MAX_KEPT_BYTES = 64 * 1024 * 1024
"""Events of finished sessions that a worker keeps for replay; the oldest go first."""


class Cancelled(NamedTuple):
    """What a cancel has come to: certain to stop, or the state in which the session had ended before."""

    state: State
    accepted: bool


class Registry:
    """This worker's sessions.

    Args:
        worker: this worker's id.
        sessions: their steps in Redis.
        upstream: the model side.
        bounds: of each generation.
        prices_of: what models cost.
        max_streams: generations at once, and as many viewers.
        session_ttl: seconds for which a claim whose reply was lost is asked for again.
        resume_ttl: seconds that a finished session is kept here; 0 streams each session once.
    """

    def __init__(
        self,
        *,
        worker: str,
        sessions: SessionStore,
        upstream: UpstreamClient,
        bounds: Bounds,
        prices_of: PricesOf,
        max_streams: int,
        session_ttl: int,
        resume_ttl: int,
    ) -> None:
        self.draining = False
        self.viewers: set[Viewer] = set()
        self._worker = worker
        self._sessions = sessions
        self._upstream = upstream
        self._bounds = bounds
        self._prices_of = prices_of
        self._max_streams = max_streams
        self._session_ttl = session_ttl
        self._resume_ttl = resume_ttl
        self._running: dict[str, Generation] = {}
        self._kept: OrderedDict[str, tuple[Generation, float]] = OrderedDict()
        self._kept_bytes = 0
        self._claims: dict[str, asyncio.Future[Generation | Standing]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # Watching

    async def find(self, session_id: str, cursor: Cursor | None) -> Generation | Terminal:
        """The generation to watch; or, of a session that ended without an event, its end.

        A request without a cursor claims a prepared session. One with a cursor never does.

        Raises:
            SessionNotFound, SessionExpired: there is none (any more).
            AlreadyClaimed: it has been streamed, and resuming is off.
            StoreUnavailable, Draining, Overloaded: not now; the page should come again.
        """
        here = self.local(session_id)
        if here is not None:
            if self._resume_ttl == 0:
                raise AlreadyClaimed
            return here
        if len(self.viewers) >= self._max_streams:
            raise Overloaded
        if cursor is None:
            found = await self._claim(session_id)
        else:
            found = await self._sessions.look(session_id)
        if isinstance(found, Generation):
            return found
        return self._elsewhere(found, cursor)

    @contextmanager
    def viewing(self, viewer: Viewer) -> Iterator[None]:
        """Count a viewer, and keep its line alive, for as long as the block runs."""
        self.viewers.add(viewer)
        try:
            yield
        finally:
            self.viewers.discard(viewer)

    def local(self, session_id: str) -> Generation | None:
        """A generation of this worker, running or kept."""
        kept = self._kept.get(session_id)
        return self._running.get(session_id) or (kept[0] if kept else None)

    def _elsewhere(self, standing: Standing, cursor: Cursor | None) -> Terminal:
        """What to make of a session that this worker does not have."""
        if standing.state is State.GONE:
            raise SessionNotFound if cursor is None else SessionExpired
        if standing.state is State.PREPARED:
            raise Overloaded("This session has not begun.", retry_after=3)
        if self._resume_ttl == 0:
            raise AlreadyClaimed
        if standing.end is not None and standing.end.id.n == 1:
            return standing.end
        raise Overloaded("Another worker has this session.", retry_after=3)

    # Claiming

    async def _claim(self, session_id: str) -> Generation | Standing:
        """Claim for one viewer or several: those who ask while a claim is under way share its outcome."""
        answer = self._claims.get(session_id)
        if answer is None:
            if self.draining:
                raise Draining(retry_after=3)
            if len(self._running) + len(self._claims) >= self._max_streams:
                raise Overloaded(retry_after=3)
            answer = self._claims[session_id] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(
                lambda f: f.cancelled() or f.exception()
            )  # there may be nobody left to ask
            self._spawn(self._pursue(session_id, answer))
        # A viewer that leaves takes its own wait along and not the claim.
        return await asyncio.shield(answer)

    async def _pursue(self, session_id: str, answer: asyncio.Future[Generation | Standing]) -> None:
        """Claim, and go on asking until the outcome is known: a claim whose reply was lost may have taken effect.

        ``answer`` is told of the first try. A generation that a later one wins starts without a viewer.
        """
        token = str(uuid.uuid4())
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._session_ttl
        try:
            while loop.time() < give_up_at:
                try:
                    outcome = await self._sessions.claim(session_id, token, self._worker)
                except StoreUnavailable as error:
                    if not answer.done():
                        answer.set_exception(error)
                    await asyncio.sleep(CLAIM_RETRY)
                    continue
                result = self._begin(session_id, token, outcome) if isinstance(outcome, Prepared) else outcome
                if not answer.done():
                    answer.set_result(result)
                return
        finally:
            self._claims.pop(session_id, None)
            answer.cancel()

    def _begin(self, session_id: str, token: str, prepared: Prepared) -> Generation:
        generation = Generation(
            session_id,
            token,
            prepared,
            upstream=self._upstream,
            sessions=self._sessions,
            bounds=self._bounds,
            prices_of=self._prices_of,
            write_later=self._write_later,
        )
        self._running[session_id] = generation
        task = generation.start()
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(generation, task))
        self._spawn(self._forget_prompt(generation))
        return generation

    async def _forget_prompt(self, generation: Generation) -> None:
        try:
            await self._sessions.started(generation.session_id, generation.token)
        except StoreUnavailable:
            log.warning("prompt stays in redis until its key expires", session=short(generation.session_id))

    # Ending

    def _ended(self, generation: Generation, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._running.pop(generation.session_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("generation broke", session=short(generation.session_id), exc_info=error)
        if self._resume_ttl > 0 and generation.feed.end is not None:
            self._keep(generation)

    def _keep(self, generation: Generation) -> None:
        until = asyncio.get_running_loop().time() + self._resume_ttl
        self._kept[generation.session_id] = (generation, until)
        self._kept_bytes += generation.feed.size
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (generation, _) = self._kept.popitem(last=False)
        self._kept_bytes -= generation.feed.size

    def _write_later(self, generation: Generation, end: Terminal) -> None:
        """Redis could not be told of an end: go on trying for as long as anybody could ask for it."""
        self._spawn(self._write_end(generation, end))

    async def _write_end(self, generation: Generation, end: Terminal) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + max(self._resume_ttl, END_RETRY)
        while loop.time() < give_up_at:
            await asyncio.sleep(END_RETRY)
            try:
                await self._sessions.end(generation.session_id, generation.token, end, timeout=CALL_TIMEOUT)
            except StoreUnavailable:
                continue
            return

    async def cancel(self, session_id: str) -> Cancelled:
        """Stop a session, whoever asks.

        Raises:
            SessionNotFound: there is none.
            StoreUnavailable: it is not this worker's, and Redis is away.
        """
        if (claim := self._claims.get(session_id)) is not None:
            await asyncio.shield(claim)
        here = self.local(session_id)
        if here is not None:
            accepted = here.stop(Halt.CANCELLED)
            return Cancelled(State.CANCELLED if accepted else here.state, accepted=accepted)
        standing = await self._sessions.cancel(session_id, cancelled_before_start())
        if standing.state is State.GONE:
            raise SessionNotFound
        if standing.state is State.RUNNING:
            raise StoreUnavailable("Another worker has this session.", retry_after=3)
        accepted = standing.state is State.PREPARED
        return Cancelled(State.CANCELLED if accepted else standing.state, accepted=accepted)

    # Time and shutdown

    def check(self, now: float) -> None:
        """Look at the timers of every generation, and drop what has been kept long enough."""
        for generation in tuple(self._running.values()):
            generation.check(now)
        while self._kept and next(iter(self._kept.values()))[1] <= now:
            self._drop_oldest()

    async def drain(self, timeout: float) -> None:
        """Claim nothing more, let what runs finish for ``timeout`` seconds, and end the rest."""
        self.draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)
        for generation in tuple(self._running.values()):
            generation.stop(ServerShutdown())
        if self._running or self._tasks:
            await asyncio.wait(self._tasks, timeout=SHUTDOWN_TIMEOUT)

    async def close(self) -> None:
        """Cancel whatever is left."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
