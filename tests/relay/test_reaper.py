"""Settling for dead workers: unreadable records, expired sessions, and claims with an unknown outcome."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from broker.core.accounts import WorstCase
from broker.core.dialect import DialectName
from broker.core.errors import StoreUnavailable
from broker.core.events import cancelled_before_start
from broker.core.pricing import Prices, parse_prices
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.core.session_report import SessionReport
from broker.relay.reaper import AT_ONCE, Reaper
from broker.relay.settlement import PRICES_AWAITED
from broker.store.accounts import LEASE, AccountStore, Reservation
from broker.store.buckets import account_of
from broker.store.connection import Store
from broker.store.journal import Append, JournalStore
from broker.store.sessions import MIN_KEPT, Prepared, SessionRecord, SessionStatus, SessionStore
from tests.chunks import events_of
from tests.clock import Clock
from tests.money import Ledger, ledger, open_reservations, slots
from tests.relay.test_races import FREE, NO_MONEY, come, reaper_of, reserved
from tests.wire import wire_to

PREPARED = Prepared(
    request=b"{}", model="model", prompt_tokens=4, referer="", client="client", worst=WorstCase(10, 100)
)
NOTHING = Batch(1, 0, b"")
CHUNK = b'{"choices":[{"delta":{"content":"four"}}]}'
CREATED = b'{"type":"response.created","response":{"usage":null}}'
WORDS = b'{"type":"response.output_text.delta","output_index":0,"delta":"four"}'
COMPLETED = b'{"type":"response.completed","response":{"usage":{"input_tokens":3,"output_tokens":4,"cost":0.00000005}}}'
USAGE = b'"usage":{"prompt_tokens":3,"completion_tokens":4},"cost":0.00000005'
PRICES = parse_prices({"pricing": {"prompt": "0.000001", "completion": "0.000001"}})
WORST = Ledger(requests=1, estimated=1, spent_tokens=10, spent_cost=100)


CLIENT = "client"


class Dead:
    """A worker that has died, and left sessions and reservations."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.accounts = AccountStore(store, FREE)
        self.sessions = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=1)
        self.journal = JournalStore(store, worker="dead", running_ttl=960)

    async def claimed(self, claim_id: str, dialect: DialectName = "chat") -> Reservation:
        """Prepare and claim a session."""
        session = f"session-{claim_id}"
        await self.sessions.prepare(session, replace(PREPARED, dialect=dialect))
        reservation = await reserved(self.accounts, claim_id)
        assert isinstance(await self.sessions.claim(session, claim_id, "dead"), Prepared)
        return reservation

    async def said(self, claim_id: str, *chunks: bytes, dialect: DialectName = "chat") -> Reservation:
        """Claim a session and journal some chunks."""
        reservation = await self.claimed(claim_id, dialect)
        batch = Batch(1, len(chunks), events_of(list(chunks), 1))
        await self.journal.append([Append(reservation.session_id, claim_id, batch)])
        return reservation

    async def ended(self, claim_id: str, data: bytes, *, state: State = State.DONE) -> Reservation:
        """Claim a session, journal a chunk and end it, without settling it."""
        reservation = await self.said(claim_id, CHUNK)
        session = reservation.session_id
        event = "done" if state is State.DONE else "error"
        await self.sessions.end(
            session, claim_id, Terminal(state, event, Cursor(1, 2, end=True), data), NOTHING
        )
        return reservation

    async def forget_journal(self, claim_id: str) -> None:
        """Let the journal expire. The end is stored a little longer."""
        await self.store.redis.delete(self.store.session_keys(f"session-{claim_id}")["events"])

    async def break_session(self, claim_id: str) -> None:
        """Replace the session by a value that no script can read."""
        key = self.store.session_keys(f"session-{claim_id}")["session"]
        await self.store.redis.delete(key)
        await self.store.redis.set(key, "no hash")

    async def is_open(self, claim_id: str) -> bool:
        return (
            await self.store.redis.zscore(account_of(self.store, CLIENT).shared("open"), claim_id) is not None
        )

    async def found(self, rounds: int = 1) -> None:
        """Let all leases expire, and run the reaper of another worker."""
        await self.found_by(reaper_of(self.store, self.accounts), rounds)

    async def found_by(self, reaper: Reaper, rounds: int = 1) -> None:
        """Let all leases expire, and run this reaper."""
        await come(self.store, "open")
        for _ in range(rounds):
            assert await reaper._round(), "Redis could be reached"


