"""Keeps reservations alive, and settles those whose worker died.

Every worker renews the leases of its own, and looks among all open ones for leases that nobody renews: whoever finds
one settles it from what was journaled. Two that find the same do no harm, for a reservation is settled once.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, NoReturn

import structlog

from broker.core.answer import Answer
from broker.core.errors import StoreUnavailable, UpstreamError, WorkerLost
from broker.core.events import cancelled_unseen, error_data
from broker.core.session import ENDED, short
from broker.core.sse import Decoder, EventTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from broker.relay.settling import Settler
    from broker.store.accounts import AccountStore, Reservation
    from broker.store.journal import JournalStore
    from broker.store.sessions import Described, SessionStore
    from broker.store.workers import WorkerStore

log = structlog.get_logger(__name__)

ROUND = 4.0
"""Seconds between two rounds, well within a lease; varied, so that workers do not all look at once."""

AT_ONCE = 20
"""Reservations of the dead that one round looks at."""

ABSENT_ROUNDS = 2
"""Rounds in a row that an owner's lease must be absent before its session is ended for it."""

MAX_EVENT = 16 * 1024 * 1024
"""Bytes of one journaled event; larger ones were never relayed."""


class Bookkeeper:
    """Looks after the reservations.

    Args:
        accounts: where they are.
        sessions: whose they are.
        journal: what was relayed.
        workers: who lives.
        settler: counts and books.
    """

    def __init__(
        self,
        accounts: AccountStore,
        sessions: SessionStore,
        journal: JournalStore,
        workers: WorkerStore,
        settler: Settler,
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._journal = journal
        self._workers = workers
        self._settler = settler
        self._absent: dict[str, int] = {}

    async def run(self, running: Callable[[], Sequence[Reservation]]) -> NoReturn:
        """Look after them until cancelled; ``running`` tells those of this worker."""
        while True:
            await asyncio.sleep(ROUND * random.uniform(0.75, 1.0))  # noqa: S311 - jitter is no secret
            try:
                await self._accounts.hold(running())
                for orphan in await self._accounts.orphans(AT_ONCE):
                    await self._look_after(orphan)
            except StoreUnavailable:
                self._absent.clear()

    async def _look_after(self, orphan: Reservation) -> None:
        session = await self._sessions.describe(orphan.session_id)
        if session is None or session.token != orphan.token:
            # The claim was never made, or was another's; a session that is gone was settled while it was there.
            await self._accounts.release(orphan.token, orphan.client)
        elif session.state in ENDED:
            await self._settle(orphan, session)
        elif await self._is_dead(session.worker):
            await self._sessions.lose(
                orphan.session_id,
                session.worker,
                error=error_data(WorkerLost()),
                cancelled=cancelled_unseen(None),
            )

    async def _is_dead(self, worker: str) -> bool:
        if worker not in await self._workers.absent([worker]):
            self._absent.pop(worker, None)
            return False
        self._absent[worker] = self._absent.get(worker, 0) + 1
        return self._absent[worker] > ABSENT_ROUNDS

    async def _settle(self, orphan: Reservation, session: Described) -> None:
        answer = await self._read(orphan.session_id)
        spent = await self._settler.count(
            answer, model=session.model, prompt_tokens=session.prompt_tokens, asked=True
        )
        await self._settler.settle(orphan, spent, session.state)
        log.warning("settled for a dead worker", session=short(orphan.session_id), estimated=spent.estimated)
        if spent.estimated:
            self._settler.correct(orphan, answer.generation_id, session.state)

    async def _read(self, session_id: str) -> Answer:
        """What the journal tells of an answer."""
        answer, decoder, after = Answer(), Decoder(MAX_EVENT), 0
        while batches := await self._journal.read(session_id, after):
            for batch in batches:
                try:
                    for frame in decoder.feed(batch.events):
                        answer.read(frame.data)
                except (UpstreamError, EventTooLarge):
                    return answer
            after = batches[-1].last
        return answer
