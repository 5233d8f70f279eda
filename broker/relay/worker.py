"""This worker: its generations, its background tasks, and its shutdown.

It starts generations and owns their tasks. `relay.hub` decides which session a viewer gets.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.result import Transcript
from broker.core.session import short
from broker.relay.finished import FinishedSession
from broker.relay.finished_cache import FinishedCache
from broker.relay.generation import Generation
from broker.relay.journal_writer import JournalWriter
from broker.relay.late_ends import LateEnds
from broker.relay.mirror import Mirrors
from broker.relay.ownership import Ownership
from broker.relay.reaper import Reaper
from broker.relay.redis_watch import RedisWatch
from broker.relay.reports import ignore, report_end
from broker.relay.settlement import Settlement
from broker.relay.tasks import Tasks
from broker.telemetry.interface import NO_TELEMETRY

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.core.session_report import SessionReport
    from broker.relay.config import GenerationLimits, Money, WorkerConfig
    from broker.relay.results import Results
    from broker.relay.viewer import Viewer
    from broker.store.accounts import AccountStore, Reservation
    from broker.store.journal import JournalStore
    from broker.store.sessions import Prepared, SessionStore
    from broker.store.workers import Notification, WorkerStore
    from broker.telemetry.interface import SessionTrace, Telemetry
    from broker.upstream.client import UpstreamClient

log = structlog.get_logger(__name__)

LISTEN_AGAIN = 0.5
"""Seconds before a broken subscription is made again."""

FINISHED_FOR = 10.0
"""Seconds that a finished session is known here where resuming is off: a failover of Redis may forget its claim, and it
must not be claimed again."""

SHUTDOWN_TIMEOUT = 3.0
"""Seconds for stopped generations to write their ends."""


class Worker:
    """The generations and the background tasks of this worker.

    Args:
        sessions: the states of sessions in Redis.
        journal: the events of sessions in Redis.
        workers: the workers in Redis; knows the id of this one.
        upstream: the model service.
        limits: the limits of each generation.
        accounts: slots, budgets and the usage ledger.
        money: functions that know about money.
        config: the limits of this worker.
        results: passes the result of each answer to an application; None where it wants none.
        count: is called with the report of every session that ended.
        note_gap: is called with the seconds between two reads of chunks of one answer.
        telemetry: makes the spans of sessions.
        clock: seconds that only go forward; by default the event loop's.

    Attributes:
        draining: nothing new is started.
        replaced: nothing new is started because another worker of this host takes it.
        ending: `drain` has begun.
        running: the generations that run here, by session id.
        finished: sessions that ended here a short while ago.
        viewers: all viewers of this worker.
        mirrors: sessions of other workers that are watched here.
        redis: what has become of Redis.
        tasks: owns the tasks of this worker.
        config: as given.
        clock: of the generations that are started from now on.
    """

    def __init__(
        self,
        *,
        sessions: SessionStore,
        journal: JournalStore,
        workers: WorkerStore,
        upstream: UpstreamClient,
        limits: GenerationLimits,
        accounts: AccountStore,
        money: Money,
        config: WorkerConfig,
        results: Results | None = None,
        count: Callable[[SessionReport], None] = ignore,
        note_gap: Callable[[float], None] = ignore,
        telemetry: Telemetry = NO_TELEMETRY,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.draining = self.replaced = self.ending = False
        self.running: dict[str, Generation] = {}
        self.finished = FinishedCache(config.resume_ttl or FINISHED_FOR)
        self.viewers: set[Viewer] = set()
        self.tasks = Tasks()
        self.config = config
        self.clock = clock or asyncio.get_running_loop().time
        self._sessions = sessions
        self._workers = workers
        self._upstream = upstream
        self._limits = limits
        self._results = results
        self._report = partial(report_end, count=count)
        self._note_gap = note_gap
        self._telemetry = telemetry
        self._learn, self._learn_speed = money.learn, money.learn_speed
        self._settlement = Settlement(accounts, money, spawn=self.tasks.spawn_extra, clock=self.clock)
        self.redis = RedisWatch(workers)
        self._journal = JournalWriter(journal, interval=config.journal_interval, clock=self.clock)
        self._late_ends = LateEnds(
            self.finished, self.redis, self._journal, spawn=self.tasks.spawn, clock=self.clock
        )
        self._ownership = Ownership(
            self.running,
            self.finished,
            worker=workers.worker,
            sessions=sessions,
            accounts=accounts,
            reads=journal,
            writes=self._journal,
            redis=self.redis,
            resuming=config.resume_ttl > 0,
            spawn=self.tasks.spawn,
        )
        self._reaper = Reaper(
            accounts,
            sessions,
            journal,
            self._settlement,
            count=count,
            telemetry=telemetry,
            same_since=self.redis.same_since,
        )
        self.mirrors = Mirrors(journal, self.redis.is_gone, self.viewers)

    @property
    def id(self) -> str:
        """The id of this worker in Redis."""
        return self._workers.worker

    @property
    def journal(self) -> JournalWriter:
        """Writes the journals of this worker."""
        return self._journal

    @property
    def leases_lost(self) -> int:
        """Sessions that were taken from this worker so far."""
        return self._ownership.lost

    def start(self) -> None:
        """Start the background tasks of this worker."""
        self.tasks.keep_running(
            {
                "redis": self.redis.run,
                "notifications": self._listen,
                "rewriting": self._ownership.run_rewriting,
                "journal": partial(self._journal.run, self._ownership),
                "mirrors": self.mirrors.run,
                "renewals": partial(self._reaper.run_renewals, self._reservations),
                "reaper": self._reaper.run,
            }
        )

    def open_ahead(self) -> None:
        """Begin to open a connection to the upstream: a generation is likely to start at once."""
        self._upstream.open_ahead()

    def start_generation(self, session_id: str, reservation: Reservation, prepared: Prepared) -> Generation:
        """Start the generation of a session that was claimed here."""
        trace = self._telemetry.session(session_id, prepared.model, prepared.trace)
        try:
            generation = self._new_generation(session_id, reservation, prepared, trace)
        except Exception:
            trace.end(None)
            raise
        self.running[session_id] = generation
        self._journal.add(generation)
        task = generation.start()
        task.add_done_callback(lambda _: self._ended(generation))
        self.tasks.adopt(task)
        return generation

    def _new_generation(
        self, session_id: str, reservation: Reservation, prepared: Prepared, trace: SessionTrace
    ) -> Generation:
        return Generation(
            session_id,
            reservation,
            prepared,
            upstream=self._upstream,
            sessions=self._sessions,
            limits=self._limits,
            settlement=self._settlement,
            journal=self._journal if self.config.resume_ttl > 0 else None,
            ownership=self._ownership,
            write_later=self._late_ends.add,
            clock=self.clock,
            transcript=Transcript() if self._results is not None else None,
            report=self._report,
            note_gap=self._note_gap,
            trace=trace,
        )

    def check(self, now: float) -> None:
        """Check the timers of every generation, and drop finished ones whose time is over."""
        self._ownership.tick(now)
        for generation in tuple(self.running.values()):
            if now < generation.check_at:
                continue
            try:
                generation.check(now)
            except Exception:  # the timers of the others must go on
                log.exception("timers cannot be checked", session=short(generation.session_id))
        self.finished.expire(now)

    async def drain(self, timeout: float) -> None:
        """Start nothing new, let generations finish for ``timeout`` seconds, and end the rest."""
        self.ending = True
        await self._finish(timeout)
        for generation in tuple(self.running.values()):
            generation.shut_down()
        await self.tasks.finish(SHUTDOWN_TIMEOUT)

    async def leave(self, timeout: float) -> None:
        """Leave everything new to another worker, and let generations finish for ``timeout`` seconds."""
        self.replaced = True
        await self._finish(timeout)

    async def _finish(self, timeout: float) -> None:
        self.draining = True
        self.mirrors.release_viewers()
        await self.tasks.finish(timeout)

    async def close(self) -> None:
        """Cancel the tasks that are left."""
        await self.tasks.close()

    def _reservations(self) -> list[Reservation]:
        running = (generation.reservation for generation in self.running.values())
        return list({each.claim_id: each for each in (*running, *self._late_ends.reservations())}.values())

    def _ended(self, generation: Generation) -> None:
        generation.trace.end(None)  # does nothing after an end; else this worker was closed before it
        self.running.pop(generation.session_id, None)
        self._journal.remove(generation)
        end = generation.feed.end
        if end is not None and generation.wrote_its_end:
            self.finished.add(FinishedSession(generation, end), self.clock())
        if self._results is not None:
            self._results.take(generation)
        self._learn_from(generation)

    def _learn_from(self, generation: Generation) -> None:
        try:
            sample, speed = generation.finishing.sample(), generation.finishing.speed()
        except Exception:  # answers of upstreams may be odd, and a sample is not important
            log.exception("nothing learned", session=short(generation.session_id))
            return
        if sample is not None:
            self.tasks.spawn_extra(self._learn(sample))
        if speed is not None:
            self.tasks.spawn_extra(self._learn_speed(speed))

    async def _listen(self) -> NoReturn:
        """Take the notifications of this worker, until cancelled."""
        while True:
            try:
                async with aclosing(self._workers.listen()) as notifications:
                    async for notification in notifications:
                        self._on_notification(notification)
            except StoreUnavailable:
                await asyncio.sleep(LISTEN_AGAIN)

    def _on_notification(self, notification: Notification) -> None:
        generation = self.running.get(notification.session_id)
        if notification.kind == "cancel" and generation is not None:
            generation.cancel()
        elif notification.kind == "watched" and generation is not None:
            generation.note_elsewhere(watched=True)
            self._journal.flush_soon(generation)
        elif notification.kind in ("events", "ended"):
            self.mirrors.on_notification(notification.session_id, notification.batch)
