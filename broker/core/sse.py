"""Decode and encode the event stream format. No I/O.

The rules are those of the HTML standard, https://html.spec.whatwg.org/multipage/server-sent-events.html,
under "Interpreting an event stream". The meaning of a frame's data is not known here.
"""

from __future__ import annotations

from typing import NamedTuple

DATA = b"data: "
"""The beginning of each line of data, as nearly all services write it, and as it is encoded here."""

_BOM = b"\xef\xbb\xbf"
_LINE_ENDS = (b"\n", b"\r")
_EMPTY = frozenset({b"", b"null", b"false", b"{}", b"[]", b'""'})
"""Contents of an ``error:`` line that report no error."""


class Frame(NamedTuple):
    """One dispatched event: its type, its data (lines joined by LF), and the last id up to it."""

    event: str
    data: bytes
    id: str


class EventTooLarge(ValueError):  # noqa: N818 - says what happened, as the tree of errors does
    """An event exceeded its limit before it was complete."""


class Decoder:
    """Decodes the bytes of an event stream, in pieces of any size, into frames.

    The standard drops an event that has no blank line behind it when the stream ends. Some model services end this
    way, so `flush` returns it.

    Args:
        max_event_bytes: limit for the lines of one event together; more raises `EventTooLarge`.
        error_lines: read lines of the form ``error: {...}`` as frames of the type ``error``, as llama.cpp sends them.

    Attributes:
        last_event_id: the id that a reconnecting client would send.
        retry: the reconnection time in milliseconds that the stream asked for, or None.
        is_between_events: True if nothing is kept for the next event, as far as that is known without a search.
    """

    __slots__ = (
        "_after_cr",
        "_at_start",
        "_data",
        "_data_bytes",
        "_error_lines",
        "_event",
        "_id",
        "_max_event_bytes",
        "_partial",
        "_partial_bytes",
        "is_between_events",
        "last_event_id",
        "retry",
    )

    def __init__(self, max_event_bytes: int, *, error_lines: bool = False) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self.is_between_events = False
        self._max_event_bytes = max_event_bytes
        self._error_lines = error_lines
        self._at_start = True
        self._after_cr = False
        self._partial: list[bytes] = []
        self._partial_bytes = 0
        self._event = ""
        self._id = ""
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, data: bytes) -> list[Frame]:
        """Add the next bytes, and return the events that they complete.

        Raises:
            EventTooLarge: the decoder cannot be used any more.
        """
        if (frames := self._plain_frames(data)) is not None:
            self.is_between_events = not self._partial
            return frames
        self.is_between_events = False
        if self._at_start:
            data = self._without_bom(data)
        if self._after_cr and data:
            # The CR ended its line already; a LF directly behind it belongs to the same line end.
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if not data:
            return []
        if b"\n" not in data and b"\r" not in data:
            self._hold(data)
            return []
        if self._partial:
            self._partial.append(data)
            data = b"".join(self._partial)
            self._partial.clear()
            self._partial_bytes = 0
        self._after_cr = data.endswith(b"\r")
        lines = data.splitlines()
        if not data.endswith(_LINE_ENDS):
            self._hold(lines.pop())
        return self._read(lines)

    def take_complete(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the complete events in the next bytes, what was kept of the first one included, and the rest.

        The events may be read in another way. What is not read so, and then the rest, has to be given to `feed`. There
        may be no events, and all is the rest, if the decoder cannot tell without reading the lines.
        """
        if self._data or self._event or self._after_cr:
            return b"", data
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            return b"", data  # and what is kept is not copied for each piece
        events = b"".join((*self._partial, data[:end]))
        self._partial.clear()
        self._partial_bytes = 0
        self.is_between_events = True
        return events, data[end:]

    def _plain_frames(self, data: bytes) -> list[Frame] | None:
        """Return the events of bytes whose complete events have one line of data and nothing else; None for any others.

        Nearly every read is of this kind. Reading it line by line, in `_read`, costs five times as much (measured).
        """
        if self._data or self._event or self._after_cr:
            return None
        if self._partial:
            if b"\n\n" not in data:
                return None  # what is kept has no line end either, and is not copied for each piece
            data = b"".join((*self._partial, data))
        end = data.rfind(b"\n\n")
        tail = data[end + 2 :]
        if end < 0 or b"\n" in tail or b"\r" in data or len(data) > self._max_event_bytes:
            return None
        events = data[:end].split(b"\n\n")
        if data.count(b"\n") != 2 * len(events):
            return None
        for event in events:
            if not event.startswith(DATA):
                return None
        self._at_start = False
        self._partial.clear()
        self._partial_bytes = 0
        if tail:
            self._hold(tail)
        self.last_event_id = event_id = self._id
        size = len(DATA)
        return [Frame("message", event[size:], event_id) for event in events]

    def flush(self) -> list[Frame]:
        """Return the events of an unfinished end, as if a blank line followed. The decoder cannot be used any more."""
        rest = b"".join(self._partial)
        self._partial.clear()
        return self._read([rest, b""] if rest else [b""])

    def _without_bom(self, data: bytes) -> bytes:
        data = b"".join((*self._partial, data))
        self._partial.clear()
        self._partial_bytes = 0
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._hold(data)
            return b""
        self._at_start = False
        return data.removeprefix(_BOM)

    def _hold(self, data: bytes) -> None:
        self._partial.append(data)
        self._partial_bytes += len(data)
        self._check(self._partial_bytes)

    def _check(self, more: int) -> None:
        if self._data_bytes + more > self._max_event_bytes:
            raise EventTooLarge(f"an event of over {self._max_event_bytes} bytes")

    def _read(self, lines: list[bytes]) -> list[Frame]:
        frames = []
        for line in lines:
            if not line:
                if (frame := self._dispatch()) is not None:
                    frames.append(frame)
            elif line.startswith(DATA):  # nearly every line of a chat stream
                self._add_data(line[len(DATA) :])
            elif self._error_lines and line.startswith(b"error:"):
                said = line[6:].strip()
                if said not in _EMPTY:
                    frames.append(Frame("error", said, self._id))
            else:
                self._field(line)
        return frames

    def _dispatch(self) -> Frame | None:
        self.last_event_id = self._id
        data, event = self._data, self._event
        self._event = ""
        if not data:
            return None
        self._data = []
        self._data_bytes = 0
        return Frame(event or "message", data[0] if len(data) == 1 else b"\n".join(data), self._id)

    def _add_data(self, value: bytes) -> None:
        self._data.append(value)
        self._data_bytes += len(value) + 1
        if self._data_bytes > self._max_event_bytes:
            self._check(0)

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")  # a comment has an empty name
        value = value.removeprefix(b" ")
        if name == b"data":
            self._add_data(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            self.retry = int(value[:18])


def encode_event(event: str, data: bytes, event_id: str | None = None) -> bytes:
    """Encode one event. ``data`` may have line ends of any kind; each line becomes a ``data:`` line."""
    head = f"id: {event_id}\nevent: {event}\n" if event_id is not None else f"event: {event}\n"
    return b"%b%b\n\n" % (head.encode(), encode_data(data))


def encode_data(data: bytes) -> bytes:
    """Encode the data of an event: its ``data:`` lines, without the end of the last one."""
    if b"\n" in data or b"\r" in data:
        data = (b"\n" + DATA).join(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))
    return DATA + data


def decode_data(lines: bytes) -> bytes:
    """Return the data that `encode_data` has encoded, with LF between its lines."""
    return lines[len(DATA) :].replace(b"\n" + DATA, b"\n")


def encode_comment(text: str) -> bytes:
    """Encode a comment, which keeps a connection alive and is not shown by clients. ``text`` is one line."""
    return f": {text}\n\n".encode()


def encode_retry(milliseconds: int) -> bytes:
    """Encode a block that sets a client's reconnection time, without an event."""
    return b"retry: %d\n\n" % milliseconds
