"""Put the operator's system message into a request. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def with_system_message(messages: Sequence[dict[str, Any]], text: str | None) -> list[dict[str, Any]]:
    """Return the messages of a chat with the operator's system message before them, if there is one."""
    return [{"role": "system", "content": text}, *messages] if text else list(messages)


def with_system_instructions(instructions: str | None, text: str | None) -> str | None:
    """Return the `instructions` of a Responses request with the operator's system message at their head.

    Args:
        instructions: those of the page, or None.
        text: the system message, or None.
    """
    if text and instructions:
        return f"{text}\n\n{instructions}"
    return text or instructions
