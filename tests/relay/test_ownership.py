"""A worker writes its sessions again if it knows more than Redis, and stops those of another worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import pytest
import pytest_asyncio

from broker.core.accounts import Usage
from broker.core.replay import Batch, read_on
from broker.core.session import Cursor, State, Terminal
from broker.relay.feed import Feed
from broker.relay.finished_cache import FinishedCache
from broker.relay.ownership import FREEZE, Ownership
from broker.store.accounts import AccountStore, Reservation
from broker.store.connection import Store
from broker.store.journal import JournalStore
from broker.store.sessions import Prepared, SessionStore
from tests.chunks import events_of
from tests.money import Ledger, ledger, open_reservations, until
from tests.relay.fakes import DONE, FINISH, HELLO, PREPARED, TOLD_USAGE, WORST, BugError
from tests.relay.workers import FREE, RUNNING_TTL, FakeWorker, running_worker
from tests.wire import wire_to

if TYPE_CHECKING:
    from broker.relay.generation import Generation


@pytest_asyncio.fixture
async def owner(store: Store) -> AsyncIterator[FakeWorker]:
    async with running_worker(store) as worker:
        yield worker


STOPPED = Terminal(State.CANCELLED, "done", Cursor(1, 1, end=True), b"{}")


class Snapshot:
    """The state of one session in Redis, to be restored later, as after a failover; the accounts too, if asked."""

    def __init__(self, store: Store, session_id: str, *, accounts: bool = False) -> None:
        self._redis: Any = store.redis
        self._keys: list[Any] = list(store.session_keys(session_id).values())
        self._accounts = accounts
        self._dumps: dict[Any, bytes | None] = {}

    async def take(self) -> Snapshot:
        keys = [*self._keys, *(await self._redis.keys("*:{a*}:*") if self._accounts else [])]
        self._dumps = {key: await self._redis.dump(key) for key in keys}
        return self

    async def restore(self) -> None:
        for key, dump in self._dumps.items():
            await self._redis.delete(key)
            if dump is not None:
                await self._redis.restore(key, 600_000, dump, replace=True)


async def chunks(worker: FakeWorker, generation: Generation, number: int, stream: int = 0) -> None:
    """Send this number of chunks, and wait until they are in the journal."""
    last = generation.feed.last + number
    for _ in range(number):
        worker.streams[stream].send(HELLO)
    await until(lambda: asyncio.sleep(0, generation.saved == last))


async def journal_of(worker: FakeWorker, session_id: str) -> tuple[bytes, int]:
    batches = await worker.journal.read(session_id, 0)
    assert batches is not None
    return read_on(batches, 0)


async def is_running_again(worker: FakeWorker, generation: Generation) -> bool:
    record = await worker.sessions.describe(generation.session_id)
    return record is not None and (record.state, record.claim_id) == (State.RUNNING, generation.claim_id)


# The last writes are lost


async def test_a_lost_claim_is_written_again_by_the_next_look(store: Store, owner: FakeWorker) -> None:
    """Redis has lost data unnoticed; the next write of the journal finds it."""
    session_id = await owner.prepare()
    before = await Snapshot(store, session_id).take()
    found = await owner.hub.find(session_id, None)
    generation = cast("Generation", found)
    await chunks(owner, generation, 3)
    await before.restore()
    await until(lambda: is_running_again(owner, generation))
    await chunks(owner, generation, 2)
    assert (await journal_of(owner, session_id))[1] == 5
    owner.streams[0].send(FINISH, DONE, None)
    assert await generation.ended() is State.DONE
    assert len(owner.upstream.requests) == 1


async def test_a_lost_end_is_written_again(store: Store, owner: FakeWorker) -> None:
    generation = await owner.start()
    await chunks(owner, generation, 3)
    before = await Snapshot(store, generation.session_id).take()
    owner.streams[0].send(FINISH, DONE, None)
    await generation.ended()
    ended = await owner.journal.status(generation.session_id)
    whole = await journal_of(owner, generation.session_id)
    await before.restore()
    await owner.worker._ownership.rewrite_sessions()
    assert await owner.journal.status(generation.session_id) == ended
    assert await journal_of(owner, generation.session_id) == whole


@pytest.mark.parametrize("resume_ttl", [300, 0])
async def test_a_session_lost_from_claim_to_end_is_paid_once(store: Store, resume_ttl: int) -> None:
    async with running_worker(store, resume_ttl=resume_ttl) as owner:
        session_id = await owner.prepare()
        before = await Snapshot(store, session_id).take()
        generation = cast("Generation", await owner.hub.find(session_id, None))
        owner.streams[0].send(HELLO, FINISH, TOLD_USAGE, DONE, None)
        assert await generation.ended() is State.DONE
        booked = await ledger(store.redis)
        assert (booked.requests, booked.spent_tokens) == (1, 15)

        async def is_paid() -> bool:
            return await ledger(store.redis) == booked

        for _ in range(2):
            await store.redis.flushall()
            await before.restore()
            await owner.worker._ownership.rewrite_sessions()
            await until(is_paid)
            record = await owner.sessions.describe(session_id)
            assert record is not None
            assert record.state is State.DONE
        await before.restore()  # the settlement is in Redis, the session is not
        await owner.worker._ownership.rewrite_sessions()
        await owner.worker.tasks.finish(10)
        assert await is_paid()
        assert len(owner.upstream.requests) == 1


async def test_what_another_worker_has_estimated_meanwhile_is_corrected(store: Store) -> None:
    """This worker was cut off together with an old primary: it ended a session there that another worker gave up."""
    async with running_worker(store) as owner:
        generation = await owner.start()
        await chunks(owner, generation, 1)
        before = await Snapshot(store, generation.session_id, accounts=True).take()
        owner.streams[0].send(FINISH, TOLD_USAGE, DONE, None)
        assert await generation.ended() is State.DONE
        booked = await ledger(store.redis)
        assert (booked.requests, booked.spent_tokens) == (1, 15)

        await store.redis.flushall()  # the new primary, and what it knew
        await before.restore()
        session, claim = generation.session_id, generation.claim_id
        await owner.sessions.mark_lost(session, claim, error=b"{}", cancelled=b"{}")
        estimate = Usage(prompt=3, completion=1, estimated=True)
        await owner.accounts.settle(generation.reservation, estimate, State.LOST)
        assert (await ledger(store.redis)).spent_tokens == 4

        await owner.worker._ownership.rewrite_sessions()

        async def is_corrected() -> bool:
            now = await ledger(store.redis)
            return (now.requests, now.spent_tokens, now.estimated) == (1, 15, 0)

        await until(is_corrected)
        record = await owner.sessions.describe(session)
        assert record is not None
        assert record.state is State.LOST, "the end that readers have seen stays"


async def test_a_late_end_that_became_a_cancel_is_written_again(valkey_url: str, store: Store) -> None:
    """Redis was away at the end. It came back with a cancel, took the end, and was then replaced by a replica.

    The replica knows the claim, but neither events nor end.
    """
    async with wire_to(valkey_url) as wire:
        far = Store(wire.url, "test")
        async with running_worker(far) as owner:
            generation = await owner.start()
            before = await Snapshot(store, generation.session_id, accounts=True).take()
            wire.block = b"*"  # each call has it
            owner.streams[0].send(HELLO, FINISH, TOLD_USAGE, DONE, None)
            assert await generation.ended() is State.DONE
            elsewhere = SessionStore(store, session_ttl=600, running_ttl=RUNNING_TTL, resume_ttl=300)
            assert (await elsewhere.cancel(generation.session_id, STOPPED)).state is State.RUNNING
            wire.unblock()

            async def is_cancelled() -> bool:
                record = await elsewhere.describe(generation.session_id)
                return record is not None and record.state is State.CANCELLED

            async def is_paid() -> bool:
                now = await ledger(store.redis)
                return (now.requests, now.spent_tokens, now.reserved_tokens) == (1, 15, 0)

            await until(is_cancelled)
            await until(is_paid)
            await until(lambda: asyncio.sleep(0, not owner.worker._late_ends.reservations()))
            await store.redis.flushall()
            await before.restore()
            assert not await is_paid()

            await owner.worker._ownership.rewrite_sessions()
            await until(is_paid)
            assert await is_cancelled()
            assert (await journal_of(owner, generation.session_id))[1] == 3
        await far.close()


async def test_lost_events_are_written_again(store: Store, owner: FakeWorker) -> None:
    generation = await owner.start()
    await chunks(owner, generation, 2)
    before = await Snapshot(store, generation.session_id).take()
    await chunks(owner, generation, 3)
    whole = await journal_of(owner, generation.session_id)
    await before.restore()

    async def is_whole() -> bool:
        return await journal_of(owner, generation.session_id) == whole

    await until(is_whole)


async def test_a_claim_made_elsewhere_before_that_wins(store: Store, owner: FakeWorker) -> None:
    session_id = await owner.prepare()
    before = await Snapshot(store, session_id).take()
    generation = cast("Generation", await owner.hub.find(session_id, None))
    await before.restore()
    elsewhere = SessionStore(store, session_ttl=600, running_ttl=RUNNING_TTL, resume_ttl=300)
    won = await elsewhere.claim(session_id, "another claim", "another worker")
    assert isinstance(won, Prepared)
    await owner.worker._ownership.rewrite_sessions()
    assert await generation.ended() is State.LOST
    record = await elsewhere.describe(session_id)
    assert record is not None
    assert (record.state, record.claim_id) == (State.RUNNING, "another claim")


async def test_an_end_that_redis_has_stands(store: Store, owner: FakeWorker) -> None:
    generation = await owner.start()
    await owner.sessions.mark_lost(generation.session_id, generation.claim_id, error=b"{}", cancelled=b"{}")
    await owner.worker._ownership.rewrite_sessions()
    assert await generation.ended() is State.LOST


# All is lost


@pytest.mark.parametrize("ended", [False, True])
async def test_an_emptied_redis_gets_sessions_and_reservations_back(
    store: Store, owner: FakeWorker, ended: bool
) -> None:
    generation = await owner.start()
    await chunks(owner, generation, 3)
    if ended:
        owner.streams[0].send(FINISH, DONE, None)
        await generation.ended()
    status = await owner.journal.status(generation.session_id)
    whole = await journal_of(owner, generation.session_id)
    await store.redis.flushall()
    owner.worker.redis.to_rewrite.set()

    async def is_back() -> bool:
        return await owner.journal.status(generation.session_id) == status

    await until(is_back)
    assert await journal_of(owner, generation.session_id) == whole
    assert await open_reservations(store.redis) == (0 if ended else 1)


class Stored:
    """The parts of a generation that are written again."""

    def __init__(self, n: int, *, ended: bool) -> None:
        self.session_id, self.claim_id = str(uuid4()), str(uuid4())
        self.reservation = Reservation(self.claim_id, self.session_id, f"client {n % 50}", "m", WORST, 20_000)
        self.prepared = replace(PREPARED, request=b"")
        self.saved = 0
        self.feed = Feed()
        self.feed.add(Batch(1, 3, events_of([b"x" * 500] * 3, 1)), 0.0)
        if ended:
            self.feed.finish(Terminal(State.DONE, "done", Cursor(1, 4, end=True), b"{}"))

    @property
    def state(self) -> State:
        return State.RUNNING if self.feed.end is None else self.feed.end.state


class NoWrites:
    def suspend_watch_expiry(self) -> None:
        """There is no journal writer here."""


@pytest.mark.slow
async def test_2000_sessions_are_written_again_within_ten_seconds(
    store: Store, valkey_url: str, record_property: Any
) -> None:
    """20 ms from Redis. Ten seconds is what others wait until an unknown session counts as gone."""
    generations = {each.session_id: each for n in range(2000) if (each := Stored(n, ended=n % 4 == 0))}
    async with wire_to(valkey_url) as wire:
        wire.delay = 0.01
        far = Store(wire.url, "test")
        ownership = Ownership(
            cast("Any", generations),
            FinishedCache(300),
            worker="owner",
            sessions=SessionStore(far, session_ttl=600, running_ttl=RUNNING_TTL, resume_ttl=300),
            accounts=AccountStore(far, FREE),
            reads=JournalStore(far, worker="owner", running_ttl=RUNNING_TTL),
            writes=cast("Any", NoWrites()),
            redis=cast("Any", None),
            resuming=True,
            spawn=lambda work: work.close(),
        )
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with asyncio.timeout(10):
            await ownership.rewrite_sessions()
        record_property("seconds", round(loop.time() - started, 2))
        await far.close()
    assert await open_reservations(store.redis) == 1500
    assert await ledger(store.redis) == Ledger(
        reserved_tokens=1500 * WORST.tokens, reserved_cost=1500 * WORST.cost
    )
    keys = [key async for key in store.redis.scan_iter("*:events:*", count=1000)]
    assert len(keys) == 2000


# This process was frozen


async def test_nothing_is_shown_after_a_freeze_until_redis_confirms(owner: FakeWorker) -> None:
    generation = await owner.start()
    await chunks(owner, generation, 1)
    ownership = owner.worker._ownership
    ownership.check_for_freeze(asyncio.get_running_loop().time() + FREEZE + 1)
    assert not generation.lifecycle.shows
    await until(lambda: asyncio.sleep(0, generation.lifecycle.shows))


async def test_a_tick_in_time_is_no_freeze(owner: FakeWorker) -> None:
    generation = await owner.start()
    owner.worker._ownership.tick(asyncio.get_running_loop().time() + FREEZE / 2)
    assert generation.lifecycle.shows


async def test_a_bug_while_rewriting_forgets_nothing(
    store: Store, owner: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ownership = owner.worker._ownership
    failed = asyncio.Event()
    rewrite = ownership.rewrite_sessions

    async def broken() -> None:
        monkeypatch.setattr(ownership, "rewrite_sessions", rewrite)
        failed.set()
        raise BugError

    generation = await owner.start()
    await chunks(owner, generation, 1)
    monkeypatch.setattr(ownership, "rewrite_sessions", broken)
    await store.redis.flushall()
    owner.worker.redis.to_rewrite.set()
    await failed.wait()
    await until(lambda: is_running_again(owner, generation))
