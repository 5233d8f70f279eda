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
        self._owners = _owners(self._keys)
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

    def has_owner(self, name: str) -> bool:
        """Return True if there is a key of this owner."""
        self._look()
        return name in self._owners

    def replace(self, keys: Iterable[ApiKey], path: Path | None) -> bool:
        """Replace the keys, and watch this file from now on. Returns True if the keys differ from those before."""
        self._file = self._watched(path)
        return self._use(keys)

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
        if self._use(keys):
            log.info("api keys changed", count=len(keys))

    def _use(self, keys: Iterable[ApiKey]) -> bool:
        before, self._keys = self._keys, _digests(keys)
        self._owners = _owners(self._keys)
        return self._keys != before


def _owners(keys: Iterable[tuple[bytes, str]]) -> frozenset[str]:
    return frozenset(name for _, name in keys)


def _digests(keys: Iterable[ApiKey]) -> tuple[tuple[bytes, str], ...]:
    return tuple((_digest(key.get_secret_value()), name) for name, key in keys)


def _digest(key: str) -> bytes:
    # Bytes of a header that are not UTF-8 arrive as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
