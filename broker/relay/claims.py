"""Claiming sessions for this worker: exactly once each, with slot and budget, also where Redis does not answer."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.errors import BrokerError, InternalError, LimitError, Overloaded, StoreUnavailable
from broker.core.session import State, short
from broker.store.accounts import LEASE, AccountStore, Reservation
from broker.store.sessions import Prepared, SessionStore, Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from broker.relay.generation import Generation

log = structlog.get_logger(__name__)

RETRY = 0.3
"""Seconds between two tries to learn the outcome of a claim."""

GIVE_BACK_TRIES = 20
"""Tries to give a reservation back; after that it is found among those that nobody renews."""


class Claims:
    """The claims under way.

    Args:
        sessions: where sessions are claimed.
        accounts: where slots and budgets are taken.
        worker: for whom.
        give_up_after: seconds for which the outcome of a claim is asked for: as long as it could still take effect.
        begin: starts the generation of a session that was won.
        spawn: runs work in the background and owns its task.
    """

    def __init__(
        self,
        sessions: SessionStore,
        accounts: AccountStore,
        *,
        worker: str,
        give_up_after: float,
        begin: Callable[[str, Reservation, Prepared], Generation],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._sessions = sessions
        self._accounts = accounts
        self._worker = worker
        self._give_up_after = give_up_after
        self._begin = begin
        self._spawn = spawn
        self._under_way: dict[str, asyncio.Future[Generation | Standing]] = {}
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._under_way)

    def get(self, session_id: str) -> asyncio.Future[Generation | Standing] | None:
        """The answer to a claim that is under way."""
        return self._under_way.get(session_id)

    async def claim(self, session_id: str) -> Generation | Standing:
        """Claim for one viewer or several: those who ask while a claim is under way share its answer.

        Raises:
            TooManyStreams, BudgetExceeded: there is no room now; the session stays prepared.
            StoreUnavailable: the outcome is not known. It is still asked for, and a generation that turns out to be
                won starts without a viewer.
        """
        answer = self._under_way.get(session_id)
        if answer is None:
            answer = self._under_way[session_id] = self._loop.create_future()
            answer.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # perhaps nobody asks any more
            self._spawn(self._pursue(session_id, answer))
        # A viewer that leaves takes its own wait along and not the claim.
        return await asyncio.shield(answer)

    async def _pursue(self, session_id: str, answer: asyncio.Future[Generation | Standing]) -> None:
        """Ask with one token until the outcome is known: a claim whose reply was lost may have taken effect."""
        pursuit = _Pursuit(session_id, str(uuid.uuid4()))
        give_up_at = self._loop.time() + self._give_up_after
        try:
            while self._loop.time() < give_up_at:
                try:
                    result = await self._try(pursuit)
                except StoreUnavailable as error:
                    if not answer.done():
                        answer.set_exception(error)
                    await asyncio.sleep(RETRY)
                    continue
                if not answer.done():
                    answer.set_result(result)
                return
        except Exception as error:
            if not isinstance(error, BrokerError):  # else refused: no slot, no budget
                log.exception("claim failed", session=short(session_id))
            if not answer.done():
                answer.set_exception(error if isinstance(error, BrokerError) else InternalError())
        finally:
            del self._under_way[session_id]
            answer.cancel()

    async def _try(self, pursuit: _Pursuit) -> Generation | Standing:
        """Take slot and budget first, then the session; each step can be asked for again with the same token."""
        if pursuit.reservation is None:
            described = await self._sessions.describe_for_claim(pursuit.session_id)
            if described is None:
                return Standing(State.GONE)
            if described.state is not State.PREPARED:
                return Standing(described.state, described.worker)
            pursuit.reservation = Reservation(
                pursuit.token, pursuit.session_id, described.client, described.model, described.worst
            )
        try:
            reservation = await self._reserve(pursuit, pursuit.reservation)
        except LimitError:
            # Another worker may just be claiming it, with the last slot.
            described = await self._sessions.describe(pursuit.session_id)
            if described is not None and described.state not in (State.PREPARED, State.GONE):
                return Standing(described.state, described.worker)
            raise
        if self._loop.time() >= pursuit.reserved_at + LEASE / 2:
            # This process stood still meanwhile, and others may have given it back.
            reservation = await self._reserve(pursuit, reservation)
        outcome = await self._sessions.claim(pursuit.session_id, pursuit.token, self._worker)
        if isinstance(outcome, Prepared):
            return self._begin(pursuit.session_id, reservation, outcome)
        self._spawn(self._give_back(reservation))
        return outcome

    async def _reserve(self, pursuit: _Pursuit, reservation: Reservation) -> Reservation:
        """Reserve, and again when half the lease is over: others give back what nobody renews."""
        now = self._loop.time()
        if now < pursuit.reserved_at + LEASE / 2:
            return reservation
        try:
            day = await self._accounts.reserve(reservation)
        except Overloaded:  # given back; but a claim whose reply was lost may have overtaken that
            described = await self._sessions.describe(pursuit.session_id)
            if described is None or described.token != pursuit.token:
                raise
            day = await self._accounts.reserve(reservation, force=True)
        pursuit.reserved_at = now
        pursuit.reservation = replace(reservation, day=day)
        return pursuit.reservation

    async def _give_back(self, reservation: Reservation) -> None:
        for _ in range(GIVE_BACK_TRIES):
            try:
                await self._accounts.release(reservation.token, reservation.client)
            except StoreUnavailable:
                await asyncio.sleep(RETRY)
            else:
                return


class _Pursuit:
    """How far one claim has got."""

    __slots__ = ("reservation", "reserved_at", "session_id", "token")

    def __init__(self, session_id: str, token: str) -> None:
        self.session_id = session_id
        self.token = token
        self.reservation: Reservation | None = None
        self.reserved_at = float("-inf")
