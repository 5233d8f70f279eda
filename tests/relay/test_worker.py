"""A worker starts generations, settles each of them however it ends, and drains and closes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from broker.core.errors import AlreadyClaimed
from broker.core.session import State
from broker.relay.finished import FinishedSession
from broker.relay.finishing import ALL
from broker.relay.generation import Generation
from broker.relay.worker import FINISHED_FOR
from broker.store.connection import Store
from broker.store.workers import Notification
from tests.clock import run_ready_tasks
from tests.money import ledger, open_reservations, slots, until
from tests.relay.fakes import DONE, FINISH, HELLO, BugError, data
from tests.relay.workers import LIMITS, FakeWorker, running_worker

LONG_USAGE = {"prompt_tokens": 100, "completion_tokens": 500, "total_tokens": 600}


@pytest_asyncio.fixture
async def worker(store: Store) -> AsyncIterator[FakeWorker]:
    async with running_worker(store) as worker:
        yield worker


async def finish(worker: FakeWorker, generation: Generation, stream: int = 0) -> None:
    worker.streams[stream].send(HELLO, FINISH, DONE, None)
    await generation.ended()
    await run_ready_tasks()


def is_kept(worker: FakeWorker, generation: Generation) -> bool:
    """Return True if what is left of a generation can be replayed: the same events, and the same end."""
    session = worker.worker.finished.get(generation.session_id)
    if session is None:
        return False
    feed, original = session.feed, generation.feed
    assert (feed.first, feed.last, feed.end) == (original.first, original.last, original.end)
    return feed.after(0, ALL) == original.after(0, ALL)


async def is_settled(store: Store) -> bool:
    """Return True if one request is booked, and neither a slot nor a reservation is left."""
    booked = (await ledger(store.redis)).requests == 1
    return booked and await slots(store.redis) == await open_reservations(store.redis) == 0


async def state_of(worker: FakeWorker, generation: Generation) -> State:
    record = await worker.sessions.describe(generation.session_id)
    assert record is not None
    return record.state


# The life of a generation


async def test_a_generation_runs_and_can_then_be_replayed(worker: FakeWorker, store: Store) -> None:
    generation = await worker.start()
    assert worker.worker.running == {generation.session_id: generation}
    await finish(worker, generation)
    assert worker.worker.running == {}
    assert is_kept(worker, generation)
    assert await state_of(worker, generation) is State.DONE
    assert await is_settled(store)


async def test_without_resuming_nothing_is_journaled_or_kept_long(store: Store) -> None:
    async with running_worker(store, resume_ttl=0) as worker:
        generation = await worker.start()
        await finish(worker, generation)
        assert await store.redis.keys("*events*") == []
        with pytest.raises(AlreadyClaimed):
            await worker.hub.find(generation.session_id, None)
        worker.worker.check(asyncio.get_running_loop().time() + FINISHED_FOR)
        assert worker.worker.finished.values() == []


async def test_a_fenced_session_is_not_cached(worker: FakeWorker) -> None:
    generation = await worker.start()
    generation.fence(None)
    await generation.ended()
    await run_ready_tasks()
    assert worker.worker.finished.get(generation.session_id) is None


async def test_a_finished_session_is_cached_for_its_time(worker: FakeWorker) -> None:
    generation = await worker.start()
    await finish(worker, generation)
    now = asyncio.get_running_loop().time()
    worker.worker.finished.expire(now + 299)
    assert is_kept(worker, generation)
    worker.worker.finished.expire(now + 301)
    assert worker.worker.finished.values() == []


async def test_an_ended_session_is_freed_without_the_collector(worker: FakeWorker) -> None:
    async def is_freed(kind: type[Generation | FinishedSession]) -> bool:
        return not any(isinstance(each, kind) and each.session_id in ids for each in gc.get_objects())

    gc.disable()
    try:
        ids = [await ended(worker, stream) for stream in range(3)]
        # The journal and the background work of the end may still have them for a moment.
        await until(lambda: is_freed(Generation))
        worker.worker.finished.expire(float("inf"))
        await until(lambda: is_freed(FinishedSession))
    finally:
        gc.enable()


async def ended(worker: FakeWorker, stream: int) -> str:
    """Start a generation, and let it end well, fail, or be cancelled. Returns the id of its session."""
    generation = await worker.start()
    if stream == 0:
        worker.streams[stream].send(HELLO, FINISH, DONE, None)
    elif stream == 1:
        worker.streams[stream].send(HELLO, None)
    else:
        generation.cancel()
    await generation.ended()
    await run_ready_tasks()
    return generation.session_id


# Bugs


@pytest.mark.parametrize("part", ["reading", "deciding", "settling", "running"])
async def test_a_bug_in_a_generation_frees_slot_and_reservation(
    worker: FakeWorker, store: Store, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    generation = await worker.start()
    errors = [BugError()]

    async def broken(*args: Any) -> Any:
        for error in errors:
            errors.clear()
            raise error
        return await original(*args)

    original: Any
    if part == "deciding":
        original = generation.finishing.decide
        monkeypatch.setattr(generation.finishing, "decide", broken)
    elif part == "settling":
        original = generation.finishing.settle
        monkeypatch.setattr(generation.finishing, "settle", broken)
    elif part == "running":
        monkeypatch.setattr(Generation, "_end", broken)
    worker.streams[0].send(HELLO, BugError())
    assert await generation.ended() is State.FAILED
    assert generation.feed.end is not None
    assert b'"internal_error"' in generation.feed.end.data
    await until(lambda: is_settled(store), within=20)
    assert await state_of(worker, generation) is State.FAILED
    assert worker.worker.running == {}


async def test_timers_of_others_are_checked_after_a_bug_in_one(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await worker.start(), await worker.start()

    check = Generation.check

    def broken(generation: Generation, now: float) -> None:
        if generation is first:
            raise BugError
        check(generation, now)

    monkeypatch.setattr(Generation, "check", broken)
    monkeypatch.setattr(worker.worker._ownership, "tick", lambda _now: None)  # time seems to jump
    worker.worker.check(asyncio.get_running_loop().time() + LIMITS.deadline)
    assert await second.ended() is State.FAILED
    assert first.state is State.RUNNING


# Samples


async def test_an_answer_gives_a_sample_of_its_models_speed(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = await worker.start()
    monkeypatch.setattr("broker.core.speed.MIN_SECONDS", 0.0)
    worker.streams[0].send(HELLO, FINISH, data({"choices": [], "usage": LONG_USAGE}), DONE, None)
    await generation.ended()
    await run_ready_tasks()
    assert [speed.model for speed in worker.speeds] == ["a/b"]
    assert worker.samples == [], "the prompt was not measured"


async def test_a_bug_while_learning_changes_nothing(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    generation = await worker.start()

    def broken() -> None:
        raise BugError

    monkeypatch.setattr(generation.finishing, "sample", broken)
    await finish(worker, generation)
    assert generation.state is State.DONE
    assert is_kept(worker, generation)
    assert await is_settled(store)


# Notifications


async def test_a_cancel_notification_stops_a_generation(worker: FakeWorker) -> None:
    generation = await worker.start()
    worker.worker._on_notification(Notification("cancel", generation.session_id, None))
    assert await generation.ended() is State.CANCELLED


async def test_a_watched_notification_counts_a_viewer_elsewhere(worker: FakeWorker) -> None:
    generation = await worker.start()
    worker.worker._on_notification(Notification("watched", generation.session_id, None))
    assert generation.watched_elsewhere


@pytest.mark.parametrize("kind", ["cancel", "watched", "events", "ended", "unknown"])
async def test_a_notification_of_an_unknown_session_does_nothing(worker: FakeWorker, kind: str) -> None:
    worker.worker._on_notification(Notification(kind, "unknown", None))


# Drain and close


async def test_a_drain_lets_generations_finish(worker: FakeWorker) -> None:
    generation = await worker.start()
    draining = asyncio.create_task(worker.worker.drain(60))
    await run_ready_tasks()
    assert worker.worker.draining
    assert not draining.done()
    await finish(worker, generation)
    await draining
    assert generation.state is State.DONE


async def test_a_drain_without_time_ends_what_runs(worker: FakeWorker, store: Store) -> None:
    generation = await worker.start()
    await worker.worker.drain(0)
    assert generation.feed.end is not None
    assert b'"server_shutdown"' in generation.feed.end.data
    assert await state_of(worker, generation) is State.FAILED
    assert await is_settled(store)


async def test_close_cancels_what_runs_and_gives_the_lease_back(store: Store) -> None:
    worker = FakeWorker(store)
    worker.worker.start()
    generation = await worker.start()
    await worker.worker.close()
    assert generation.state is State.RUNNING, "another worker will find it"
    assert worker.streams[0].closed.is_set()
    assert await store.redis.keys(f"*{worker.id}*") == []
