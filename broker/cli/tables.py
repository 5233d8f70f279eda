"""How the commands draw their tables: for a person on a terminal, for a program line by line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, ConsoleDimensions
from rich.text import Text

from broker.cli.output import Output
from broker.cli.words import printable

if TYPE_CHECKING:
    from rich.table import Table

# Away from a terminal no line is folded, so that grep finds whole ones.
_ENDLESS = 10_000


def show(table: Table) -> None:
    """Print a table. Away from a terminal a row is a line; on one, columns that may wrap are folded to fit.

    Raises:
        OutputError: standard output takes no more.
    """
    output = Output()
    console = Console(file=output, width=None if output.isatty() else _ENDLESS)
    # Half a figure would be a wrong one: what does not fit at all is left to the terminal to break.
    needed = console.measure(table, options=console.options.update(width=_ENDLESS)).minimum
    console.size = ConsoleDimensions(max(console.width, needed), console.height)
    console.print(table)


def cell(value: object) -> Text:
    """Return what somebody else wrote, as it is but on one line: a plain string would be read as markup."""
    return Text(" ".join(printable(str(value or "")).split()))
