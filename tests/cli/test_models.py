"""How `broker models` writes figures."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from broker.cli.models import context, per_million, table


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
        {"id": "a/b", "name": "[red]B[/red]\x1b[2J", "pricing": {"prompt": "0", "completion": "-1"}},
        {"id": "a/c", "pricing": "unknown"},
        {},
    ]
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(table(entries))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[1:] == [["a/b", "[red]B[/red][2J", "free", "varies"], ["a/c"], []]
