"""Turn a chunk of an answer into text for people: text, thoughts, and a word in place of a picture.

`core.chat_said` knows the shapes in which services write the same contents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from broker.core import chat_said
from broker.core.chat_said import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

PICTURE: Final = "[image]"


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
    return [
        Piece(PICTURE) if kind is Kind.PICTURE else Piece(text, thought=kind is Kind.REASONING)
        for kind, text in chat_said.pieces(delta)
    ]
