"""What the commands say to a person, and their exit statuses."""

from __future__ import annotations

import sys

BAD_USE = 2
"""The exit status where the arguments or the settings are at fault."""


def complain(words: object, status: int = 1) -> int:
    """Say it on standard error and return the exit status that goes with it."""
    print(f"broker: {printable(str(words))}", file=sys.stderr)
    return status


def printable(text: str) -> str:
    """Return the text without what would command a terminal: control characters but tab and newline."""
    return "".join(char for char in text if char in "\n\t" or not _commands(ord(char)))


def _commands(code: int) -> bool:
    return code < 0x20 or 0x7F <= code < 0xA0
