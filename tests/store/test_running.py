"""What runs on all workers, as operators read it from a real Redis."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.events import cancelled_before_start
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.store import running
from broker.store.accounts import LEASE, AccountStore, Reservation
from broker.store.buckets import account_of
from broker.store.connection import Store
from broker.store.journal import Append, JournalStore
from broker.store.pending import PendingStore
from broker.store.running import Activity, Running, RunningSession, RunningStore
from broker.store.sessions import Prepared, SessionStore
from broker.store.workers import WorkerInfo, WorkerStore

WORST = WorstCase(5000, 7_000_000)
QUOTAS = Quotas(pending=50, streams=5000, daily_tokens=0, daily_cost=0, total_daily_cost=0)
CLAIM = "claim-1"
DONE = Terminal(State.DONE, "done", Cursor(1, 3, end=True), b"{}")


class Stage:
    """One session, and the steps of its worker."""

    def __init__(self, store: Store) -> None:
        self.session_id = str(uuid4())
        self.store = store
        self.sessions = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)
        self.accounts = AccountStore(store, QUOTAS)
        self.journal = JournalStore(store, worker="w1", running_ttl=960)
        self.reservation = Reservation(CLAIM, self.session_id, "key:ann", "a/b", WORST)

    async def prepare(self) -> None:
        prepared = Prepared(
            request=b"{}", model="a/b", prompt_tokens=1, referer="", client="key:ann", worst=WORST
        )
        await self.sessions.prepare(self.session_id, prepared)

    async def claim(self) -> None:
        await self.accounts.reserve(self.reservation)
        await self.sessions.claim(self.session_id, CLAIM, "w1")

    async def journal_events(self, first: int, last: int, events: bytes) -> None:
        await self.journal.append([Append(self.session_id, CLAIM, Batch(first, last, events))])

    async def read(self) -> Running:
        return await RunningStore(self.store).read()

    async def one(self) -> RunningSession:
        [session] = (await self.read()).sessions
        return session


@pytest_asyncio.fixture
async def stage(store: Store) -> Stage:
    stage = Stage(store)
    await stage.prepare()
    return stage


async def test_nothing_is_listed_before_a_claim(stage: Stage) -> None:
    assert (await stage.read()).sessions == []


async def test_a_session_is_listed_with_all_that_is_known(stage: Stage) -> None:
    await stage.claim()
    await stage.journal_events(1, 2, b"a" * 100)
    await stage.journal_events(3, 3, b"b" * 50)
    await stage.journal_events(3, 3, b"b" * 50)  # once more, as after a lost reply
    found = await stage.read()
    [session] = found.sessions
    assert session.since_ms is not None
    assert 0 <= found.now_ms - session.since_ms < 60_000
    assert session == RunningSession(
        session_id=stage.session_id,
        client="key:ann",
        model="a/b",
        activity=Activity.RUNNING,
        since_ms=session.since_ms,
        worker="w1",
        events=3,
        size=150,
        reserved=WORST,
    )


async def test_a_session_has_no_events_before_its_first_chunk(stage: Stage) -> None:
    await stage.claim()
    session = await stage.one()
    assert (session.activity, session.events, session.size) == (Activity.RUNNING, 0, 0)


async def test_a_session_whose_claim_is_under_way_is_starting(stage: Stage) -> None:
    await stage.accounts.reserve(stage.reservation)
    session = await stage.one()
    assert (session.activity, session.worker) == (Activity.STARTING, "")


async def test_a_cancelled_session_is_stopping(stage: Stage) -> None:
    await stage.claim()
    await stage.sessions.cancel(stage.session_id, cancelled_before_start())
    assert (await stage.one()).activity is Activity.STOPPING


async def test_a_session_with_an_end_is_ended_until_it_is_settled(stage: Stage) -> None:
    await stage.claim()
    await stage.sessions.end(stage.session_id, CLAIM, DONE, Batch(1, 3, b"x"))
    assert (await stage.one()).activity is Activity.ENDED
    await stage.accounts.settle(stage.reservation, Usage(1, 1, cost=1), State.DONE)
    assert (await stage.read()).sessions == []


async def test_a_session_that_nobody_renews_is_overdue(stage: Stage) -> None:
    await stage.claim()
    key = account_of(stage.store, "key:ann").shared("open")
    await stage.store.redis.zincrby(key, -(LEASE * 1000 + 1), CLAIM)
    assert (await stage.one()).activity is Activity.OVERDUE


async def test_a_session_that_redis_has_lost_is_unknown(stage: Stage) -> None:
    await stage.claim()
    await stage.store.run([stage.sessions.forgetting(stage.session_id)])
    assert (await stage.one()).activity is Activity.UNKNOWN


async def test_the_time_of_a_claim_written_again_is_not_known(stage: Stage) -> None:
    await stage.accounts.reserve_again([stage.reservation])
    assert (await stage.one()).since_ms is None


async def test_one_unreadable_reservation_hides_no_other(stage: Stage) -> None:
    await stage.claim()
    account = account_of(stage.store, "key:bob")
    await stage.store.redis.zadd(account.shared("open"), {"odd": 10**13, "odder": 10**13})
    await stage.store.redis.hset(account.reservation("odd"), mapping={"state": "open", "session": "s"})
    await stage.store.redis.set(account.reservation("odder"), "not a hash")
    await stage.accounts.reserve(Reservation("oddest", "s2", "key:bob", "a/b", WORST))
    session = stage.store.session_keys("s2")["session"]
    await stage.store.redis.hset(session, mapping={"state": "running", "claim_id": "oddest", "last": "many"})
    found = await stage.read()
    assert [each.session_id for each in found.sessions] == [stage.session_id]
    assert found.unreadable == 3


async def test_thousands_of_sessions_are_found_in_batches(store: Store) -> None:
    accounts = AccountStore(store, QUOTAS)
    wanted = [Reservation(f"c{n}", str(uuid4()), f"k{n % 3}", "m", WORST) for n in range(1500)]
    assert await accounts.reserve_again(wanted) == []
    found = await RunningStore(store).read()
    assert sorted(each.session_id for each in found.sessions) == sorted(each.session_id for each in wanted)
    assert found.complete


async def test_a_list_that_is_cut_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MAX_SESSIONS", 3)
    accounts = AccountStore(store, QUOTAS)
    for n in range(4):
        await accounts.reserve(Reservation(f"c{n}", f"s{n}", f"client {n}", "m", WORST))
    found = await RunningStore(store).read()
    assert (len(found.sessions), found.complete) == (3, False)


async def test_all_of_a_client_is_read_however_much_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "MAX_SESSIONS", 3)
    accounts = AccountStore(store, QUOTAS)
    for n in range(6):
        await accounts.reserve(Reservation(f"c{n}", f"s{n}", f"client {n // 3}", "m", WORST))
    for client, expected in (("client 0", {"s0", "s1", "s2"}), ("client 1", {"s3", "s4", "s5"})):
        found = await RunningStore(store).read(client=client)
        assert ({each.session_id for each in found.sessions}, found.complete) == (expected, True)
    assert (await RunningStore(store).read(client="client 2")).sessions == []


async def test_workers_are_listed_while_they_live(store: Store) -> None:
    info = WorkerInfo("w1", "host-1", 4711, "1.2.3")
    await WorkerStore(store, worker="w1", info=info).marker()
    await WorkerStore(store, worker="w2").marker()
    assert (await RunningStore(store).read()).workers == [info, WorkerInfo("w2")]


async def test_a_worker_that_is_gone_is_not_listed_for_long(store: Store) -> None:
    await WorkerStore(store, worker="w1").marker()
    [key] = await store.redis.keys("*alive*")
    [listed] = await store.redis.zrange(key, 0, -1)
    member: Any = listed
    await store.redis.zincrby(key, -60_000, member)
    await WorkerStore(store, worker="w2").marker()
    assert (await RunningStore(store).read()).workers == [WorkerInfo("w2")]
    assert 0 < await store.redis.pttl(key) <= 15_000


async def test_pending_sessions_of_a_client_are_found(store: Store) -> None:
    pending = PendingStore(store, QUOTAS, session_ttl=600)
    for session, client in (("s1", "ann"), ("s2", "bob"), ("s3", "ann")):
        await pending.admit(client, session, WORST, stored=10)
    reader = RunningStore(store)
    found, complete = await reader.pending("ann")
    assert (sorted(found), complete) == (["s1", "s3"], True)
    assert await reader.pending("nobody") == ([], True)
