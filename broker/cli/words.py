"""What the commands say to a person, and their exit statuses."""

from __future__ import annotations

import math
import sys
from contextlib import suppress

BAD_USE = 2
"""The exit status where the arguments or the settings are at fault."""

CREDENTIAL = "BROKER_TOKEN"
"""The environment variable of what the client commands show to a broker that asks who is there."""

_MINUTE, _HOUR = 60, 3600
_FOR_EVER = 10**9  # seconds; no wait that anybody means

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def complain(words: object, status: int = 1) -> int:
    """Say it on standard error and return the exit status that goes with it."""
    tell(f"broker: {words}")
    return status


def tell(words: str) -> None:
    """Say it on standard error, where somebody may be listening."""
    with suppress(OSError):
        print(printable(words), file=sys.stderr, flush=True)


def after(sentence: str, seconds: object) -> str:
    """Return the sentence and, where it is known, how long to wait before the next attempt."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < _FOR_EVER:
        return sentence
    for size, unit in ((_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * size:
            return f"{sentence} Try again in {math.ceil(seconds / size)} {unit}."
    return f"{sentence} Try again in {math.ceil(seconds)} s."


def printable(text: str) -> str:
    """Return the text without what would command a terminal: control characters but tab and newline."""
    return "".join(char for char in text if char in "\n\t" or not _commands(ord(char)))


def _commands(code: int) -> bool:
    return code < 0x20 or 0x7F <= code < 0xA0