async def test_the_session_of_a_dead_worker_is_reported_once(store: Store, log: io.StringIO) -> None:
    dead = Dead(store)
    await dead.said("claim", CHUNK)
    await dead.found(rounds=2)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    [line] = [line for line in lines if line["event"] == "session ended"]
    assert (line["level"], line["state"], line["code"]) == ("warning", "lost", "worker_lost")
    assert (line["session"], line["client"], line["model"]) == ("session-", "client", "model")


async def test_the_session_of_a_dead_worker_is_counted(store: Store) -> None:
    dead = Dead(store)
    await dead.said("claim", CHUNK)
    await dead.ended("ended", b"{}")  # by its own worker, which has counted it
    await come(store, "open")
    reaper = reaper_of(store, dead.accounts)
    counted: list[SessionReport] = []
    reaper._count = counted.append
    assert await reaper._round()
    assert [(report.session, report.state) for report in counted] == [("session-claim", State.LOST)]


@pytest.mark.parametrize(
    ("data", "booked"),
    [
        (b'{"estimated":false,' + USAGE + b"}", Ledger(1, 0, 7, 50)),
        (b"{" + USAGE + b',"estimated":true}', Ledger(1, 1, 7, 50)),
        (b'{"usage":{"input_tokens":3,"output_tokens":4},"cost":0.00000005}', Ledger(1, 0, 7, 50)),
        (b'{"usage":null,"cost":0.00000005,"estimated":true}', WORST),
        (b'{"usage":{"prompt_tokens":3},"cost":null}', WORST),
        (b"", WORST),
    ],
)
async def test_an_end_without_its_journal_is_booked_by_its_usage(
    store: Store, data: bytes, booked: Ledger
) -> None:
    assert MIN_KEPT > 1, "an end must be stored for longer than its journal"
    dead = Dead(store)
    await dead.ended("1", data)
    await dead.forget_journal("1")
    await dead.found()
    assert await ledger(store.redis) == booked
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


@pytest.mark.parametrize(
    ("dialect", "chunks", "booked"),
    [
        ("chat", [CHUNK], Ledger(1, 1, 4 + 2, 0)),
        ("responses", [CREATED, WORDS], Ledger(1, 1, 4 + 2, 0)),
        ("responses", [CREATED, WORDS, COMPLETED], Ledger(1, 0, 7, 50)),
    ],
)
async def test_a_journal_is_counted_in_the_dialect_it_is_in(
    store: Store, dialect: DialectName, chunks: list[bytes], booked: Ledger
) -> None:
    dead = Dead(store)
    await dead.said("1", *chunks, dialect=dialect)
    await dead.found()
    account = await ledger(store.redis)
    assert account._replace(reserved_tokens=0, reserved_cost=0) == booked


class Listing:
    """The list of prices of a worker that has just started.

    Attributes:
        prices: of every model; None until there is a list.
        looks: how often the worker has looked for prices.
        come_after: just after so many looks they come; 0 for not by themselves.
        clock: the worker's clock.
    """

    def __init__(self) -> None:
        self.prices: Prices | None = None
        self.looks = self.come_after = 0
        self.clock = Clock()

    async def prices_of(self, _model: str) -> Prices | None:
        known = self.prices
        self.looks += 1
        if self.looks == self.come_after:
            self.prices = PRICES
        return known

    def reaper(self, dead: Dead) -> Reaper:
        """Return the reaper of this worker."""
        money = NO_MONEY._replace(prices_of=self.prices_of, has_prices=lambda: self.prices is not None)
        return reaper_of(dead.store, dead.accounts, self.clock, money)


async def test_a_worker_without_prices_settles_for_a_dead_one_when_it_has_them(store: Store) -> None:
    dead, listing = Dead(store), Listing()
    await dead.said("1", CHUNK)
    reaper = listing.reaper(dead)
    for seconds in (0.0, PRICES_AWAITED - 1):
        listing.clock.now += seconds
        await dead.found_by(reaper)
        assert await dead.is_open("1")
        [record] = await dead.sessions.describe_many(["session-1"])
        assert isinstance(record, SessionRecord)
        assert record.state is State.LOST  # viewers do not wait for prices
    listing.prices = PRICES
    await dead.found_by(reaper)
    assert await ledger(store.redis) == Ledger(1, 1, 4 + 2, (4 + 2) * 1000)


