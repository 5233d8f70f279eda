"""What a chunk of an answer says, for a person to read: text, thoughts, and a word in place of what is no text.

Services write the same thing in many shapes: a message in place of a delta, text as a list of parts, thoughts under
names of their own. What has an unknown shape says nothing. Nothing here raises, whatever a chunk holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

PICTURE: Final = "[image]"
_DEEPEST: Final = 6  # a part may hold a list of parts: thinking does


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the answer's text, or of the thoughts before it."""

    text: str
    thought: bool = False


def pieces(chunk: Mapping[str, Any]) -> list[Piece]:
    """Return what to print of a chunk, thoughts first."""
    choices = chunk.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict):
        return []
    delta = first.get("delta") or first.get("message")
    if not isinstance(delta, dict):
        return []
    found = [
        *_thoughts(delta),
        *_parts(delta.get("content")),
        *_parts(delta.get("refusal")),
        *(Piece(PICTURE) for _ in _list(delta.get("images"))),
    ]
    return [piece for piece in found if piece.text]


def _thoughts(delta: Mapping[str, Any]) -> Iterable[Piece]:
    # The same thoughts may stand under several names: the first that says something counts.
    for name in ("reasoning", "reasoning_content"):
        if found := [piece for piece in _parts(delta.get(name), thought=True) if piece.text]:
            return found
    return [
        Piece(text, thought=True)
        for detail in _list(delta.get("reasoning_details"))
        if isinstance(detail, dict)
        for text in (detail.get("text"), detail.get("summary"))
        if isinstance(text, str)
    ]


def _parts(content: Any, *, thought: bool = False, depth: int = 0) -> Iterator[Piece]:
    """Yield what a text says, or a list of parts, which are texts and objects with a type."""
    if isinstance(content, str):
        yield Piece(content, thought=thought)
    elif isinstance(content, list) and depth < _DEEPEST:
        for part in content:
            yield from _parts(part, thought=thought, depth=depth + 1)
    elif isinstance(content, dict) and depth < _DEEPEST:
        yield from _part(content, thought=thought, depth=depth + 1)


def _part(part: Mapping[str, Any], *, thought: bool, depth: int) -> Iterator[Piece]:
    match part.get("type"):
        case "thinking" | "reasoning":
            said = part.get("thinking") or part.get("reasoning") or part.get("text")
            yield from _parts(said, thought=True, depth=depth)
        case "refusal":
            yield from _parts(part.get("refusal"), thought=thought, depth=depth)
        case "image" | "image_url" | "output_image":
            yield Piece(PICTURE, thought=thought)
        case _:
            yield from _parts(part.get("text"), thought=thought, depth=depth)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
