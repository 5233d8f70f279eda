"""The limits in a table of the clients file, and in the claim of a token."""

from __future__ import annotations

import datetime as dt
import tomllib
from decimal import Decimal
from typing import Any

import pytest

from broker.core.client_limits import ClientLimits
from broker.core.rates import Rate
from broker.identity.limit_values import LONGEST_SYSTEM, MAX_LISTED, LimitsError, read_claim, read_table

NEW_YEAR = dt.datetime(2031, 1, 1, tzinfo=dt.UTC).timestamp()


def toml(text: str) -> dict[str, Any]:
    return tomllib.loads(text, parse_float=Decimal)


def test_every_name_of_a_table_is_read() -> None:
    limits = read_table(
        toml("""
        models = ["openai/*", "x/y:free"]
        rate = "100/2 hours"
        streams = 3
        max_output_tokens = 500
        daily_tokens = 1000
        daily_cost = 2.50
        monthly_cost = "20"
        origins = ["https://App.example:443", "null"]
        system = " Be kind. "
        expires = 2031-01-01
        disabled = false
        """)
    )
    assert limits == ClientLimits(
        narrows=False,
        models=("openai/*", "x/y:free"),
        rate=Rate(100, 7200),
        streams=3,
        max_output_tokens=500,
        daily_tokens=1000,
        daily_cost=2_500_000_000,
        monthly_cost=20_000_000_000,
        origins=("https://app.example", "null"),
        system="Be kind.",
        expires=NEW_YEAR,
        disabled=False,
    )


def test_every_name_of_a_claim_is_read() -> None:
    claim = {
        "models": ["openai/*"],
        "rate": "5/minute",
        "streams": 1,
        "max_output_tokens": 500,
        "daily_tokens": 1000,
        "daily_cost": 0.25,
        "monthly_cost": "1.5",
        "origins": ["https://app.example"],
        "expires": NEW_YEAR,
        "disabled": True,
    }
    assert read_claim(claim) == ClientLimits(
        narrows=True,
        models=("openai/*",),
        rate=Rate(5, 60),
        streams=1,
        max_output_tokens=500,
        daily_tokens=1000,
        daily_cost=250_000_000,
        monthly_cost=1_500_000_000,
        origins=("https://app.example",),
        expires=NEW_YEAR,
        disabled=True,
    )


@pytest.mark.parametrize(
    "written",
    ["2031-01-01", "2031-01-01T00:00:00Z", "2031-01-01 00:00:00", "2031-01-01T02:00:00+02:00"],
)
def test_a_time_is_in_utc_unless_it_has_an_offset(written: str) -> None:
    assert read_table(toml(f"expires = {written}")).expires == NEW_YEAR
    assert read_claim({"expires": written}).expires == NEW_YEAR


@pytest.mark.parametrize("amount", [0, 0.0, "0", Decimal(0)])
def test_no_budget_is_a_word_of_tables_only(amount: Any) -> None:
    assert read_table({"daily_cost": amount, "daily_tokens": 0}).daily_cost == 0
    with pytest.raises(LimitsError, match="daily_cost must be an amount in USD above 0"):
        read_claim({"daily_cost": amount})
    with pytest.raises(LimitsError, match="daily_tokens must be a whole number, 1 or more"):
        read_claim({"daily_tokens": 0})


def each(name: str, *values: Any) -> list[tuple[str, Any]]:
    return [(name, value) for value in values]


NO_AMOUNTS = (-1, "-1", "1e3", "1,5", "", " 1", True, None, 10**7, "1" * 40, float("nan"), float("inf"), [1])
WRONG = [
    *each("models", "a/*", [], [""], [1], ["x"] * (MAX_LISTED + 1), ["x" * 300], {}, None),
    *each("rate", 30, "30", "0/minute", "x/minute", ["1/minute"], None),
    *each("streams", 0, -1, "1", 1.0, True, 10**16, None),
    *each("max_output_tokens", 0, "1", 1.5, True),
    *each("daily_tokens", -1, "1", 1.5, True, 10**16),
    *each("daily_cost", *NO_AMOUNTS),
    *each("monthly_cost", *NO_AMOUNTS),
    *each("origins", "https://a", [], ["a.example"], ["https://a/path"], [None], None),
    *each("expires", True, None, "tomorrow", "", dt.time(1, 2), []),
    *each("disabled", 0, 1, "true", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any) -> None:
    for read in (read_table, read_claim):
        with pytest.raises(LimitsError) as error:
            read({name: value})
        assert str(error.value).startswith(f"{name} must be ")
        assert error.value.__cause__ is None


@pytest.mark.parametrize(
    "value", ["", " ", 1, ["x"], "x" * (LONGEST_SYSTEM + 1), "ü" * (LONGEST_SYSTEM // 2 + 1)]
)
def test_a_wrong_system_message_is_refused(value: Any) -> None:
    with pytest.raises(LimitsError, match=r"^system must be a text"):
        read_table({"system": value})


def test_a_time_of_a_table_has_no_quotes() -> None:
    for value in ("2031-01-01", 4_000_000_000):
        with pytest.raises(LimitsError, match=r"^expires must be a date"):
            read_table({"expires": value})


@pytest.mark.parametrize("name", ["model", "Models", "narrows", "", "x" * 1000, "a\nb", "key"])
def test_an_unknown_name_is_refused_and_its_value_not_shown(name: str) -> None:
    for read in (read_table, read_claim):
        with pytest.raises(LimitsError, match="is not the name of a limit") as error:
            read({name: "hidden"})
        assert "hidden" not in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 100
