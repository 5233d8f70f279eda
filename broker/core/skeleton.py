"""Recognize the chunks of an answer that differ from an earlier one only in their text. No I/O.

Nearly every chunk of a chat is the chunk before it with another piece of text, and the same id and model around it.
Parsing it again tells nothing new. A skeleton is such a chunk, cut where its text begins and ends. A chunk with the
same two parts is the same JSON with another text, if that text has no character that JSON would read in another way.

This is the fast path of `chat_answer`, whose slow path gives the meaning: the tests compare both on the same chunks.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

MAX_TRIES = 8
"""Chunks of an answer that are tried as a skeleton. Some services write something new into every chunk."""

MAX_SIZE = 4096
"""Bytes of a chunk that is tried."""

_PLAIN = bytes(set(range(0x20, 0x7F)) - set(b'"\\'))
"""The characters of ASCII that a JSON text has as they are."""

_PROBE = "-"
_CONTENT = re.compile(rb'"content" ?: ?"')


class Skeleton:
    """The parts of a chunk before and after its text. It matches nothing until `learn` has found one."""

    __slots__ = ("_end", "_size", "_start", "_tries")

    def __init__(self) -> None:
        self._start = self._end = b""
        self._size = 0
        self._tries = 0

    def text_size(self, data: bytes) -> int:
        """Return the UTF-8 bytes of the text of a chunk; 0 where the chunk has to be parsed."""
        start, end = self._start, self._end
        if not (start and data.startswith(start) and data.endswith(end)):
            return 0
        size = len(data) - self._size
        if size <= 0:
            return 0
        text = data[len(start) : len(start) + size]
        return size if not text.translate(None, _PLAIN) or _is_plain(text) else 0

    def learn(self, data: bytes, chunk: dict[str, Any], delta: dict[str, Any]) -> None:
        """Try to make a skeleton of a chunk.

        Args:
            data: the chunk as JSON.
            chunk: the same, parsed.
            delta: the object in it that has the text as its `content`.
        """
        if self._tries >= MAX_TRIES or len(data) > MAX_SIZE:
            return
        self._tries += 1
        raw = delta["content"].encode("utf-8", "replace")
        # Data of several lines is not encoded as it is written here.
        if not _is_plain(raw) or b"\n" in data:
            return
        for found in _CONTENT.finditer(data):
            start, rest = data[: found.end()], data[found.end() :]
            if rest.startswith(raw + b'"') and _differs_only_in(start, rest[len(raw) :], chunk, delta):
                self._start, self._end = start, rest[len(raw) :]
                self._size = len(start) + len(self._end)
                return


def _is_plain(text: bytes) -> bool:
    """Return True if a JSON text has these bytes as they are."""
    try:
        # Printable text has no control characters, which JSON refuses.
        return b'"' not in text and b"\\" not in text and text.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _differs_only_in(start: bytes, end: bytes, chunk: dict[str, Any], delta: dict[str, Any]) -> bool:
    """Return True if another text between the two parts changes the content of the delta and nothing else."""
    text = delta["content"]
    probe = _PROBE + text
    delta["content"] = probe
    try:
        return bool(orjson.loads(start + probe.encode() + end) == chunk)
    except orjson.JSONDecodeError:
        return False
    finally:
        delta["content"] = text
