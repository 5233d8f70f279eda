"""A full Valkey: nothing new begins, and running sessions can be watched, ended and settled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.store.accounts import AccountStore, Reservation
from broker.store.journal import Append, Appended, JournalStore
from broker.store.sessions import Prepared, SessionStore
from broker.store.workers import WorkerStore
from tests.chunks import events_of
from tests.money import Ledger, ledger, let_time_pass, open_reservations, slots

if TYPE_CHECKING:
    from broker.store.connection import Store

RUNNING_TTL = 500
PREPARED = Prepared(
    request=b'{"messages":[]}',
    model="model",
    prompt_tokens=10,
    referer="",
    client="client",
    worst=WorstCase(10, 100),
)
NOTHING = Batch(1, 0, b"")
ONE = Batch(1, 1, events_of([b"1"], 1))
DONE = Terminal(State.DONE, "done", Cursor(1, 2, end=True), b"{}")
CANCELLED = Terminal(State.CANCELLED, "done", Cursor(1, 1, end=True), b"{}")


def wanted(claim_id: str) -> Reservation:
    return Reservation(claim_id, f"session-{claim_id}", "client", "model", WorstCase(10, 100))


class Stage:
    """What there was before Redis was full: a session that waits, one that runs, a reservation with a lapsed lease."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sessions = SessionStore(store, session_ttl=600, running_ttl=RUNNING_TTL, resume_ttl=300)
        self.journal = JournalStore(store, worker="owner", running_ttl=RUNNING_TTL)
        self.elsewhere = JournalStore(store, worker="follower", running_ttl=RUNNING_TTL)
        self.workers = WorkerStore(store, worker="owner")
        self.accounts = AccountStore(store, Quotas(50, 2, 0, 0, 0))
        self.reservation = wanted("token")

    async def set(self) -> None:
        for session in ("waiting", "running"):
            await self.sessions.prepare(session, PREPARED)
        await self.sessions.claim("running", "token", "owner")
        self.reservation = await self.accounts.reserve(self.reservation)
        await let_time_pass(self.store.redis, "open")
        await self.workers.marker()

    async def ask(self) -> Appended:
        """Append no events, as an owner does that only asks for cancels and viewers."""
        [answer] = await self.journal.append([Append("running", "token", NOTHING)])
        assert answer is not None
        return answer

    async def everything(self) -> dict[bytes, object]:
        """Return all data in Redis."""
        redis: Any = self.store.redis
        read = {
            b"hash": redis.hgetall,
            b"set": redis.smembers,
            b"string": redis.get,
            b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
            b"stream": redis.xrange,
        }
        return {key: await read[await redis.type(key)](key) for key in await redis.keys("*")}


@pytest_asyncio.fixture
async def full(store: Store) -> AsyncIterator[Stage]:
    stage = Stage(store)
    await stage.set()
    await store.redis.config_set("maxmemory", 1)
    try:
        yield stage
    finally:
        await store.redis.config_set("maxmemory", 0)


# Refused


REFUSED: dict[str, Callable[[Stage], Awaitable[object]]] = {
    "prepare": lambda stage: stage.sessions.prepare("new", PREPARED),
    "reserve": lambda stage: stage.accounts.reserve(wanted("new")),
    "claim": lambda stage: stage.sessions.claim("waiting", "new", "owner"),
    "events": lambda stage: stage.journal.append([Append("running", "token", ONE)]),
    "end with events": lambda stage: stage.sessions.end("running", "token", DONE, ONE),
}


@pytest.mark.parametrize("step", REFUSED.values(), ids=REFUSED)
async def test_a_step_that_takes_room_is_refused_and_changes_nothing(
    full: Stage, step: Callable[[Stage], Awaitable[object]]
) -> None:
    before = await full.everything()
    with pytest.raises(StoreUnavailable):
        await step(full)
    assert await full.everything() == before


async def test_a_refused_step_can_be_repeated_once_there_is_room(full: Stage) -> None:
    for step in REFUSED.values():
        with pytest.raises(StoreUnavailable):
            await step(full)
    await full.store.redis.config_set("maxmemory", 0)
    for step in REFUSED.values():
        await step(full)
    assert (await full.elsewhere.status("running")).end == DONE
    assert (await full.elsewhere.read("running", 0)) == [ONE]


# Passing


async def test_a_viewer_elsewhere_registers(full: Stage) -> None:
    assert (await full.elsewhere.follow("running", 0)).status.state is State.RUNNING
    assert (await full.ask()).watched == 1


async def test_the_owner_learns_what_others_want(full: Stage) -> None:
    assert await full.ask() == Appended(State.RUNNING, 0)
    assert (await full.sessions.cancel("running", CANCELLED)).state is State.RUNNING
    assert (await full.ask()).cancel


async def test_a_pending_session_is_cancelled(full: Stage) -> None:
    assert (await full.sessions.cancel("waiting", CANCELLED)).state is State.PREPARED
    assert (await full.elsewhere.status("waiting")).end == CANCELLED


async def test_an_end_without_events_is_written(full: Stage) -> None:
    ended = await full.sessions.end("running", "token", DONE, NOTHING)
    assert (await full.elsewhere.status("running")) == ended


async def test_a_dead_workers_session_is_ended(full: Stage) -> None:
    lost = await full.sessions.mark_lost("running", "token", error=b'{"lost":1}', cancelled=b"{}")
    assert lost.end == Terminal(State.LOST, "error", Cursor(2, 1, end=True), b'{"lost":1}')
    assert (await full.elsewhere.status("running")).end == lost.end


async def test_the_marker_is_kept(full: Stage) -> None:
    marker = (await full.workers.marker()).marker
    assert (await full.workers.marker()).marker == marker


async def test_a_reservation_is_renewed_also_one_whose_lease_has_lapsed(full: Stage) -> None:
    assert await full.accounts.overdue(10) == [full.reservation]
    assert await full.accounts.renew([full.reservation]) == []
    assert await full.accounts.overdue(10) == []


async def test_usage_is_booked(full: Stage) -> None:
    await full.accounts.settle(full.reservation, Usage(1, 2, cost=7), State.DONE)
    assert await ledger(full.store.redis) == Ledger(1, 0, 3, 7)
    assert await slots(full.store.redis) == await open_reservations(full.store.redis) == 0


async def test_a_reservation_is_given_back(full: Stage) -> None:
    await full.accounts.release(full.reservation)
    assert await ledger(full.store.redis) == Ledger()
    assert await slots(full.store.redis) == await open_reservations(full.store.redis) == 0


# Come back empty


async def test_a_journal_that_is_born_late_has_its_time(store: Store) -> None:
    """Redis came back empty while all events were in the journal only: it goes on with a number above one."""
    stage = Stage(store)
    await stage.set()
    await stage.journal.append([Append("running", "token", Batch(1, 5, events_of([b"1"] * 5, 1)))])
    await store.redis.flushall()
    held = Batch(6, 5, b"")
    again = stage.sessions.restoring("running", "token", "owner", PREPARED.spec, held=held, end=None)
    assert await stage.sessions.run_each([again]) == [1]
    sixth = Batch(6, 6, events_of([b"6"], 6))
    assert await stage.journal.append([Append("running", "token", sixth)]) == [Appended(State.RUNNING, 6)]
    assert await stage.elsewhere.read("running", 5) == [sixth]
    assert 0 < await store.redis.ttl(store.session_keys("running")["events"]) <= RUNNING_TTL
