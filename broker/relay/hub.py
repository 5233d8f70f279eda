"""The interface of the relay for `web`: find or claim the session that a viewer asks for, and cancel sessions."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

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
from broker.relay.claiming import Claiming, no_own_quotas
from broker.relay.generation import Generation

if TYPE_CHECKING:
    from broker.core.replay import Batch
    from broker.relay.claiming import QuotasOf
    from broker.relay.finished import FinishedSession
    from broker.relay.mirror import Mirror
    from broker.relay.pursuit import Meanwhile
    from broker.relay.source import Source
    from broker.relay.viewer import Viewer
    from broker.relay.worker import Worker
    from broker.store.accounts import AccountStore
    from broker.store.journal import JournalStore
    from broker.store.pending import PendingStore
    from broker.store.sessions import SessionStore


class Cancelled(NamedTuple):
    """The outcome of a cancel.

    Attributes:
        state: `CANCELLED`, or the state in which the session had ended before.
        accepted: the session is certain to end as cancelled, and had not ended before.
    """

    state: State
    accepted: bool


class Hub:
    """Finds the sessions that viewers of this worker ask for.

    Args:
        worker: runs generations and has the mirrors.
        sessions: the states of sessions in Redis.
        journal: the events of sessions in Redis.
        accounts: slots and budgets.
        pending: sessions that are not claimed yet.
        quotas_of: returns the limits that the client of a session has now; raises `Unauthorized`.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        sessions: SessionStore,
        journal: JournalStore,
        accounts: AccountStore,
        pending: PendingStore,
        quotas_of: QuotasOf = no_own_quotas,
    ) -> None:
        self._worker = worker
        self._sessions = sessions
        self._journal = journal
        self._pending = pending
        self._config = worker.config
        self._claiming = Claiming(
            sessions,
            accounts,
            pending,
            worker=worker.id,
            give_up_after=self._config.session_ttl + self._config.running_ttl,
            begin=worker.start_generation,
            spawn=worker.tasks.spawn,
            open_ahead=worker.open_ahead,
            quotas_of=quotas_of,
        )

    async def find(
        self,
        session_id: str,
        cursor: Cursor | None,
        *,
        may_wait: bool = False,
        meanwhile: Meanwhile | None = None,
    ) -> Source:
        """Return the source of a session's events.

        A request without a cursor claims a prepared session. One with a cursor never does.

        Args:
            session_id: the id of the session.
            cursor: the last event that the viewer has; None for none.
            may_wait: it may wait in line for a slot.
            meanwhile: work for the time in which Redis decides on a claim. It is not called if there is none.

        Raises:
            SessionNotFound, SessionExpired: there is no such session, or not any more.
            AlreadyClaimed: it has been streamed, and resuming is off.
            Unauthorized: it is prepared, and its client may not ask any more.
            StoreUnavailable, Draining, Overloaded, NotYetClaimed: not possible now; the page should try again.
        """
        here = self._here(session_id)
        if here is not None:
            self._check_resuming()
            return here
        if cursor is None and (won := await self._claim(session_id, may_wait, meanwhile)) is not None:
            return won
        return await self._mirror(session_id, cursor)

    def add_viewer(self, source: Source, viewer: Viewer, *, resumed: bool = False) -> None:
        """Count a viewer, and send it heartbeats, until `remove_viewer` is called.

        Args:
            source: of its events.
            viewer: the viewer.
            resumed: it came with a cursor.
        """
        source.add_viewer(resumed=resumed)
        self._worker.viewers.add(viewer)

    def remove_viewer(self, source: Source, viewer: Viewer) -> None:
        """Stop counting a viewer: it has left."""
        self._worker.viewers.discard(viewer)
        source.remove_viewer()

    async def read_journal(self, session_id: str, after: int) -> list[Batch]:
        """Return a part of a session's journal, for a viewer whose next events have left memory.

        Raises:
            StoreUnavailable: Redis cannot be reached, or does not have the session now; the page should try again.
        """
        batches = await self._journal.read(session_id, after)
        if batches is None:
            raise StoreUnavailable
        return batches

    async def cancel(self, session_id: str) -> Cancelled:
        """Stop a session, on any worker.

        Raises:
            SessionNotFound: there is no such session.
            StoreUnavailable: another worker owns it, and Redis is away.
        """
        here = self._here(session_id)
        if here is not None:
            accepted = here.cancel()
            state = await here.ended()  # only a written end is certain: this worker may die at any moment
            return Cancelled(state, accepted=accepted and state is State.CANCELLED)
        withdrawn = self._claiming.withdraw(session_id)
        status = await self._sessions.cancel(session_id, cancelled_before_start())
        if status.state is State.GONE:
            await self._raise_gone(None)
        if status.state is State.PREPARED:
            await self._forget(session_id)
        accepted = status.state in (State.PREPARED, State.RUNNING)
        if withdrawn and status.state is State.CANCELLED:
            accepted = True  # the pursuit of the claim wrote that end before
        return Cancelled(State.CANCELLED if accepted else status.state, accepted=accepted)

    def _here(self, session_id: str) -> Generation | FinishedSession | None:
        return self._worker.running.get(session_id) or self._worker.finished.get(session_id)

    async def _claim(self, session_id: str, may_wait: bool, meanwhile: Meanwhile | None) -> Generation | None:
        """Claim a session. Returns None if it cannot be claimed; `_mirror` finds the reason."""
        if session_id not in self._claiming and not await self._may_claim(session_id):
            return None
        # Nothing is awaited between these checks and the claim, or more claims would pass than there is room for.
        if session_id not in self._claiming:
            if self._worker.draining:
                raise Draining
            if len(self._worker.running) + len(self._claiming) >= self._config.max_streams:
                raise Overloaded
        outcome = await self._claiming.claim(session_id, may_wait=may_wait, meanwhile=meanwhile)
        if isinstance(outcome, Generation):
            if outcome.was_watched:  # by another viewer that waited for the same claim
                self._check_resuming()
            return outcome
        if outcome.state is State.GONE:
            await self._raise_gone(None)
        return None

    async def _may_claim(self, session_id: str) -> bool:
        """Return False for a session that runs or has ended.

        Raises:
            StoreUnavailable: Redis is a new server, which may have forgotten that the session runs. Its owner is about
                to write that.
        """
        since = await self._worker.redis.claims_paused_since()
        if since is None:
            return True
        record = await self._sessions.describe(session_id)
        if record is not None and record.state is not State.PREPARED:
            return False
        if record is None or record.prepared_ms < since:
            raise StoreUnavailable
        return True

    async def _mirror(self, session_id: str, cursor: Cursor | None) -> Mirror:
        mirrors = self._worker.mirrors
        mirror = mirrors.get(session_id)
        if mirror is not None:
            return mirror
        if self._worker.draining:
            raise Draining
        # A viewer that is refused must not be registered. A session without an owner was never streamed.
        if self._config.resume_ttl == 0 and (await self._journal.status(session_id)).worker:
            raise AlreadyClaimed
        opened = await mirrors.open(session_id, cursor.n if cursor is not None else 0)
        if opened is State.GONE:
            await self._raise_gone(cursor)
        if isinstance(opened, State):
            raise NotYetClaimed
        return opened

    def _check_resuming(self) -> None:
        if self._config.resume_ttl == 0:
            raise AlreadyClaimed

    async def _raise_gone(self, cursor: Cursor | None) -> None:
        if not await self._worker.redis.is_gone():
            raise StoreUnavailable
        raise SessionNotFound if cursor is None else SessionExpired

    async def _forget(self, session_id: str) -> None:
        """Free the pending place of a cancelled session. If Redis cannot be reached now, the place expires."""
        with suppress(StoreUnavailable):
            if (session := await self._sessions.describe(session_id)) is not None:
                await self._pending.forget(session.spec.client, session_id)
