"""Recognize the chunks of an answer that differ from an earlier one only in their text. No I/O.

Nearly every chunk of a chat is the chunk before it with another piece of text, and the same id and model around it.
Parsing it again tells nothing new. A skeleton is such a chunk, cut where its text begins and ends. A chunk with the
same two parts is the same JSON with another text, if that text has no character that JSON would read in another way.

This is the fast path of `chat_answer`, whose slow path gives the meaning: the tests compare both on the same chunks.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

import orjson

from broker.core.sse import DATA

MAX_TRIES = 8
"""Chunks of an answer that are tried as a skeleton. Some services write something new into every chunk."""

MAX_SIZE = 4096
"""Bytes of a chunk that is tried."""

_PLAIN = bytes(set(range(0x20, 0x7F)) - set(b'"\\'))
"""The characters of ASCII that a JSON text has as they are."""

_TEXTS = re.compile(rb"""(?:(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})++\x00)*+""")
"""Texts as JSON has them between quotes, each followed by a zero, which no such text has."""

_PROBE = "-"
_CONTENT = re.compile(rb'"content" ?: ?"')


class Skeleton:
    """The parts of an event before and after its text. It matches nothing until `learn` has found one."""

    __slots__ = ("_end", "_head", "_tail", "_tries")

    def __init__(self) -> None:
        self._head = self._tail = b""  # of an event
        self._end = b""  # of its data
        self._tries = 0

    def text_size(self, event: bytes) -> int:
        """Return the UTF-8 bytes of the text of an event that differs only in it; 0 where it has to be parsed.

        As `match` for one event, but faster: nearly every read has one.

        Args:
            event: a complete event as it is encoded, or anything else.
        """
        head, tail = self._head, self._tail
        if not (head and event.startswith(head) and event.endswith(tail)):
            return 0
        text = event[len(head) : len(event) - len(tail)]
        if not text or len(event) < len(head) + len(tail):
            return 0
        if b"\n" in text:  # several events: to look at all their characters takes longer than `match`
            return 0
        return _plain_texts([text])[1] if text.translate(None, _PLAIN) else len(text)

    def match(self, events: bytes) -> tuple[list[bytes], int]:
        """Find the leading events that differ from the skeleton only in their text.

        Args:
            events: complete events as they are encoded, and perhaps anything behind them.

        Returns:
            The line of each of these events, ``data: `` included, and the UTF-8 bytes of all their texts.
        """
        head, end = self._head, self._end
        if not head or not events.startswith(head):
            return [], 0
        # Nearly always these are all events. It is fast to suppose so and to compare: a split by one byte takes a tenth
        # of the time of one by two, and one comparison a sixth of many (measured).
        lines = events.split(b"\n")[:-2:2]
        texts = [line[len(head) : len(line) - len(end)] for line in lines]
        if head + (self._tail + head).join(texts) + self._tail != events:
            lines = list(takewhile(self._is_like, events.split(b"\n\n")[:-1]))
            texts = [line[len(head) : len(line) - len(end)] for line in lines]
        count, size = _plain_texts(texts)
        return lines[:count], size

    def _is_like(self, line: bytes) -> bool:
        """Return True if an event of one line has the parts around the text."""
        head, end = self._head, self._end
        return line.startswith(head) and line.endswith(end) and len(line) >= len(head) + len(end)

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
        if _plain_texts([raw])[0] == 0 or b"\\" in raw or b"\n" in data:
            return
        for found in _CONTENT.finditer(data):
            start, rest = data[: found.end()], data[found.end() :]
            if rest.startswith(raw + b'"') and _differs_only_in(start, rest[len(raw) :], chunk, delta):
                self._end = rest[len(raw) :]
                self._head, self._tail = DATA + start, self._end + b"\n\n"
                return


def _plain_texts(texts: list[bytes]) -> tuple[int, int]:
    """Return how many of the first texts are the inside of a JSON text and not empty, and their bytes in UTF-8."""
    joined = b" ".join(texts)
    if not joined.translate(None, _PLAIN) and b"" not in texts:
        return len(texts), len(joined) - len(texts) + 1
    good = _TEXTS.match(b"\0".join(texts) + b"\0")
    count = good[0].count(b"\0") if good is not None else 0
    try:
        said = orjson.loads(b'["%b"]' % b'","'.join(texts[:count])) if count else []
    except orjson.JSONDecodeError:  # no UTF-8, or half a character
        return 0, 0
    return count, len("".join(said).encode())


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
