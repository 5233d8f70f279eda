"""Claims with an unknown outcome, without viewers, withdrawn, and made by several workers at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import pytest_asyncio

from broker.core.accounts import WorstCase
from broker.core.errors import BeingClaimed, BudgetExceeded, StoreUnavailable, TooManyStreams
from broker.core.events import cancelled_before_start
from broker.core.session import State
from broker.relay.claiming import Claiming
from broker.relay.pursuit import TURNS_TO_SEND
from broker.store.accounts import AccountStore, Reservation
from broker.store.buckets import account_of
from broker.store.clock import IN_TIME_MS, KNOWN_FOR
from broker.store.connection import Store
from broker.store.pending import PendingStore
from broker.store.sessions import Prepared, SessionStatus, SessionStore
from broker.store.shared_connection import PROMPT
from tests.kinds import needs_one_server
from tests.money import open_reservations, slots, until
from tests.relay.test_races import FREE, InSteps
from tests.scripted import PATIENCE
from tests.valkey_cluster import one_address
from tests.wire import Wire, wire_to

if TYPE_CHECKING:
    from broker.core.accounts import Quotas
    from broker.relay.generation import Generation

PREPARED = Prepared(
    request=b"{}", model="model", prompt_tokens=1, referer="", client="client", worst=WorstCase(10, 100)
)
CLAIM, RESERVE = b"claimer", b"total-claim"
"""Bytes that only the packet of a claim, or of a reservation, contains."""


class Claimer:
    """A worker that claims over a connection of its own.

    Args:
        url: of Redis.
        quotas: the limits of clients.
        in_steps: it reserves first and claims when it has the reply, as in a cluster; else both are one round trip.
    """

    def __init__(self, url: str, quotas: Quotas = FREE, *, in_steps: bool = True) -> None:
        self.store = Store(url, "test")
        self.sessions = SessionStore(self.store, session_ttl=600, running_ttl=960, resume_ttl=300)
        self.accounts = (InSteps if in_steps else AccountStore)(self.store, quotas)
        self.pending = PendingStore(self.store, quotas, session_ttl=600)
        self.begun: list[str] = []
        self.opened_ahead = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.claims = Claiming(
            self.sessions,
            self.accounts,
            self.pending,
            worker="claimer",
            give_up_after=100,
            begin=self._begin,
            spawn=self._spawn,
            open_ahead=self._open_ahead,
        )

    def _begin(self, session: str, reservation: Reservation, prepared: Prepared) -> Generation:
        self.begun.append(session)
        return cast("Generation", session)

    def _open_ahead(self) -> None:
        self.opened_ahead += 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def prepare(self, session: str = "session") -> None:
        await self.pending.admit("client", session, PREPARED.worst, stored=1)
        await self.sessions.prepare(session, replace(PREPARED, model="total-claim"))

    async def idle(self) -> None:
        """Wait until no claim is under way."""
        await until(lambda: asyncio.sleep(0, not self._tasks))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.close()


@pytest_asyncio.fixture
async def wire(valkey_url: str) -> AsyncIterator[Wire]:
    async with wire_to(valkey_url) as wire:
        yield wire


@pytest_asyncio.fixture
async def claimer(wire: Wire) -> AsyncIterator[Claimer]:
    async with claiming(wire, in_steps=True) as claimer:
        yield claimer


@pytest_asyncio.fixture
async def at_once(wire: Wire) -> AsyncIterator[Claimer]:
    async with claiming(wire, in_steps=False) as claimer:
        yield claimer


@asynccontextmanager
async def claiming(wire: Wire, *, in_steps: bool) -> AsyncIterator[Claimer]:
    """Yield a worker that has prepared a session."""
    claimer = Claimer(wire.url, in_steps=in_steps)
    await claimer.prepare()
    yield claimer
    wire.unblock()
    await claimer.close()


async def state_of(store: Store, session: str = "session") -> State:
    described = await SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300).describe(session)
    return described.state if described is not None else State.GONE


async def is_in_order(store: Store, claimer: Claimer) -> bool:
    """Return True if one slot and one reservation are taken by a session that runs, and nothing by any other.

    A session that runs has no pending place, and one that is prepared has one.
    """
    state = await state_of(store)
    runs = int(state is State.RUNNING)
    assert claimer.begun == ["session"] * runs
    places = [await store.redis.zcard(key) for key in await store.redis.keys("*:pending:*")]
    return (
        await slots(store.redis) == await open_reservations(store.redis) == runs
        and sum(places) == 2 * (state is State.PREPARED)  # of the client and of the total
    )


def begun(outcome: object) -> bool:
    """Returns True if a claim has won. A generation is only the name of its session here."""
    return outcome == "session"


# Pursued or not


async def test_a_claim_that_was_never_sent_is_not_pursued(store: Store, wire: Wire, claimer: Claimer) -> None:
    wire.block = RESERVE
    with pytest.raises(StoreUnavailable):
        await claimer.claims.claim("session")
    assert len(claimer.claims) == 0
    wire.unblock()
    await claimer.idle()
    await until(lambda: asyncio.sleep(0, wire.count("session") >= 1))
    assert (claimer.begun, await state_of(store)) == ([], State.PREPARED)
    assert claimer.opened_ahead == 1, "which is kept for the next request"
    assert await slots(store.redis) == await open_reservations(store.redis) == 0
    await claimer.claims.claim("session")  # as the page does that comes again
    assert claimer.begun == ["session"]


async def test_a_sent_claim_is_pursued_without_viewers(store: Store, wire: Wire, claimer: Claimer) -> None:
    wire.block = CLAIM
    with pytest.raises(StoreUnavailable):
        await claimer.claims.claim("session")
    assert "session" in claimer.claims
    wire.unblock()
    await claimer.idle()
    assert (claimer.begun, await state_of(store)) == (["session"], State.RUNNING)
    assert claimer.opened_ahead == 1, "however often the claim was sent"
    assert await slots(store.redis) == 1


async def test_viewers_that_leave_before_a_claim_is_sent_take_it_along(
    store: Store, wire: Wire, claimer: Claimer
) -> None:
    wire.block = RESERVE
    waiting = [asyncio.create_task(claimer.claims.claim("session")) for _ in range(3)]
    await wire.until_blocked()
    for viewer in waiting:
        viewer.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    wire.unblock()
    await claimer.idle()
    assert (claimer.begun, await state_of(store)) == ([], State.PREPARED)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_a_viewer_works_while_redis_decides(wire: Wire, claimer: Claimer) -> None:
    wire.block = RESERVE
    worked = asyncio.Event()

    async def work() -> None:
        worked.set()

    viewer = asyncio.create_task(claimer.claims.claim("session", meanwhile=work))
    await wire.until_blocked()
    async with asyncio.timeout(PATIENCE):
        await worked.wait()
    assert not viewer.done()
    wire.unblock()
    assert begun(await viewer)


async def test_a_viewer_whose_work_fails_has_left(store: Store, wire: Wire, claimer: Claimer) -> None:
    async def fail() -> None:
        raise ConnectionResetError

    wire.block = RESERVE
    with pytest.raises(ConnectionResetError):
        await claimer.claims.claim("session", meanwhile=fail)
    wire.unblock()
    await claimer.idle()
    assert (claimer.begun, await state_of(store)) == ([], State.PREPARED)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_one_viewer_that_stays_is_enough(wire: Wire, claimer: Claimer) -> None:
    wire.block = RESERVE
    leaving, staying = [asyncio.create_task(claimer.claims.claim("session")) for _ in range(2)]
    await wire.until_blocked()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    wire.unblock()
    assert begun(await staying)
    assert claimer.begun == ["session"]


async def test_a_later_viewer_waits_for_the_outcome_of_the_claim(wire: Wire, claimer: Claimer) -> None:
    wire.block = CLAIM
    with pytest.raises(StoreUnavailable):
        await claimer.claims.claim("session")
    late = [asyncio.create_task(claimer.claims.claim("session")) for _ in range(3)]
    await asyncio.sleep(0)
    wire.unblock()
    assert all(map(begun, await asyncio.gather(*late)))
    assert claimer.begun == ["session"]


# In one round trip


async def test_a_claim_takes_one_round_trip(store: Store, wire: Wire, at_once: Claimer) -> None:
    before = len(wire.sent)
    assert begun(await at_once.claims.claim("session"))
    await at_once.idle()
    claim, forgotten = wire.sent[before:]
    assert RESERVE in claim
    assert CLAIM in claim
    assert b"pending" in forgotten, "which the page does not wait for"
    assert await is_in_order(store, at_once)


@pytest.mark.parametrize(
    "limits", [{"streams": 1}, {"daily_tokens": 15}, {"daily_cost": 150}, {"monthly_cost": 150}]
)
async def test_a_claim_without_room_claims_nothing(
    store: Store, valkey_url: str, limits: dict[str, int]
) -> None:
    claimer = Claimer(valkey_url, replace(FREE, **limits), in_steps=False)
    await claimer.prepare("other")
    await claimer.prepare()
    await claimer.claims.claim("other")
    with pytest.raises(TooManyStreams if "streams" in limits else BudgetExceeded):
        await claimer.claims.claim("session")
    await claimer.idle()
    assert (claimer.begun, await state_of(store)) == (["other"], State.PREPARED)
    assert await slots(store.redis) == await open_reservations(store.redis) == 1
    assert await store.redis.zcard(account_of(store, "client").key("pending")) == 1, "it still waits"
    await claimer.close()


@pytest.mark.parametrize("has_room", [True, False])
async def test_the_total_budget_is_asked_before_a_claim(
    store: Store, valkey_url: str, has_room: bool
) -> None:
    """It is another account, so that the claim is a round trip of its own."""
    quotas = replace(FREE, total_daily_cost=200 if has_room else 150)
    claimer = Claimer(valkey_url, quotas, in_steps=False)
    await claimer.prepare("other")
    await claimer.prepare()
    await claimer.claims.claim("other")
    if has_room:
        assert begun(await claimer.claims.claim("session"))
    else:
        with pytest.raises(BudgetExceeded):
            await claimer.claims.claim("session")
    await claimer.idle()
    assert (
        len(claimer.begun) == await slots(store.redis) == await open_reservations(store.redis) == 1 + has_room
    )
    await claimer.close()


async def test_a_server_that_stands_for_a_cluster_is_asked_in_steps() -> None:
    """Some services have one address and divide the keys behind it. They refuse a call with keys of several slots."""
    needs_one_server("it starts one of its own")
    async with one_address() as server:
        claimer, store = Claimer(server.url, in_steps=False), Store(server.url, "test")
        refused = []
        for session in ("first", "second"):
            await claimer.prepare(session)
            await claimer.claims.claim(session)
            await claimer.idle()
            refused.append(claimer.store.errors)
        assert claimer.begun == ["first", "second"]
        assert await slots(store.redis) == await open_reservations(store.redis) == 2
        assert not claimer.store.runs_in_order
        assert refused[0] == refused[1] > 0, "after the first claim no other was tried so"
        assert await store.redis.keys("*:pending:*") == [], "all places are free"
        await claimer.close()
        await store.close()


async def test_a_claim_whose_reply_was_lost_has_won(store: Store, wire: Wire, at_once: Claimer) -> None:
    wire.drop = b"total-claim"
    with pytest.raises(StoreUnavailable):
        await at_once.claims.claim("session")
    assert await state_of(store) is State.RUNNING
    assert "session" in at_once.claims
    wire.drop = b""
    await at_once.idle()
    assert at_once.begun == ["session"], "though nobody has asked again"
    assert await is_in_order(store, at_once)


async def test_a_claim_that_never_arrived_in_time_cannot_win_later(
    store: Store, wire: Wire, at_once: Claimer
) -> None:
    wire.block = CLAIM
    with pytest.raises(StoreUnavailable):
        await at_once.claims.claim("session")
    await at_once.idle()  # it was made void, for nobody waits
    assert (at_once.begun, await state_of(store)) == ([], State.PREPARED)
    sent = wire.count("session")
    wire.unblock()
    await until(lambda: asyncio.sleep(0, wire.count("session") > sent))
    assert await is_in_order(store, at_once)
    assert begun(await at_once.claims.claim("session")), "as a page gets it that comes again"
    await at_once.idle()
    assert await is_in_order(store, at_once)


async def test_a_claim_that_comes_late_does_not_begin_for_nobody(
    store: Store, wire: Wire, at_once: Claimer
) -> None:
    """As after a while in which Redis stood still: it does first what it was asked before."""
    wire.block = CLAIM
    with pytest.raises(StoreUnavailable):
        await at_once.claims.claim("session")
    sent = wire.count("session")
    wire.unblock()
    await until(lambda: asyncio.sleep(0, wire.count("session") > sent))
    await at_once.idle()
    assert (at_once.begun, await state_of(store)) == ([], State.PREPARED)
    assert await is_in_order(store, at_once)
    assert begun(await at_once.claims.claim("session"))
    await at_once.idle()
    assert await is_in_order(store, at_once)


async def test_a_claim_that_is_a_little_late_begins_for_the_page_that_waits(
    store: Store, wire: Wire, at_once: Claimer
) -> None:
    at_once.store.call_timeout = PATIENCE
    wire.block = CLAIM
    viewer = asyncio.create_task(at_once.claims.claim("session"))
    await wire.until_blocked()
    await asyncio.sleep(IN_TIME_MS / 1000)  # and so it is late
    wire.unblock()
    assert begun(await viewer)
    await at_once.idle()
    assert await is_in_order(store, at_once)


async def test_without_the_clock_of_redis_a_claim_is_made_in_steps(
    wire: Wire, at_once: Claimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + KNOWN_FOR)
    before = len(wire.sent)
    assert begun(await at_once.claims.claim("session"))
    await at_once.idle()
    reserve, claim = wire.sent[before:]
    assert RESERVE in reserve
    assert CLAIM not in reserve
    assert CLAIM in claim


async def test_a_page_that_comes_again_gets_the_session_by_another_claim(
    store: Store, wire: Wire, at_once: Claimer
) -> None:
    wire.block = b"total-claim"  # and not what makes it void
    with pytest.raises(StoreUnavailable):
        await at_once.claims.claim("session")
    late = [asyncio.create_task(at_once.claims.claim("session")) for _ in range(3)]
    await asyncio.sleep(0)
    wire.block = b""  # for new connections; what was sent before waits on its own
    assert all(map(begun, await asyncio.gather(*late)))
    sent = wire.count("session")
    wire.unblock()
    await until(lambda: asyncio.sleep(0, wire.count("session") > sent))
    await at_once.idle()
    assert await is_in_order(store, at_once)


async def test_a_claim_is_made_in_steps_while_redis_is_slow(
    store: Store, wire: Wire, at_once: Claimer
) -> None:
    """So nothing begins that nobody waits for any more."""
    wire.block = b"still"
    other = asyncio.create_task(at_once.store.command("GET", "still"))
    await wire.until_blocked()
    await asyncio.sleep(PROMPT)  # so long has the call waited
    viewer = asyncio.create_task(at_once.claims.claim("session"))
    for _ in range(TURNS_TO_SEND + 1):
        await asyncio.sleep(0)  # then it has asked
    viewer.cancel()
    await asyncio.gather(viewer, return_exceptions=True)
    wire.unblock()
    await other
    await at_once.idle()
    assert (at_once.begun, await state_of(store)) == ([], State.PREPARED)
    assert await is_in_order(store, at_once)


@pytest.mark.parametrize("lost", [False, True], ids=["late", "lost reply"])
async def test_a_claim_at_once_that_is_withdrawn_never_begins(
    store: Store, wire: Wire, at_once: Claimer, lost: bool
) -> None:
    if lost:
        wire.drop = b"total-claim"
    else:
        wire.block = CLAIM
    waiting = asyncio.create_task(at_once.claims.claim("session"))
    await (wire.until_blocked() if not lost else until(lambda: is_running(store)))
    assert at_once.claims.withdraw("session")
    wire.drop = b""
    wire.unblock()
    await asyncio.gather(waiting, return_exceptions=True)
    await at_once.idle()
    assert (at_once.begun, await state_of(store)) == ([], State.CANCELLED)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_a_claim_that_is_withdrawn_while_it_is_made_void_is_cancelled(
    store: Store, wire: Wire, at_once: Claimer
) -> None:
    wire.block = CLAIM
    with pytest.raises(StoreUnavailable):
        await at_once.claims.claim("session")
    wire.blocked.clear()
    wire.block = b"session"
    await wire.until_blocked()
    assert at_once.claims.withdraw("session")
    wire.unblock()
    await at_once.idle()
    assert (at_once.begun, await state_of(store)) == ([], State.CANCELLED)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def is_running(store: Store) -> bool:
    return await state_of(store) is State.RUNNING


async def test_of_many_claims_as_many_win_as_there_is_room_for(store: Store, valkey_url: str) -> None:
    claimers = [Claimer(valkey_url, replace(FREE, streams=3), in_steps=n == 0) for n in range(3)]
    for n in range(8):
        await claimers[0].prepare(f"s{n}")
    outcomes = await asyncio.gather(
        *(each.claims.claim(f"s{n}") for n in range(8) for each in claimers), return_exceptions=True
    )
    begun = [session for each in claimers for session in each.begun]
    assert len(begun) == len(set(begun)) == 3
    assert await slots(store.redis) == 3
    assert not [each for each in outcomes if isinstance(each, StoreUnavailable)]
    for each in claimers:
        await each.idle()
        await each.close()
    assert await open_reservations(store.redis) == 3


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_is_lost_a_session_begins_once_and_leaves_nothing(
    store: Store, wire: Wire, at_once: Claimer, seed: int
) -> None:
    """Packets come late or never, replies are lost, and pages leave and come again, in an order by chance."""
    chance = random.Random(seed)
    pages: list[asyncio.Task[object]] = []
    for _ in range(6):
        match chance.randrange(5):
            case 0:
                wire.block = chance.choice([CLAIM, b"total-claim", b"refused"])
            case 1:
                wire.drop = b"total-claim"
            case 2:
                wire.unblock()
                wire.drop = b""
            case 3 if pages:
                chance.choice(pages).cancel()
        pages.append(asyncio.create_task(at_once.claims.claim("session")))
        await asyncio.sleep(chance.choice([0, 0.002, 0.4]))
    wire.drop = b""
    wire.unblock()
    await asyncio.gather(*pages, return_exceptions=True)
    await at_once.idle()
    if not at_once.begun:
        await at_once.claims.claim("session")
        await at_once.idle()
    assert at_once.begun == ["session"]
    await until(lambda: is_in_order(store, at_once))


# Cancelled meanwhile


@pytest.mark.parametrize("held", [CLAIM, RESERVE], ids=["claim", "reservation"])
@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
async def test_a_claim_that_is_withdrawn_never_begins(
    store: Store, wire: Wire, claimer: Claimer, held: bytes, in_time: bool
) -> None:
    wire.block = held
    waiting = asyncio.create_task(claimer.claims.claim("session"))
    await wire.until_blocked()
    if not in_time:
        with suppress(StoreUnavailable):
            await waiting
    withdrawn = claimer.claims.withdraw("session")
    assert withdrawn or (held == RESERVE and not in_time), "a claim that was never sent is over"
    wire.unblock()
    outcome = await asyncio.gather(waiting, return_exceptions=True)
    await claimer.idle()
    assert claimer.begun == []
    assert await slots(store.redis) == await open_reservations(store.redis) == 0
    if withdrawn:
        assert await state_of(store) is State.CANCELLED
    if in_time:
        [standing] = outcome
        assert isinstance(standing, SessionStatus)
        assert (standing.state, standing.end) == (State.CANCELLED, cancelled_before_start())


@pytest.mark.parametrize("in_steps", [True, False], ids=["in steps", "at once"])
async def test_a_claim_with_a_lost_reply_that_is_cancelled_ends_so(
    store: Store, wire: Wire, in_steps: bool
) -> None:
    elsewhere = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)
    async with claiming(wire, in_steps=in_steps) as claimer:
        wire.drop = b"total-claim"  # the reply of the claim, which has the model in it
        with pytest.raises(StoreUnavailable):
            await claimer.claims.claim("session")
        assert await state_of(store) is State.RUNNING
        assert (await elsewhere.cancel("session", cancelled_before_start())).state is State.RUNNING
        wire.drop = b""
        await claimer.idle()
        assert (claimer.begun, await state_of(store)) == ([], State.CANCELLED)
        assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_only_a_claim_under_way_can_be_withdrawn(claimer: Claimer) -> None:
    assert not claimer.claims.withdraw("session")
    await claimer.claims.claim("session")
    assert not claimer.claims.withdraw("session"), "it has begun"


# Claimed elsewhere


@pytest.mark.parametrize(
    "limits", [{"streams": 1}, {"daily_tokens": 15}, {"daily_cost": 150}, {"total_daily_cost": 150}]
)
async def test_a_session_claimed_elsewhere_needs_no_second_slot(
    store: Store, valkey_url: str, wire: Wire, limits: dict[str, int]
) -> None:
    quotas = replace(FREE, **limits)
    one, other = Claimer(wire.url, quotas), Claimer(valkey_url, quotas)
    await one.prepare()
    await one.prepare("next")
    wire.block = CLAIM
    first = asyncio.create_task(one.claims.claim("session"))
    await wire.until_blocked()
    second = asyncio.create_task(other.claims.claim("session"))
    with pytest.raises(TooManyStreams if "streams" in limits else BudgetExceeded):
        await other.claims.claim("next")
    wire.unblock()
    assert begun(await first)
    assert await second == SessionStatus(State.RUNNING, "claimer")
    assert await slots(store.redis) == 1
    for each in (one, other):
        await each.close()


async def test_a_claim_elsewhere_that_takes_too_long_is_being_claimed(valkey_url: str, wire: Wire) -> None:
    quotas = replace(FREE, streams=1)
    one, other = Claimer(wire.url, quotas), Claimer(valkey_url, quotas)
    await one.prepare()
    wire.block = CLAIM
    first = asyncio.create_task(one.claims.claim("session"))
    await wire.until_blocked()
    with pytest.raises(BeingClaimed):
        await other.claims.claim("session")
    wire.unblock()
    await asyncio.gather(first, return_exceptions=True)
    for each in (one, other):
        await each.close()


async def test_a_session_that_runs_elsewhere_takes_no_place_in_line(store: Store, valkey_url: str) -> None:
    """This worker prepared it and remembers it as prepared, and all slots of its client are taken."""
    claimer = Claimer(valkey_url, replace(FREE, streams=1))
    await claimer.prepare("other")
    await claimer.claims.claim("other", may_wait=True)
    await claimer.prepare()
    await SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300).claim("session", "c", "w")
    status = await claimer.claims.claim("session", may_wait=True)
    await claimer.close()
    assert isinstance(status, SessionStatus)
    assert status.state is State.RUNNING
    assert await store.redis.zcard(account_of(store, "client").line_keys()["line"]) == 0
