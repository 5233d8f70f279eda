"""The journal is written in time and in batches, and the events that wait for Redis in memory are limited."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from random import Random
from typing import TYPE_CHECKING, cast

import pytest

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.core.session import State
from broker.relay.feed import Feed
from broker.relay.journal_writer import (
    ASK_AFTER,
    MAX_SESSIONS,
    MAX_WRITE,
    REGISTER_AGAIN,
    SLOT,
    TICK,
    JournalWriter,
)
from broker.store.journal import Append, Appended
from tests.clock import Clock, run_ready_tasks
from tests.relay.fakes import cancel

if TYPE_CHECKING:
    from broker.relay.generation import Generation
    from broker.store.journal import JournalStore

KIB = 1024


class Holder:
    """What the journal writer sees of a generation."""

    session_id = "0123456789"

    def __init__(self, feed: Feed) -> None:
        self.feed = feed


def holding(size: int) -> Generation:
    """A generation whose events, of so many bytes, are not in Redis."""
    feed = Feed()
    for n in range(1, 5):
        feed.add(Batch(n, n, b"x" * (size // 4)), 0.0)
    return cast("Generation", Holder(feed))


@pytest.fixture
async def writer(monkeypatch: pytest.MonkeyPatch) -> JournalWriter:
    monkeypatch.setattr("broker.relay.journal_writer.MAX_PENDING_BYTES", 100 * KIB)
    return JournalWriter(cast("JournalStore", None), interval=0.5)


async def test_running_and_ended_generations_share_one_bound(writer: JournalWriter) -> None:
    running, ended = holding(60 * KIB), holding(60 * KIB)
    writer.add(running)
    writer.keep_pending(ended)
    assert running.feed.size + ended.feed.size <= 100 * KIB


async def test_the_largest_gives_way_first(writer: JournalWriter) -> None:
    small, large = holding(20 * KIB), holding(90 * KIB)
    writer.keep_pending(small)
    writer.keep_pending(large)
    assert (small.feed.size, large.feed.size) == (20 * KIB, 0)


async def test_many_ended_generations_stay_within_the_bound(writer: JournalWriter) -> None:
    ended = [holding(8 * KIB) for _ in range(50)]
    for generation in ended:
        writer.keep_pending(generation)
    assert sum(generation.feed.size for generation in ended) <= 100 * KIB


async def test_an_end_that_was_written_counts_no_more(writer: JournalWriter) -> None:
    first, second = holding(90 * KIB), holding(90 * KIB)
    writer.keep_pending(first)
    writer.release_pending(first)
    writer.keep_pending(second)
    assert (first.feed.size, second.feed.size) == (90 * KIB, 90 * KIB)


# Writing


class FakeGeneration:
    """A running generation whose events come from the test.

    Attributes:
        cancelled: how often it was cancelled.
        elsewhere: the notes on viewers of other workers.
    """

    def __init__(self, session_id: str = "session") -> None:
        self.session_id = session_id
        self.claim_id = "claim"
        self.feed = Feed()
        self.saved = 0
        self.watched_elsewhere = False
        self.cancelled = 0
        self.elsewhere: list[bool] = []

    def add(self, count: int = 1, size: int = 10) -> None:
        for _ in range(count):
            n = self.feed.last + 1
            self.feed.add(Batch(n, n, b"x" * size), 0.0)

    def unsaved(self, limit: int) -> Batch:
        return self.feed.unsaved(self.saved, limit)

    def has_unsaved(self) -> bool:
        return self.saved < self.feed.last

    def cancel(self) -> None:
        self.cancelled += 1

    def note_elsewhere(self, *, watched: bool) -> None:
        self.watched_elsewhere = watched
        self.elsewhere.append(watched)


class FakeStore:
    """Takes every batch, unless the test says otherwise.

    Attributes:
        calls: sessions and numbers of events of every round trip.
        answers: what is answered for a session in place of that; None is a refusal.
        away: Redis cannot be reached.
        never: is waited for, if it is set here.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, tuple[int, int]]] = []
        self.answers: dict[str, Appended | None] = {}
        self.away = False
        self.never: asyncio.Event | None = None

    async def append(self, appends: list[Append]) -> list[Appended | None]:
        if self.never is not None:
            await self.never.wait()
        if self.away:
            raise StoreUnavailable
        self.calls.append({each.session_id: (each.batch.first, each.batch.last) for each in appends})
        taken = {each.session_id: Appended(State.RUNNING, each.batch.last) for each in appends}
        return [(taken | self.answers)[each.session_id] for each in appends]


