"""Call functions at exact times, for the upstream of the benchmarks.

The timers of uvloop and asyncio are exact to a millisecond. With 10,000 chunks a second they would send ten chunks at
once, which no upstream does. On Linux this pacer uses a timer of the kernel, exact to some microseconds.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import itertools
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_NONBLOCK_AND_CLOEXEC = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
_AT_AN_ABSOLUTE_TIME = 1
_SECOND = 1_000_000_000


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec`: seconds and nanoseconds of the interval and of the first time."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


class Pacer:
    """Calls functions at times of the monotonic clock, in nanoseconds, earliest first."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._armed_for = 0
        self._timer: int | None = None
        self._handle: asyncio.TimerHandle | None = None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._timer = self._libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_AND_CLOEXEC)
            if self._timer < 0:
                raise OSError(ctypes.get_errno(), "no timer of the kernel")
            self._loop.add_reader(self._timer, self._expired)

    def call_at(self, when: int, call: Callable[[], None]) -> None:
        """Call a function at a time; one that has passed is as soon as possible."""
        heapq.heappush(self._due, (when, next(self._order), call))
        if not self._armed_for or when < self._armed_for:
            self._arm()

    def _arm(self) -> None:
        self._armed_for = when = self._due[0][0]
        if self._timer is None:
            if self._handle is not None:
                self._handle.cancel()
            pause = max(0, when - time.monotonic_ns()) / _SECOND
            self._handle = self._loop.call_later(pause, self._call_due)
            return
        spec = _TimerSpec(0, 0, *divmod(max(1, when), _SECOND))
        if self._libc.timerfd_settime(self._timer, _AT_AN_ABSOLUTE_TIME, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "the timer of the kernel cannot be set")

    def _expired(self) -> None:
        assert self._timer is not None
        try:
            os.read(self._timer, 8)
        except BlockingIOError:  # it was set again after it had expired
            return
        self._call_due()

    def _call_due(self) -> None:
        now = time.monotonic_ns()
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()
        self._armed_for = 0
        if self._due:
            self._arm()
