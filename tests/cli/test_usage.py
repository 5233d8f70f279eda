"""`broker usage`: the usage ledger for the operator, from a real Redis."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from broker.cli.usage import parse_period, summed, to_csv, usage
from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.session import State
from broker.store.accounts import AccountStore, Reservation
from broker.store.connection import Store
from broker.store.usage_ledger import METRICS, UsageRow
from tests.cli.fake_broker import run_shell
from tests.system.harness import clean_environment, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

THIRTY_FIVE_DAYS = 35 * 86_400


@pytest_asyncio.fixture
async def accounts(valkey_url: str) -> AsyncIterator[AccountStore]:
    """The accounts of a service with the default key prefix."""
    store = Store(valkey_url, "broker")
    yield AccountStore(store, Quotas(0, 1000, 0, 0, 0))
    await store.close()


async def book(
    accounts: AccountStore, token: str, client: str, model: str, spent: Usage, state: State = State.DONE
) -> int:
    """Settle one session; returns its day."""
    wanted = Reservation(token, f"session-{token}", client, model, WorstCase(100, 100))
    reservation = await accounts.reserve(wanted)
    await accounts.settle(reservation, spent, state)
    return reservation.day


@pytest_asyncio.fixture
async def day(accounts: AccountStore) -> str:
    """A day with some use; its date."""
    await book(accounts, "1", "key:ann", "a/one", Usage(1000, 200, 300, 40, 2_500_000))
    await book(accounts, "2", "key:ann", "b/two", Usage(10, 5, cost=None, estimated=True), State.CANCELLED)
    await book(accounts, "3", "key:bob", "a/one", Usage(1, 2, cost=7_000_000), State.FAILED)
    number = await book(accounts, "4", "key:bob", "a/one", Usage(0, 0, cost=0), State.LOST)
    return (dt.date(1970, 1, 1) + dt.timedelta(days=number)).isoformat()


def run(tmp_path: Path, redis_url: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {"REDIS_URL": redis_url, "COLUMNS": "80"} if redis_url else {}
    return subprocess.run(
        [sys.executable, "-m", "broker", "usage", *args],
        cwd=tmp_path,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def on_a_terminal(tmp_path: Path, redis_url: str, columns: int) -> list[str]:
    """Return what is shown on a terminal of this width, without colours."""
    ours, theirs = pty.openpty()
    try:
        env = clean_environment(
            {"REDIS_URL": redis_url, "COLUMNS": str(columns), "LINES": "24", "TERM": "dumb"}
        )
        subprocess.run(
            [sys.executable, "-m", "broker", "usage"],
            cwd=tmp_path,
            env=env,
            stdout=theirs,
            timeout=20,
            check=True,
        )
        return os.read(ours, 10_000).decode().splitlines()
    finally:
        os.close(ours)
        os.close(theirs)


def rows(found: subprocess.CompletedProcess[str]) -> Any:
    assert (found.returncode, found.stderr) == (0, "")
    return json.loads(found.stdout)


async def test_the_ledger_is_summed_by_client(tmp_path: Path, valkey_url: str, day: str) -> None:
    zeros = dict.fromkeys(METRICS, 0)
    ann = {"requests": 2, "prompt": 1010, "completion": 205, "cached": 300, "reasoning": 40, "cost": 0.0025}
    assert rows(run(tmp_path, valkey_url, "--json")) == {
        "day": day,
        "by": "client",
        "rows": [
            {
                "client": "key:bob",
                **zeros,
                "requests": 2,
                "prompt": 1,
                "completion": 2,
                "cost": 0.007,
                "failed": 2,
            },
            {"client": "key:ann", **zeros, **ann, "estimated": 1, "unpriced": 1, "cancelled": 1},
        ],
    }


async def test_the_ledger_is_summed_by_model(tmp_path: Path, valkey_url: str, day: str) -> None:
    found = rows(run(tmp_path, valkey_url, "--by", "model", "--day", day, "--json"))
    assert [(row["model"], row["requests"], row["cost"]) for row in found["rows"]] == [
        ("a/one", 3, 0.0095),
        ("b/two", 1, 0.0),
    ]


HEADINGS = [
    "requests",
    "prompt",
    "completion",
    "cached",
    "reasoning",
    "USD",
    "estimated",
    "cancelled",
    "failed",
]
FEW = ["requests", "prompt", "completion", "USD", "failed"]
ANN = ["key:ann", "2", "1,010", "205", "300", "40", "0.002500+?", "50%", "1", "0"]
BOB = ["key:bob", "2", "1", "2", "0", "0", "0.007000", "0%", "0", "2"]


async def test_the_table_has_one_line_for_each_row(tmp_path: Path, valkey_url: str, day: str) -> None:
    found = run(tmp_path, valkey_url)
    assert (found.returncode, found.stderr) == (0, "")
    title, *lines = found.stdout.splitlines()
    assert title.strip() == f"Usage on {day} (UTC)"
    assert [line.split() for line in lines] == [["client", *HEADINGS], BOB, ANN]


async def test_a_terminal_shows_bars_and_what_fits_beside_them(
    tmp_path: Path, valkey_url: str, day: str
) -> None:
    title, heading, bob, ann = on_a_terminal(tmp_path, valkey_url, columns=80)
    assert title.strip() == f"Usage on {day} (UTC): 4 requests, 0.0095 USD"
    assert heading.split() == ["client", *FEW]
    assert bob.split() == ["key:bob", "█" * bob.count("█"), "2", "1", "2", "0.007000", "2"]
    assert ann.split()[2:] == ["2", "1,010", "205", "0.002500+?", "0"]
    assert bob.count("█") > 2 * ann.count("█") > 0
    assert max(map(len, (title, heading, bob, ann))) <= 80


async def test_a_wide_terminal_shows_all_columns(tmp_path: Path, valkey_url: str, day: str) -> None:
    _, heading, bob, ann = on_a_terminal(tmp_path, valkey_url, columns=140)
    assert heading.split() == ["client", *HEADINGS]
    assert ["key:bob", *bob.split()[2:]] == BOB
    assert ["key:ann", *ann.split()[2:]] == ANN


async def test_a_narrow_terminal_shows_whole_figures_and_names(
    tmp_path: Path, valkey_url: str, day: str
) -> None:
    title, *lines = on_a_terminal(tmp_path, valkey_url, columns=40)
    figures = [line.split() for line in lines[-3:]]
    assert title.startswith(f"Usage on {day}")
    assert figures == [
        ["client", *FEW],
        ["key:bob", "2", "1", "2", "0.007000", "2"],
        ["key:ann", "2", "1,010", "205", "0.002500+?", "0"],
    ]


async def test_a_name_is_shown_unchanged_on_one_line(
    tmp_path: Path, valkey_url: str, accounts: AccountStore
) -> None:
    await book(accounts, "1", "key:ann", "[red]a/one[/red] :smile:\n\x1b[2J", Usage(1, 1, cost=0))
    found = run(tmp_path, valkey_url, "--by", "model")
    assert found.stdout.splitlines()[2].startswith("[red]a/one[/red] :smile: [2J ")


async def test_a_day_without_use_is_empty(tmp_path: Path, valkey_url: str, day: str) -> None:
    before = (dt.date.fromisoformat(day) - dt.timedelta(days=1)).isoformat()
    assert rows(run(tmp_path, valkey_url, "--day", before, "--json")) == {
        "day": before,
        "by": "client",
        "rows": [],
    }
    assert run(tmp_path, valkey_url, "--day", before).returncode == 0


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_a_name_is_no_formula_in_a_spreadsheet(name: str) -> None:
    row = {"model": name, **dict.fromkeys(METRICS, 0)}
    _, line, usual = to_csv([row, {**row, "model": "a/=1"}], "model").splitlines()
    assert line.startswith(f"'{name},0,")
    assert usual.startswith("a/=1,0,")


async def test_csv_has_the_names_and_values_of_the_json(tmp_path: Path, valkey_url: str, day: str) -> None:
    found = run(tmp_path, valkey_url, "--csv")
    assert (found.returncode, found.stderr) == (0, "")
    told = rows(run(tmp_path, valkey_url, "--json"))["rows"]
    table = list(csv.DictReader(io.StringIO(found.stdout)))
    assert [list(row) for row in table] == [list(row) for row in told]
    for as_csv, as_json in zip(table, told, strict=True):
        assert as_csv["client"] == as_json["client"]
        assert [float(as_csv[name]) for name in METRICS] == [as_json[name] for name in METRICS]


async def test_a_month_is_summed_over_its_days(
    tmp_path: Path, valkey_url: str, accounts: AccountStore, day: str
) -> None:
    [today] = {dt.date.fromisoformat(day)}
    earlier = (today.replace(day=1) - dt.date(1970, 1, 1)).days  # the same day, on the first of a month
    old = Reservation("old", "session-old", "key:ann", "a/one", WorstCase(1, 1), day=earlier)
    await accounts.settle(old, Usage(1, 1, cost=1_000_000), State.DONE)
    found = rows(run(tmp_path, valkey_url, "--month", day[:7], "--json"))
    assert found["month"] == day[:7]
    assert {row["client"]: row["requests"] for row in found["rows"]} == {"key:bob": 2, "key:ann": 3}
    by_day = rows(run(tmp_path, valkey_url, "--by", "day", "--json"))
    assert by_day == {**by_day, "month": day[:7], "by": "day"}
    listed = {row["day"]: row["requests"] for row in by_day["rows"]}
    assert list(listed) == [f"{day[:7]}-{n:02}" for n in range(1, today.day + 1)]
    assert sum(listed.values()) == 5
    assert listed[f"{day[:7]}-01"] == (5 if today.day == 1 else 1)


@pytest.mark.parametrize("period", [("--month", "2020-02"), ("--day", "2020-02-29")])
async def test_a_period_that_is_forgotten_says_so(
    tmp_path: Path, valkey_url: str, period: tuple[str, str]
) -> None:
    found = run(tmp_path, valkey_url, *period, "--json")
    assert found.returncode == 0
    assert json.loads(found.stdout)["rows"] == []
    assert found.stderr == "Days are stored for 35 days; older ones are missing here.\n"


@pytest.mark.parametrize(
    "args",
    [
        ["--day", "2026-11-20", "--month", "2026-11"],
        ["--json", "--csv"],
        ["--month", "2026-13"],
        ["--month", "2026-11-20"],
        ["--month", "0000-01"],
        ["--month", ""],
    ],
)
def test_arguments_that_contradict_or_mean_nothing_are_refused(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = dict(zip(args[::2], args[1::2], strict=False))
    assert (
        usage(
            given.get("--day"),
            given.get("--month"),
            by="client",
            as_json="--json" in args,
            as_csv="--csv" in args,
        )
        == 2
    )
    assert capsys.readouterr().err.startswith("broker: ")


def test_a_month_has_its_days_up_to_today() -> None:
    today = dt.date(2026, 3, 2)
    assert [str(each) for each in parse_period(None, None, "day").days(today)] == ["2026-03-01", "2026-03-02"]
    february = parse_period(None, "2026-02", "client").days(today)
    assert (str(february[0]), str(february[-1]), len(february)) == ("2026-02-01", "2026-02-28", 28)
    assert [str(each) for each in parse_period(None, "2027-01", "day").days(today)] == ["2027-01-01"]


async def test_the_ledger_is_stored_for_thirty_five_days(store: Store, day: str) -> None:
    keys: Any = await store.redis.keys("*:ledger:*")
    assert len(keys) == 2, "of two clients"
    for key in keys:
        assert key.decode().endswith(day)
        assert THIRTY_FIVE_DAYS - 60 < await store.redis.ttl(key) <= THIRTY_FIVE_DAYS


@pytest.mark.parametrize("day", ["yesterday", "2026-13-01", "20", ""])
def test_an_invalid_day_is_refused_in_one_line(tmp_path: Path, valkey_url: str, day: str) -> None:
    found = run(tmp_path, valkey_url, "--day", day)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1
    assert "--day" in found.stderr


def test_without_a_redis_there_is_no_ledger(tmp_path: Path) -> None:
    found = run(tmp_path, "")
    assert (found.returncode, found.stdout) == (2, "")
    assert "REDIS_URL" in found.stderr


def test_a_redis_that_is_away_is_reported_in_one_line(tmp_path: Path) -> None:
    found = run(tmp_path, f"redis://127.0.0.1:{free_port()}/0")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["redis+ring://x", "redis+sentinel://x", "redis+cluster://x/1"])
def test_an_unsupported_redis_is_reported_in_one_line(tmp_path: Path, url: str) -> None:
    found = run(tmp_path, url)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("broker: REDIS_URL must be ")
    assert found.stderr.count("\n") == 1


async def test_a_redis_that_refuses_leaves_standard_output_alone(tmp_path: Path, valkey_url: str) -> None:
    found = run(tmp_path, f"{valkey_url}?db=9999", "--json")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("broker: Redis cannot be reached (")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["", "--json"])
async def test_a_full_disk_is_reported_in_one_line(valkey_url: str, day: str, flag: str) -> None:
    told = "broker: standard output cannot be written (no space left on device).\n"
    assert await run_shell(f"REDIS_URL={valkey_url} broker usage {flag} >/dev/full") == (1, "", told)


def test_the_dearest_come_first_then_the_busiest_then_by_name() -> None:
    def line(client: str, cost: int, requests: int) -> UsageRow:
        return UsageRow(client, "m", {**dict.fromkeys(METRICS, 0), "cost": cost, "requests": requests})

    lines = [line("d", 0, 1), line("c", 0, 1), line("b", 0, 5), line("a", 1, 1)]
    found = summed({dt.date(2026, 11, 20): lines}, "client")
    assert [row["client"] for row in found] == ["a", "b", "c", "d"]
