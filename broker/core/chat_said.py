"""Read the contents of a chat chunk for people: text, reasoning, tool calls. No I/O.

Services write the same contents in many shapes: a message in place of a delta, text as a list of parts, reasoning under
several names. An unknown shape gives nothing. An answer is counted by the same rules, in `chat_answer`.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from broker.core.said import NOTHING, Said

if TYPE_CHECKING:
    from collections.abc import Mapping

_REASONING: Final = ("reasoning", "reasoning_content", "reasoning_text")
_DEEPEST: Final = 6  # a part may hold a list of parts, as thinking does


class Kind(Enum):
    """The kind of a piece of an answer."""

    TEXT = "text"
    REASONING = "reasoning"
    PICTURE = "picture"


Piece = tuple[Kind, str]
"""A piece of an answer: its kind and its text, which is empty for a picture. A plain tuple: there may be many."""


class DeltasUnknown(Exception):  # noqa: N818 - says what happened, as the tree of errors does
    """A chunk has a message, and it is not known whether there were deltas before it.

    In place of deltas, a message is a piece of the answer. After deltas, it repeats the answer so far.
    """


def said_in_chunk(chunk: Mapping[str, Any], deltas: bool | None) -> tuple[Said, bool | None]:
    """Return the contents of a chunk, and whether there has been a delta so far; None where that is unknown.

    Of several choices only the first, number 0, is read.

    Args:
        chunk: the parsed chunk.
        deltas: the value returned for the chunk before; False for the first chunk, None where unknown.

    Raises:
        DeltasUnknown: `deltas` is None, but is needed for this chunk.
    """
    found: list[Said] = []
    for choice in _list(chunk.get("choices")):
        if isinstance(choice, dict) and not choice.get("index"):
            said, deltas = _said_in_choice(choice, deltas)
            found.append(said)
    if len(found) == 1:
        return found[0], deltas
    text, reasoning = "".join([said.text for said in found]), "".join([said.reasoning for said in found])
    return Said(text, reasoning, tuple(call for said in found for call in said.calls)), deltas


def in_place_of_delta(choice: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a choice has in place of a delta: a message, or the text of the old completions API."""
    message = choice.get("message")
    if isinstance(message, dict):
        return message
    text = choice.get("text")
    return {"content": text} if text and isinstance(text, str) else None


def pieces(delta: Mapping[str, Any]) -> list[Piece]:
    """Return the pieces of a delta or a message, reasoning first, without its tool calls."""
    thoughts = max(tellings(delta), key=len, default="")
    found = [(Kind.REASONING, thoughts), *_parts(delta.get("content")), *_parts(delta.get("refusal"))]
    found += [(Kind.PICTURE, "") for _ in _list(delta.get("images"))]
    return [piece for piece in found if piece[1] or piece[0] is Kind.PICTURE]


def tellings(delta: Mapping[str, Any]) -> list[str]:
    """Return the reasoning of a delta under each of its names. They repeat each other, so the longest is complete."""
    found = []
    for name in _REASONING:
        if thoughts := delta.get(name):
            text = (
                thoughts
                if isinstance(thoughts, str)
                else _joined(_parts(thoughts, Kind.REASONING), Kind.REASONING)
            )
            found.append(text)
    if details := _list(delta.get("reasoning_details")):
        found.append(_text_of_details(details))
    return found


def _text_of_details(details: list[Any]) -> str:
    texts = [detail.get(key) for detail in details if isinstance(detail, dict) for key in ("text", "summary")]
    return "".join([text for text in texts if isinstance(text, str)])


def _said_in_choice(choice: Mapping[str, Any], deltas: bool | None) -> tuple[Said, bool | None]:
    delta = choice.get("delta")
    if isinstance(delta, dict) and delta:
        return _said_in_delta(delta), True
    message = None if deltas else in_place_of_delta(choice)
    said = NOTHING if message is None else _said_in_delta(message)
    if deltas is None and said != NOTHING:
        raise DeltasUnknown
    return said, deltas


def _said_in_delta(delta: Mapping[str, Any]) -> Said:
    content = delta.get("content")
    if isinstance(content, str) and (len(delta) == 1 or (len(delta) == 2 and "role" in delta)):
        return Said(content)  # nearly every delta
    found = pieces(delta)
    calls = tuple(call for call in _list(delta.get("tool_calls")) if isinstance(call, dict))
    return Said(_joined(found, Kind.TEXT), _joined(found, Kind.REASONING), calls)


def _parts(content: Any, kind: Kind = Kind.TEXT) -> list[Piece]:
    """Return the pieces of a text, or of a list of parts, which are texts and objects with a type."""
    found: list[Piece] = []
    _add(found, content, kind, 0)
    return found


def _add(found: list[Piece], content: Any, kind: Kind, depth: int) -> None:
    if isinstance(content, str):
        found.append((kind, content))
    elif depth > _DEEPEST:
        return
    elif isinstance(content, list):
        for part in content:
            _add(found, part, kind, depth + 1)
    elif isinstance(content, dict):
        match content.get("type"):
            case "thinking" | "reasoning":
                thoughts = content.get("thinking") or content.get("reasoning") or content.get("text")
                _add(found, thoughts, Kind.REASONING, depth + 1)
            case "refusal":
                _add(found, content.get("refusal"), kind, depth + 1)
            case "image" | "image_url" | "output_image":
                found.append((Kind.PICTURE, ""))
            case _:
                _add(found, content.get("text"), kind, depth + 1)


def _joined(found: list[Piece], kind: Kind) -> str:
    return "".join([text for each, text in found if each is kind])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
