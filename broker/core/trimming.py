"""Shorten a conversation that is too long.

Whole units are dropped, the oldest first, until the rest fits:

1. Turns before the last user message. A turn is a user message with everything up to the next one. Assistant messages
   before the first user message are a turn as well.
2. Then, within the last turn, an assistant message together with its tool results. So a model that works on one
   question in a hundred steps loses the first steps, but not the question. The newest step stays.

System and developer messages always stay, and so does the last user message. Text is never cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_PINNED_ROLES = ("system", "developer")


def trim(units: Iterable[Sequence[int]], tokens: Sequence[int], limit: float) -> list[int]:
    """Return the places of the entries that stay, in order.

    If the entries that must stay exceed the limit, they are returned all the same: the caller has to check.

    Args:
        units: the places of entries that can be dropped together, in the order in which they are dropped.
        tokens: tokens of each entry.
        limit: tokens of all entries together.
    """
    total = sum(tokens)
    dropped: set[int] = set()
    for unit in units:
        if total <= limit:
            break
        total -= sum(tokens[index] for index in unit)
        dropped.update(unit)
    return [index for index in range(len(tokens)) if index not in dropped]


def droppable_units(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Yield the places of messages of a chat that can be dropped together, in the order in which they are dropped.

    Args:
        messages: the messages, with tool messages directly behind the assistant message that they answer.
    """
    last_user = _last_user(messages)
    yield from _units(messages, range(last_user), "user")
    steps = list(_units(messages, range(last_user + 1, len(messages)), "assistant"))
    yield from steps[:-1]


def _last_user(messages: Sequence[Mapping[str, Any]]) -> int:
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "user":
            return index
    return -1


def _units(messages: Sequence[Mapping[str, Any]], places: range, opening_role: str) -> Iterator[list[int]]:
    """Yield the units of a part of the conversation, which is cut before each message of the opening role."""
    unit: list[int] = []
    for index in places:
        role = messages[index]["role"]
        if role in _PINNED_ROLES:
            continue
        if role == opening_role and unit:
            yield unit
            unit = []
        unit.append(index)
    if unit:
        yield unit
