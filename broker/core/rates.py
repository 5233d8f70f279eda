"""The rate of a client: its limit, and the result of one hit. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Rate:
    """A number of requests in each window of so many seconds."""

    count: int
    seconds: int

    def implies(self, other: Rate) -> bool:
        """Return True if a client that keeps to this rate always keeps to the other one too."""
        return self.count <= other.count and self.seconds >= other.seconds


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
