"""Amounts as people read them."""

from __future__ import annotations

import pytest

from broker.cli import amounts


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_940, "9.9 kB"),
        (9_960, "10 kB"),
        (999_499, "999 kB"),
        (999_600, "1.0 MB"),
        (8 * 1024**2, "8.4 MB"),
        (10**12, "1.0 TB"),
        (10**16, "10000 TB"),
    ],
)
def test_sizes_keep_two_digits_that_count(count: int, shown: str) -> None:
    assert amounts.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86_399, "23h59m"),
        (90_000, "1d01h"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, shown: str) -> None:
    assert amounts.duration(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0004, "0ms"), (0.25, "250ms"), (1, "1.0s"), (9.96, "10s"), (75, "1m15s")]
)
def test_waits_are_in_milliseconds_below_a_second(seconds: float, shown: str) -> None:
    assert amounts.wait(seconds) == shown


@pytest.mark.parametrize(
    ("nano", "shown"),
    [
        (0, "0.0000"),
        (1, "<0.0001"),
        (2_500_000, "0.0025"),
        (10**9, "1.00"),
        (1_234_567 * 10**9, "1,234,567.00"),
    ],
)
def test_small_costs_have_more_decimals(nano: int, shown: str) -> None:
    assert amounts.usd(nano) == shown


@pytest.mark.parametrize(("number", "shown"), [(0, "0 sessions"), (1, "1 session"), (2000, "2,000 sessions")])
def test_one_thing_is_not_several(number: int, shown: str) -> None:
    assert amounts.count(number, "session") == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, ""), (1e-9, "▏"), (0.5, "██"), (0.6, "██▍"), (1, "████"), (7, "████"), (-1, "")],
)
def test_a_bar_shows_a_share_and_something_of_all(share: float, shown: str) -> None:
    assert amounts.bar(share, 4) == shown
