"""The command line: a module a command; what they print and read is here, what they ask for is elsewhere."""

from __future__ import annotations


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    # The parser is built when it is needed: importing a module of this package stays cheap.
    from broker.cli.commands import app  # noqa: PLC0415 - as said above

    app(prog_name="broker")
