"""Standard output of the commands. Only this module writes to it, and handles that it is closed."""

from __future__ import annotations

import io
import os
import sys

_LAST_STANDARD = 2  # the number of standard error


class OutputError(Exception):
    """Standard output is closed; the text is a sentence for a person.

    Attributes:
        reader_left: it is a pipe whose reader has left.
    """

    def __init__(self, error: OSError | None = None) -> None:
        why = "it is closed" if error is None else os.strerror(error.errno or 0).lower()
        super().__init__(f"standard output cannot be written ({why}).")
        self.reader_left = isinstance(error, BrokenPipeError)


def secure_streams() -> None:
    """Make the three standard streams safe to use. Called once, at the start of the process.

    The number of a closed stream would be given to the next file or socket, which would then get the output. Characters
    that the encoding of the output lacks are shown as question marks.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD:
        pass
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def require_output() -> None:
    """Check that standard output is open, before anything is requested.

    Raises:
        OutputError: standard output was closed when the process started.
    """
    if sys.stdout is None:
        raise OutputError


def write(text: str) -> None:
    """Write to standard output at once.

    Raises:
        OutputError: it is closed.
    """
    require_output()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _discard()
        raise OutputError(error) from error


class Output(io.StringIO):
    """Standard output for a library that needs a file. Stores nothing, and raises `OutputError`."""

    def isatty(self) -> bool:
        """Return True if it is a terminal."""
        return sys.stdout.isatty()

    def write(self, text: str) -> int:
        """Write as the function `write` does."""
        write(text)
        return len(text)


def _discard() -> None:
    # Buffered text would fail again at the end of the interpreter, with a message that is not ours.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
