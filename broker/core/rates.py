"""The rate of a client: the result of one hit. No I/O."""

from __future__ import annotations

from typing import NamedTuple


class RateStatus(NamedTuple):
    """The result of a hit, and the state of the client after it.

    Attributes:
        allowed: the hit passed and was counted. A refused hit is not counted.
        limit: hits that may pass in a window.
        window: the length of the window in seconds.
        remaining: hits that would pass now.
        reset: seconds until the oldest hit leaves the window, which frees one more.
    """

    allowed: bool
    limit: int
    window: int
    remaining: int
    reset: float
