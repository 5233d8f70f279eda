"""How `broker models` writes its table, and where."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from broker.cli.models import context, per_million, table
from tests.cli.fake_broker import fake_broker, run, run_shell


@pytest.mark.parametrize(
    ("price", "shown"),
    [
        ("0.0000004", "0.4"),
        ("0.000015", "15"),
        ("0.0000000375", "0.0375"),
        ("0.0001", "100"),
        (0.000002, "2"),
        ("0", "free"),
        ("0.0", "free"),
        ("-1", "varies"),
        (None, ""),
        ("soon", ""),
        ("NaN", ""),
        ("Infinity", ""),
        ("1e999999", ""),
        ([], ""),
    ],
)
def test_a_price_is_shown_for_a_million_tokens(price: Any, shown: str) -> None:
    assert per_million(price) == shown


@pytest.mark.parametrize(("tokens", "shown"), [(32768, "32,768"), (None, ""), (0, ""), ("many", "")])
def test_a_context_is_shown_in_thousands(tokens: Any, shown: str) -> None:
    assert context(tokens) == shown


def test_an_entry_is_shown_as_it_is_whatever_it_holds() -> None:
    entries: list[dict[str, Any]] = [
        {
            "id": "a/b",
            "name": "[red]B[/red]\\[i]\x1b[2J\n:cat:",
            "pricing": {"prompt": "0", "completion": "-1"},
        },
        {"id": "a/c", "pricing": "unknown"},
        {},
    ]
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(table(entries))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[1:] == [["a/b", "[red]B[/red]\\[i][2J", ":cat:", "free", "varies"], ["a/c"], []]


async def test_a_long_list_is_read_to_its_end() -> None:
    entries = [{"id": f"a/{n}", "name": "name " * 50} for n in range(4000)]
    async with fake_broker(models=entries) as broker:
        status, out, err = await run("models", "--url", broker.url)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [entry["id"] for entry in entries]


async def test_a_table_that_nobody_takes_ends_as_an_answer_does() -> None:
    async with fake_broker(models=[{"id": "a/b"}]) as broker:
        command = f"broker models --url {broker.url}"
        assert await run_shell(f"{command} | true") == (1, "", "")
        told = "broker: standard output cannot be written (no space left on device).\n"
        assert await run_shell(f"{command} >/dev/full") == (1, "", told)
        asked = len(broker.asked)
        told = "broker: standard output cannot be written (it is closed).\n"
        assert await run_shell(f"{command} >&-") == (1, "", told)
        assert len(broker.asked) == asked


async def test_a_list_without_a_match_is_told_in_one_line() -> None:
    async with fake_broker() as broker:
        assert await run("models", "x", "--free", "--url", broker.url) == (
            1,
            "",
            "broker: no model matches.\n",
        )
        assert broker.asked == ["models?q=x&free=true"]
