"""The command line: a module a command; what they print and read is here, what they ask for is elsewhere."""

from __future__ import annotations

import sys

BAD_USE = 2
"""The exit status where the arguments or the settings are at fault."""


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    # The parser is built when it is needed: importing a module of this package stays cheap.
    from broker.cli.commands import app  # noqa: PLC0415 - as said above

    app(prog_name="broker")


def complain(words: object, status: int = 1) -> int:
    """Say it on standard error and return the exit status that goes with it."""
    print(f"broker: {words}", file=sys.stderr)
    return status
