"""What an application is told of an answer that has ended, and how it is gathered from the chunks. No I/O.

Gathering parses each chunk once more, so it is done only where an application wants to know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from broker.core.responses_said import is_event, said_in_event

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Mapping

_REASONING = ("reasoning", "reasoning_content", "reasoning_text")
_DEEPEST = 6  # a part may hold a list of parts: thinking does


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
        self._deltas = False

    def add(self, chunks: Iterable[bytes]) -> None:
        """Take the chunks of one read."""
        for data in chunks:
            if isinstance(chunk := _parsed(data), dict):
                if is_event(chunk):
                    self._add_event(chunk)
                else:
                    self._add(chunk)

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

    def _add(self, chunk: Mapping[str, Any]) -> None:
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return
        said = choice.get("delta")
        if isinstance(said, dict) and said:
            self._deltas = True
        elif self._deltas:  # a message beside deltas is the answer so far, told again
            return
        else:
            said = choice.get("message")
        if isinstance(said, dict):
            self._add_said(said)

    def _add_event(self, event: Mapping[str, Any]) -> None:
        said = said_in_event(event)
        self._text.append(said.text)
        self._reasoning.append(said.reasoning)
        for call in said.calls:
            function = {name: _text(call.get(name)) for name in ("name", "arguments")}
            self._calls[len(self._calls)] = {
                "id": _text(call.get("call_id")),
                "type": "function",
                "function": function,
            }

    def _add_said(self, said: Mapping[str, Any]) -> None:
        self._add_content(said.get("content"), self._text, 0)
        self._add_content(said.get("refusal"), self._text, 0)
        before = len(self._reasoning)
        for name in _REASONING:  # the same thoughts may stand under several names
            if len(self._reasoning) == before:
                self._add_content(said.get(name), self._reasoning, 0)
        if len(self._reasoning) == before:
            details = [detail for detail in _list(said.get("reasoning_details")) if isinstance(detail, dict)]
            texts = (detail.get(key) for detail in details for key in ("text", "summary"))
            self._reasoning += [text for text in texts if isinstance(text, str)]
        for call in _list(said.get("tool_calls")):
            if isinstance(call, dict):
                self._add_call(call)

    def _add_content(self, content: Any, to: list[str], depth: int) -> None:
        """Add a text, a part with a type, or a list of both."""
        if isinstance(content, str):
            if content:
                to.append(content)
        elif depth > _DEEPEST:
            return
        elif isinstance(content, list):
            for part in content:
                self._add_content(part, to, depth + 1)
        elif isinstance(content, dict):
            if content.get("type") in ("thinking", "reasoning"):
                thoughts = content.get("thinking") or content.get("reasoning") or content.get("text")
                self._add_content(thoughts, self._reasoning, depth + 1)
            else:
                self._add_content(content.get("text") or content.get("refusal"), to, depth + 1)

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


def _parsed(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(data)  # takes half a surrogate pair, whose other half the next chunk may have
    except (ValueError, RecursionError):
        return None


def _whole(pieces: list[str]) -> str:
    """Put pieces together; what is left of a pair that was cut becomes U+FFFD."""
    text = "".join(pieces)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
