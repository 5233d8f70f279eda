"""Claiming sessions for this worker: exactly once each, with slot and budget, also where Redis does not answer."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.errors import (
    BeingClaimed,
    BrokerError,
    BudgetExceeded,
    InternalError,
    LimitError,
    Overloaded,
    StoreRefused,
    StoreUnavailable,
)
from broker.core.events import cancelled_before_start
from broker.core.session import State, short
from broker.relay.retries import until_stored
from broker.store.accounts import BUDGET_RETRY, LEASE, AccountStore, Reservation
from broker.store.sessions import Prepared, SessionStatus, SessionStore

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from broker.relay.generation import Generation
    from broker.store.pending import PendingStore

log = structlog.get_logger(__name__)

RETRY = 0.3
"""Seconds between two tries to learn the outcome of a claim."""

GIVE_BACK_FOR = LEASE
"""Seconds for which a reservation is tried to be given back; after that others find that nobody renews it."""

ELSEWHERE_TRIES = 10
"""Looks at a session that another worker is claiming, until a page is asked to come again."""

ELSEWHERE_PAUSE = 0.1
"""Seconds between them."""


class Claiming:
    """The claims under way.

    Args:
        sessions: where sessions are claimed.
        accounts: where slots and budgets are taken.
        pending: where a session that was claimed is counted no more.
        worker: for whom.
        give_up_after: seconds for which the outcome of a claim is asked for: as long as it could still take effect.
        begin: starts the generation of a session that was won.
        spawn: runs work in the background and owns its task.
    """

    def __init__(
        self,
        sessions: SessionStore,
        accounts: AccountStore,
        pending: PendingStore,
        *,
        worker: str,
        give_up_after: float,
        begin: Callable[[str, Reservation, Prepared], Generation],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._sessions = sessions
        self._accounts = accounts
        self._pending = pending
        self._worker = worker
        self._give_up_after = give_up_after
        self._begin = begin
        self._spawn = spawn
        self._under_way: dict[str, _Pursuit] = {}
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._under_way)

    def __contains__(self, session_id: str) -> bool:
        """Whether a claim of this session is under way."""
        return session_id in self._under_way

    async def claim(self, session_id: str, *, may_wait: bool = False) -> Generation | SessionStatus:
        """Claim for one viewer or several: those who ask while a claim is under way share its answer.

        Raises:
            Queued: the session waits in line.
            TooManyStreams, BudgetExceeded: there is no room now; the session stays prepared.
            BeingClaimed: another worker is claiming it, and has not done so in time.
            StoreUnavailable: the outcome is not known. Where the claim was sent, its outcome is still asked for, and
                a generation that turns out to be won starts without a viewer.
        """
        pursuit = self._under_way.get(session_id)
        if pursuit is None:
            pursuit = self._under_way[session_id] = _Pursuit(session_id, str(uuid.uuid4()))
            self._spawn(self._pursue(pursuit))
        pursuit.may_wait = pursuit.may_wait or may_wait
        # A viewer that leaves takes its own wait along and not the claim.
        return await pursuit.attempt.wait()

    def withdraw(self, session_id: str) -> bool:
        """Let no generation begin by a claim that is under way; returns True if one was.

        Where it has won, or may have, the session is given the end of a cancel, as soon as Redis can be told.
        """
        pursuit = self._under_way.get(session_id)
        if pursuit is None:
            return False
        pursuit.withdrawn = True
        return True

    async def _pursue(self, pursuit: _Pursuit) -> None:
        """Ask with one token until the outcome is known: a claim whose reply was lost may have taken effect.

        One that was never sent may not, and then nobody waits any more once it has failed.
        """
        give_up_at = self._loop.time() + self._give_up_after
        try:
            while self._loop.time() < give_up_at:
                try:
                    result = await self._try(pursuit)
                except StoreUnavailable as error:
                    if not pursuit.sent:
                        raise
                    pursuit.attempt.fail(error)
                    pursuit.attempt = _Attempt()
                    await asyncio.sleep(RETRY)
                else:
                    pursuit.attempt.tell(result)
                    return
        except BrokerError as error:  # refused: no slot, no budget; or never sent
            pursuit.attempt.fail(error)
            # What may have been reserved is given back: a claim that was never sent cannot win. A refusal took nothing.
            if isinstance(error, StoreUnavailable) and not pursuit.sent and pursuit.reservation is not None:
                self._spawn(self._give_back(pursuit.reservation))
        except Exception as error:
            log.exception("claim failed", session=short(pursuit.session_id), exc_info=error)
            pursuit.attempt.fail(InternalError())
        finally:
            del self._under_way[pursuit.session_id]
            pursuit.attempt.fail(StoreUnavailable())  # unless they have been told already

    async def _try(self, pursuit: _Pursuit) -> Generation | SessionStatus:
        """Take slot and budget first, then the session; each step can be asked for again with the same token."""
        if not pursuit.withdrawn:
            outcome = await self._take(pursuit)
            if isinstance(outcome, Prepared) and pursuit.reservation is not None and not pursuit.withdrawn:
                return self._begin(pursuit.session_id, pursuit.reservation, outcome)
            if isinstance(outcome, SessionStatus) and not pursuit.withdrawn:
                return self._lost(pursuit, outcome)
        # Nothing was sent to the upstream, so nothing was spent, whether it has won or not.
        await self._sessions.cancel(pursuit.session_id, cancelled_before_start())
        outcome = await self._sessions.claim(pursuit.session_id, pursuit.claim_id, self._worker)
        if isinstance(outcome, Prepared):
            raise StoreUnavailable  # Redis went back to an older state in between: cancel it once more
        return self._lost(pursuit, outcome)

    def _lost(self, pursuit: _Pursuit, outcome: SessionStatus) -> SessionStatus:
        if pursuit.reservation is not None:
            self._spawn(self._give_back(pursuit.reservation))
        return outcome

    async def _take(self, pursuit: _Pursuit) -> Prepared | SessionStatus:
        if pursuit.reservation is None:
            described = await self._sessions.describe_for_claim(pursuit.session_id)
            if described is None:
                return SessionStatus(State.GONE)
            if described.state is not State.PREPARED:
                return SessionStatus(described.state, described.worker)
            pursuit.ends_ms = described.ends_ms
            pursuit.reservation = Reservation(
                pursuit.claim_id,
                pursuit.session_id,
                described.spec.client,
                described.spec.model,
                described.spec.worst,
            )
        try:
            reservation = await self._reserve(pursuit, pursuit.reservation)
        except (LimitError, BeingClaimed) as error:
            return await self._taken_elsewhere(pursuit, error)
        if self._loop.time() >= pursuit.reserved_at + LEASE / 2:
            # This process stood still meanwhile, and others may have given it back.
            await self._reserve(pursuit, reservation)
        if not pursuit.sent:
            if not pursuit.attempt.waiting and not pursuit.withdrawn:
                raise StoreUnavailable  # nobody wants it any more
            if pursuit.withdrawn:
                return SessionStatus(State.PREPARED)
        pursuit.sent = True
        return await self._sessions.claim(
            pursuit.session_id,
            pursuit.claim_id,
            self._worker,
            also=self._pending.forgetting(reservation.client, pursuit.session_id),
        )

    async def _taken_elsewhere(self, pursuit: _Pursuit, refused: BrokerError) -> SessionStatus:
        """Where a session stands for which there was no room: another worker may be claiming it, with the last slot.

        Raises:
            LimitError: nobody else does.
            BeingClaimed: whether that claim wins is not known in time; the page should come again.
        """
        for _ in range(ELSEWHERE_TRIES):
            described = await self._sessions.describe(pursuit.session_id)
            if described is not None and described.state not in (State.PREPARED, State.GONE):
                return SessionStatus(described.state, described.worker)
            if isinstance(refused, LimitError) or described is None:
                break
            await asyncio.sleep(ELSEWHERE_PAUSE)
        if isinstance(refused, BudgetExceeded) and refused.final:
            left = await self._sessions.remaining(pursuit.session_id)
            if left is not None and left > (refused.retry_after or 0):  # a new day begins before it ends
                raise BudgetExceeded(refused.message, retry_after=BUDGET_RETRY)
        raise refused

    async def _reserve(self, pursuit: _Pursuit, reservation: Reservation) -> Reservation:
        """Reserve, and again when half the lease is over: others give back what nobody renews."""
        now = self._loop.time()
        if now < pursuit.reserved_at + LEASE / 2:
            return reservation
        try:
            day = await self._accounts.reserve(
                reservation, may_wait=pursuit.may_wait, ends_ms=pursuit.ends_ms
            )
        except BeingClaimed:
            raise
        except Overloaded:  # given back; but a claim whose reply was lost may have overtaken that
            described = await self._sessions.describe(pursuit.session_id)
            if described is None or described.claim_id != pursuit.claim_id:
                raise
            if await self._accounts.reserve_again([reservation]):
                raise StoreRefused from None
            day = await self._accounts.reserve(reservation)
        pursuit.reserved_at = now
        pursuit.reservation = replace(reservation, day=day)
        return pursuit.reservation

    async def _give_back(self, reservation: Reservation) -> None:
        with suppress(StoreUnavailable):  # then it is found among those that nobody renews
            await until_stored(
                partial(self._accounts.release, reservation), give_up_after=GIVE_BACK_FOR, retry=RETRY
            )


class _Attempt:
    """One try of a claim, and those who wait for what comes of it."""

    __slots__ = ("_outcome", "waiting")

    def __init__(self) -> None:
        self._outcome: asyncio.Future[Generation | SessionStatus] = asyncio.get_running_loop().create_future()
        self._outcome.add_done_callback(lambda done: done.exception())  # perhaps nobody asks any more
        self.waiting = 0

    async def wait(self) -> Generation | SessionStatus:
        """Wait for the outcome, or raise what it failed with."""
        self.waiting += 1
        try:
            return await asyncio.shield(self._outcome)
        finally:
            self.waiting -= 1

    def tell(self, outcome: Generation | SessionStatus) -> None:
        """It has an outcome."""
        self._outcome.set_result(outcome)

    def fail(self, error: BrokerError) -> None:
        """It has failed, unless it has an outcome already."""
        if not self._outcome.done():
            self._outcome.set_exception(error)


class _Pursuit:
    """How far one claim has got.

    Attributes:
        sent: it may have reached Redis, and may yet take effect there.
        may_wait: without a free slot, the session waits in line.
        ends_ms: when the session expires, in ms by the clock of Redis; 0 before that is known.
        withdrawn: somebody has cancelled the session: no generation begins.
    """

    __slots__ = (
        "attempt",
        "claim_id",
        "ends_ms",
        "may_wait",
        "reservation",
        "reserved_at",
        "sent",
        "session_id",
        "withdrawn",
    )

    def __init__(self, session_id: str, claim_id: str) -> None:
        self.session_id = session_id
        self.claim_id = claim_id
        self.attempt = _Attempt()
        self.reservation: Reservation | None = None
        self.reserved_at = float("-inf")
        self.sent = False
        self.may_wait = False
        self.ends_ms = 0
        self.withdrawn = False
