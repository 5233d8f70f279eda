"""Tables of the commands: for people on a terminal, line by line for programs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from broker.cli.output import Output
from broker.cli.words import one_line

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType, RenderResult

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
    if isinstance(shown, Table):
        # Half a number would be a wrong one: what does not fit is left to the terminal to break.
        console.size = ConsoleDimensions(max(console.width, narrowest(shown)), console.height)
    console.print(shown)


def narrowest(table: Table) -> int:
    """Return the columns that a table needs if names are folded as far as they may be."""
    folding = [column for column in table.columns if not column.no_wrap]
    for column in folding:
        column.max_width = column.min_width
    try:
        return measure(table)
    finally:
        for column in folding:
            column.max_width = None


def cell(value: object, *, style: str = "", fold: bool = True) -> Text:
    """Return text of others on one line, without what a terminal could obey, and otherwise unchanged.

    A plain string would be parsed as markup.

    Args:
        value: the text.
        style: a style of the library.
        fold: False for a text that ends with an ellipsis where it does not fit, instead of going on in the next line.
    """
    text = Text(one_line(value or ""), style=style)
    if not fold:
        text.no_wrap, text.overflow = True, "ellipsis"
    return text


class Name:
    """A name of others on one line. Where it does not fit, its beginning is cut: ports and numbers are at the end.

    Args:
        name: the name.
        width: columns that it takes, if there is room and the name has fewer.
    """

    def __init__(self, name: object, width: int = 0) -> None:
        self._name = one_line(name)
        self._width = width

    def __rich_measure__(self, _console: Console, options: ConsoleOptions) -> Measurement:
        """Return the columns that it needs."""
        wanted = max(cell_len(self._name), self._width)
        return Measurement(min(wanted, options.max_width), min(wanted, options.max_width))

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        name, room = self._name, options.max_width
        if cell_len(name) > room:
            name = name[len(name) - room + 1 :]
            while cell_len(name) > room - 1:
                name = name[1:]
            name = f"…{name}"
        yield Text(name, no_wrap=True)
