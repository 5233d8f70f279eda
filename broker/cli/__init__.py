"""The command line: a module a command; what they print and read is here, what they ask for is elsewhere."""

from __future__ import annotations

import sys

from broker.cli.output import OutputError, hold_streams
from broker.cli.words import BAD_USE, INTERRUPTED, complain


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    try:
        hold_streams()
        if not all(_is_text(argument) for argument in sys.argv[1:]):
            sys.exit(complain("the arguments must be UTF-8 text.", BAD_USE))
        # The parser is built when it is needed: importing a module of this package stays cheap.
        from broker.cli.commands import app  # noqa: PLC0415 - as said above

        app(prog_name="broker")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OutputError as error:
        # A reader that left, such as `head`, has what it wanted.
        sys.exit(1 if error.reader_left else complain(error))


def _is_text(argument: str) -> bool:
    # Python gives what it cannot decode as halves of characters, which nobody can encode again.
    return not any("\ud800" <= char <= "\udfff" for char in argument)
