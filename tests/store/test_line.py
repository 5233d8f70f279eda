"""Pages of one client that wait for a slot: their places, whose turn it is, and who has left."""

from __future__ import annotations

import random
from typing import Any

import pytest

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import BeingClaimed, Queued, TooManyStreams
from broker.core.session import State
from broker.store.accounts import LINE, AccountStore, Reservation
from broker.store.buckets import account_of
from broker.store.connection import Store
from broker.store.pending import PendingStore

SLOTS = 2
QUOTAS = Quotas(pending=1000, streams=SLOTS, daily_tokens=0, daily_cost=0, total_daily_cost=0)
CLIENT = "client"


class Line:
    """Sessions of one client; each page claims with an id of its own every time that it comes."""

    def __init__(self, store: Store) -> None:
        self.accounts = AccountStore(store, QUOTAS)
        self.redis: Any = store.redis
        self.keys = account_of(store, CLIENT).line_keys()
        self.running: dict[str, Reservation] = {}
        self._visits = 0

    async def come(self, session: str) -> Queued | None:
        """A page comes for its session. Returns its place, or None where it takes a slot."""
        self._visits += 1
        reservation = Reservation(f"{session}-{self._visits}", session, CLIENT, "m", WorstCase(1, 0))
        try:
            await self.accounts.reserve(reservation, may_wait=True)
        except Queued as place:
            return place
        self.running[session] = reservation
        return None

    async def place(self, session: str) -> tuple[int, int]:
        place = await self.come(session)
        assert place is not None
        return place.position, place.of

    async def end(self, session: str) -> None:
        await self.accounts.settle(self.running.pop(session), Usage(1, 0), State.DONE)

    async def be_late(self, session: str, ms: int) -> None:
        """Let the time by which its page should have come back lie so far in the past."""
        seconds, _ = await self.redis.time()
        await self.redis.zadd(self.keys["due"], {session: seconds * 1000 - ms}, xx=True)

    async def fill(self) -> None:
        for n in range(SLOTS):
            assert await self.come(f"first {n}") is None


@pytest.fixture
async def line(store: Store) -> Line:
    line = Line(store)
    await line.fill()
    return line


async def test_pages_wait_in_the_order_in_which_they_came(line: Line) -> None:
    assert await line.place("a") == (1, 1)
    assert await line.place("b") == (2, 2)
    assert await line.place("c") == (3, 3)
    assert await line.place("a") == (1, 3), "and keep their places"


async def test_a_free_slot_is_kept_for_the_first_in_line(line: Line) -> None:
    await line.place("a")
    await line.place("b")
    await line.end("first 0")
    assert await line.place("b") == (2, 2)
    assert await line.place("new") == (3, 3)
    assert await line.come("a") is None
    assert await line.place("b") == (1, 2)


async def test_as_many_as_there_are_free_slots_may_run(line: Line) -> None:
    for session in ("a", "b", "c"):
        await line.place(session)
    for n in range(SLOTS):
        await line.end(f"first {n}")
    assert await line.place("c") == (3, 3)
    assert await line.come("b") is None, "there is one for the page in front as well"
    assert await line.come("a") is None
    assert await line.place("c") == (1, 1)


async def test_an_overdue_page_keeps_its_place_but_no_slot(line: Line) -> None:
    for session in ("a", "b", "c"):
        await line.place(session)
    await line.be_late("a", 1000)
    await line.end("first 0")
    assert await line.come("b") is None
    assert await line.place("a") == (1, 2)


async def test_a_place_is_given_up_when_its_page_does_not_come_back(line: Line) -> None:
    await line.place("a")
    await line.place("b")
    await line.be_late("a", LINE["PLACE_MS"] + 2000)
    assert await line.place("b") == (1, 1)
    assert await line.place("a") == (2, 2), "a later page is the last"


async def test_a_cancel_frees_the_place(store: Store, line: Line) -> None:
    await line.place("a")
    await line.place("b")
    await PendingStore(store, QUOTAS, session_ttl=600).forget(CLIENT, "a")
    assert await line.place("b") == (1, 1)


async def test_pages_far_behind_come_back_less_often(line: Line) -> None:
    retries = []
    for n in range(60):
        place = await line.come(f"page {n}")
        assert place is not None
        retries.append(place.retry_ms)
    assert retries == sorted(retries)
    assert (retries[0], retries[-1]) == (2000, 10_000)


async def test_a_caller_that_cannot_wait_takes_no_place_in_line(line: Line) -> None:
    await line.place("a")
    for _ in range(2):
        with pytest.raises(TooManyStreams) as refused:
            await line.accounts.reserve(Reservation("curl", "curl", CLIENT, "m", WorstCase(1, 0)))
        assert not isinstance(refused.value, Queued)
        await line.end("first 0") if "first 0" in line.running else None
    assert await line.come("a") is None


async def test_the_lines_of_two_clients_are_their_own(store: Store, line: Line) -> None:
    await line.place("a")
    other = Reservation("other", "other", "another client", "m", WorstCase(1, 0))
    await line.accounts.reserve(other, may_wait=True)


async def test_a_session_that_is_claimed_elsewhere_does_not_wait(line: Line) -> None:
    with pytest.raises(BeingClaimed):
        await line.come("first 0")


async def test_the_line_has_a_time_to_live(line: Line) -> None:
    await line.place("a")
    for key in line.keys.values():
        assert 0 < await line.redis.pttl(key) <= 60_000


async def test_no_page_passes_another_that_comes_back_in_time(store: Store) -> None:
    """Any order of pages that come, come back, leave and end; the line is compared with a list."""
    for seed in range(5):
        await store.redis.flushall()
        line, chance = Line(store), random.Random(seed)
        waiting: list[str] = []
        late: set[str] = set()
        for n in range(200):
            step = chance.random()
            if step < 0.35 and line.running:
                await line.end(chance.choice(sorted(line.running)))
                continue
            if step < 0.45 and waiting:
                left = chance.choice(waiting)
                late.add(left)
                await line.be_late(left, 1000)
                continue
            session = chance.choice(waiting) if waiting and step < 0.8 else f"{seed} page {n}"
            before = waiting.index(session) if session in waiting else len(waiting)
            kept = [each for each in waiting[:before] if each not in late]
            place = await line.come(session)
            assert len(line.running) <= SLOTS
            if place is None:
                assert len(kept) < SLOTS - (len(line.running) - 1), "a slot was kept for who is in front"
                waiting = [each for each in waiting if each != session]
            else:
                assert len(line.running) + len(kept) >= SLOTS, "a slot stays free that nobody waits for"
                if session not in waiting:
                    waiting.append(session)
                assert (place.position, place.of) == (before + 1, len(waiting))
            late.discard(session)
