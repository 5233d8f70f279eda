"""`broker sessions`: how sessions are named and shown; no Redis."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from rich.console import Console

from broker.cli import sessions
from broker.cli.sessions import is_client, shown_ids, table, to_json
from broker.cli.tables import narrowest
from broker.core.accounts import WorstCase
from broker.store.running import Activity, Running, RunningSession
from broker.store.workers import WorkerInfo

ID = "3f2b8c1e-9a4d-4e6f-8b7a-1c2d3e4f5a6b"
OTHER = "3f2b8c1e-9a4e-4e6f-8b7a-1c2d3e4f5a6b"
FAR = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
NOW = 1_795_000_000_000
WORKERS = [WorkerInfo("w1", "eu-1", 4711, "0.1.0")]


def session(session_id: str = ID, **changes: object) -> RunningSession:
    usual: dict[str, object] = {
        "session_id": session_id,
        "client": "key:acme",
        "model": "a/b",
        "activity": Activity.RUNNING,
        "since_ms": NOW - 65_000,
        "worker": "w1",
        "events": 312,
        "size": 98_400,
        "reserved": WorstCase(4116, 6_561_600),
    }
    return RunningSession(**{**usual, **changes})  # type: ignore[arg-type]


def drawn(*listed: RunningSession, width: int = 80) -> list[str]:
    """Return the lines of the table on a terminal of this width."""
    found = Running(NOW, list(listed), WORKERS)
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table(listed, shown_ids(listed), found))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_an_id_is_shown_by_its_first_eight_characters() -> None:
    assert shown_ids([session(ID), session(FAR)]) == {ID: "3f2b8c1e", FAR: "7c9e6679"}


def test_ids_that_begin_alike_are_shown_longer() -> None:
    shown = shown_ids([session(ID), session(OTHER), session(FAR)])
    assert shown == {ID: "3f2b8c1e-9a4d", OTHER: "3f2b8c1e-9a4e", FAR: "7c9e6679"}


def test_two_claims_of_a_session_do_not_show_its_whole_id() -> None:
    assert shown_ids([session(ID), session(ID)]) == {ID: "3f2b8c1e"}


@pytest.mark.parametrize(
    ("name", "wanted", "meant"),
    [
        ("key:acme", "acme", True),
        ("key:acme", "key:acme", True),
        ("acme", "acme", True),
        ("key:acme2", "acme", False),
        ("sub:acme", "acme", False),
    ],
)
def test_a_client_is_named_as_listed_or_by_its_key(name: str, wanted: str, meant: bool) -> None:
    assert is_client(name, wanted) is meant


def test_eighty_columns_show_everything_without_a_cut() -> None:
    long = session(client="addr:9f86d081884c7d65", model="anthropic/claude-sonnet-4.5", size=998_400)
    lines = drawn(long)
    assert max(map(len, lines)) <= 80
    assert narrowest(table([long], shown_ids([long]), Running(NOW, [long], WORKERS))) <= 80
    heading, first, *rest = lines
    assert heading.split() == [
        "id",
        "client",
        "model",
        "state",
        "for",
        "worker",
        "events",
        "size",
        "max",
        "USD",
    ]
    assert first.split()[0] == "3f2b8c1e"
    assert {"running", "1m05s", "312", "998", "kB", "0.0066"} <= set(first.split())
    columns = [heading.index(name) for name in ("client", "model", "state", "worker", "events")]
    joined = ["".join(line[start:end].strip() for line in (first, *rest)) for start, end in pairwise(columns)]
    assert joined[:2] == ["addr:9f86d081884c7d65", "anthropic/claude-sonnet-4.5"]
    assert joined[3] == "eu-1:4711"


def test_a_session_without_a_chunk_is_waiting() -> None:
    [_, row] = drawn(session(events=0, size=0), width=200)
    assert row.split()[3:] == ["waiting", "1m05s", "eu-1:4711", "-", "-", "0.0066"]


def test_an_unknown_time_and_worker_are_said_to_be_unknown() -> None:
    [_, row] = drawn(session(since_ms=None, worker="", activity=Activity.STARTING, events=0), width=200)
    assert row.split()[3:] == ["starting", "?", "-", "-", "-", "0.0066"]


def test_markup_and_control_characters_of_others_are_harmless() -> None:
    [_, row] = drawn(session(client="[red]x[/red]", model="a\x1b[2Jb"), width=200)
    assert "[red]x[/red]" in row
    assert "\x1b" not in row


def test_json_has_all_that_is_known_and_no_secret() -> None:
    found = Running(NOW, [session()], WORKERS)
    told = to_json(session(), shown_ids(found.sessions), found)
    assert told == {
        "id": "3f2b8c1e",
        "client": "key:acme",
        "model": "a/b",
        "state": "running",
        "since": "2026-11-18T11:05:35.000Z",
        "seconds": 65.0,
        "worker": "w1",
        "host": "eu-1:4711",
        "firstChunk": True,
        "events": 312,
        "bytes": 98_400,
        "reserved": {"tokens": 4116, "cost": 0.0065616},
    }
    assert ID not in json.dumps(told)


@pytest.mark.parametrize(
    ("session_id", "client"),
    [(None, None), (ID, "acme"), ("3f2b8c1", None), ("3f2b8c1g", None), ("*" * 8, None), ("", None)],
)
def test_a_cancel_names_one_thing(
    session_id: str | None, client: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions.cancel(session_id, client) == 2
    assert capsys.readouterr().err.startswith("broker: ")
