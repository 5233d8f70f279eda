"""The table of `broker models`."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import struct
import termios
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


def test_an_entry_is_shown_unchanged_whatever_it_holds() -> None:
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


LONG_ID = "rehearsal/a-model-with-a-very-long-name-that-goes-on-and-on:free"


@pytest.mark.parametrize("columns", [20, 40, 80, 300])
async def test_a_narrow_terminal_shows_whole_ids_and_descriptions(
    columns: int,
) -> None:
    does = "Waits five seconds, then says one sentence."
    entry = {"id": LONG_ID, "name": "Rehearsal: Long name", "description": does, "pricing": {"prompt": "0"}}
    async with fake_broker(models=[entry]) as broker:
        out = await on_a_terminal(columns, "models", "--url", broker.url)
        _, piped, _ = await run("models", "--url", broker.url)
    assert LONG_ID in out
    assert " ".join(out.split()).count("sentence.") == 1
    assert LONG_ID in piped
    assert does in piped


async def test_fields_of_other_services_are_left_out() -> None:
    entry = {"id": "a/b", "name": "The model", "description": "Paragraphs of praise."}
    async with fake_broker(models=[entry]) as broker:
        _, out, _ = await run("models", "--url", broker.url)
    assert "The model" in out
    assert "praise" not in out


async def on_a_terminal(columns: int, *args: str) -> str:
    """Return what a command prints on a terminal of that width."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    reading = asyncio.create_task(asyncio.to_thread(_read_all, ours))
    try:
        status, _, _ = await run(*args, stdout=its, env={"TERM": "xterm", "COLUMNS": ""})
    finally:
        os.close(its)
    assert status == 0
    return await reading


def _read_all(terminal: int) -> str:
    found = b""
    try:
        while data := os.read(terminal, 65536):
            found += data
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(terminal)
    return found.decode()


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


async def test_a_list_without_a_match_is_reported_in_one_line() -> None:
    async with fake_broker() as broker:
        assert await run("models", "x", "--free", "--url", broker.url) == (
            1,
            "",
            "broker: no model matches.\n",
        )
        assert broker.asked == ["models?q=x&free=true"]
