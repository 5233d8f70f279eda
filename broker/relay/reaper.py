"""Renews the reservations of this worker, and ends and settles the sessions of dead workers.

A session is alive while its reservation is renewed. Every worker renews its own reservations once a second, in a loop
that does nothing else. Another loop finds reservations that are not renewed any more, ends their sessions as lost, and
settles their usage by the journal. Two workers may find the same one: an end is written once and settled once.
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
from broker.telemetry.interface import NO_TELEMETRY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from broker.core.accounts import Usage, WorstCase
    from broker.core.answer import Answer
    from broker.core.dialect import Dialect
    from broker.core.session_report import SessionReport
    from broker.relay.settlement import Settlement
    from broker.store.accounts import AccountStore, Reservation
    from broker.store.journal import JournalStore
    from broker.store.sessions import SessionRecord, SessionStatus, SessionStore
    from broker.telemetry.interface import Telemetry

log = structlog.get_logger(__name__)

RENEW = 1.0
"""Seconds between two renewals."""

RENEW_AT_ONCE = 1000
"""Maximum number of reservations that one round trip renews, so that Redis can serve others in between."""

ROUND = 1.0
"""Seconds between two searches for dead workers' reservations, with jitter, so that workers do not search at once."""

AWAY = 0.5
"""Seconds between two tries while Redis is away."""

AT_ONCE = 2000
"""Maximum number of dead workers' reservations that one round handles."""

TOGETHER = 32
"""Maximum number of them handled at the same time. Other work needs connections too."""

END_AT_ONCE = 128
"""Maximum number of dead workers' sessions that one round trip ends."""

ASK_AT_ONCE = 100
"""Maximum number of estimates that one round takes."""

MAX_EVENT = 16 * 1024 * 1024
"""Maximum bytes of one journaled event. Larger events are never relayed."""


async def _always() -> float:
    return float("-inf")


