"""The command line: one module for each command, with what it prints and reads."""

from __future__ import annotations

import sys

from broker.cli.output import OutputError, secure_streams
from broker.cli.words import BAD_USE, INTERRUPTED, complain


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    try:
        secure_streams()
        if not all(_is_text(argument) for argument in sys.argv[1:]):
            sys.exit(complain("the arguments must be UTF-8 text.", BAD_USE))
        # The parser is imported only when it is needed, so that importing a module of this package stays cheap.
        from broker.cli.commands import app  # noqa: PLC0415 - see above

        app(prog_name="broker")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OutputError as error:
        # A reader that has left, such as `head`, has read enough.
        sys.exit(1 if error.reader_left else complain(error))


def _is_text(argument: str) -> bool:
    # Python decodes invalid bytes to lone surrogates, which cannot be encoded again.
    return not any("\ud800" <= char <= "\udfff" for char in argument)
