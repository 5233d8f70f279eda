"""One liveness for sessions and reservations: a session lives while its reservation is renewed.

Every worker renews its own once a second, in a loop that does nothing else, and looks in another one for those that
nobody renews. Their sessions are ended as lost, and what they took is settled from what was journaled. Two workers that
find the same do no harm: an end is written once, and a reservation is settled once.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import orjson
import structlog

from broker.core.accounts import usage_at_worst, usage_of
from broker.core.dialect import DIALECTS
from broker.core.errors import StoreRefused, StoreUnavailable, UpstreamError, WorkerLost
from broker.core.events import cancelled_unseen, error_data
from broker.core.pricing import to_nano
from broker.core.responses_answer import in_chat_names
from broker.core.session import ENDED, State, short
from broker.core.sse import Decoder, EventTooLarge
from broker.relay.reports import ignore, report_of_lost, write_line
from broker.relay.rounds import for_each
from broker.relay.settlement import has_counts
from broker.store.accounts import LEASE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from broker.core.accounts import Usage, WorstCase
    from broker.core.answer import Answer
    from broker.core.dialect import Dialect
    from broker.core.session_report import SessionReport
    from broker.relay.settlement import Settlement
    from broker.store.accounts import AccountStore, Reservation
    from broker.store.journal import JournalStore
    from broker.store.sessions import SessionRecord, SessionStore

log = structlog.get_logger(__name__)

RENEW = 1.0
"""Seconds between two renewals."""

RENEW_AT_ONCE = 1000
"""Reservations that one round trip renews: what it costs Redis must not hold up others."""

ROUND = 1.0
"""Seconds between two looks for the dead; varied, so that workers do not all look at once."""

AWAY = 0.5
"""Seconds between two tries while Redis is away."""

AT_ONCE = 2000
"""Reservations of the dead that one round looks at."""

TOGETHER = 32
"""Of these, how many are worked on at the same time; connections must be left for everything else."""

ASK_AT_ONCE = 100
"""Estimates that one round takes on."""

MAX_EVENT = 16 * 1024 * 1024
"""Bytes of one journaled event; larger ones were never relayed."""


class Reaper:
    """Keeps this worker's reservations alive, and ends and settles those of the dead.

    Args:
        accounts: where the reservations are.
        sessions: whose they are.
        journal: what was relayed.
        settlement: counts and books.
        clock: seconds that only go forward.
        count: is called with the report of every session that was ended for a dead worker.
    """

    def __init__(
        self,
        accounts: AccountStore,
        sessions: SessionStore,
        journal: JournalStore,
        settlement: Settlement,
        clock: Callable[[], float] = time.monotonic,
        count: Callable[[SessionReport], None] = ignore,
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._journal = journal
        self._settlement = settlement
        self._clock = clock
        self._count = count
        self._answered_since = float("-inf")

    async def run_renewals(self, running: Callable[[], Sequence[Reservation]]) -> NoReturn:
        """Renew until cancelled; ``running`` returns the reservations of this worker."""
        while True:
            try:
                await self._renew(running())
            except StoreRefused:
                pause = RENEW  # it was logged
            except StoreUnavailable:
                pause = AWAY  # leases that expired meanwhile are renewed as soon as Redis is back
            else:
                pause = RENEW
            await asyncio.sleep(pause)

    async def run(self) -> NoReturn:
        """Look for the dead until cancelled."""
        while True:
            pause = ROUND if await self._round() else AWAY
            await asyncio.sleep(pause * random.uniform(0.75, 1.0))  # noqa: S311 - jitter is no secret

    async def _renew(self, running: Sequence[Reservation]) -> None:
        for start in range(0, len(running), RENEW_AT_ONCE):
            # Lost by Redis, or given back while its claim was on the way. One that has just ended stays as it is.
            closed = await self._accounts.renew(running[start : start + RENEW_AT_ONCE])
            await self._accounts.reserve_again(closed)

    async def _round(self) -> bool:
        """Do all that there is to do. Returns True if Redis could be reached."""
        for step in (self._reap, self._ask):
            try:
                await step()
            except StoreRefused:
                continue  # it was logged, and the other steps may pass
            except StoreUnavailable:
                # Nobody could renew meanwhile. Only what is not renewed while Redis answers is lost.
                self._answered_since = self._clock() + LEASE
                return False
        return True

    async def _reap(self) -> None:
        """End and settle what has not been renewed in time."""
        if self._clock() < self._answered_since:
            return
        orphans = await self._accounts.overdue(AT_ONCE)
        found: list[tuple[Reservation, SessionRecord | None]] = []

        async def end(orphan: Reservation) -> None:
            found.append((orphan, await self._end(orphan)))

        async def settle(one: tuple[Reservation, SessionRecord | None]) -> None:
            await self._look_after(*one)

        # All ends first: viewers wait for them.
        failed = await for_each(orphans, end, doing="end sessions of the dead", together=TOGETHER)
        unsettled = await for_each(found, settle, doing="settle for the dead", together=TOGETHER)
        failed += [orphan for orphan, _ in unsettled]
        await self._accounts.put_off(failed)

    async def _end(self, orphan: Reservation) -> SessionRecord | None:
        """End the session of a reservation that nobody renews, and return what it is then."""
        session = await self._sessions.describe(orphan.session_id)
        if session is None or session.claim_id != orphan.claim_id or session.state is not State.RUNNING:
            return session
        lost = await self._sessions.mark_lost(
            orphan.session_id,
            orphan.claim_id,
            error=error_data(WorkerLost()),
            cancelled=cancelled_unseen(None),
        )
        log.warning("worker lost", session=short(orphan.session_id), worker=session.worker, state=lost.state)
        if (
            lost.end is not None and lost.end.id.epoch == 2
        ):  # else its own worker has ended it meanwhile, and told it
            report = report_of_lost(orphan.session_id, session, lost.state)
            write_line(report)
            self._count(report)
        return replace(session, state=lost.state)

    async def _ask(self) -> None:
        for estimate in await self._accounts.due_estimates(min(ASK_AT_ONCE, self._settlement.room)):
            self._settlement.ask(estimate)

    async def _look_after(self, orphan: Reservation, session: SessionRecord | None) -> None:
        if session is None:
            # All workers were away for longer than it is kept, and whether its claim had won nobody can tell any more.
            # The most that it can have cost is safe.
            await self._settlement.settle(orphan, usage_at_worst(orphan.worst), State.LOST, None)
        elif session.claim_id != orphan.claim_id:
            # Its claim has not won so far. One that is still on its way must not win any more.
            if await self._sessions.refuse(orphan.session_id, orphan.claim_id):
                await self._accounts.release(orphan)
        elif session.state in ENDED:
            await self._settle(orphan, session, session.state)

    async def _settle(self, orphan: Reservation, session: SessionRecord, state: State) -> None:
        answer = await self._read(orphan.session_id, DIALECTS[session.spec.dialect])
        if answer is None:  # an end is known for longer than what led to it
            spent, generation_id = spent_in_end(session.end_data, orphan.worst), None
        else:
            spent = await self._settlement.count(
                answer, orphan, prompt_tokens=session.spec.prompt_tokens, asked=True
            )
            generation_id = answer.generation_id
        await self._settlement.settle(orphan, spent, state, generation_id)
        log.warning("settled for a dead worker", session=short(orphan.session_id), estimated=spent.estimated)

    async def _read(self, session_id: str, dialect: Dialect) -> Answer | None:
        """What the journal tells of an answer; None where it has expired, or a part of it is not there."""
        answer, decoder, after = dialect.answer(), Decoder(MAX_EVENT), 0
        while True:
            followed = await self._journal.follow(session_id, after, register=False)
            if followed.standing.state is State.GONE:
                return None
            if not followed.batches:
                return answer if followed.last <= after else None
            for batch in followed.batches:
                try:
                    for frame in decoder.feed(batch.events):
                        answer.read(frame.data)
                except (UpstreamError, EventTooLarge):
                    return answer
            after = followed.batches[-1].last


def spent_in_end(data: bytes, worst: WorstCase) -> Usage:
    """What the end of a session tells that it took; else all that it may have taken.

    Args:
        data: of its `done` event, JSON, or of another end, or empty.
        worst: what is reserved.
    """
    told = orjson.loads(data) if data else {}
    usage, cost = told.get("usage"), told.get("cost")
    counts = in_chat_names(usage) if isinstance(usage, dict) else None
    if counts is None or not has_counts(counts):
        return usage_at_worst(worst)
    return usage_of(counts, to_nano(cost), estimated=bool(told.get("estimated")))
