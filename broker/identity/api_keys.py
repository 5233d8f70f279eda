"""API keys: whose a key is. Those of a file are read again when the file changes."""

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
        self._clock = clock
        self._file = self._watched(path)

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
        self._file = self._watched(path)
        before, self._keys = self._keys, _digests(keys)
        return self._keys != before

    def _watched(self, path: Path | None) -> WatchedFile[tuple[ApiKey, ...]] | None:
        if path is None:
            return None
        # A file that is no good leaves the keys there are: nobody is let in or out by a slip.
        refusal = "the file of api keys is no good, the old keys stay"
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
    # A header's bytes that are no UTF-8 come as lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
