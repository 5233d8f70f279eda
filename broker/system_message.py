"""The operator's system message, which is put before every conversation. Its file is read again when it changes.

Its place in a request is in `broker/core/system.py`. Its text is never logged.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from broker.settings import read_system_file
from broker.watched_file import WatchedFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = structlog.get_logger(__name__)


class SystemMessage:
    """The system message for all clients.

    Args:
        path: its file; None where there is none.
        clock: seconds that only go forward.

    Raises:
        SettingsError: the file cannot be used. Later, an unusable file leaves the old text in force.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._text = read_system_file(path) if path is not None else None
        self._file = (
            WatchedFile(
                path,
                read_system_file,
                refusal="the system message cannot be read again, the old one stays",
                clock=clock,
            )
            if path is not None
            else None
        )

    @property
    def text(self) -> str | None:
        """The current text; None where there is none. Checks the file at most once a second."""
        if self._file is not None:
            self._take(self._file.changed())
        return self._text

    def read_again(self) -> None:
        """Read the file now, whether or not it has changed."""
        if self._file is not None:
            self._take(self._file.read_again())

    def _take(self, text: str | None) -> None:
        if text is not None and text != self._text:
            self._text = text
            log.info("system message changed", bytes=len(text.encode()))
