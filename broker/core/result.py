"""What an application is told of an answer that has ended, and how it is gathered from the chunks. No I/O.

Gathering parses each chunk once more, so it is done only where an application wants to know.
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
    """An answer that has ended. What was said, and the session's id, do not show in its `repr`.

    Attributes:
        id: of the session.
        client: the name of the client that prepared it.
        model: that answered, else that was asked for.
        state: ``done``, ``failed``, ``cancelled`` or ``abandoned``; ``lost`` where another worker took this one for
            dead and ended the session.
        text: of the answer, as far as it came.
        reasoning: what the model thought, where it was shown.
        tool_calls: as a message of the assistant holds them: ``{"id", "type", "function": {"name", "arguments"}}``.
        usage: the upstream's own object; None where it told none.
        cost: USD; None where it is not known.
        estimated: the cost rests on our own count. The books are corrected later where the upstream tells more.
        finish_reason: the upstream's word, or ``cancelled``.
        error: the code of the error that it ended in, such as ``upstream_timeout``.
        started_at: when the session was claimed. All times are UTC.
        first_chunk_at: when the first chunk came; None where none did.
        ended_at: when it ended.
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
    """What an answer says, gathered chunk by chunk. Nothing here raises, whatever a chunk holds.

    It is not bounded by itself: the chunks of an answer are, by `BROKER_MAX_RESPONSE`.
    """

    __slots__ = ("_calls", "_deltas", "_reasoning", "_text")

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}  # by index
        self._deltas: bool | None = False

    def add(self, chunks: Iterable[bytes]) -> None:
        """Take the chunks of one read."""
        for data in chunks:
            said, self._deltas = said_in(parse_relayed(data), self._deltas)
            self._text.append(said.text)
            self._reasoning.append(said.reasoning)
            for call in said.calls:
                self._add_call(_as_piece(call) if call.get("type") == "function_call" else call)

    @property
    def text(self) -> str:
        """The answer."""
        return _whole(self._text)

    @property
    def reasoning(self) -> str:
        """What the model thought."""
        return _whole(self._reasoning)

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        """The calls, each put together of its pieces."""
        return tuple(self._calls.values())

    def _add_call(self, piece: Mapping[str, Any]) -> None:
        index = piece.get("index")
        if not isinstance(index, int):
            index = max(self._calls, default=-1) + 1  # a call that is whole
        call = self._calls.setdefault(index, {"id": "", "type": "function"})
        function = call.setdefault("function", {"name": "", "arguments": ""})
        said = piece.get("function")
        if not isinstance(said, dict):
            said = {}
        call["id"] = call["id"] or _text(piece.get("id"))
        function["name"] = function["name"] or _text(said.get("name"))
        function["arguments"] += _text(said.get("arguments"))
        if "extra_content" in piece:
            call["extra_content"] = piece["extra_content"]  # has to be sent back with the call


def _as_piece(item: Mapping[str, Any]) -> dict[str, Any]:
    """A ``function_call`` item of a response as a call of a chat, whole."""
    return {"id": item.get("call_id"), "function": {name: item.get(name) for name in ("name", "arguments")}}


def _whole(pieces: list[str]) -> str:
    """Put pieces together; what is left of a pair that was cut becomes U+FFFD."""
    text = "".join(pieces)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
