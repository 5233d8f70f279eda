"""Read the body of an HTTP answer, for the load of the benchmarks: as little work as possible for each read."""

from __future__ import annotations

import re

_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:\s*close", re.IGNORECASE)


class Reply:
    """One answer, fed with what the connection reads.

    Attributes:
        status: of the answer; 0 until its head is here.
        ended: the answer is here as a whole.
        closes: the server closes the connection after it. Without a length, the body ends there.
    """

    def __init__(self) -> None:
        self.status = 0
        self.ended = False
        self.closes = False
        self._chunked = False
        self._left: int | None = None
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return what is new of the body. A chunk of HTTP is returned when it is here as a whole."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not self.status:
            head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = head
                return b""
            self._read_head(head)
        if self._chunked:
            return self._unchunked(data)
        if self._left is not None:
            self._left -= len(data)
            self.ended = self._left <= 0
        return data

    def end_of_connection(self) -> bool:
        """Return True if the answer is here as a whole, now that nothing can follow."""
        self.ended = self.ended or (bool(self.status) and not self._chunked and self._left is None)
        return self.ended

    def _read_head(self, head: bytes) -> None:
        self.status = int(head[9:12])
        self.closes = _CLOSE.search(head) is not None
        self._chunked = _CHUNKED.search(head) is not None
        length = _LENGTH.search(head)
        self._left = int(length[1]) if length else 0 if self.status == 204 else None

    def _unchunked(self, data: bytes) -> bytes:
        pieces, at = [], 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            begin, size = line_end + 2, int(data[at:line_end], 16)
            if len(data) < begin + size + 2:
                break
            at = begin + size + 2
            if not size:
                self.ended = True
                break
            pieces.append(data[begin : begin + size])
        self._rest = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
