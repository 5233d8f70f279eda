"""The budget of a calendar month: counted beside the days, by the same steps."""

from __future__ import annotations

import asyncio
import calendar
import contextlib
import datetime as dt
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import BudgetExceeded, LimitError
from broker.core.session import State
from broker.store.accounts import ACCOUNT_TTL, MONTH, AccountStore, Reservation
from broker.store.buckets import account_of, total_account
from broker.store.connection import script_text
from broker.store.pending import PendingStore
from tests.money import TOTAL, Ledger, due_estimates, ledger, let_time_pass

if TYPE_CHECKING:
    from broker.store.connection import Store

FREE = Quotas(pending=50, streams=1000, daily_tokens=0, daily_cost=0, total_daily_cost=0)
EPOCH = dt.date(1970, 1, 1)


def wanted(claim_id: str, cost: int = 100, client: str = "c") -> Reservation:
    return Reservation(claim_id, f"session-{claim_id}", client, "model", WorstCase(10, cost))


async def reserved(accounts: AccountStore, claim_id: str, cost: int = 100) -> Reservation:
    return await accounts.reserve(wanted(claim_id, cost))


async def month(store: Store) -> Ledger:
    return await ledger(store.redis, months=True)


def days_left() -> int:
    today = dt.datetime.now(dt.UTC).date()
    return calendar.monthrange(today.year, today.month)[1] - today.day


async def test_the_month_of_every_day_is_that_of_the_calendar(store: Store) -> None:
    days = [*range(16_000, 48_000, 1), 11_015, 11_016, 47_540, 47_541]
    lua = script_text("forget", {}).lua.partition("local pending")[0]
    code = f"""{lua}
      local found = {{}}
      for i, day in ipairs(ARGV) do
        local month, ends, before = month_of(tonumber(day))
        found[i] = month .. ' ' .. ends .. ' ' .. before
      end
      return found"""
    for start in range(0, len(days), 5000):
        part = days[start : start + 5000]
        found: Any = await store.redis.eval(code, 0, *map(str, part))
        for day, answer in zip(part, found, strict=True):
            date = EPOCH + dt.timedelta(days=day)
            first = date.replace(day=1)
            following = (first + dt.timedelta(days=31)).replace(day=1)
            before = first - dt.timedelta(days=1)
            assert answer.decode() == f"{date:%Y-%m} {(following - EPOCH).days} {before:%Y-%m}"


async def test_claims_at_once_win_while_the_month_has_room(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, monthly_cost=700))
    results = await asyncio.gather(
        *(accounts.reserve(wanted(str(n))) for n in range(30)), return_exceptions=True
    )
    assert sum(isinstance(result, Reservation) for result in results) == 7
    refused = [result for result in results if not isinstance(result, Reservation)]
    assert all(isinstance(each, BudgetExceeded) and not each.final for each in refused)
    assert (await month(store)).reserved_cost == 700


async def test_a_month_that_is_used_up_refuses_until_its_end(store: Store) -> None:
    quotas = replace(FREE, monthly_cost=150)
    accounts, pending = AccountStore(store, quotas), PendingStore(store, quotas, session_ttl=600)
    await accounts.settle(await reserved(accounts, "1"), Usage(1, 1, cost=100), State.DONE)
    left = days_left()
    with pytest.raises(BudgetExceeded) as claim:
        await accounts.reserve(wanted("2"))
    with pytest.raises(BudgetExceeded) as prepare:
        await pending.admit("c", "s", WorstCase(10, 100))
    assert claim.value.final
    for error in (claim.value, prepare.value):
        assert error.message == MONTH
        assert error.retry_after is not None
        assert left * 86_400 <= error.retry_after <= (left + 1) * 86_400
    await accounts.reserve(wanted("3", cost=50))
    await accounts.reserve(wanted("4", client="d"))


async def test_a_budget_that_is_spent_decides_over_a_reserved_one(store: Store) -> None:
    """The day could have room again when others end, but the month has none whatever they do."""
    accounts = AccountStore(store, replace(FREE, daily_cost=500, monthly_cost=450))
    await accounts.settle(await reserved(accounts, "1"), Usage(1, 1, cost=400), State.DONE)
    await reserved(accounts, "2", cost=50)
    with pytest.raises(BudgetExceeded) as refused:
        await accounts.reserve(wanted("3", cost=60))
    assert refused.value.final


async def test_limits_of_one_client_replace_those_of_the_service(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, monthly_cost=100))
    own = replace(FREE, monthly_cost=250, streams=2)
    for n in range(2):
        await accounts.reserve(wanted(str(n)), quotas=own)
    with pytest.raises(LimitError):
        await accounts.reserve(wanted("3", cost=1), quotas=own)
    with pytest.raises(BudgetExceeded):
        await accounts.reserve(wanted("4", cost=51), quotas=replace(own, streams=9))
    with pytest.raises(BudgetExceeded):
        await accounts.reserve(wanted("5", cost=1))


