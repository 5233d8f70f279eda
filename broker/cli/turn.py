"""One turn of a conversation in `broker chat`: decide what to do with each event of the broker.

No I/O and no clock. `broker/cli/chat.py` has the connection and prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from broker.cli.pieces import pieces
from broker.cli.words import after, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.cli.pieces import Piece
    from broker.core.sse import Frame

# Connections in a row without any event, as while the broker restarts; and waits in a row for room or budget.
MOST_BARREN_LINES = 10
MOST_WAITS = 200
DEFAULT_RETRY_MS = 2000
LONGEST_RETRY_MS = 60_000


@dataclass(frozen=True, slots=True)
class End:
    """The end of the turn.

    Attributes:
        status: the exit status.
        note: a line for standard error.
    """

    status: int
    note: str


class Turn:
    """Follows one session over as many connections as it takes.

    Pass each frame to `take`. After the end of a connection, call `connection_over` for the seconds to wait before the
    next one.

    Attributes:
        cursor: the ``Last-Event-ID`` to send, empty before the first event.
        end: set once nothing more will come.
        waits_for: the broker's reason for a wait, if it gave one on this connection.
    """

    def __init__(self) -> None:
        self.cursor = ""
        self.end: End | None = None
        self._retry_ms = DEFAULT_RETRY_MS
        self._barren_lines = 0
        self._waits = 0
        self.waits_for = ""

    def take(self, frame: Frame) -> list[Piece]:
        """Take one event and return what to print of it."""
        if frame.id:
            self.cursor = frame.id
            self._barren_lines = self._waits = 0
        match frame.event:
            case "chunk":
                return pieces(_object(frame.data))
            case "done":
                self.end = _done(_object(frame.data))
            case "queued":
                place = _object(frame.data)
                self.waits_for = one_line(
                    f"Too many of your answers are being written; this is number {place.get('position')}."
                )
            case "error":
                self._take_error(_object(frame.data))
        return []

    def _take_error(self, error: Mapping[str, Any]) -> None:
        message = one_line(error.get("message") or "The answer failed.")
        if error.get("final", True):
            self.end = End(1, after(message, error.get("retryAfter")))
        else:
            self.waits_for = message

    def gone(self) -> None:
        """Note that the broker has nothing more (204)."""
        self.end = self.end or End(1, "The answer is over; there is nothing more to show.")

    def come_back_in(self, milliseconds: int) -> None:
        """Note how long the broker asks to wait between connections."""
        self._retry_ms = min(milliseconds, LONGEST_RETRY_MS)

    def connection_over(self) -> float:
        """Return the seconds to wait before the next connection. Where that is useless, sets `end` and returns 0."""
        if self.waits_for:
            self._waits += 1
            if self._waits >= MOST_WAITS:
                self.end = End(1, self.waits_for)
            self.waits_for = ""
        else:
            self._barren_lines += 1
            if self._barren_lines >= MOST_BARREN_LINES:
                self.end = End(1, "The broker cannot be reached any more; the answer is not complete.")
        return 0.0 if self.end is not None else self._retry_ms / 1000


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _done(data: Mapping[str, Any]) -> End:
    reason = data.get("finishReason")
    if reason == "cancelled":
        return End(1, "The answer was cancelled.")
    parts = [_usage(data), _cost(data), _times(data), str(data.get("model") or "")]
    if reason not in {"stop", None}:
        parts.append(f"ended by {reason}")
    return End(0, one_line(" · ".join(part for part in parts if part)))


def _usage(data: Mapping[str, Any]) -> str:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return ""
    return f"{usage.get('prompt_tokens', '?')} + {usage.get('completion_tokens', '?')} tokens"


def _cost(data: Mapping[str, Any]) -> str:
    cost = data.get("cost")
    if not isinstance(cost, int | float):
        return "cost unknown"
    about = "about " if data.get("estimated") else ""
    return f"{about}${cost:.9f}".rstrip("0").rstrip(".")


def _times(data: Mapping[str, Any]) -> str:
    first, total = data.get("ttftMs"), data.get("totalMs")
    if not isinstance(total, int | float):
        return ""
    after = f" (first after {first / 1000:.1f} s)" if isinstance(first, int | float) else ""
    return f"{total / 1000:.1f} s{after}"
