"""The hub finds or claims the session that a viewer asks for, and cancels sessions, wherever they run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import pytest
import pytest_asyncio

from broker.core.errors import (
    AlreadyClaimed,
    Draining,
    NotYetClaimed,
    Overloaded,
    SessionExpired,
    SessionNotFound,
    StoreUnavailable,
)
from broker.core.replay import read_on
from broker.core.session import START, Cursor, State
from broker.relay.finishing import ALL
from broker.relay.generation import Generation
from broker.relay.hub import Cancelled
from broker.relay.mirror import Mirror
from broker.store.buckets import account_of
from broker.store.connection import Store
from tests.clock import run_ready_tasks
from tests.money import open_reservations, slots, until
from tests.relay.fakes import DONE, FINISH, HELLO, PREPARED, RESERVATION, watched
from tests.relay.workers import FakeWorker, running_worker

if TYPE_CHECKING:
    from broker.relay.viewer import Viewer


@pytest_asyncio.fixture
async def here(store: Store) -> AsyncIterator[FakeWorker]:
    async with running_worker(store) as worker:
        yield worker


@pytest_asyncio.fixture
async def elsewhere(store: Store) -> AsyncIterator[FakeWorker]:
    async with running_worker(store) as worker:
        yield worker


# Finding


async def test_a_prepared_session_is_claimed_once(here: FakeWorker, elsewhere: FakeWorker) -> None:
    session = await here.prepare()
    found = await asyncio.gather(
        *(worker.hub.find(session, None) for worker in (here, elsewhere) for _ in range(5))
    )
    generations = {source for source in found if isinstance(source, Generation)}
    assert len(generations) == 1
    assert all(isinstance(source, Generation | Mirror) for source in found)
    assert len(here.upstream.requests) + len(elsewhere.upstream.requests) == 1


async def test_a_running_or_finished_session_of_this_worker_is_found(here: FakeWorker) -> None:
    generation = await here.start()
    assert await here.hub.find(generation.session_id, None) is generation
    here.streams[0].send(HELLO, FINISH, DONE, None)
    await generation.ended()
    found = await here.hub.find(generation.session_id, Cursor(1, 1))
    assert found.feed.end == generation.feed.end is not None
    assert found.feed.after(0, ALL) == generation.feed.after(0, ALL)
    assert found.prepared_by == generation.prepared_by


async def test_a_session_of_another_worker_is_mirrored_once(here: FakeWorker, elsewhere: FakeWorker) -> None:
    generation = await elsewhere.start()
    found = [await here.hub.find(generation.session_id, cursor) for cursor in (None, START)]
    assert isinstance(found[0], Mirror)
    assert found[0] is found[1]
    assert found[0].worker == elsewhere.id


async def test_a_cursor_never_claims(here: FakeWorker) -> None:
    session = await here.prepare()
    with pytest.raises(NotYetClaimed):
        await here.hub.find(session, START)
    assert here.upstream.requests == []


@pytest.mark.parametrize(("cursor", "error"), [(None, SessionNotFound), (START, SessionExpired)])
async def test_an_unknown_session_is_not_found_or_expired(
    here: FakeWorker, cursor: Cursor | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await here.hub.find(str(uuid4()), cursor)


async def test_a_full_worker_starts_nothing_more(store: Store) -> None:
    async with running_worker(store, max_streams=1) as full:
        generation = await full.start()
        with pytest.raises(Overloaded):
            await full.start()
        assert await full.hub.find(generation.session_id, None) is generation


async def test_a_draining_worker_serves_only_what_runs_on_it(here: FakeWorker, elsewhere: FakeWorker) -> None:
    own, foreign = await here.start(), await elsewhere.start()
    prepared = await here.prepare()
    here.worker.draining = True
    for session in (prepared, foreign.session_id):
        with pytest.raises(Draining):
            await here.hub.find(session, None)
    assert await here.hub.find(own.session_id, None) is own


async def test_without_resuming_a_session_streams_once(store: Store) -> None:
    async with running_worker(store, resume_ttl=0) as here, running_worker(store, resume_ttl=0) as elsewhere:
        generation = await here.start()
        with watched(generation):
            for worker in (here, elsewhere):
                with pytest.raises(AlreadyClaimed):
                    await worker.hub.find(generation.session_id, None)


async def test_without_redis_a_page_is_asked_to_come_again(tmp_path: Path) -> None:
    away = FakeWorker(Store(f"unix://{tmp_path}/none", "test"))
    for cursor in (None, START):
        with pytest.raises(StoreUnavailable):
            await away.hub.find(str(uuid4()), cursor)
    await away.worker.close()


# Watching


async def test_a_viewer_counts_while_it_watches(here: FakeWorker) -> None:
    generation = await here.start()
    viewer = cast("Viewer", object())
    here.hub.add_viewer(generation, viewer)
    assert here.worker.viewers == {viewer}
    assert generation.was_watched
    assert generation._viewers == 1
    here.hub.remove_viewer(generation, viewer)
    assert generation._viewers == 0
    assert here.worker.viewers == set()


async def test_the_journal_is_read_after_an_event(here: FakeWorker) -> None:
    generation = await here.start()
    here.streams[0].send(HELLO, HELLO, HELLO)
    await until(lambda: asyncio.sleep(0, generation.saved == 3), within=20)
    batches = await here.hub.read_journal(generation.session_id, 1)
    assert read_on(batches, 1) == (generation.feed.after(1, 10_000).events, 3)


async def test_the_journal_of_an_unknown_session_is_unavailable(here: FakeWorker) -> None:
    with pytest.raises(StoreUnavailable):
        await here.hub.read_journal(str(uuid4()), 0)


# Cancelling

STOPPED = Cancelled(State.CANCELLED, accepted=True)


async def test_cancelling_a_prepared_session_frees_its_place(here: FakeWorker, store: Store) -> None:
    session = await here.prepare()
    assert await here.hub.cancel(session) == STOPPED
    assert await store.redis.zcard(account_of(store, PREPARED.client).key("pending")) == 0
    assert isinstance(await here.hub.find(session, None), Mirror), "it tells of the cancel"
    assert here.upstream.requests == []


async def test_cancelling_a_session_here_stops_it_at_once(here: FakeWorker, store: Store) -> None:
    generation = await here.start()
    assert await here.hub.cancel(generation.session_id) == STOPPED
    assert generation.state is State.CANCELLED
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_cancelling_a_session_elsewhere_stops_it(here: FakeWorker, elsewhere: FakeWorker) -> None:
    generation = await elsewhere.start()
    assert await here.hub.cancel(generation.session_id) == STOPPED
    assert await generation.ended() is State.CANCELLED


@pytest.mark.parametrize("by", ["owner", "other"])
async def test_cancelling_a_finished_session_returns_its_state(
    here: FakeWorker, elsewhere: FakeWorker, by: str
) -> None:
    generation = await here.start()
    here.streams[0].send(HELLO, FINISH, DONE, None)
    await generation.ended()
    hub = here.hub if by == "owner" else elsewhere.hub
    assert await hub.cancel(generation.session_id) == Cancelled(State.DONE, accepted=False)


async def test_cancelling_an_unknown_session_is_an_error(here: FakeWorker) -> None:
    with pytest.raises(SessionNotFound):
        await here.hub.cancel(str(uuid4()))


async def test_without_redis_only_the_owner_can_cancel(tmp_path: Path) -> None:
    away = FakeWorker(Store(f"unix://{tmp_path}/none", "test"))
    generation = away.worker.start_generation(RESERVATION.session_id, RESERVATION, PREPARED)
    assert await away.hub.cancel(generation.session_id) == STOPPED
    with pytest.raises(StoreUnavailable):
        await away.hub.cancel(str(uuid4()))
    await away.worker.close()


async def test_a_viewer_that_leaves_does_not_stop_the_claim(here: FakeWorker) -> None:
    session = await here.prepare()
    leaving: asyncio.Task[Any] = asyncio.create_task(here.hub.find(session, None))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert isinstance(await here.hub.find(session, None), Generation)
    assert len(here.upstream.requests) == 1


# Redis is another server than before


async def test_a_prepared_session_is_retried_while_claims_pause(
    here: FakeWorker, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await here.prepare()
    seconds, micros = await store.redis.time()
    monkeypatch.setattr(here.worker.redis, "claims_paused_since", _since(seconds * 1000 + micros // 1000 + 1))
    with pytest.raises(StoreUnavailable):
        await here.hub.find(before, None)
    assert here.upstream.requests == []


async def test_while_claims_pause_a_session_prepared_since_is_claimed(
    here: FakeWorker, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot have been claimed on the server of before."""
    seconds, _ = await store.redis.time()
    monkeypatch.setattr(here.worker.redis, "claims_paused_since", _since(seconds * 1000))
    assert isinstance(await here.hub.find(await here.prepare(), None), Generation)


async def test_while_claims_pause_a_running_session_is_followed(
    here: FakeWorker, elsewhere: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = await elsewhere.start()
    monkeypatch.setattr(here.worker.redis, "claims_paused_since", _since(2**53))
    assert isinstance(await here.hub.find(generation.session_id, None), Mirror)


async def test_claims_at_once_keep_to_the_streams_of_a_worker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them may first have to find out whether the server is a new one."""
    asked = asyncio.Event()

    async def not_paused() -> None:
        await asked.wait()

    async with running_worker(store, max_streams=1) as worker:
        monkeypatch.setattr(worker.worker.redis, "claims_paused_since", not_paused)
        sessions = [await worker.prepare() for _ in range(3)]
        finding = [asyncio.create_task(worker.hub.find(session, None)) for session in sessions]
        await run_ready_tasks()
        asked.set()
        found = await asyncio.gather(*finding, return_exceptions=True)
        assert sum(isinstance(source, Generation) for source in found) == 1
        assert sum(isinstance(source, Overloaded) for source in found) == 2


def _since(ms: int) -> Callable[[], Awaitable[int]]:
    async def paused_since() -> int:
        return ms

    return paused_since
