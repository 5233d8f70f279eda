"""The limits of a client: those of the service, changed by its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.accounts import Quotas
from broker.core.client_limits import (
    DISABLED,
    EXPIRED,
    ClientLimits,
    LimitsInForce,
    ServiceLimits,
    combine,
)
from broker.core.errors import ModelNotAllowed, OriginNotAllowed, Unauthorized
from broker.core.rates import Rate

QUOTAS = Quotas(pending=50, streams=5, daily_tokens=1000, daily_cost=0, total_daily_cost=9, monthly_cost=70)
SERVICE = LimitsInForce(QUOTAS, rates=(Rate(30, 60),), max_output_tokens=4096)


def table(**values: Any) -> LimitsInForce:
    return combine(SERVICE, ClientLimits(narrows=False, **values))


def claim(**values: Any) -> LimitsInForce:
    return combine(SERVICE, ClientLimits(narrows=True, **values))


def test_what_is_not_said_is_the_services() -> None:
    assert table() == claim() == SERVICE
    service = ServiceLimits(SERVICE)
    assert service.of(None) is SERVICE
    assert service.of(ClientLimits()) is service.of(ClientLimits())


def test_a_table_replaces_the_limits_of_the_service() -> None:
    limits = table(
        streams=50, daily_tokens=0, daily_cost=8, monthly_cost=900, rate=Rate(500, 60), max_output_tokens=9000
    )
    assert limits.quotas == replace(QUOTAS, streams=50, daily_tokens=0, daily_cost=8, monthly_cost=900)
    assert limits.rates == (Rate(500, 60),)
    assert limits.max_output_tokens == 9000


def test_a_claim_cannot_raise_a_limit() -> None:
    limits = claim(
        streams=50,
        daily_tokens=5000,
        daily_cost=8,
        monthly_cost=900,
        rate=Rate(500, 60),
        max_output_tokens=9000,
    )
    assert limits == replace(SERVICE, quotas=replace(QUOTAS, daily_cost=8))  # of that one there was none


def test_a_claim_makes_limits_smaller() -> None:
    limits = claim(streams=1, daily_tokens=10, monthly_cost=7, rate=Rate(5, 60), max_output_tokens=100)
    assert limits.quotas == replace(QUOTAS, streams=1, daily_tokens=10, monthly_cost=7)
    assert limits.rates == (Rate(5, 60),)
    assert limits.max_output_tokens == 100


@pytest.mark.parametrize(
    ("own", "rates"),
    [
        (Rate(30, 60), (Rate(30, 60),)),
        (Rate(31, 60), (Rate(30, 60),)),
        (Rate(30, 61), (Rate(30, 61),)),
        (Rate(29, 3600), (Rate(29, 3600),)),
        (Rate(40, 30), (Rate(30, 60),)),
        (Rate(1000, 86_400), (Rate(30, 60), Rate(1000, 86_400))),
        (Rate(2, 1), (Rate(30, 60), Rate(2, 1))),
    ],
)
def test_of_two_rates_with_other_windows_both_hold(own: Rate, rates: tuple[Rate, ...]) -> None:
    assert claim(rate=own).rates == rates


counts = st.none() | st.integers(1, 6)
owns = st.builds(
    ClientLimits,
    streams=counts,
    daily_tokens=counts,
    daily_cost=counts,
    monthly_cost=counts,
    max_output_tokens=counts,
)


@given(
    own=owns,
    streams=st.integers(1, 6),
    budgets=st.tuples(*[st.integers(0, 6)] * 3),
    output=st.integers(1, 6),
)
def test_a_claim_never_allows_more(
    own: ClientLimits, streams: int, budgets: tuple[int, int, int], output: int
) -> None:
    tokens, cost, month = budgets
    quotas = Quotas(1, streams, tokens, cost, 0, monthly_cost=month)
    limits = combine(LimitsInForce(quotas, (), output), own)
    for name in ("streams", "daily_tokens", "daily_cost", "monthly_cost"):
        found, theirs, ours = getattr(limits.quotas, name), getattr(quotas, name), getattr(own, name)
        wanted = min((each for each in (theirs, ours) if each), default=0)
        assert found == wanted, name
    assert limits.max_output_tokens == min(output, own.max_output_tokens or output)


@pytest.mark.parametrize("narrows", [True, False])
def test_models_and_origins_are_those_of_both(narrows: bool) -> None:
    service = replace(SERVICE, models=(("openai/*", "x/*"),), origins=frozenset({"https://a", "https://b"}))
    own = ClientLimits(narrows=narrows, models=("openai/gpt-*",), origins=("https://b", "https://c"))
    limits = combine(service, own)
    limits.check_models(["openai/gpt-5"])
    for model in ("openai/o3", "x/y", "openai/GPT-5"):
        with pytest.raises(ModelNotAllowed, match=model):
            limits.check_models(["openai/gpt-5", model])
    assert limits.origins == frozenset({"https://b"})
    assert combine(service, ClientLimits(origins=("*",))).origins == service.origins


def test_only_pages_of_listed_origins_may_prepare() -> None:
    limits = table(origins=("https://a.example", "null"))
    for origin in ("https://a.example", "HTTPS://A.example", "null", "", None):
        limits.check_origin(origin)
        SERVICE.check_origin(origin)
    for origin in ("https://b.example", "https://a.example:444", "*"):
        SERVICE.check_origin(origin)
        with pytest.raises(OriginNotAllowed):
            limits.check_origin(origin)


def test_a_client_is_refused_from_its_time_on() -> None:
    ClientLimits().check(2.0)
    limits = ClientLimits(expires=100.0)
    limits.check(99.9)
    with pytest.raises(Unauthorized, match=EXPIRED):
        limits.check(100.0)
    with pytest.raises(Unauthorized, match=DISABLED):
        ClientLimits(disabled=True).check(1.0)
