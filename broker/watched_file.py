"""A file of the operator that is read again when it changes, without a task of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog

from broker.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOOK_EVERY = 1.0
"""Seconds between two checks of a file."""

REFUSED_PAUSE = 4.0
"""Seconds after which a file that was refused is read again although it has not changed; its rights may have."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class WatchedFile(Generic[T]):
    """Reads a file when it has changed. An unusable file changes nothing, and is logged once.

    Args:
        path: the path of the file.
        read: reads it; raises `SettingsError` where it cannot be used.
        refusal: the log line for an unusable file.
        clock: seconds that only go forward.
        every: seconds between two checks.
        settles: read a change only when two checks in a row have seen the same version of the file, so that it is not
            read while an editor writes it.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], T],
        *,
        refusal: str,
        clock: Callable[[], float] = time.monotonic,
        every: float = LOOK_EVERY,
        settles: bool = False,
    ) -> None:
        self._every = every
        self._settles = settles
        self._last: FileState | None = None
        self._retry_at = 0.0
        self._path = path
        self._read = read
        self._refusal = refusal
        self._clock = clock
        self._look_at = clock()
        self._used: FileState | None = None
        self._refused: FileState | None = None

    def read(self) -> T:
        """Return the contents, which count as read.

        Raises:
            SettingsError: the file cannot be used.
        """
        state = file_state(self._path)
        content = self._read(self._path)
        self._used = state
        return content

    def changed(self) -> T | None:
        """Return the contents if they are usable and have changed since the last call, else None.

        Checks the file at most once in ``every`` seconds.
        """
        now = self._clock()
        if now < self._look_at:
            return None
        self._look_at = now + self._every
        # Taken before reading, so that a change meanwhile is seen at the next check.
        state = file_state(self._path)
        before, self._last = self._last, state
        if state == self._used or (self._settles and state != before):
            return None
        if state == self._refused and now < self._retry_at:
            return None
        self._retry_at = now + REFUSED_PAUSE
        return self._take(state)

    def read_again(self) -> T | None:
        """Return the contents if they are usable, whether or not they have changed; else None."""
        self._refused = None
        return self._take(file_state(self._path))

    def _take(self, state: FileState) -> T | None:
        try:
            content = self._read(self._path)
        except SettingsError as error:
            if state != self._refused:
                log.warning(self._refusal, reason=str(error))
            self._refused = state
            return None
        self._used, self._refused = state, None
        return content


FileState = tuple[int, ...]


def file_state(path: Path) -> FileState:
    """Return the version of a file; empty where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