class Writing:
    """A journal writer that runs by the clock of the test.

    Attributes:
        lost: sessions that were found to be another worker's.
        error: is raised when that is found.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = FakeStore()
        self.writer = JournalWriter(
            cast("JournalStore", self.store), interval=INTERVAL, clock=self.clock, pause=self.clock.pause
        )
        self.lost: list[str] = []
        self.error: Exception | None = None

    async def on_session_lost(self, generation: Generation) -> None:
        self.lost.append(generation.session_id)
        if self.error is not None:
            raise self.error

    def start(self, session_id: str = "session") -> FakeGeneration:
        """A generation that is journaled from now on."""
        generation = FakeGeneration(session_id)
        self.writer.add(cast("Generation", generation))
        return generation

    def written(self, session_id: str = "session") -> list[tuple[int, int]]:
        """The events of a session in each round trip that had some."""
        batches = [call[session_id] for call in self.store.calls if session_id in call]
        return [(first, last) for first, last in batches if last >= first]


INTERVAL = 0.5
WHOLE_ROUND = INTERVAL + 3 * SLOT
"""Seconds within which every slot has had its turn."""


@pytest.fixture
async def writing() -> AsyncIterator[Writing]:
    writing = Writing()
    task = asyncio.create_task(writing.writer.run(writing))
    await run_ready_tasks()
    yield writing
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_events_are_written_within_the_interval_and_once(writing: Writing) -> None:
    generation = writing.start()
    generation.add(3)
    await writing.clock.advance(WHOLE_ROUND)
    assert writing.written() == [(1, 3)]
    assert (generation.saved, generation.has_unsaved()) == (3, False)
    generation.add()
    await writing.clock.advance(WHOLE_ROUND)
    assert writing.written() == [(1, 3), (4, 4)]


@pytest.mark.parametrize("seed", range(30))
async def test_no_session_waits_longer_than_the_interval(writing: Writing, seed: int) -> None:
    """However suddenly their number changes: the turns of few sessions have many slots, those of many have few."""
    random = Random(seed)
    sessions: list[FakeGeneration] = []
    unsaved_since: dict[FakeGeneration, float] = {}
    for _ in range(12):
        while sessions and random.random() < 0.5:
            for _ in range(random.randint(1, len(sessions))):
                gone = sessions.pop(random.randrange(len(sessions)))
                writing.writer.remove(cast("Generation", gone))
                unsaved_since.pop(gone, None)
        burst = random.choice((0, 1, 5, 40, 300))
        sessions += [writing.start(f"{seed}-{random.random()}") for _ in range(burst)]
        for _ in range(random.randint(1, 30)):
            for generation in sessions:
                if not generation.has_unsaved():
                    unsaved_since[generation] = writing.clock()
                    generation.add()
            await writing.clock.advance(TICK)
            for generation in sessions:
                waited = writing.clock() - unsaved_since[generation]
                assert not generation.has_unsaved() or waited <= INTERVAL + 2 * TICK


async def test_a_new_session_is_asked_about_in_its_first_round(writing: Writing) -> None:
    writing.start()
    await writing.clock.advance(WHOLE_ROUND)
    assert len(writing.store.calls) == 1, "so that its prompt leaves Redis"


async def test_a_silent_session_is_asked_about_once_a_second(writing: Writing) -> None:
    writing.start()
    await writing.clock.advance(WHOLE_ROUND)
    for asked in range(2, 5):
        await writing.clock.advance(ASK_AFTER + WHOLE_ROUND)
        assert len(writing.store.calls) >= asked
    assert len(writing.store.calls) <= 10


async def test_an_urgent_session_is_written_at_the_next_tick(writing: Writing) -> None:
    generation = writing.start()
    await writing.clock.advance(WHOLE_ROUND)
    generation.add()
    writing.writer.flush_soon(cast("Generation", generation))
    await writing.clock.advance(TICK)
    assert writing.written() == [(1, 1)]


async def test_a_removed_session_is_not_written(writing: Writing) -> None:
    generation = writing.start()
    writing.writer.remove(cast("Generation", generation))
    writing.writer.flush_soon(cast("Generation", generation))
    generation.add()
    await writing.clock.advance(WHOLE_ROUND)
    assert writing.store.calls == []


async def test_a_session_that_was_written_and_removed_is_freed(writing: Writing) -> None:
    generation = writing.start()
    generation.add()
    while not writing.written():
        await writing.clock.advance(TICK)
    writing.writer.remove(cast("Generation", generation))
    kept = weakref.ref(generation)
    del generation
    assert kept() is None


async def test_many_sessions_take_several_round_trips(writing: Writing) -> None:
    sessions = [writing.start(str(n)) for n in range(MAX_SESSIONS + 1)]
    for generation in sessions:
        generation.add()
        writing.writer.flush_soon(cast("Generation", generation))
    await writing.clock.advance(TICK)
    assert sorted(len(call) for call in writing.store.calls) == [1, MAX_SESSIONS]


async def test_a_long_backlog_is_written_in_parts(writing: Writing) -> None:
    generation = writing.start()
    generation.add(3, size=MAX_WRITE)
    await writing.clock.advance(WHOLE_ROUND)
    assert writing.written() == [(1, 1), (2, 2), (3, 3)]


async def test_events_of_an_outage_are_written_when_redis_is_back(writing: Writing) -> None:
    generation = writing.start()
    writing.store.away = True
    generation.add()
    await writing.clock.advance(WHOLE_ROUND)
    generation.add()
    writing.store.away = False
    await writing.clock.advance(WHOLE_ROUND)
    assert writing.written() == [(1, 2)]


async def test_nothing_is_written_behind_a_gap(writing: Writing) -> None:
    generation = writing.start()
    generation.add(2)
    generation.feed.trim(1, keep=0)  # memory was short while Redis was away
    generation.feed.skip_to(2)
    generation.add()
    await writing.clock.advance(WHOLE_ROUND)
    assert writing.written() == []


async def test_a_cancel_in_the_answer_stops_the_generation(writing: Writing) -> None:
    generation = writing.start()
    writing.store.answers["session"] = Appended(State.RUNNING, 0, cancel=True)
    await writing.clock.advance(WHOLE_ROUND)
    assert generation.cancelled == 1


async def test_viewers_elsewhere_are_noted(writing: Writing) -> None:
    generation = writing.start()
    writing.store.answers["session"] = Appended(State.RUNNING, 0, watched=1)
    await writing.clock.advance(WHOLE_ROUND)
    assert generation.elsewhere == [True]
    writing.store.answers.clear()
    await writing.clock.advance(ASK_AFTER + WHOLE_ROUND)
    assert generation.elsewhere[-1] is False


async def test_after_an_outage_viewers_have_time_to_register_again(writing: Writing) -> None:
    generation = writing.start()
    writing.writer.suspend_watch_expiry()
    await writing.clock.advance(WHOLE_ROUND)
    assert generation.elsewhere == []
    await writing.clock.advance(REGISTER_AGAIN + ASK_AFTER)
    assert generation.elsewhere[-1] is False


async def test_a_lost_session_is_reported_to_the_owner(writing: Writing) -> None:
    generation = writing.start()
    writing.store.answers["session"] = Appended(State.LOST, 0)
    await writing.clock.advance(WHOLE_ROUND)
    assert writing.lost == ["session"]
    assert generation.elsewhere == []


async def test_a_bug_with_one_session_does_not_affect_others(writing: Writing) -> None:
    writing.error = ValueError("a bug")
    broken, fine = writing.start("broken"), writing.start("fine")
    writing.store.answers["broken"] = Appended(State.LOST, 0)
    for generation in (broken, fine):
        generation.add()
        writing.writer.flush_soon(cast("Generation", generation))
    await writing.clock.advance(TICK)
    assert (writing.lost, fine.saved) == (["broken"], 1)


async def test_a_refused_session_is_not_asked_about_at_every_tick(writing: Writing) -> None:
    writing.start()
    writing.store.answers["session"] = None
    await writing.clock.advance(WHOLE_ROUND)
    assert len(writing.store.calls) == 1


@pytest.mark.parametrize(("answer", "confirmed"), [("taken", True), ("refused", False), ("away", False)])
async def test_a_confirmation_says_whether_redis_answered(answer: str, confirmed: bool) -> None:
    writing = Writing()
    generation = cast("Generation", writing.start())
    writing.store.away = answer == "away"
    if answer == "refused":
        writing.store.answers["session"] = None
    asking = asyncio.create_task(writing.writer.confirm([generation], writing))
    await writing.clock.advance(TICK)
    assert await asking is confirmed


@pytest.mark.parametrize("at", ["without sessions", "pause", "append"])
async def test_the_writer_can_be_cancelled_at_each_await(at: str) -> None:
    writing = Writing()
    if at != "without sessions":
        writing.start().add()
    if at == "append":
        writing.store.never = asyncio.Event()
    task = asyncio.create_task(writing.writer.run(writing))
    await writing.clock.advance(WHOLE_ROUND if at == "append" else 0)
    await cancel(task)
