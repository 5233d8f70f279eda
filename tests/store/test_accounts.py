"""Slots, budgets and the usage ledger in a real Valkey. The sums are checked after every step."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import BeingClaimed, BudgetExceeded, LimitError, TooManyStreams
from broker.core.session import State
from broker.store.accounts import AccountStore, Reservation
from broker.store.connection import Store
from broker.store.pending import PendingStore
from broker.store.usage_ledger import OTHER, UsageLedger
from tests.money import TOTAL, ledger
from tests.redis_client import info_of_all

FREE = Quotas(pending=50, streams=1000, daily_tokens=0, daily_cost=0, total_daily_cost=0)


def wanted(claim_id: str, client: str = "c", tokens: int = 10, cost: int = 100) -> Reservation:
    return Reservation(claim_id, f"session-{claim_id}", client, "model", WorstCase(tokens, cost))


async def reserved(accounts: AccountStore, reservation: Reservation) -> Reservation:
    return await accounts.reserve(reservation)


async def test_claims_at_once_win_while_there_is_room(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, total_daily_cost=37 * 100))
    at_once = asyncio.Semaphore(20)  # a call has a second, and all connections are new

    async def claim(n: int) -> Reservation:
        async with at_once:
            return await accounts.reserve(wanted(str(n), client=f"c{n % 7}"))

    results = await asyncio.gather(*(claim(n) for n in range(500)), return_exceptions=True)
    assert sum(isinstance(result, Reservation) for result in results) == 37
    assert all(isinstance(result, Reservation | BudgetExceeded) for result in results)
    assert (await ledger(store.redis)).reserved_cost == 3700
    assert (await ledger(store.redis, TOTAL)).reserved_cost == 3700


async def test_slots_are_the_clients_own(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, streams=2))
    for n in range(2):
        await accounts.reserve(wanted(f"a{n}", client="a"))
    with pytest.raises(TooManyStreams):
        await accounts.reserve(wanted("a2", client="a"))
    await accounts.reserve(wanted("b0", client="b"))


async def test_every_way_out_gives_the_slot_back(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, streams=1))
    first = await reserved(accounts, wanted("1"))
    await accounts.settle(first, Usage(1, 1, cost=5), State.DONE)
    second = await reserved(accounts, wanted("2"))
    await accounts.release(second)
    await accounts.reserve(wanted("3"))


async def test_a_repeated_claim_reserves_nothing_more(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, streams=1))
    for _ in range(3):
        await accounts.reserve(wanted("1"))
    assert (await ledger(store.redis)).reserved_tokens == 10


async def test_a_late_repeat_does_not_reserve_again(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    await accounts.release(wanted("1"))  # arrives before its reserve
    with pytest.raises(Exception, match="given back"):
        await accounts.reserve(wanted("1"))
    assert (await ledger(store.redis)).reserved_tokens == 0


async def test_usage_is_booked_once_and_whole_above_its_reservation(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, wanted("1", tokens=10, cost=100))
    for _ in range(3):
        await accounts.settle(reservation, Usage(20, 30, 5, 7, 1234), State.DONE)
    await accounts.release(reservation)
    total = await ledger(store.redis)
    assert (total.reserved_tokens, total.reserved_cost) == (0, 0)
    assert (total.spent_tokens, total.spent_cost, total.requests) == (50, 1234, 1)


async def test_an_estimate_is_corrected_once_and_final_usage_is_not(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    guessed = await reserved(accounts, wanted("1"))
    await accounts.settle(guessed, Usage(10, 10, cost=50, estimated=True), State.CANCELLED)
    for _ in range(2):
        await accounts.correct(guessed, Usage(8, 4, cost=30))
    known = await reserved(accounts, wanted("2"))
    await accounts.settle(known, Usage(1, 1, cost=1), State.DONE)
    await accounts.correct(known, Usage(9, 9, cost=9))
    total = await ledger(store.redis)
    assert (total.spent_tokens, total.spent_cost, total.estimated) == (14, 31, 0)
    _, (line,) = await UsageLedger(store).rows(None)
    assert line.counts["cost"] == 31
    assert (line.counts["requests"], line.counts["cancelled"], line.counts["estimated"]) == (2, 1, 0)


async def test_prepare_counts_usage_and_not_reservations(store: Store) -> None:
    quotas = replace(FREE, daily_tokens=100)
    accounts, pending = AccountStore(store, quotas), PendingStore(store, quotas, session_ttl=600)
    reservation = await reserved(accounts, wanted("1", tokens=95))
    await pending.admit("c", "s1", WorstCase(10, 0))
    with pytest.raises(BudgetExceeded):
        await accounts.reserve(wanted("2", tokens=10))
    await accounts.settle(reservation, Usage(60, 35), State.DONE)
    with pytest.raises(BudgetExceeded):
        await pending.admit("c", "s2", WorstCase(10, 0))
    await pending.admit("d", "s3", WorstCase(10, 0))


async def test_the_pending_sessions_of_a_client_are_limited(store: Store) -> None:
    pending = PendingStore(store, replace(FREE, pending=2), session_ttl=600)
    await pending.admit("c", "s1", WorstCase(1, 0))
    await pending.admit("c", "s2", WorstCase(1, 0))
    with pytest.raises(TooManyStreams):
        await pending.admit("c", "s3", WorstCase(1, 0))
    await pending.forget("c", "s1")
    await pending.admit("c", "s3", WorstCase(1, 0))
    await pending.forget("c", "s2")
    await pending.admit("c", "s4", WorstCase(1, 0))


async def test_a_lost_reservation_is_made_again_despite_the_limits(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, streams=1))
    await accounts.reserve(wanted("1"))
    await accounts.reserve_again([wanted("2")])
    assert (await ledger(store.redis)).reserved_tokens == 20


async def test_every_key_has_a_time_to_live(store: Store) -> None:
    accounts, pending = AccountStore(store, FREE), PendingStore(store, FREE, session_ttl=600)
    await pending.admit("c", "s1", WorstCase(1, 1))
    reservation = await reserved(accounts, wanted("1"))
    await accounts.reserve(wanted("2"))
    await accounts.settle(reservation, Usage(1, 1, cost=1), State.FAILED)
    keys = await store.redis.keys("*")
    assert keys
    assert [key for key in keys if await store.redis.ttl(key) < 0] == []


@pytest.mark.parametrize("seed", range(5))
async def test_spent_and_reserved_never_exceed_the_limit(store: Store, seed: int) -> None:
    """Any order of steps, repeats included. No bill exceeds its reservation here, so there is no exception."""
    rng = random.Random(seed)
    limit = 5000
    accounts = AccountStore(store, replace(FREE, streams=5, daily_cost=3000, total_daily_cost=limit))
    open_ones: list[Reservation] = []
    billed = 0
    for n in range(300):
        step = rng.random()
        if step < 0.5:
            client = f"c{rng.randrange(3)}"
            with contextlib.suppress(LimitError):
                open_ones.append(await reserved(accounts, wanted(str(n), client, cost=rng.randrange(1, 900))))
        elif open_ones:
            chosen = open_ones[rng.randrange(len(open_ones))]
            if step < 0.75:
                cost = rng.randrange(chosen.worst.cost + 1)
                for _ in range(rng.randrange(1, 3)):
                    await accounts.settle(chosen, Usage(1, 1, cost=cost), State.DONE)
                billed += cost
            else:
                for _ in range(rng.randrange(1, 3)):
                    await accounts.release(chosen)
            open_ones.remove(chosen)
        total = await ledger(store.redis, TOTAL)
        assert total.spent_cost + total.reserved_cost <= limit
        assert total.reserved_cost == sum(each.worst.cost for each in open_ones)
        assert total == await ledger(store.redis), "the sum of the clients must be the total"
    assert (await ledger(store.redis)).spent_cost == billed


async def test_the_ledger_names_a_bounded_number_of_models_a_day(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.store.usage_ledger.MAX_MODELS", 3)
    monkeypatch.setattr("broker.store.usage_ledger.MAX_CLIENTS", 2)
    accounts = AccountStore(store, replace(FREE, streams=100))
    for number in range(8):
        reservation = await reserved(accounts, replace(wanted(str(number)), model=f"m{number}"))
        await accounts.settle(reservation, Usage(1, 1, cost=5), State.DONE)
    for number, client in enumerate("def"):
        reservation = await reserved(accounts, wanted(f"{number}-{client}", client=client))
        await accounts.settle(reservation, Usage(1, 1, cost=5), State.DONE, model="m0")
    _, lines = await UsageLedger(store).rows(None)
    counted = {(line.client, line.model): line.counts["requests"] for line in lines}
    assert counted == {
        ("c", "m0"): 1,
        ("c", "m1"): 1,
        ("c", "m2"): 1,
        ("c", OTHER): 5,
        ("d", "m0"): 1,
        (OTHER, "m0"): 2,
    }
    assert (await ledger(store.redis)).spent_cost == 55


async def test_final_usage_replaces_the_estimate(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.store.usage_ledger.MAX_MODELS", 0)
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, wanted("1"))
    guess = Usage(1, 1, cost=5, estimated=True)
    await accounts.settle(reservation, guess, State.DONE, generation_id="gen", model="m")
    await accounts.correct(reservation, Usage(2, 2, cost=9))
    _, [line] = await UsageLedger(store).rows(None)
    assert (line.model, line.counts["cost"], line.counts["estimated"]) == (OTHER, 9, 0)


async def commands_run(store: Store) -> int:
    """Return the number of commands that Redis has run so far, including those of scripts."""
    infos = await info_of_all(store.redis, "commandstats")
    return sum(each["calls"] for stats in infos for each in stats.values())


async def test_the_cost_of_a_refused_claim_does_not_grow_with_streams(store: Store) -> None:
    """The total has a slot for each stream of the service."""
    accounts = AccountStore(store, replace(FREE, total_daily_cost=100))
    await accounts.reserve(wanted("first", client="first"))
    costs = []
    for more in (0, 300):
        await accounts.reserve_again([wanted(str(n), client=f"c{n}") for n in range(more)])
        before = await commands_run(store)
        with pytest.raises(BudgetExceeded):
            await accounts.reserve(wanted("refused", client=f"refused-{more}"))
        await accounts.release(wanted(f"given back {more}", client="another"))
        costs.append(await commands_run(store) - before)
    assert costs[1] <= costs[0] + 5


async def test_a_claim_waits_while_another_has_the_last_of_the_total(store: Store) -> None:
    """Two workers claim one session, and the total has room for one of them."""
    accounts = AccountStore(store, replace(FREE, total_daily_cost=150))
    first = wanted("first")
    await accounts.reserve(first)
    with pytest.raises(BeingClaimed):
        await accounts.reserve(replace(first, claim_id="second"))
    assert (
        (await ledger(store.redis)).reserved_cost == (await ledger(store.redis, TOTAL)).reserved_cost == 100
    )
