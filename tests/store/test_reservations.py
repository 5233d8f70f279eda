"""Reservations as leases in a real Valkey: renewed, expired, made again, and found by other workers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import BudgetExceeded, Overloaded, StoreUnavailable, TooManyStreams
from broker.core.session import State
from broker.store.accounts import AccountStore, Reservation
from broker.store.buckets import Account, account_of, total_account
from tests.money import TOTAL, Ledger, due_estimates, ledger, let_time_pass, open_reservations, slots

if TYPE_CHECKING:
    from broker.store.connection import Store

FREE = Quotas(pending=50, streams=2, daily_tokens=0, daily_cost=0, total_daily_cost=0)


def wanted(claim_id: str, client: str = "c") -> Reservation:
    return Reservation(claim_id, f"session-{claim_id}", client, "model", WorstCase(10, 100))


async def reserved(accounts: AccountStore, claim_id: str) -> Reservation:
    return await accounts.reserve(wanted(claim_id))


async def expire(store: Store) -> None:
    """Let every lease expire, as a long outage does."""
    await let_time_pass(store.redis, "open")


async def test_only_reservations_without_renewal_are_found(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    kept, left = await reserved(accounts, "1"), await reserved(accounts, "2")
    assert await accounts.overdue(10) == []
    await expire(store)
    assert await accounts.renew([kept]) == []
    assert await accounts.overdue(10) == [left]


async def test_a_slot_stays_taken_if_its_lease_expires_in_an_outage(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    running = [await reserved(accounts, "1"), await reserved(accounts, "2")]
    await expire(store)
    with pytest.raises(TooManyStreams):
        await accounts.reserve(wanted("3"))  # comes before their worker has renewed them
    await accounts.renew(running)
    await accounts.settle(running[0], Usage(1, 1, cost=7), State.DONE)
    await accounts.reserve(wanted("3"))
    assert await slots(store.redis) == 2


async def test_reserving_again_renews(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    await reserved(accounts, "1")
    await expire(store)
    await accounts.reserve(wanted("1"))
    assert await accounts.overdue(10) == []
    assert await ledger(store.redis) == Ledger(reserved_tokens=10, reserved_cost=100)


async def test_a_running_generation_reserves_again(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, streams=3, daily_cost=150))
    reservation = await reserved(accounts, "1")
    await accounts.release(wanted("1"))
    await accounts.reserve(wanted("2"))
    with pytest.raises(Overloaded):
        await accounts.reserve(wanted("1"))
    assert await accounts.renew([reservation]) == [reservation]
    for _ in range(2):
        await accounts.reserve_again([reservation])
    assert await ledger(store.redis) == Ledger(reserved_tokens=20, reserved_cost=200)
    with pytest.raises(BudgetExceeded):
        await accounts.reserve(wanted("3"))
    await accounts.settle(reservation, Usage(1, 1, cost=7), State.DONE)
    assert await ledger(store.redis) == Ledger(1, 0, 2, 7, 10, 100)


async def test_a_settled_reservation_is_not_reserved_again(store: Store) -> None:
    """Redis came back empty while a generation was ending: its end may be written before its reservation is."""
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, "1")
    await accounts.settle(reservation, Usage(1, 1, cost=7), State.DONE)
    assert await accounts.renew([reservation]) == [reservation]
    await accounts.reserve_again([reservation])
    assert await ledger(store.redis) == Ledger(1, 0, 2, 7)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_usage_after_a_release_is_booked(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, "1")
    await accounts.release(wanted("1"))
    for _ in range(2):
        await accounts.settle(reservation, Usage(1, 1, cost=7), State.DONE)
    assert await ledger(store.redis) == Ledger(1, 0, 2, 7)


async def test_a_lost_reservation_is_made_again_on_its_own_day(store: Store) -> None:
    """On the day of the claim, even after midnight."""
    accounts = AccountStore(store, FREE)
    yesterday = await reserved(accounts, "1")
    yesterday = replace(yesterday, day=yesterday.day - 1)
    await store.redis.flushall()
    assert await accounts.renew([yesterday]) == [yesterday]
    await accounts.reserve_again([yesterday])
    fields = await store.redis.hgetall(account_of(store, "c").key("account"))
    assert fields[f"{yesterday.day}:reserved_cost".encode()] == b"100"
    await accounts.settle(yesterday, Usage(1, 1, cost=7), State.DONE)
    fields = await store.redis.hgetall(account_of(store, "c").key("account"))
    assert fields[f"{yesterday.day}:spent_cost".encode()] == b"7"
    assert (await accounts.totals("c")).day.requests == 0


async def test_one_of_settle_release_and_reserve_at_once_counts(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, "1")
    await asyncio.gather(
        *(accounts.settle(reservation, Usage(1, 1, cost=7), State.DONE) for _ in range(5)),
        *(accounts.reserve_again([reservation]) for _ in range(5)),
        *(accounts.settle(reservation, Usage(2, 2, cost=9, estimated=True), State.LOST) for _ in range(5)),
    )
    assert await ledger(store.redis) == Ledger(1, 0, 2, 7)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_old_days_are_removed_from_an_account_in_daily_use(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, total_daily_cost=10**9))
    today = (await reserved(accounts, "now")).day
    await accounts.release(wanted("now"))
    for ago in range(12, -1, -1):
        reservation = replace(wanted(str(ago)), day=today - ago)
        await accounts.reserve_again([reservation])
        await accounts.settle(reservation, Usage(1, 1, cost=1), State.DONE)
    for account in (account_of(store, "c"), total_account(store)):
        fields: Any = await store.redis.hgetall(account.key("account"))
        days = {int(field.partition(b":")[0]) for field in fields if b"-" not in field}
        assert days == {today - ago for ago in range(4)}
    assert (await accounts.totals("c")).day.requests == 1


# Estimates


async def due(store: Store) -> None:
    """Make every estimate due."""
    await let_time_pass(store.redis, "estimates")


async def due_ids(accounts: AccountStore) -> list[tuple[Reservation, str]]:
    return [(estimate.reservation, estimate.generation_id) for estimate in await due_estimates(accounts)]


async def test_other_workers_ask_for_a_record_after_its_workers_time(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, "1")
    await accounts.settle(
        reservation, Usage(1, 1, cost=7, estimated=True), State.CANCELLED, generation_id="gen-1"
    )
    assert await due_estimates(accounts) == []
    await due(store)
    assert await due_ids(accounts) == [(reservation, "gen-1")]
    assert await due_estimates(accounts) == [], "the worker that got it has time to ask"
    await due(store)
    assert await due_ids(accounts) == [(reservation, "gen-1")]
    assert await store.redis.ttl(account_of(store, "c").shared("estimates")) > 0


async def test_a_corrected_estimate_is_not_due_again(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    for claim_id in ("1", "2", "3"):
        reservation = await reserved(accounts, claim_id)
        await accounts.settle(
            reservation, Usage(1, 1, cost=7, estimated=True), State.LOST, generation_id="gen"
        )
        await accounts.settle(reservation, Usage(1, 1, cost=7, estimated=True), State.LOST)
    await due(store)
    await accounts.correct(wanted("1"), Usage(1, 1, cost=8))
    await accounts.accept_estimate(wanted("2"))
    assert [reservation.claim_id for reservation, _ in await due_ids(accounts)] == ["3"]


async def test_a_later_worker_adds_the_generation_id_to_an_estimate(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, "1")
    guess = Usage(1, 1, cost=7, estimated=True)
    await accounts.settle(reservation, guess, State.LOST)
    await accounts.settle(reservation, guess, State.LOST, generation_id="gen-1")
    await due(store)
    assert await due_ids(accounts) == [(reservation, "gen-1")]


async def test_no_record_is_due_for_final_usage_or_without_an_id(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    known, unnamed = await reserved(accounts, "1"), await reserved(accounts, "2")
    await accounts.settle(known, Usage(1, 1, cost=7), State.DONE, generation_id="gen")
    await accounts.settle(unnamed, Usage(1, 1, cost=7, estimated=True), State.LOST)
    assert await store.redis.keys("*:estimates") == []


async def test_an_estimate_without_its_reservation_blocks_no_other(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    guess = Usage(1, 1, cost=7, estimated=True)
    await accounts.settle(wanted("lost"), guess, State.LOST, generation_id="gen-1")
    known = await reserved(accounts, "known")
    await accounts.settle(known, guess, State.LOST, generation_id="gen-2")
    await due(store)
    assert await due_ids(accounts) == [(known, "gen-2")]
    await due(store)
    assert await due_ids(accounts) == [(known, "gen-2")]


GUESS = Usage(1, 1, cost=7, estimated=True)


async def estimated(accounts: AccountStore, claim_id: str, guess: Usage = GUESS) -> Reservation:
    """A reservation of 10 tokens and 100 nano-USD that was settled by an estimate."""
    reservation = await reserved(accounts, claim_id)
    await accounts.renew([reservation])
    await accounts.settle(reservation, guess, State.CANCELLED, generation_id="gen")
    return reservation


async def test_the_rest_above_an_estimate_stays_reserved_without_a_slot(store: Store) -> None:
    accounts = AccountStore(store, replace(FREE, streams=1, daily_cost=250))
    await estimated(accounts, "1")
    assert await ledger(store.redis) == Ledger(1, 1, 2, 7, 8, 93)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0
    await reserved(accounts, "2")
    await accounts.settle(replace(wanted("2"), day=0), Usage(1, 1, cost=100), State.DONE)
    with pytest.raises(BudgetExceeded):
        await accounts.reserve(wanted("3"))


@pytest.mark.parametrize("times", [1, 3])
async def test_final_usage_frees_the_rest_of_a_reservation_once(store: Store, times: int) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await estimated(accounts, "1")
    other = await reserved(accounts, "2")
    for _ in range(times):
        await accounts.correct(reservation, Usage(2, 3, cost=50))
        await accounts.accept_estimate(reservation)
    assert await ledger(store.redis) == Ledger(1, 0, 5, 50, 10, 100)
    await accounts.release(other)
    assert await ledger(store.redis) == Ledger(1, 0, 5, 50)


@pytest.mark.parametrize("times", [1, 3])
async def test_an_accepted_estimate_stays_and_frees_the_rest(store: Store, times: int) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await estimated(accounts, "1")
    for _ in range(times):
        await accounts.accept_estimate(reservation)
    assert await ledger(store.redis) == Ledger(1, 1, 2, 7)
    await accounts.correct(reservation, Usage(2, 3, cost=50))  # the final usage may still come later
    assert await ledger(store.redis) == Ledger(1, 0, 5, 50)


async def test_an_estimate_as_high_as_its_reservation_keeps_nothing(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await estimated(accounts, "1", Usage(8, 8, cost=120, estimated=True))
    assert await ledger(store.redis) == Ledger(1, 1, 16, 120)
    await accounts.accept_estimate(reservation)
    assert await ledger(store.redis) == Ledger(1, 1, 16, 120)


async def test_an_estimate_without_a_generation_id_reserves_nothing(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await reserved(accounts, "1")
    await accounts.settle(reservation, GUESS, State.CANCELLED)
    assert await ledger(store.redis) == Ledger(1, 1, 2, 7)


async def test_an_estimate_is_one_workers_until_its_time_is_over(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    await estimated(accounts, "1")
    await due(store)
    both = await asyncio.gather(due_estimates(accounts), due_estimates(accounts))
    assert sorted(len(found) for found in both) == [0, 1]
    await due(store)
    await accounts.ask_later(wanted("1"), 30)
    assert await due_estimates(accounts) == []


class Dying(AccountStore):
    """The accounts of a worker that is killed after it has settled in the total, and before the client's account."""

    async def _book_in(self, account: Account, *args: Any) -> Any:
        if account is not self._total:
            raise StoreUnavailable
        return await super()._book_in(account, *args)