async def test_an_estimate_keeps_its_rest_of_the_month_reserved(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    first, second = await reserved(accounts, "1"), await reserved(accounts, "2")
    guess = Usage(1, 1, cost=30, estimated=True)
    for each in (first, second):
        await accounts.settle(each, guess, State.FAILED, generation_id="gen")
    assert (await month(store)).spent_cost == 60
    assert (await month(store)).reserved_cost == 140
    await let_time_pass(store.redis, "estimates")
    assert len(await due_estimates(accounts)) == 2
    await accounts.correct(first, Usage(2, 3, cost=80))
    await accounts.accept_estimate(second)
    assert await month(store) == Ledger(2, 1, 0, 110, 0, 0)


async def test_a_generation_of_the_last_month_is_booked_there(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, monthly_cost=100, total_daily_cost=10**9))
    today = (await reserved(accounts, "now", cost=1)).day
    await accounts.release(wanted("now", cost=1))
    before = (EPOCH + dt.timedelta(days=today)).replace(day=1) - dt.timedelta(days=1)
    late = replace(wanted("late"), day=(before - EPOCH).days)
    await accounts.reserve_again([late])
    await accounts.reserve(wanted("new"))  # this month has room
    await accounts.settle(late, Usage(1, 1, cost=90), State.DONE)
    fields: Any = await store.redis.hgetall(account_of(store, "c").key("account"))
    assert fields[f"{before:%Y-%m}:spent_cost".encode()] == b"90"
    assert fields[f"{before:%Y-%m}:reserved_cost".encode()] == b"0"
    total = await accounts.totals("c")
    assert (total.month.requests, total.month.cost, total.day.cost) == (0, 0, 0)


async def test_old_months_are_removed_from_an_account_in_use(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    today = (await reserved(accounts, "now")).day
    await accounts.release(wanted("now"))
    for ago in range(200, -1, -20):
        reservation = replace(wanted(str(ago)), day=today - ago)
        await accounts.reserve_again([reservation])
        await accounts.settle(reservation, Usage(1, 1, cost=1), State.DONE)
    fields: Any = await store.redis.hgetall(account_of(store, "c").key("account"))
    this = (EPOCH + dt.timedelta(days=today)).replace(day=1)
    months = {field.partition(b":")[0].decode() for field in fields if b"-" in field}
    assert months == {f"{this:%Y-%m}", f"{this - dt.timedelta(days=1):%Y-%m}"}


async def test_an_account_is_stored_until_its_month_is_over(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, total_daily_cost=10**9))
    for step in ("reserve", "settle"):
        reservation = await reserved(accounts, step)
        if step == "settle":
            await accounts.settle(reservation, Usage(1, 1, cost=1), State.DONE)
        ttl = await store.redis.ttl(account_of(store, "c").key("account"))
        assert days_left() * 86_400 <= ttl - ACCOUNT_TTL <= (days_left() + 1) * 86_400
        assert await store.redis.ttl(total_account(store).key("account")) <= ACCOUNT_TTL


async def test_the_total_of_all_clients_has_no_months(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, total_daily_cost=10**9))
    await accounts.settle(await reserved(accounts, "1"), Usage(1, 1, cost=1), State.DONE)
    assert await ledger(store.redis, TOTAL, months=True) == Ledger()


@pytest.mark.parametrize("seed", range(4))
async def test_days_and_month_agree_after_any_order_of_steps(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    accounts = AccountStore(store, replace(FREE, daily_cost=4000, monthly_cost=3000))
    running: list[Reservation] = []
    for n in range(200):
        step = rng.random()
        if step < 0.5:
            with contextlib.suppress(LimitError):
                running.append(await reserved(accounts, str(n), cost=rng.randrange(1, 900)))
        elif running:
            chosen = running.pop(rng.randrange(len(running)))
            cost = rng.randrange(chosen.worst.cost // 3 + 1)
            for _ in range(rng.randrange(1, 3)):
                if step < 0.6:
                    await accounts.release(chosen)
                elif step < 0.8:
                    guess = Usage(1, 1, cost=cost, estimated=True)
                    await accounts.settle(chosen, guess, State.FAILED, generation_id="gen")
                    await accounts.correct(chosen, Usage(2, 2, cost=cost * 2))
                else:
                    await accounts.settle(chosen, Usage(1, 1, cost=cost), State.DONE)
        of_month, of_days = await month(store), await ledger(store.redis)
        assert of_month == of_days._replace(spent_tokens=0, reserved_tokens=0)
        assert of_month.spent_cost + of_month.reserved_cost <= 3000
        assert of_month.reserved_cost == sum(each.worst.cost for each in running)
