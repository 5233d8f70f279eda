"""Messages of the commands to people, and exit statuses."""

from __future__ import annotations

import math
import sys
from contextlib import suppress

BAD_USE = 2
"""The exit status for wrong arguments or settings."""

CREDENTIAL = "BROKER_TOKEN"
"""The environment variable with the token of the client commands."""

_MINUTE, _HOUR = 60, 3600
_FOR_EVER = 10**9  # seconds; longer than any real wait

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def complain(words: object, status: int = 1) -> int:
    """Print a complaint on standard error and return the exit status."""
    print_note(f"broker: {words}")
    return status


def print_note(words: str) -> None:
    """Print a note on standard error."""
    with suppress(OSError):
        print(printable(words), file=sys.stderr, flush=True)


def after(sentence: str, seconds: object) -> str:
    """Return the sentence with, where known, the time to wait before the next attempt."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < _FOR_EVER:
        return sentence
    for size, unit in ((_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * size:
            return f"{sentence} Try again in {math.ceil(seconds / size)} {unit}."
    return f"{sentence} Try again in {math.ceil(seconds)} s."


def printable(text: str) -> str:
    """Return the text without control characters, which a terminal could obey; tab and newline stay."""
    return "".join(char for char in text if char in "\n\t" or not _commands(ord(char)))


def _commands(code: int) -> bool:
    return code < 0x20 or 0x7F <= code < 0xA0