OTHER_GUESS = GUESS._replace(cost=9)
TRUTH = Usage(2, 3, cost=50)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("first", "first_id", "second", "second_id"),
    [
        (GUESS, "gen", OTHER_GUESS, None),
        (GUESS, "gen", OTHER_GUESS, "gen"),
        (GUESS, None, OTHER_GUESS, "gen"),
        (GUESS, None, OTHER_GUESS, None),
        (GUESS, "gen", TRUTH, None),
        (TRUTH, None, GUESS, "gen"),
    ],
)
async def test_a_death_between_two_accounts_leaves_nothing_reserved(
    store: Store, learned: bool, first: Usage, first_id: str | None, second: Usage, second_id: str | None
) -> None:
    quotas = replace(FREE, total_daily_cost=10**9)
    accounts, dying = AccountStore(store, quotas), Dying(store, quotas)
    reservation = await reserved(accounts, "1")
    with pytest.raises(StoreUnavailable):
        await dying.settle(reservation, first, State.FAILED, generation_id=first_id)
    await accounts.settle(reservation, second, State.LOST, generation_id=second_id)
    await due(store)
    for estimate in await due_estimates(accounts):
        if learned:
            await accounts.correct(estimate.reservation, TRUTH)
        else:
            await accounts.accept_estimate(estimate.reservation)
    client, total = await ledger(store.redis), await ledger(store.redis, TOTAL)
    assert (client.spent_cost, client.reserved_cost, client.requests) == (total.spent_cost, 0, 1)
    assert (total.reserved_cost, total.reserved_tokens, total.requests) == (0, 0, 1)
