"""Claims sessions for this worker exactly once, with a slot and a budget, even if Redis does not answer at times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
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
    Queued,
    StoreRefused,
    StoreUnavailable,
    Unauthorized,
)
from broker.core.events import cancelled_before_start
from broker.core.session import State, short
from broker.relay.pursuit import Attempt, Pursuit, new_claim_id
from broker.relay.retries import until_stored
from broker.store.accounts import BUDGET_RETRY, LEASE, AccountStore, Reservation
from broker.store.clock import IN_TIME_MS
from broker.store.sessions import Prepared, SessionStatus, SessionStore

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from broker.core.accounts import Quotas
    from broker.relay.generation import Generation
    from broker.relay.pursuit import Meanwhile
    from broker.store.pending import PendingStore
    from broker.store.sessions import Spec

log = structlog.get_logger(__name__)

RETRY = 0.3
"""Seconds between two tries to learn the outcome of a claim."""

GIVE_BACK_FOR = LEASE
"""Seconds for which releasing a reservation is tried. After that, the reaper finds that it is not renewed."""

ELSEWHERE_TRIES = 10
"""Number of checks of a session that another worker is claiming, before the page is asked to try again."""

ELSEWHERE_PAUSE = 0.1
"""Seconds between these checks."""

TURNS_TO_ASK = 2
"""Turns of the event loop between a won claim and the call that frees its pending place. The upstream is asked first,
because a page waits for the answer."""

QuotasOf = Callable[["Spec"], "Quotas | None"]
"""Returns the limits of the client of a session; None for those of the service."""


def no_own_quotas(_: Spec) -> None:
    """Return the limits of a client that has none of its own."""


class Claiming:
    """The claims under way.

    Args:
        sessions: stores the claims.
        accounts: reserves slots and budgets.
        pending: counts the pending sessions, from which a claimed one is removed.
        worker: this worker's id.
        give_up_after: seconds for which the outcome of a claim is asked for: as long as it could still take effect.
        begin: starts the generation of a claimed session.
        spawn: runs work in the background and owns its task.
        open_ahead: begins to open a connection to the upstream, to save its time after the claim.
        quotas_of: returns the limits that the client of a session has now; raises `Unauthorized` where it may not ask
            any more.
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
        open_ahead: Callable[[], None] = lambda: None,
        quotas_of: QuotasOf = no_own_quotas,
    ) -> None:
        self._open_ahead = open_ahead
        self._quotas_of = quotas_of
        self._sessions = sessions
        self._accounts = accounts
        self._pending = pending
        self._worker = worker
        self._give_up_after = give_up_after
        self._begin = begin
        self._spawn = spawn
        self._under_way: dict[str, Pursuit] = {}
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._under_way)

    def __contains__(self, session_id: str) -> bool:
        """Returns True if a claim of this session is under way."""
        return session_id in self._under_way

    async def claim(
        self, session_id: str, *, may_wait: bool = False, meanwhile: Meanwhile | None = None
    ) -> Generation | SessionStatus:
        """Claim a session for one or more viewers: viewers that come while a claim is under way share its outcome.

        Args:
            session_id: the id of the session.
            may_wait: it may wait in line for a slot.
            meanwhile: work for the time in which Redis decides.

        Raises:
            Queued: the session waits in line.
            TooManyStreams, BudgetExceeded: there is no room now; the session stays prepared.
            Unauthorized: its client may not ask any more; the session stays prepared.
            BeingClaimed: another worker is claiming it and did not finish in time.
            StoreUnavailable: the outcome is not known. If the claim was sent, its outcome is still asked for, and if
                it has won, its generation starts without a viewer.
        """
        pursuit = self._under_way.get(session_id)
        if pursuit is None:
            pursuit = self._under_way[session_id] = Pursuit(session_id, new_claim_id())
            self._spawn(self._pursue(pursuit))
        pursuit.may_wait = pursuit.may_wait or may_wait
        # A viewer that leaves cancels its own wait, not the claim.
        return await pursuit.attempt.wait(meanwhile)

    def withdraw(self, session_id: str) -> bool:
        """Prevent a claim under way from starting a generation. Returns True if there was a claim.

        If it has won or may have won, the session ends as cancelled as soon as Redis can be reached.
        """
        pursuit = self._under_way.get(session_id)
        if pursuit is None:
            return False
        pursuit.withdrawn = True
        return True

    async def _pursue(self, pursuit: Pursuit) -> None:
        """Repeat with one claim id until the outcome is known: a claim whose reply was lost may have taken effect.

        A claim that was never sent cannot have taken effect, so it is not repeated after a failure.
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
                    pursuit.attempt = Attempt()
                    await asyncio.sleep(RETRY)
                else:
                    pursuit.attempt.succeed(result)
                    return
        except BrokerError as error:  # refused: no slot, no budget; or never sent
            pursuit.attempt.fail(error)
            # Release what may have been reserved: a claim that was never sent cannot win. A refusal reserves nothing.
            if isinstance(error, StoreUnavailable) and not pursuit.sent and pursuit.reservation is not None:
                self._spawn(self._give_back(pursuit.reservation))
        except Exception as error:
            log.exception("claim failed", session=short(pursuit.session_id), exc_info=error)
            pursuit.attempt.fail(InternalError())
        finally:
            del self._under_way[pursuit.session_id]
            pursuit.attempt.fail(StoreUnavailable())  # does nothing if it has an outcome already

    async def _try(self, pursuit: Pursuit) -> Generation | SessionStatus:
        """Reserve slot and budget, and claim the session. Each step can be repeated with the same claim id."""
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

    def _lost(self, pursuit: Pursuit, outcome: SessionStatus) -> SessionStatus:
        if pursuit.reservation is not None:
            self._spawn(self._give_back(pursuit.reservation))
        return outcome

    async def _take(self, pursuit: Pursuit) -> Prepared | SessionStatus:
        if pursuit.reservation is None:
            described = await self._sessions.describe_for_claim(pursuit.session_id)
            if described is None:
                return SessionStatus(State.GONE)
            if described.state is not State.PREPARED:
                return SessionStatus(described.state, described.worker)
            try:
                pursuit.quotas = self._quotas_of(described.spec)
            except Unauthorized as error:
                return await self._taken_elsewhere(pursuit, error)
            pursuit.ends_ms, pursuit.spec = described.ends_ms, described.spec
            # While Redis decides, because a claim is rarely refused. In the next turn of the loop: Redis is asked at
            # the end of this one.
            self._loop.call_soon(self._open_ahead)
            pursuit.reservation = Reservation(
                pursuit.claim_id,
                pursuit.session_id,
                described.spec.client,
                described.spec.model,
                described.spec.worst,
            )
        if pursuit.at_once:
            await self._make_void(pursuit)
        elif not pursuit.sent and (outcome := await self._take_at_once(pursuit)) is not None:
            return outcome
        return await self._take_in_steps(pursuit)

    async def _take_at_once(self, pursuit: Pursuit) -> Prepared | SessionStatus | None:
        """Reserve and claim in one round trip. Returns None where that is not possible now.

        The first chunk comes a sixth earlier (measured). `_take_in_steps` does the same in two round trips, and says
        what it means: nothing is claimed unless the reservation was made.
        """
        wanted, spec = pursuit.wanted, pursuit.spec
        reserving = self._accounts.reserving(
            wanted, quotas=pursuit.quotas, may_wait=pursuit.may_wait, ends_ms=pursuit.ends_ms
        )
        now_ms = self._sessions.redis_ms()
        if reserving is None or spec is None or now_ms is None:
            return None
        pursuit.sent = pursuit.at_once = True
        try:
            reply, outcome = await self._sessions.claim_if_reserved(
                reserving,
                pursuit.session_id,
                pursuit.claim_id,
                self._worker,
                spec=spec,
                before_ms=now_ms + IN_TIME_MS,
            )
        except StoreRefused:  # Redis has answered, and done nothing
            pursuit.sent = pursuit.at_once = False
            raise
        pursuit.at_once = False
        pursuit.sent = outcome is not None
        if isinstance(outcome, Prepared):
            self._spawn(self._forget(wanted))
        try:
            pursuit.reservation = self._accounts.reserved(wanted, reply)
        except (LimitError, BeingClaimed) as error:
            return await self._taken_elsewhere(pursuit, error)
        return outcome

    async def _forget(self, reservation: Reservation) -> None:
        """Stop counting a claimed session as pending. If Redis cannot be reached now, its place expires."""
        for _ in range(TURNS_TO_ASK):
            await asyncio.sleep(0)
        with suppress(StoreUnavailable):
            await self._pending.forget(reservation.client, reservation.session_id)

    async def _make_void(self, pursuit: Pursuit) -> None:
        """Make sure that a claim whose reply was lost cannot win any more, unless it has won.

        Raises:
            StoreUnavailable: this is not known yet, or no viewer waits any more.
        """
        if not await self._sessions.refuse(pursuit.session_id, pursuit.claim_id):
            pursuit.at_once = False  # it has won, or the session is gone: the next step shows which
            return
        pursuit.sent = pursuit.at_once = False
        if not pursuit.attempt.waiting and not pursuit.withdrawn:
            raise StoreUnavailable
        # Released first, or it could take the room of the next claim.
        await self._accounts.release(pursuit.wanted)
        pursuit.rename(new_claim_id())

    async def _take_in_steps(self, pursuit: Pursuit) -> Prepared | SessionStatus:
        """Reserve, and then claim."""
        try:
            reservation = await self._reserve(pursuit, pursuit.wanted)
        except (LimitError, BeingClaimed) as error:
            return await self._taken_elsewhere(pursuit, error)
        if self._loop.time() >= pursuit.reserved_at + LEASE / 2:
            # This process was frozen meanwhile, and others may have released the reservation.
            await self._reserve(pursuit, reservation)
        if not pursuit.sent:
            if not pursuit.attempt.waiting and not pursuit.withdrawn:
                raise StoreUnavailable  # all viewers have left
            if pursuit.withdrawn:
                return SessionStatus(State.PREPARED)
        pursuit.sent = True
        return await self._sessions.claim(
            pursuit.session_id,
            pursuit.claim_id,
            self._worker,
            also=self._pending.forgetting(reservation.client, pursuit.session_id),
        )

    async def _taken_elsewhere(self, pursuit: Pursuit, refused: BrokerError) -> SessionStatus:
        """Return the status of a session that was refused here: another worker may have claimed it.

        Raises:
            LimitError, Unauthorized: no other worker has claimed it.
            BeingClaimed: the outcome of the other claim is not known in time; the page should try again.
        """
        for _ in range(ELSEWHERE_TRIES):
            described = await self._sessions.describe(pursuit.session_id)
            if described is not None and described.state not in (State.PREPARED, State.GONE):
                if isinstance(refused, Queued):  # it got a place in line that it does not need
                    await self._pending.forget(described.spec.client, pursuit.session_id)
                return SessionStatus(described.state, described.worker)
            if not isinstance(refused, BeingClaimed) or described is None:
                break
            await asyncio.sleep(ELSEWHERE_PAUSE)
        if isinstance(refused, BudgetExceeded) and refused.final:
            left = await self._sessions.remaining(pursuit.session_id)
            if left is not None and left > (refused.retry_after or 0):  # a new day begins before it ends
                raise BudgetExceeded(refused.message, retry_after=BUDGET_RETRY)
        raise refused

    async def _reserve(self, pursuit: Pursuit, reservation: Reservation) -> Reservation:
        """Reserve, and reserve again after half the lease: others release a reservation that is not renewed."""
        now = self._loop.time()
        if now < pursuit.reserved_at + LEASE / 2:
            return reservation
        try:
            reserved = await self._accounts.reserve(
                reservation,
                quotas=pursuit.quotas,
                may_wait=pursuit.may_wait,
                ends_ms=pursuit.ends_ms,
            )
        except BeingClaimed:
            raise
        except Overloaded:  # released; but a claim whose reply was lost may have won before that
            described = await self._sessions.describe(pursuit.session_id)
            if described is None or described.claim_id != pursuit.claim_id:
                raise
            if await self._accounts.reserve_again([reservation]):
                raise StoreRefused from None
            reserved = await self._accounts.reserve(reservation)
        pursuit.reserved_at = now
        pursuit.reservation = reserved
        return reserved

    async def _give_back(self, reservation: Reservation) -> None:
        with suppress(StoreUnavailable):  # then the reaper finds it
            await until_stored(
                partial(self._accounts.release, reservation), give_up_after=GIVE_BACK_FOR, retry=RETRY
            )
