"""Whole workers on a real server, before an upstream that a test writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import uuid4

from broker.core.accounts import Quotas
from broker.core.bytes_per_token import Sample
from broker.relay.config import GenerationLimits, Money, WorkerConfig
from broker.relay.generation import Generation
from broker.relay.hub import Hub
from broker.relay.worker import Worker
from broker.store.accounts import AccountStore
from broker.store.connection import Store
from broker.store.journal import JournalStore
from broker.store.pending import PendingStore
from broker.store.sessions import SessionStore
from broker.store.workers import WorkerStore
from tests.clock import Clock
from tests.relay.fakes import PREPARED, FakeStream, FakeUpstream

FREE = Quotas(pending=1000, streams=10_000, daily_tokens=0, daily_cost=0, total_daily_cost=0)
LIMITS = GenerationLimits(
    first_data_timeout=120, idle_timeout=60, deadline=600, grace=60, max_response=100_000, max_retries=0
)
RUNNING_TTL = 960


class FakeWorker:
    """A worker and its hub, with one stream of the upstream for each generation.

    Attributes:
        streams: of the generations, in the order in which they ask.
        samples, speeds: what was learned.
    """

    def __init__(self, store: Store, *, resume_ttl: int = 300, max_streams: int = 10) -> None:
        self.id = str(uuid4())
        self.streams = [FakeStream() for _ in range(10)]
        self.samples: list[Sample] = []
        self.speeds: list[Sample] = []
        self.sessions = SessionStore(store, session_ttl=600, running_ttl=RUNNING_TTL, resume_ttl=resume_ttl)
        self.accounts = AccountStore(store, FREE)
        self.journal = JournalStore(store, worker=self.id, running_ttl=RUNNING_TTL)
        self.upstream = FakeUpstream(Clock(), *self.streams)
        self.worker = Worker(
            sessions=self.sessions,
            journal=self.journal,
            workers=WorkerStore(store, worker=self.id),
            upstream=cast("Any", self.upstream),
            limits=LIMITS,
            accounts=self.accounts,
            money=Money(
                prices_of=_unknown,
                has_prices=lambda: True,
                name_of=lambda model: model,
                fetch_generation=_unknown,
                keeps_records=lambda: False,
                learn=self._note(self.samples),
                speed_of=_unknown,
                learn_speed=self._note(self.speeds),
            ),
            config=WorkerConfig(
                max_streams=max_streams,
                session_ttl=600,
                running_ttl=RUNNING_TTL,
                resume_ttl=resume_ttl,
                journal_interval=0.05,
            ),
        )
        self.pending = PendingStore(store, FREE, session_ttl=600)
        self.hub = Hub(
            self.worker,
            sessions=self.sessions,
            journal=self.journal,
            accounts=self.accounts,
            pending=self.pending,
        )

    @staticmethod
    def _note(samples: list[Sample]) -> Callable[[Sample], Any]:
        async def learn(sample: Sample) -> None:
            samples.append(sample)

        return learn

    async def prepare(self) -> str:
        """A new session, which counts as pending."""
        session_id = str(uuid4())
        await self.pending.admit(PREPARED.client, session_id, PREPARED.worst)
        await self.sessions.prepare(session_id, PREPARED)
        return session_id

    async def start(self) -> Generation:
        """A generation of a new session."""
        found = await self.hub.find(await self.prepare(), None)
        assert isinstance(found, Generation)
        return found


async def _unknown(_: object) -> None:
    return None


@asynccontextmanager
async def running_worker(store: Store, **options: Any) -> AsyncIterator[FakeWorker]:
    """Run a worker until the block ends, and take it down without time to finish."""
    worker = FakeWorker(store, **options)
    worker.worker.start()
    try:
        yield worker
        await worker.worker.drain(0)
    finally:
        await worker.worker.close()
