"""A stopwatch for bounds on the time that the broker takes. Other work on the machine does not count."""

from __future__ import annotations

import os
import time
from pathlib import Path


def waited_for_a_core(pid: int) -> float:
    """Return the seconds that a process was ready to run while others ran; 0 where the system has no such number."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


class Stopwatch:
    """Measures from the moment when it is made.

    On a loaded machine a process may be ready to run, and yet wait for a core for any time. A test of how soon the
    broker acts must not fail for that.

    Args:
        pids: processes that have to act until the time is read, in addition to that of the test.
    """

    def __init__(self, *pids: int) -> None:
        self._waited = {pid: waited_for_a_core(pid) for pid in (os.getpid(), *pids)}
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def seconds(self) -> float:
        """The same without the time that the processes waited for a core. One that has ended did not wait."""
        elapsed = self.elapsed
        return elapsed - sum(
            max(0.0, waited_for_a_core(pid) - before) for pid, before in self._waited.items()
        )
