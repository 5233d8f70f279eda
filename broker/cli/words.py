"""What the commands say to a person, and their exit statuses."""

from __future__ import annotations

import sys
from contextlib import suppress

BAD_USE = 2
"""The exit status where the arguments or the settings are at fault."""

CREDENTIAL = "BROKER_TOKEN"
"""The environment variable of what the client commands show to a broker that asks who is there."""

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


def printable(text: str) -> str:
    """Return the text without what would command a terminal: control characters but tab and newline."""
    return "".join(char for char in text if char in "\n\t" or not _commands(ord(char)))


def _commands(code: int) -> bool:
    return code < 0x20 or 0x7F <= code < 0xA0
