"""How often a client may prepare: what became of one hit. No I/O."""

from __future__ import annotations

from typing import NamedTuple


class RateStatus(NamedTuple):
    """What became of a hit, and how the client stands after it.

    Attributes:
        allowed: it passed, and was counted. A refused one is not counted.
        limit: hits that may pass in a window.
        window: its length in seconds.
        remaining: hits that would pass now.
        reset: seconds until the oldest hit leaves the window, which frees one more.
    """

    allowed: bool
    limit: int
    window: int
    remaining: int
    reset: float