class Reaper:
    """Renews this worker's reservations, and ends and settles those of dead workers.

    Args:
        accounts: stores the reservations.
        sessions: stores the sessions.
        journal: stores the events.
        settlement: counts usage and settles it.
        clock: seconds that only go forward.
        count: is called with the report of every session that was ended for a dead worker.
        telemetry: makes a span of each of them.
        same_since: returns the time of the clock since when the same Redis answers; raises `StoreUnavailable`.
    """

    def __init__(
        self,
        accounts: AccountStore,
        sessions: SessionStore,
        journal: JournalStore,
        settlement: Settlement,
        clock: Callable[[], float] = time.monotonic,
        count: Callable[[SessionReport], None] = ignore,
        telemetry: Telemetry = NO_TELEMETRY,
        same_since: Callable[[], Awaitable[float]] = _always,
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._journal = journal
        self._settlement = settlement
        self._clock = clock
        self._count = count
        self._telemetry = telemetry
        self._same_since = same_since
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
        """Search for reservations of dead workers until cancelled."""
        while True:
            pause = ROUND if await self._round() else AWAY
            await asyncio.sleep(pause * random.uniform(0.75, 1.0))  # noqa: S311 - jitter is no secret

    async def _renew(self, running: Sequence[Reservation]) -> None:
        for start in range(0, len(running), RENEW_AT_ONCE):
            # Redis lost it, or it was released while its claim was under way. One that has just ended does not change.
            closed = await self._accounts.renew(running[start : start + RENEW_AT_ONCE])
            await self._accounts.reserve_again(closed)

    async def _round(self) -> bool:
        """Run one round. Returns True if Redis could be reached."""
        for step in (self._reap, self._ask):
            try:
                await step()
            except StoreRefused:
                continue  # it was logged, and the other step may work
            except StoreUnavailable:
                # No worker could renew meanwhile. A reservation is lost only if it is not renewed while Redis answers.
                self._answered_since = self._clock() + LEASE
                return False
        return True

    async def _reap(self) -> None:
        """End and settle the reservations that were not renewed in time."""
        if self._clock() < self._answered_since:
            return
        orphans = await self._accounts.overdue(AT_ONCE)
        # Asked behind that, because any call may be the first to reach a server that has replaced another one, and
        # that does not know of the last renewals there.
        if self._clock() < await self._same_since() + LEASE:
            return
        # All ends first: viewers wait for them.
        found: list[tuple[Reservation, SessionRecord | None]] = []
        failed: list[Reservation] = []
        for start in range(0, len(orphans), END_AT_ONCE):
            part = orphans[start : start + END_AT_ONCE]
            ended = await self._end(part)
            found += [(orphan, ended[orphan.claim_id]) for orphan in part if orphan.claim_id in ended]
            failed += [orphan for orphan in part if orphan.claim_id not in ended]

        async def settle(one: tuple[Reservation, SessionRecord | None]) -> None:
            await self._look_after(*one)

        unsettled = await for_each(found, settle, doing="settle for the dead", together=TOGETHER)
        failed += [orphan for orphan, _ in unsettled]
        await self._accounts.put_off(failed)

    async def _end(self, orphans: Sequence[Reservation]) -> dict[str, SessionRecord | None]:
        """End the sessions of reservations that are not renewed any more, in two round trips.

        Returns the record of each session by claim id. A session that Redis cannot read or end now is left out.
        """
        records = await self._sessions.describe_many([orphan.session_id for orphan in orphans])
        ended: dict[str, SessionRecord | None] = {}
        running: list[tuple[Reservation, SessionRecord]] = []
        for orphan, record in zip(orphans, records, strict=True):
            if isinstance(record, StoreUnavailable):
                continue
            if record is not None and record.claim_id == orphan.claim_id and record.state is State.RUNNING:
                running.append((orphan, record))
            else:
                ended[orphan.claim_id] = record
        for (orphan, record), status in zip(running, await self._mark_lost(running), strict=True):
            if not isinstance(status, StoreUnavailable):
                self._report(orphan, record, status)
                ended[orphan.claim_id] = replace(record, state=status.state)
        return ended

    async def _mark_lost(
        self, running: Sequence[tuple[Reservation, SessionRecord]]
    ) -> list[SessionStatus | StoreUnavailable]:
        if not running:
            return []
        try:
            return await self._sessions.mark_lost_many(
                [(orphan.session_id, orphan.claim_id) for orphan, _ in running],
                error=error_data(WorkerLost()),
                cancelled=cancelled_unseen(None),
            )
        except StoreRefused as refused:  # all of them
            return [refused] * len(running)

    def _report(self, orphan: Reservation, session: SessionRecord, lost: SessionStatus) -> None:
        log.warning("worker lost", session=short(orphan.session_id), worker=session.worker, state=lost.state)
        # With another epoch, its own worker has ended it meanwhile and has written the report.
        if lost.end is not None and lost.end.id.epoch == 2:
            report = report_of_lost(orphan.session_id, session, lost.state)
            write_line(report)
            self._count(report)
            self._telemetry.lost(report, session.spec.trace)

    async def _ask(self) -> None:
        for estimate in await self._accounts.due_estimates(min(ASK_AT_ONCE, self._settlement.room)):
            self._settlement.ask(estimate)

    async def _look_after(self, orphan: Reservation, session: SessionRecord | None) -> None:
        if session is None:
            # No worker was alive for longer than a session is stored, so it is not known whether its claim had won.
            # Book the worst case, which is safe.
            await self._settlement.settle(orphan, usage_at_worst(orphan.worst), State.LOST, None)
        elif session.claim_id != orphan.claim_id:
            # Its claim has not won so far. If the claim is still under way, it must not win any more.
            if await self._sessions.refuse(orphan.session_id, orphan.claim_id):
                await self._accounts.release(orphan)
        elif session.state in ENDED:
            await self._settle(orphan, session, session.state)

    async def _settle(self, orphan: Reservation, session: SessionRecord, state: State) -> None:
        answer = await self._read(orphan.session_id, DIALECTS[session.spec.dialect])
        if answer is None:  # an end is stored for longer than its journal
            spent, generation_id = spent_in_end(session.end_data, orphan.worst), None
        else:
            # Asked before, because the prices may come while the usage is counted.
            awaits_prices = self._settlement.awaits_prices(orphan)
            spent = await self._settlement.count(
                answer, orphan, prompt_tokens=session.spec.prompt_tokens, asked=True
            )
            generation_id = answer.generation_id
            if spent.cost is None and awaits_prices:  # nobody waits for it, unlike for an end
                await self._accounts.put_off([orphan])
                return
        await self._settlement.settle(orphan, spent, state, generation_id)
        log.warning("settled for a dead worker", session=short(orphan.session_id), estimated=spent.estimated)

    async def _read(self, session_id: str, dialect: Dialect) -> Answer | None:
        """Return the answer in a journal, None if the journal has expired or is incomplete."""
        answer, decoder, after = dialect.answer(), Decoder(MAX_EVENT), 0
        while True:
            followed = await self._journal.follow(session_id, after, register=False)
            if followed.status.state is State.GONE:
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
    """Return the usage in the end of a session, or the worst case if it has none.

    Args:
        data: the JSON of its `done` event or of another end, or empty.
        worst: the reserved amount.
    """
    reported = orjson.loads(data) if data else {}
    usage, cost = reported.get("usage"), reported.get("cost")
    counts = in_chat_names(usage) if isinstance(usage, dict) else None
    if counts is None or not has_counts(counts):
        return usage_at_worst(worst)
    return usage_of(counts, to_nano(cost), estimated=bool(reported.get("estimated")))
