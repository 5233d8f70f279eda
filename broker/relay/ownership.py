"""What this worker owns, and making sure that it still does: after a freeze, and after Redis has lost everything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.session import State, short
from broker.relay.finishing import ALL, NOTHING
from broker.relay.rounds import for_each

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from broker.relay.finished_cache import FinishedCache
    from broker.relay.generation import Generation
    from broker.relay.journal_writer import JournalWriter
    from broker.relay.membership import Membership
    from broker.store.accounts import AccountStore
    from broker.store.journal import JournalStore
    from broker.store.sessions import SessionStore

log = structlog.get_logger(__name__)

FREEZE = 1.5
"""Seconds without a tick after which this process must have been frozen: others may have buried it meanwhile."""

CONFIRM_TIMEOUT = 0.3
"""Seconds that viewers of a worker that was frozen wait for Redis to confirm it."""

RESTORE_TRIES = 20
"""Times that a session is written again where Redis, which may be full, refuses it."""

RESTORE_PAUSE = 0.5
"""Seconds between them."""


class Ownership:
    """The sessions of this worker, and Redis's word on whose they are.

    Args:
        running: what runs here.
        kept: what has ended here.
        worker: this worker's id.
        sessions: where they stand.
        accounts: where their reservations are.
        reads: where to look.
        writes: this worker's journal, by which Redis confirms.
        membership: knows whether Redis came back empty.
        resuming: events are journaled.
        spawn: runs work in the background and owns its task.
    """

    def __init__(
        self,
        running: Mapping[str, Generation],
        kept: FinishedCache,
        *,
        worker: str,
        sessions: SessionStore,
        accounts: AccountStore,
        reads: JournalStore,
        writes: JournalWriter,
        membership: Membership,
        resuming: bool,
        spawn: Callable[[Coroutine[Any, Any, Any]], None],
    ) -> None:
        self._running = running
        self._kept = kept
        self._worker = worker
        self._sessions = sessions
        self._accounts = accounts
        self._reads = reads
        self._writes = writes
        self._membership = membership
        self._resuming = resuming
        self._spawn = spawn
        self._ticked_at = asyncio.get_running_loop().time()
        self._unconfirmed: set[Generation] = set()
        self._asked_in: dict[Generation, object] = {}

    async def on_session_lost(self, generation: Generation) -> None:
        """Redis does not have a running session as ours: write it again if all was lost, else it is another's."""
        try:
            gone = await self._membership.is_gone()
            standing = await self._reads.look(generation.session_id)
            ours = standing.worker == self._worker
            if ours and (standing.end is None or standing.end.id.epoch == 1):
                return  # it is there, or has ended by our own word meanwhile
            if standing.state is State.GONE and not gone:
                await self._restore(generation)
                return
        except StoreUnavailable:
            return  # asked again with the next write
        log.warning("fenced", session=short(generation.session_id), state=standing.state)
        generation.fence(standing.end)

    async def rewrite_sessions(self) -> None:
        """Redis came back empty: write every session that is held here; those that it refuses are tried again.

        Raises:
            StoreUnavailable: Redis is away again.
        """
        left = [*self._running.values(), *self._kept.values()]
        for _ in range(RESTORE_TRIES):
            left = await for_each(left, self._restore, doing="write sessions again")
            if not left:
                return
            await asyncio.sleep(RESTORE_PAUSE)
            left = [each for each in left if self._is_held(each)]

    def _is_held(self, generation: Generation) -> bool:
        session_id = generation.session_id
        return generation in (self._running.get(session_id), self._kept.get(session_id))

    async def _restore(self, generation: Generation) -> None:
        self._writes.suspend_watch_expiry()
        if generation.state is State.RUNNING:
            await self._accounts.reserve(generation.reservation, force=True)
        held = generation.feed.unsaved(0, ALL) if self._resuming else NOTHING
        await self._sessions.restore(
            generation.session_id,
            generation.claim_id,
            self._worker,
            generation.prepared,
            state=generation.state,
            held=held,
            end=generation.feed.end,
        )
        generation.saved = held.last

    def check_for_freeze(self, now: float) -> None:
        """Find out whether this process stood still; asked before anything is shown."""
        stood_still = now - self._ticked_at
        if stood_still > FREEZE:
            self._after_freeze(stood_still)
            self._ticked_at = now

    def tick(self, now: float) -> None:
        """Time goes by."""
        self.check_for_freeze(now)
        self._ticked_at = now

    def _after_freeze(self, stood_still: float) -> None:
        """Nothing is shown until Redis has confirmed that the sessions are still ours."""
        frozen = list(self._running.values())
        if frozen:
            log.warning("was frozen", sessions=len(frozen), seconds=round(stood_still, 1))
        for generation in frozen:
            generation.froze(stood_still)

    def confirm(self, generation: Generation) -> None:
        """Ask Redis whether a session is still ours; all that are asked for at once share a round trip."""
        if not self._unconfirmed:
            self._spawn(self._confirm())
        self._unconfirmed.add(generation)
        self._asked_in.pop(generation, None)  # an answer that is on its way may be older than the freeze

    async def _confirm(self) -> None:
        asked, self._unconfirmed = self._unconfirmed, set()
        this_round = object()
        self._asked_in.update(dict.fromkeys(asked, this_round))
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await self._writes.confirm(asked, self)
        except TimeoutError:
            log.warning("not confirmed in time")
        finally:
            for generation in asked:
                if self._asked_in.get(generation) is this_round:
                    del self._asked_in[generation]
                    generation.confirmed()
