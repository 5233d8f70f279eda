"""Numbers that Lua writes and Redis reads: zero, large and negative ones, on every server."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.session import State
from broker.store.accounts import AccountStore, Reservation
from broker.store.connection import Store
from tests.money import Ledger, ledger, open_reservations, slots

FREE = Quotas(pending=50, streams=2, daily_tokens=0, daily_cost=0, total_daily_cost=0)
AMOUNTS = [0, 1, 2**31, 10**14, 10**15, 2**53, 10**17]
WORSTS = [WorstCase(tokens, cost) for tokens in (0, 1, 2**31) for cost in AMOUNTS]


def wanted(worst: WorstCase) -> Reservation:
    return Reservation("t", "session", "c", "model", worst)


@pytest.mark.parametrize("worst", WORSTS, ids=str)
async def test_a_large_reservation_is_given_back_exactly(store: Store, worst: WorstCase) -> None:
    accounts = AccountStore(store, FREE)
    await accounts.reserve(wanted(worst))
    assert await ledger(store.redis) == Ledger(reserved_tokens=worst.tokens, reserved_cost=worst.cost)
    await accounts.release(wanted(worst))
    assert await ledger(store.redis) == Ledger()
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


@pytest.mark.parametrize("worst", WORSTS, ids=str)
@pytest.mark.parametrize("spent", [0, 1, 10**15], ids=str)
async def test_a_large_reservation_is_settled_exactly(store: Store, worst: WorstCase, spent: int) -> None:
    accounts = AccountStore(store, FREE)
    await accounts.reserve(wanted(worst))
    await accounts.settle(wanted(worst), Usage(spent, 0, cost=spent), State.DONE)
    assert await ledger(store.redis) == Ledger(1, 0, spent, spent)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


@pytest.mark.parametrize("before", [0, 7, 10**15], ids=str)
@pytest.mark.parametrize("after", [0, 7, 10**15], ids=str)
async def test_final_usage_replaces_a_lower_or_higher_estimate(store: Store, before: int, after: int) -> None:
    accounts = AccountStore(store, FREE)
    reservation = await accounts.reserve(wanted(WorstCase(0, 0)))
    await accounts.settle(reservation, Usage(before, 0, cost=before, estimated=True), State.DONE)
    await accounts.correct(reservation, Usage(after, 0, cost=after))
    assert await ledger(store.redis) == Ledger(1, 0, after, after)


def test_no_script_negates_a_number() -> None:
    """Lua has a negative zero, which some servers do not take for an integer. `0 - x` has none."""
    for script in resources.files("broker.store").joinpath("lua").iterdir():
        code = re.sub(r"--.*|'[^'\n]*'", "", script.read_text(encoding="utf-8"))
        assert not re.search(r"[,(={]\s*-\s*[A-Za-z_]", code), script.name
