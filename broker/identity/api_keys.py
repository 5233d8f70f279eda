"""API keys and their owners. Keys from a file are read again when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import TYPE_CHECKING

import structlog

from broker.settings import read_api_keys
from broker.watched_file import WatchedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from broker.setting_kinds import ApiKey

log = structlog.get_logger(__name__)


class ApiKeys:
    """The valid API keys.

    Args:
        keys: the keys at the start.
        path: the file that they are from, or None.
        clock: seconds that only go forward.
    """

    def __init__(
        self, keys: Iterable[ApiKey], path: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = _digests(keys)
        self._clock = clock
        self._file = self._watched(path)

    def owner_of(self, key: str) -> str | None:
        """Return the name of a key's owner; None for an unknown key.

        Takes the same time for every key, known or not.
        """
        self._look()
        shown = _digest(key)
        owner = None
        for digest, name in self._keys:
            if hmac.compare_digest(digest, shown):
                owner = name
        return owner

    def replace(self, keys: Iterable[ApiKey], path: Path | None) -> bool:
        """Replace the keys, and watch this file from now on. Returns True if the keys differ from those before."""
        self._file = self._watched(path)
        before, self._keys = self._keys, _digests(keys)
        return self._keys != before

    def _watched(self, path: Path | None) -> WatchedFile[tuple[ApiKey, ...]] | None:
        if path is None:
            return None
        # An invalid file leaves the present keys: a typing mistake lets nobody in or out.
        refusal = "the file of api keys is unusable, the old keys stay"
        return WatchedFile(path, read_api_keys, refusal=refusal, clock=self._clock)

    def _look(self) -> None:
        keys = self._file.changed() if self._file is not None else None
        if keys is None:
            return
        before, self._keys = self._keys, _digests(keys)
        if self._keys != before:
            log.info("api keys changed", count=len(keys))


def _digests(keys: Iterable[ApiKey]) -> tuple[tuple[bytes, str], ...]:
    return tuple((_digest(key.get_secret_value()), name) for name, key in keys)


def _digest(key: str) -> bytes:
    # Bytes of a header that are not UTF-8 arrive as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
