"""The result of an answer for the application around the broker, collected from the chunks. No I/O.

This parses each chunk once more, so it is done only where an application wants results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from broker.core.answer import parse_relayed
from broker.core.dialect import said_in

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Result:
    """An answer that has ended. Its `repr` shows neither its contents nor the session's id.

    Attributes:
        id: the id of the session.
        client: the name of the client that prepared it.
        model: the model that answered, else the requested one.
        state: ``done``, ``failed``, ``cancelled`` or ``abandoned``; ``lost`` where another worker ended the session
            because it took this one for dead.
        text: text of the answer, as far as it came.
        reasoning: reasoning of the model, where it was shown.
        tool_calls: as in a message of the assistant: ``{"id", "type", "function": {"name", "arguments"}}``.
        usage: the upstream's usage object; None where it sent none.
        cost: USD; None where it is not known.
        estimated: the cost is our own count. The usage ledger is corrected later if the upstream has a record.
        finish_reason: that of the upstream, or ``cancelled``.
        error: the code of the error that ended it, such as ``upstream_timeout``.
        started_at: time of the claim. All times are UTC.
        first_chunk_at: time of the first chunk; None where there was none.
        ended_at: time of the end.
    """

    id: str = field(repr=False)
    client: str
    model: str
    state: str
    text: str = field(repr=False)
    reasoning: str = field(repr=False)
    tool_calls: tuple[Mapping[str, Any], ...] = field(repr=False)
    usage: Mapping[str, Any] | None
    cost: float | None
    estimated: bool
    finish_reason: str | None
    error: str | None
    started_at: dt.datetime
    first_chunk_at: dt.datetime | None
    ended_at: dt.datetime


class Transcript:
    """The contents of an answer, collected chunk by chunk. Never raises, whatever a chunk holds.

    It has no limit of its own: `BROKER_MAX_RESPONSE` limits the chunks of an answer.
    """

    __slots__ = ("_calls", "_deltas", "_reasoning", "_text")

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}  # by index
        self._deltas: bool | None = False

    def add(self, chunks: Iterable[bytes]) -> None:
        """Add the chunks of one read."""
        for data in chunks:
            said, self._deltas = said_in(parse_relayed(data), self._deltas)
            self._text.append(said.text)
            self._reasoning.append(said.reasoning)
            for call in said.calls:
                self._add_call(_as_piece(call) if call.get("type") == "function_call" else call)

    @property
    def text(self) -> str:
        """The text of the answer."""
        return _whole(self._text)

    @property
    def reasoning(self) -> str:
        """The reasoning of the model."""
        return _whole(self._reasoning)

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        """The calls, each joined from its pieces."""
        return tuple(self._calls.values())

    def _add_call(self, piece: Mapping[str, Any]) -> None:
        index = piece.get("index")
        if not isinstance(index, int):
            index = max(self._calls, default=-1) + 1  # a complete call
        call = self._calls.setdefault(index, {"id": "", "type": "function"})
        function = call.setdefault("function", {"name": "", "arguments": ""})
        said = piece.get("function")
        if not isinstance(said, dict):
            said = {}
        call["id"] = call["id"] or _text(piece.get("id"))
        function["name"] = function["name"] or _text(said.get("name"))
        function["arguments"] += _text(said.get("arguments"))
        if "extra_content" in piece:
            call["extra_content"] = piece["extra_content"]  # must be sent back with the call


def _as_piece(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``function_call`` item of a response as a complete call of a chat."""
    return {"id": item.get("call_id"), "function": {name: item.get(name) for name in ("name", "arguments")}}


def _whole(pieces: list[str]) -> str:
    """Join pieces; half of a cut surrogate pair becomes U+FFFD."""
    text = "".join(pieces)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