async def test_prices_that_come_while_a_worker_counts_are_used_next_time(store: Store) -> None:
    dead, listing = Dead(store), Listing()
    await dead.said("1", CHUNK)
    listing.come_after = 2  # one for the model that answered, one for the one that was asked
    reaper = listing.reaper(dead)
    await dead.found_by(reaper)
    assert (listing.looks, await dead.is_open("1")) == (2, True)
    await dead.found_by(reaper)
    assert await ledger(store.redis) == Ledger(1, 1, 4 + 2, (4 + 2) * 1000)


async def test_a_worker_that_gets_no_prices_settles_without_them(store: Store) -> None:
    dead, listing = Dead(store), Listing()
    await dead.said("1", CHUNK)
    reaper = listing.reaper(dead)
    listing.clock.now += PRICES_AWAITED
    await dead.found_by(reaper)
    assert (await ledger(store.redis)).spent_cost == 0
    assert not await dead.is_open("1")


async def test_an_error_without_its_journal_is_booked_at_its_worst(store: Store) -> None:
    dead = Dead(store)
    await dead.ended("1", b'{"code":"upstream_timeout"}', state=State.FAILED)
    await dead.forget_journal("1")
    await dead.found()
    assert await ledger(store.redis) == WORST


async def test_a_missing_journal_does_not_stop_other_settlements(store: Store) -> None:
    dead = Dead(store)
    for claim_id in ("1", "2", "3"):
        await dead.ended(claim_id, b"{}")
    await dead.forget_journal("1")
    await dead.found()
    assert await open_reservations(store.redis) == 0
    assert (await ledger(store.redis)).requests == 3


@pytest.mark.parametrize("broken", ["session", "journal", "reservation", "fields"])
async def test_an_unreadable_record_does_not_stop_other_settlements(store: Store, broken: str) -> None:
    dead = Dead(store)
    for claim_id in ("a", "b", "c"):
        await dead.ended(claim_id, b"{}")
    record = account_of(store, CLIENT).reservation("a")
    if broken == "session":
        await dead.break_session("a")
    elif broken == "journal":
        await dead.forget_journal("a")
        await store.redis.set(store.session_keys("session-a")["events"], "no stream")
    elif broken == "reservation":
        await store.redis.delete(record)
        await store.redis.set(record, "no hash")
    else:
        await store.redis.hset(record, "tokens", "many")
    await dead.found(rounds=2)
    assert (await ledger(store.redis)).requests == 2
    assert [await dead.is_open(claim_id) for claim_id in ("a", "b", "c")] == [True, False, False]


async def test_many_unreadable_sessions_do_not_block_the_others(store: Store) -> None:
    dead = Dead(store)
    for n in range(AT_ONCE):
        await reserved(dead.accounts, f"bad-{n}")
        await dead.break_session(f"bad-{n}")
    await dead.ended("good", b"{}")
    await come(store, "open")
    await store.redis.zadd(account_of(store, CLIENT).shared("open"), {"good": 2})  # found last
    reaper = reaper_of(store, dead.accounts)
    for _ in range(2):
        assert await reaper._round()
    assert not await dead.is_open("good")
    assert await open_reservations(store.redis) == AT_ONCE, "none of them may be released"


async def test_an_unreadable_reservation_does_not_stop_other_renewals(store: Store) -> None:
    dead = Dead(store)
    running = [await dead.claimed(claim_id) for claim_id in ("1", "2", "3")]
    record = account_of(store, CLIENT).reservation("1")
    await store.redis.delete(record)
    await store.redis.set(record, "no hash")
    await come(store, "open")
    await reaper_of(store, dead.accounts)._renew(running)
    open_until: Any = await store.redis.zrange(
        account_of(store, CLIENT).shared("open"), 0, -1, withscores=True
    )
    renewed = {claim_id for claim_id, score in open_until if score > 1}
    assert {b"2", b"3"} <= renewed


# Claims with an unknown outcome


