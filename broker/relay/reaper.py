"""Keeps reservations alive, settles those whose worker died, and asks what a worker did not live to ask.

Every worker renews the leases of its own, and looks among all open ones for leases that nobody renews: whoever finds
one settles it from what was journaled. Two that find the same do no harm, for a reservation is settled once.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import orjson
import structlog

from broker.core.accounts import usage_at_worst, usage_of
from broker.core.answer import Answer
from broker.core.errors import StoreRefused, StoreUnavailable, UpstreamError, WorkerLost
from broker.core.events import cancelled_unseen, error_data
from broker.core.pricing import to_nano
from broker.core.session import ENDED, State, short
from broker.core.sse import Decoder, EventTooLarge
from broker.relay.rounds import for_each
from broker.relay.settlement import has_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from broker.core.accounts import Usage, WorstCase
    from broker.relay.settlement import Settlement
    from broker.store.accounts import AccountStore, Reservation
    from broker.store.journal import JournalStore
    from broker.store.sessions import SessionRecord, SessionStore
    from broker.store.workers import WorkerStore

log = structlog.get_logger(__name__)

ROUND = 4.0
"""Seconds between two rounds, well within a lease; varied, so that workers do not all look at once."""

AWAY_ROUND = 0.5
"""The same while Redis is away: leases that expired meanwhile are renewed as soon as it is back."""

AT_ONCE = 100
"""Reservations of the dead that one round looks at."""

ABSENT_ROUNDS = 2
"""Rounds in a row that an owner's lease must be absent before its session is ended for it."""

MAX_EVENT = 16 * 1024 * 1024
"""Bytes of one journaled event; larger ones were never relayed."""


class Reaper:
    """Looks after the reservations.

    Args:
        accounts: where they are.
        sessions: whose they are.
        journal: what was relayed.
        workers: who lives.
        settlement: counts and books.
    """

    def __init__(
        self,
        accounts: AccountStore,
        sessions: SessionStore,
        journal: JournalStore,
        workers: WorkerStore,
        settlement: Settlement,
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._journal = journal
        self._workers = workers
        self._settlement = settlement
        self._absent: dict[str, int] = {}

    async def run(self, running: Callable[[], Sequence[Reservation]]) -> NoReturn:
        """Look after them until cancelled; ``running`` tells those of this worker."""
        pause = ROUND
        while True:
            await asyncio.sleep(pause * random.uniform(0.75, 1.0))  # noqa: S311 - jitter is no secret
            pause = ROUND if await self._round(running()) else AWAY_ROUND

    async def _round(self, running: Sequence[Reservation]) -> bool:
        """Do all there is to do; whether Redis could be reached."""
        for step in (partial(self._hold, running), self._look_around, self._ask):
            try:
                await step()
            except StoreRefused:
                continue  # it was logged, and the other steps may pass
            except StoreUnavailable:
                self._absent.clear()
                return False
        return True

    async def _hold(self, running: Sequence[Reservation]) -> None:
        # Lost by Redis, or given back while its claim was on the way. One that has just ended stays as it is.
        closed = await self._accounts.hold(running)
        await for_each(closed, partial(self._accounts.reserve, force=True), doing="reserve again")

    async def _look_around(self) -> None:
        orphans = await self._accounts.orphans(AT_ONCE)
        found: list[tuple[Reservation, SessionRecord | None]] = []

        async def describe(orphan: Reservation) -> None:
            found.append((orphan, await self._sessions.describe(orphan.session_id)))

        async def look_after(one: tuple[Reservation, SessionRecord | None]) -> None:
            await self._look_after(*one, dead)

        failed = await for_each(orphans, describe, doing="find the session of a reservation")
        dead = await self._dead({session.worker for _, session in found if session is not None})
        failed += [orphan for orphan, _ in await for_each(found, look_after, doing="settle for the dead")]
        await self._accounts.put_off([orphan.claim_id for orphan in failed])

    async def _ask(self) -> None:
        for estimate in await self._accounts.unasked(min(AT_ONCE, self._settlement.room)):
            self._settlement.ask(estimate)

    async def _dead(self, owners: set[str]) -> set[str]:
        """Those of these workers whose lease was absent in so many rounds in a row."""
        owners = owners - {""}
        absent = await self._workers.absent(owners) if owners else set()
        self._absent = {worker: self._absent.get(worker, 0) + 1 for worker in absent}
        return {worker for worker, rounds in self._absent.items() if rounds > ABSENT_ROUNDS}

    async def _look_after(self, orphan: Reservation, session: SessionRecord | None, dead: set[str]) -> None:
        if session is None:
            # All workers were away for longer than it is kept, and whether its claim had won nobody can tell any more.
            # The most that it can have cost is safe.
            await self._settlement.settle(orphan, usage_at_worst(orphan.worst), State.LOST, None)
            return
        if (
            session.claim_id != orphan.claim_id
        ):  # its claim has not won so far; one that is still on its way must not
            if await self._sessions.refuse(orphan.session_id, orphan.claim_id):
                await self._accounts.release(orphan.claim_id, orphan.client)
            return
        state = session.state
        if state is State.RUNNING and session.worker in dead:
            lost = await self._sessions.mark_lost(
                orphan.session_id,
                session.worker,
                error=error_data(WorkerLost()),
                cancelled=cancelled_unseen(None),
            )
            state = lost.state
        if state in ENDED:
            await self._settle(orphan, session, state)

    async def _settle(self, orphan: Reservation, session: SessionRecord, state: State) -> None:
        answer = await self._read(orphan.session_id)
        if answer is None:  # an end is known for longer than what led to it
            spent, generation_id = spent_in_end(session.end_data, orphan.worst), None
        else:
            spent = await self._settlement.count(
                answer, orphan, prompt_tokens=session.prompt_tokens, asked=True
            )
            generation_id = answer.generation_id
        await self._settlement.settle(orphan, spent, state, generation_id)
        log.warning("settled for a dead worker", session=short(orphan.session_id), estimated=spent.estimated)

    async def _read(self, session_id: str) -> Answer | None:
        """What the journal tells of an answer; None where it has expired, or a part of it is not there."""
        answer, decoder, after = Answer(), Decoder(MAX_EVENT), 0
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
    if not isinstance(usage, dict) or not has_counts(usage):
        return usage_at_worst(worst)
    return usage_of(usage, to_nano(cost), estimated=bool(told.get("estimated")))
