"""Messages of the commands to people, and exit statuses."""

from __future__ import annotations

import math
import os
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

_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}
# Characters with which a text seems to have another order than it has: https://www.unicode.org/reports/tr9/
_BIDI_CONTROLS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_OBEYED = dict.fromkeys(_CONTROLS | _BIDI_CONTROLS)


def complain(words: object, status: int = 1) -> int:
    """Print a complaint on standard error and return the exit status."""
    print_note(f"broker: {words}")
    return status


def print_note(words: str) -> None:
    """Print a note on standard error."""
    with suppress(OSError):
        print(printable(words), file=sys.stderr, flush=True)


def reason(error: OSError) -> str:
    """Return why a connection failed, such as `connection refused`."""
    # A failed look-up of a name has its own numbers and text.
    known = error.errno is not None and error.errno > 0
    return (os.strerror(error.errno or 0) if known else str(error.strerror or error)).lower()


def after(sentence: str, seconds: object) -> str:
    """Return the sentence with, where known, the time to wait before the next attempt."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < _FOR_EVER:
        return sentence
    for size, unit in ((_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * size:
            return f"{sentence} Try again in {math.ceil(seconds / size)} {unit}."
    return f"{sentence} Try again in {math.ceil(seconds)} s."


def printable(text: str) -> str:
    """Return the text of others without what a terminal could obey; tab and newline stay.

    Everything that a server or Redis has said passes here before a person sees it.
    """
    return text.translate(_OBEYED)


def one_line(value: object) -> str:
    """Return text of others on one line, without what a terminal could obey."""
    return " ".join(printable(str(value)).split())