async def test_a_reservation_of_an_expired_session_is_booked_at_worst(store: Store) -> None:
    """It was claimed, its worker died at once, and its session expired before another worker found it."""
    dead = Dead(store)
    reservation = await dead.claimed("1")
    await store.redis.delete(store.session_keys(reservation.session_id)["session"])
    await dead.found()
    assert await ledger(store.redis) == WORST


async def test_a_late_claim_without_its_reservation_does_not_win(store: Store) -> None:
    dead = Dead(store)
    await dead.sessions.prepare("session-1", PREPARED)
    await reserved(dead.accounts, "1")
    await dead.found()
    assert await open_reservations(store.redis) == 0
    assert await dead.sessions.claim("session-1", "1", "dead") == SessionStatus(State.PREPARED)
    assert isinstance(await dead.sessions.claim("session-1", "2", "another"), Prepared), "another claim wins"


async def test_a_claim_that_has_won_meanwhile_is_not_given_back(store: Store) -> None:
    """The session is read before its claim wins, and the reservation is released after that."""
    dead = Dead(store)
    reservation = await dead.claimed("1")
    before = await dead.sessions.describe(reservation.session_id)
    assert before is not None
    reaper = reaper_of(store, dead.accounts)
    await reaper._look_after(reservation, replace(before, state=State.PREPARED, claim_id=""))
    assert await dead.is_open("1")


@pytest.mark.parametrize("end", ["cancelled", "another's"])
async def test_a_claim_that_lost_is_given_back(store: Store, end: str) -> None:
    dead = Dead(store)
    await dead.sessions.prepare("session-1", PREPARED)
    await reserved(dead.accounts, "1")
    if end == "cancelled":
        await dead.sessions.cancel("session-1", cancelled_before_start())
    else:
        await dead.sessions.claim("session-1", "2", "another")
    await dead.found()
    assert await ledger(store.redis) == Ledger()
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_a_claim_repeated_after_a_cancel_gets_the_end(store: Store) -> None:
    dead = Dead(store)
    await dead.claimed("1")
    assert (await dead.sessions.cancel("session-1", cancelled_before_start())).state is State.RUNNING
    end = cancelled_before_start()
    for _ in range(2):
        answer = await dead.sessions.claim("session-1", "1", "dead")
        assert isinstance(answer, SessionStatus)
        assert (answer.state, answer.end) == (State.CANCELLED, end)


# One liveness


async def test_an_orphan_is_ended_even_if_its_worker_is_alive(store: Store) -> None:
    """A session without renewal counts as lost, even if its worker is alive."""
    dead = Dead(store)
    reservation = await dead.claimed("1")
    await dead.found()
    status = await dead.sessions.describe(reservation.session_id)
    assert status is not None
    assert status.state is State.LOST
    assert await open_reservations(store.redis) == 0


async def test_after_an_outage_workers_have_time_to_renew(store: Store) -> None:
    dead, clock = Dead(store), Clock()
    await dead.claimed("1")
    await come(store, "open")
    reaper = reaper_of(store, dead.accounts, clock)
    broken = reaper._accounts.overdue

    async def away(limit: int) -> list[Reservation]:
        raise StoreUnavailable

    reaper._accounts.overdue = away  # type: ignore[method-assign]
    assert not await reaper._round()
    reaper._accounts.overdue = broken  # type: ignore[method-assign]
    clock.now += LEASE - 0.1
    assert await reaper._round()
    assert await dead.is_open("1")
    clock.now += 0.2
    assert await reaper._round()
    assert not await dead.is_open("1")


@pytest.mark.slow
async def test_2000_sessions_of_a_dead_worker_are_ended_in_one_round(
    store: Store, valkey_url: str, record_property: Any
) -> None:
    dead, many = Dead(store), 2000
    for n in range(many):
        await dead.claimed(str(n))
    await come(store, "open")
    async with wire_to(valkey_url) as wire:
        wire.delay = 0.01  # 20 ms there and back
        far = Store(wire.url, "test")
        accounts = AccountStore(far, FREE)
        reaper = reaper_of(far, accounts)
        started = time.monotonic()
        assert await reaper._round()
        record_property("seconds", round(time.monotonic() - started, 2))
        await far.close()
    assert await open_reservations(store.redis) == 0
    for n in range(0, many, 97):
        record = await dead.sessions.describe(f"session-{n}")
        assert record is not None
        assert record.state is State.LOST
