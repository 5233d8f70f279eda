"""API keys: whose a key is. Those of a file are read again when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import TYPE_CHECKING

import structlog

from broker.settings import SettingsError, read_api_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from broker.setting_kinds import ApiKey

LOOK_EVERY = 1.0
"""Seconds between looks at the file, where keys are asked for that often."""

log = structlog.get_logger(__name__)


class ApiKeys:
    """The keys that are good now.

    Args:
        keys: those of the start.
        path: the file that they are from.
        clock: seconds that only go forward.
    """

    def __init__(
        self, keys: Iterable[ApiKey], path: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = _digests(keys)
        self._path = path
        self._clock = clock
        self._look_at = clock()
        self._read: _State | None = None
        self._refused: _State | None = None

    def owner_of(self, key: str) -> str | None:
        """The name of a key, None if it is none of ours.

        Takes as long whichever key it is, if any, and however much of it is right.
        """
        self._look()
        shown = _digest(key)
        owner = None
        for digest, name in self._keys:
            if hmac.compare_digest(digest, shown):
                owner = name
        return owner

    def replace(self, keys: Iterable[ApiKey], path: Path | None) -> bool:
        """Take other keys, and watch this file from now on. Returns True if they differ from those there were."""
        self._path, self._read = path, None
        before, self._keys = self._keys, _digests(keys)
        return self._keys != before

    def _look(self) -> None:
        now = self._clock()
        if self._path is None or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        state = _state(
            self._path
        )  # taken first, so that a change during the reading is seen at the next look
        if state != self._read:
            self._read_again(self._path, state)

    def _read_again(self, path: Path, state: _State) -> None:
        """Take the keys of a file, or keep those there are if it is no good: nobody is let in or out by a slip."""
        try:
            keys = read_api_keys(path)
        except SettingsError as error:
            if state != self._refused:
                log.warning("the file of api keys is no good, the old keys stay", reason=str(error))
            self._refused = state
            return
        self._read, self._refused = state, None
        before, self._keys = self._keys, _digests(keys)
        if self._keys != before:
            log.info("api keys changed", count=len(keys))


_State = tuple[int, ...]
"""What tells one version of a file from another; empty where there is no file."""


def _state(path: Path) -> _State:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def _digests(keys: Iterable[ApiKey]) -> tuple[tuple[bytes, str], ...]:
    return tuple((_digest(key.get_secret_value()), name) for name, key in keys)


def _digest(key: str) -> bytes:
    # A header's bytes that are no UTF-8 come as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
