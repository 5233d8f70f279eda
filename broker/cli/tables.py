"""Tables of the commands: for people on a terminal, line by line for programs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleDimensions
from rich.text import Text

from broker.cli.output import Output
from broker.cli.words import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Lines are never folded except on a terminal, so that grep finds whole ones.
_ENDLESS = 10_000


def terminal_width() -> int | None:
    """Return the columns of the terminal, or None where standard output is not one."""
    output = Output()
    return Console(file=output).width if output.isatty() else None


def measure(table: Table) -> int:
    """Return the columns that a table needs to show everything, each row on one line."""
    console = Console(file=io.StringIO(), width=_ENDLESS)
    return console.measure(table, options=console.options.update(width=_ENDLESS)).maximum


def show(shown: RenderableType) -> None:
    """Print a table. On a terminal, columns that may wrap are folded to fit; otherwise each row is one line.

    Raises:
        OutputError: standard output is closed.
    """
    output = Output()
    console = Console(file=output, width=None if output.isatty() else _ENDLESS)
    # Half a number would be a wrong one: what does not fit is left to the terminal to break.
    needed = console.measure(shown, options=console.options.update(width=_ENDLESS)).minimum
    console.size = ConsoleDimensions(max(console.width, needed), console.height)
    console.print(shown)


def cell(value: object) -> Text:
    """Return text of others on one line, unchanged otherwise. A plain string would be parsed as markup."""
    return Text(" ".join(printable(str(value or "")).split()))
