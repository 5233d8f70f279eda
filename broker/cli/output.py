"""Standard output of the commands: the only place that writes to it, and what happens when it takes no more."""

from __future__ import annotations

import io
import os
import sys

_LAST_STANDARD = 2  # the number of standard error


class OutputError(Exception):
    """Standard output takes no more; the text is a sentence for a person.

    Attributes:
        reader_left: it is a pipe that nobody reads any more.
    """

    def __init__(self, error: OSError | None = None) -> None:
        why = "it is closed" if error is None else os.strerror(error.errno or 0).lower()
        super().__init__(f"standard output cannot be written ({why}).")
        self.reader_left = isinstance(error, BrokenPipeError)


def hold_streams() -> None:
    """Make the three standard streams safe to use; for the start of the process, once.

    A closed one would give its number to the next file or socket, which would then be written to in its place. What
    the output's encoding lacks is shown as a question mark.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD:
        pass
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def require_output() -> None:
    """Check before anything is asked for that there is somewhere to write the answer.

    Raises:
        OutputError: standard output was closed when the process started.
    """
    if sys.stdout is None:
        raise OutputError


def write(text: str) -> None:
    """Write to standard output, at once.

    Raises:
        OutputError: it takes no more, now and later.
    """
    require_output()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _discard()
        raise OutputError(error) from error


class Output(io.StringIO):
    """Standard output for a library that wants a file; keeps nothing itself, and raises `OutputError`."""

    def isatty(self) -> bool:
        """Somebody reads it on a terminal."""
        return sys.stdout.isatty()

    def write(self, text: str) -> int:
        """As the function of this name."""
        write(text)
        return len(text)


def _discard() -> None:
    # What is still buffered would fail once more when the interpreter ends, and not in words of ours.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
