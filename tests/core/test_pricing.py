"""Prices out of the catalog's strings, and money out of usage."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.pricing import (
    MAX_COST,
    Demand,
    Prices,
    completion_of,
    cost_of,
    dearest,
    dearest_list,
    is_free,
    max_price,
    parse_prices,
    rates_for,
    reported_cost_of_record,
    to_nano,
    to_usd,
    worst_case,
    worst_case_of_all,
)

MINI = {
    "prompt": "0.00000015",
    "completion": "0.0000006",
    "request": "0",
    "image": "0.000217",
    "web_search": "0",
    "internal_reasoning": "0",
    "input_cache_read": "0.000000075",
}
GEMINI = {
    "prompt": "0.00000125",
    "completion": "0.00001",
    "input_cache_read": "0.00000031",
    "input_cache_write": "0.000001625",
    "overrides": [{"min_prompt_tokens": 200000, "prompt": "0.0000025", "completion": "0.000015"}],
}


def prices(pricing: Any) -> Prices:
    parsed = parse_prices({"id": "m", "pricing": pricing})
    assert parsed is not None
    return parsed


def usage(prompt: Any, completion: Any, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, **more}


def test_the_upstreams_own_cost_comes_first() -> None:
    assert cost_of(usage(194, 2, cost=0.0000303), prices(MINI)) == 30_300
    assert cost_of({"cost": 0.0000303}, None) == 30_300


@pytest.mark.parametrize("cost", [0, 0.0])
def test_a_cost_of_zero_is_zero(cost: Any) -> None:
    assert cost_of(usage(1000, 1000, cost=cost), prices(MINI)) == 0


@pytest.mark.parametrize("cost", ["0", "0.0015", {"total_cost": "7"}])
def test_a_text_is_not_a_cost(cost: Any) -> None:
    assert cost_of({"cost": cost}, None) is None
    assert cost_of(usage(1000, 1000, cost=cost), prices(MINI)) == 750_000


@pytest.mark.parametrize(
    "cost",
    [
        -0.01,
        True,
        None,
        "free",
        "",
        "NaN",
        "-1",
        "Infinity",
        float("nan"),
        float("inf"),
        [],
        {},
        1e300,
        10**400,
    ],
)
def test_an_invalid_cost_counts_as_missing(cost: Any) -> None:
    assert cost_of({"cost": cost}, None) is None
    assert cost_of(usage(1000, 100, cost=cost), prices(MINI)) == 1000 * 150 + 100 * 600


def test_prompt_and_completion_are_counted_at_their_prices() -> None:
    assert cost_of(usage(1000, 100), prices(GEMINI)) == 1000 * 1250 + 100 * 10_000


def test_a_price_for_the_request_is_added_once() -> None:
    priced = prices({"prompt": "0.000001", "completion": "0.000002", "request": "0.005"})
    assert cost_of(usage(10, 10), priced) == 10 * 1000 + 10 * 2000 + 5_000_000


def test_cached_tokens_have_their_own_prices() -> None:
    details = {"cached_tokens": 600, "cache_write_tokens": 100}
    cost = cost_of(usage(1000, 0, prompt_tokens_details=details), prices(GEMINI))
    assert cost == 600 * 310 + 100 * 1625 + 300 * 1250


def test_cached_tokens_cost_as_others_where_no_price_is_listed() -> None:
    priced = prices({"prompt": "0.000001", "completion": "0.000001", "input_cache_write": "0"})
    details = {"cached_tokens": 600, "cache_write_tokens": 100}
    assert cost_of(usage(1000, 0, prompt_tokens_details=details), priced) == 1_000_000


def test_cached_tokens_never_exceed_the_prompt() -> None:
    details = {"cached_tokens": 5000, "cache_write_tokens": 5000}
    assert cost_of(usage(1000, 0, prompt_tokens_details=details), prices(GEMINI)) == 1000 * 310


def test_reasoning_tokens_have_their_own_price() -> None:
    priced = prices({"prompt": "0", "completion": "0.000002", "internal_reasoning": "0.000003"})
    details = {"reasoning_tokens": 40}
    assert cost_of(usage(0, 100, completion_tokens_details=details), priced) == 60 * 2000 + 40 * 3000


def test_reasoning_listed_at_zero_costs_as_completion() -> None:
    details = {"reasoning_tokens": 40}
    assert cost_of(usage(0, 100, completion_tokens_details=details), prices(MINI)) == 100 * 600


def test_prices_below_a_nano_are_exact_before_rounding() -> None:
    priced = prices({"prompt": "0.0000000375", "completion": "0.00000000001"})
    assert cost_of(usage(2, 0), priced) == 75
    assert cost_of(usage(1, 0), priced) == 38
    assert cost_of(usage(0, 1), priced) == 1


def test_an_override_needs_strictly_more_prompt_tokens() -> None:
    assert cost_of(usage(200_000, 10), prices(GEMINI)) == 200_000 * 1250 + 10 * 10_000
    assert cost_of(usage(200_001, 10), prices(GEMINI)) == 200_001 * 2500 + 10 * 15_000


def test_an_override_leaves_the_prices_that_it_does_not_name() -> None:
    details = {"cached_tokens": 200_001}
    cost = cost_of(usage(200_001, 0, prompt_tokens_details=details), prices(GEMINI))
    assert cost == 200_001 * 310


def test_later_overrides_win_price_by_price() -> None:
    tiers = [
        {"min_prompt_tokens": 10, "prompt": "0.000002", "completion": "0.000005"},
        {"min_prompt_tokens": 20, "prompt": "0.000003"},
    ]
    priced = prices({"prompt": "0.000001", "completion": "0.000001", "overrides": tiers})
    assert cost_of(usage(30, 1), priced) == 30 * 3000 + 5000


def at_hours(start: Any, end: Any) -> Prices:
    night = {"utc_start": start, "utc_end": end, "prompt": "0.000001"}
    return prices({"prompt": "0.000004", "completion": "0", "overrides": [night]})


@pytest.mark.parametrize(
    ("minute", "nano"),
    [(16 * 60 + 29, 4000), (16 * 60 + 30, 1000), (17 * 60 + 59, 1000), (18 * 60, 4000)],
)
@pytest.mark.parametrize("clock", [(1630, 1800), ("1630", "1800"), (1630.0, 1800.0)])
def test_a_window_holds_from_its_start_until_before_its_end(clock: Any, minute: int, nano: int) -> None:
    assert cost_of(usage(1, 0), at_hours(*clock), minute_of_day=minute) == nano


@pytest.mark.parametrize(("minute", "nano"), [(1439, 1000), (0, 1000), (29, 1000), (30, 4000), (989, 4000)])
def test_a_window_may_wrap_past_midnight(minute: int, nano: int) -> None:
    assert cost_of(usage(1, 0), at_hours(1630, 30), minute_of_day=minute) == nano


def test_without_a_time_of_day_the_dearer_side_counts() -> None:
    assert cost_of(usage(1, 0), at_hours(1630, 30)) == 4000
    peak = {"utc_start": 100, "utc_end": 400, "prompt": "0.000009"}
    assert (
        cost_of(usage(1, 0), prices({"prompt": "0.000004", "completion": "0", "overrides": [peak]})) == 9000
    )


@pytest.mark.parametrize(
    "condition",
    [
        {"utc_days": ["monday"]},
        {"utc_start": 2500, "utc_end": 9},
        {"min_prompt_tokens": "many"},
        {"weather": 1},
    ],
)
@pytest.mark.parametrize(("price", "nano"), [("0.000009", 9000), ("0.000001", 4000)])
def test_an_unknown_condition_counts_where_it_is_dearer(
    condition: dict[str, Any], price: str, nano: int
) -> None:
    override = {**condition, "prompt": price}
    priced = prices({"prompt": "0.000004", "completion": "0", "overrides": [override]})
    assert cost_of(usage(1, 0), priced, minute_of_day=600) == nano


@pytest.mark.parametrize(
    "pricing",
    [
        {"prompt": "-1", "completion": "-1"},
        {"prompt": "0.1", "completion": "-0.1"},
        {"prompt": "0.1"},
        {"completion": "0.1"},
        {"prompt": "cheap", "completion": "0.1"},
        {"prompt": "", "completion": "0.1"},
        {"prompt": "NaN", "completion": "0.1"},
        {"prompt": "sNaN", "completion": "0.1"},
        {"prompt": "Infinity", "completion": "0.1"},
        {"prompt": "1e999999", "completion": "0.1"},
        {"prompt": "1e-99999999999999999999", "completion": "0.1"},
        {"prompt": "0." + "1" * 5000, "completion": "0.1"},
        {"prompt": 0.1, "completion": 0.1},
        {"prompt": "0.1", "completion": "0.1", "request": "-1"},
        {"prompt": "0.1", "completion": "0.1", "overrides": [{"prompt": "-1"}]},
        {"prompt": "0.1", "completion": "0.1", "overrides": ["night"]},
        {"prompt": "0.1", "completion": "0.1", "overrides": "night"},
        {},
        [],
        None,
        "0",
    ],
)
def test_an_invalid_price_makes_the_model_unpriced(pricing: Any) -> None:
    unpriced = parse_prices({"pricing": pricing})
    assert unpriced is None
    assert cost_of(usage(1, 1), unpriced) is None
    assert worst_case(1, 1, unpriced) is None
    assert not is_free(unpriced)


def test_a_model_without_a_price_list_is_unpriced() -> None:
    assert parse_prices({"id": "llama3:8b", "object": "model"}) is None


def test_a_price_that_is_null_is_not_listed() -> None:
    assert prices({"prompt": "0.1", "completion": "0.1", "request": None, "overrides": None}).overrides == ()


def test_an_invalid_unused_price_means_only_not_free() -> None:
    priced = prices({"prompt": "0", "completion": "0", "web_search": "-1"})
    assert cost_of(usage(5, 5), priced) == 0
    assert not is_free(priced)


def test_free_means_every_price_is_zero() -> None:
    assert is_free(prices({"prompt": "0", "completion": "0.0", "image": "0", "discount": 0}))
    assert not is_free(prices({"prompt": "0", "completion": "0.0000001"}))
    assert not is_free(prices({"prompt": "0", "completion": "0", "image": "0.1"}))
    assert not is_free(prices({"prompt": "0", "completion": "0", "overrides": [{"prompt": "0.1"}]}))


def test_the_worst_case_takes_the_highest_of_all_prices() -> None:
    assert worst_case(100, 10, prices(GEMINI)) == 100 * 2500 + 10 * 15_000
    writing = prices({"prompt": "0.000003", "completion": "0.000015", "input_cache_write_1h": "0.000006"})
    assert worst_case(100, 10, writing) == 100 * 6000 + 10 * 15_000
    thinking = prices(
        {"prompt": "0", "completion": "0.000001", "internal_reasoning": "0.000002", "request": "1"}
    )
    assert worst_case(100, 10, thinking) == 10 * 2000 + 10**9


def test_negative_counts_make_no_negative_worst_case() -> None:
    assert worst_case(-5, -5, prices(GEMINI)) == 0


def test_an_amount_beyond_belief_is_not_known() -> None:
    priced = prices({"prompt": "1000", "completion": "1000"})
    assert worst_case(10**6, 0, priced) is None
    assert cost_of(usage(10**6, 0), priced) is None


def test_max_price_is_the_dearest_in_usd_a_million_tokens() -> None:
    assert max_price([prices(MINI)]) == {"prompt": 0.15, "completion": 0.6}
    assert max_price([prices(MINI), prices(GEMINI)]) == {"prompt": 2.5, "completion": 15.0}


def test_money_goes_to_json_and_back() -> None:
    assert to_usd(30_300) == 0.0000303
    assert to_nano(to_usd(123_456_789_012)) == 123_456_789_012
    assert to_nano(Decimal("0.1")) == 100_000_000
    assert to_nano(Decimal("NaN")) is None


def test_rates_hold_for_one_size_and_time() -> None:
    assert rates_for(prices(GEMINI), 10, 0).prompt == 1250
    assert rates_for(prices(GEMINI), 10**6, 0).prompt == 2500
    assert dearest(prices(GEMINI)).cache_read == 310


@pytest.mark.parametrize(
    "odd",
    [
        None,
        [],
        "usage",
        {},
        usage("12", "5"),
        usage(-1, 5),
        usage(1, -5),
        usage(True, 5),
        usage(1.5, 5),
        usage(10**30, 5),
        usage(None, None),
        usage(5, [1]),
    ],
)
def test_usage_without_believable_counts_has_no_cost(odd: Any) -> None:
    assert cost_of(odd, prices(MINI)) is None


@pytest.mark.parametrize("details", [None, [], "x", 5, {"cached_tokens": "all"}, {"cached_tokens": -5}, {}])
def test_odd_details_are_passed_over(details: Any) -> None:
    odd = usage(10, 10, prompt_tokens_details=details, completion_tokens_details=details)
    assert cost_of(odd, prices(MINI)) == 10 * 150 + 10 * 600


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=8,
)
amounts = st.decimals(min_value=0, max_value="0.01", places=12).map(str) | st.decimals().map(str)
price_keys = st.sampled_from(
    [
        "prompt",
        "completion",
        "request",
        "image",
        "internal_reasoning",
        "input_cache_read",
        "input_cache_write",
    ]
)
condition_keys = st.sampled_from(["min_prompt_tokens", "utc_start", "utc_end", "utc_days"])
price_lists = st.dictionaries(price_keys, amounts | json, max_size=7)
overrides = st.builds(
    lambda base, conditions: {**base, **conditions},
    price_lists,
    st.dictionaries(condition_keys, st.integers(0, 2500) | json, max_size=4),
)
pricings = st.builds(
    lambda base, extra, rest: {"prompt": "0.001", "completion": "0.002", **base, **rest, "overrides": extra},
    price_lists,
    st.lists(overrides, max_size=3) | json,
    st.dictionaries(st.text(max_size=8), json, max_size=2),
)
counts = st.integers(-5, 10**7) | json
usages = st.fixed_dictionaries(
    {},
    optional={
        "cost": json,
        "prompt_tokens": counts,
        "completion_tokens": counts,
        "prompt_tokens_details": st.dictionaries(
            st.sampled_from(["cached_tokens", "cache_write_tokens"]), counts
        )
        | json,
        "completion_tokens_details": st.dictionaries(st.just("reasoning_tokens"), counts) | json,
    },
)
minutes = st.none() | st.integers(0, 1439)


@given(usages | json, pricings | json, minutes)
def test_a_cost_is_never_negative_and_never_raises(used: Any, pricing: Any, minute: int | None) -> None:
    cost = cost_of(used, parse_prices({"pricing": pricing}), minute_of_day=minute)
    assert cost is None or (type(cost) is int and 0 <= cost <= MAX_COST)


@st.composite
def full_usages(draw: st.DrawFn) -> dict[str, Any]:
    prompt, completion, read, written, thought = (draw(st.integers(0, 10**6)) for _ in range(5))
    return usage(
        prompt,
        completion,
        prompt_tokens_details={"cached_tokens": read, "cache_write_tokens": written},
        completion_tokens_details={"reasoning_tokens": thought},
    )


@given(pricings, full_usages(), minutes)
def test_no_usage_costs_more_than_its_worst_case(
    pricing: Any, used: dict[str, Any], minute: int | None
) -> None:
    priced = parse_prices({"pricing": pricing})
    worst = worst_case(used["prompt_tokens"], used["completion_tokens"], priced)
    cost = cost_of(used, priced, minute_of_day=minute)
    if worst is not None:
        assert cost is not None
        assert cost <= worst


@given(pricings, st.integers(-5, 10**6), st.integers(-5, 10**6))
def test_a_text_is_priced_like_any_request(pricing: Any, prompt: int, output: int) -> None:
    priced = parse_prices({"pricing": pricing})
    if priced is not None:
        assert worst_case(prompt, output, priced) == worst_case_of_all(prompt, output, priced, Demand())


@given(json)
def test_any_json_is_an_amount_or_none(value: Any) -> None:
    nano = to_nano(value)
    assert nano is None or 0 <= nano <= MAX_COST


# Costs that upstreams report, each in its own form


@pytest.mark.parametrize(
    ("told", "nano"),
    [
        ({"cost": {"total_cost": 0.006, "input_tokens_cost": 0.001, "currency": "USD"}}, 6_000_000),
        ({"cost": {"total_cost": 0}}, 0),
        ({"cost_in_usd_ticks": 37_756_000}, 3_775_600),
        ({"cost_in_usd_ticks": 1}, 1),
        ({"cost_in_usd_ticks": 0}, 0),
        ({"cost": {"total_cost": "?"}, "cost_in_usd_ticks": 20}, 2),
        ({"cost": 0.5, "cost_in_usd_ticks": 20}, 500_000_000),
        ({"cost": 0, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.036}}, 36_000_000),
        ({"cost": 0.0018, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.036}}, 37_800_000),
        ({"cost": 0.002, "is_byok": True, "cost_details": {"upstream_inference_cost": None}}, 2_000_000),
        ({"cost": 0.002, "is_byok": True, "cost_details": {"upstream_inference_cost": -1}}, 2_000_000),
        ({"cost": 0.002, "is_byok": True, "cost_details": None}, 2_000_000),
        ({"cost": 0.002, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.036}}, 2_000_000),
        ({"cost": 0.002, "cost_details": {"upstream_inference_cost": 0.036}}, 2_000_000),
        ({"cost": 1e-10, "is_byok": True, "cost_details": {"upstream_inference_cost": 1e-10}}, 1),
    ],
)
def test_a_reported_cost_is_read_in_every_form(told: dict[str, Any], nano: int) -> None:
    assert cost_of(usage(1000, 1000, **told), prices(MINI)) == nano


@pytest.mark.parametrize(
    "told",
    [
        {"cost": {}},
        {"cost": {"total_cost": -1}},
        {"cost": {"total_cost": {"total_cost": 1}}},
        {"cost_in_usd_ticks": -5},
        {"cost_in_usd_ticks": True},
        {"cost_in_usd_ticks": "many"},
        {"cost_in_usd_ticks": 10**40},
        {"cost_in_usd_ticks": float("nan")},
    ],
)
def test_a_cost_in_no_known_form_leaves_it_to_the_list(told: dict[str, Any]) -> None:
    assert cost_of(usage(1000, 100, **told), prices(MINI)) == 1000 * 150 + 100 * 600


def test_a_record_has_the_cost_of_an_own_key_separately() -> None:
    record = {"total_cost": 0.001, "is_byok": True, "upstream_inference_cost": 0.02}
    assert reported_cost_of_record(record) == 21_000_000
    assert reported_cost_of_record({**record, "is_byok": False}) == 1_000_000
    assert reported_cost_of_record({**record, "total_cost": None}) is None


@pytest.mark.parametrize(
    ("counts", "written"),
    [
        ({"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 354}, 342),
        ({"prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 354}, 342),
        ({"prompt_tokens": 12, "total_tokens": 354}, 342),
        ({"prompt_tokens": 12, "completion_tokens": 342, "total_tokens": 354}, 342),
        ({"prompt_tokens": 12, "completion_tokens": 342, "total_tokens": 0}, 342),
        ({"prompt_tokens": 12, "completion_tokens": 342, "total_tokens": "?"}, 342),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, 0),
        ({"prompt_tokens": 12}, None),
        ({"total_tokens": 12}, None),
    ],
)
def test_reasoning_that_only_the_total_has_counts(counts: dict[str, Any], written: int | None) -> None:
    assert completion_of(counts) == written


def test_hidden_reasoning_has_the_price_of_reasoning() -> None:
    priced = prices({"prompt": "0", "completion": "0.000002", "internal_reasoning": "0.000003"})
    told = usage(12, 2, total_tokens=354, completion_tokens_details={"reasoning_tokens": 340})
    assert cost_of(told, priced) == 2 * 2000 + 340 * 3000


# Worst cases beyond text

RICH = {
    "prompt": "0.000001",
    "completion": "0.000002",
    "request": "0.001",
    "image": "0.01",
    "image_token": "0.000003",
    "audio": "0.00003",
    "input_audio_cache": "0.00004",
    "web_search": "0.02",
    "image_output": "0.00007",
    "audio_output": "0.00009",
    "overrides": [{"min_prompt_tokens": 10, "image": "0.011"}],
}


@pytest.mark.parametrize(
    ("demand", "more"),
    [
        (Demand(), 0),
        (Demand(images=100), 100 * 11_000_000 + 100 * 2000 * (3000 - 1000)),
        (Demand(sounds=2), 2 * 4000 * (40_000 - 1000)),
        (Demand(searches=3), 3 * 20_000_000),
        (Demand(draws=True), 50 * (70_000 - 2000)),
        (Demand(speaks=True), 50 * (90_000 - 2000)),
        (Demand(draws=True, speaks=True), 50 * (90_000 - 2000)),
    ],
)
def test_the_worst_case_has_every_price_that_a_request_can_touch(demand: Demand, more: int) -> None:
    text = 300_000 * 1000 + 50 * 2000 + 1_000_000
    assert worst_case(300_000, 50, prices(RICH), demand) == text + more


@pytest.mark.parametrize(
    ("key", "demand"),
    [
        ("image", Demand(images=1)),
        ("audio", Demand(sounds=1)),
        ("web_search", Demand(searches=1)),
        ("image_output", Demand(draws=True)),
    ],
)
def test_a_negative_price_is_unknown_only_where_it_applies(key: str, demand: Demand) -> None:
    priced = prices({"prompt": "0.000001", "completion": "0.000001", key: "-1"})
    assert worst_case(1, 1, priced, demand) is None
    assert worst_case(1, 1, priced) == 2000


def test_max_price_has_the_prices_that_apply() -> None:
    text = {"prompt": 1.0, "completion": 2.0, "request": 0.001}
    assert max_price([prices(RICH)]) == text
    assert max_price([prices(RICH)], Demand(images=1)) == {**text, "image": 0.011}
    assert max_price([prices(RICH), prices(MINI)], Demand(sounds=1)) == {**text, "audio": 0.00003}


def test_the_dearest_list_has_the_highest_of_every_price() -> None:
    merged = dearest_list([prices(MINI), prices(GEMINI), prices(RICH)])
    assert merged is not None
    assert worst_case(1000, 10, merged) == 1000 * 2500 + 10 * 15_000 + 1_000_000
    assert worst_case(0, 0, merged, Demand(images=1)) == 1_000_000 + 11_000_000 + 2000 * (3000 - 2500)
    assert dearest_list([]) is None
