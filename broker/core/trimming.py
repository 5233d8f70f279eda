"""What stays of a conversation that is too long.

Whole units go, the oldest first, until the rest fits:

1. Turns before the last user message. A turn is a user message and all that follows it up to the next one; what
   an assistant says before anybody has asked is a turn of its own.
2. Then, within the last turn, an assistant message with the tool results that answer it. A model that works on
   one question for a hundred steps forgets the first steps, not the question. The newest of them stays.

System and developer messages stay wherever they stand, and so does the last user message. No text is ever cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_PINNED_ROLES = ("system", "developer")


def trim(units: Iterable[Sequence[int]], tokens: Sequence[int], limit: float) -> list[int]:
    """The places of what stays of a conversation, in order.

    Where even the least that must stay is over the limit, that least is returned: the caller has to look.

    Args:
        units: the places of what can go together, in the order in which it goes.
        tokens: what each entry of the conversation costs.
        limit: what they may cost together.
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
    """The places of what can go together of a chat, in the order in which it goes.

    Args:
        messages: with tool messages right behind the assistant message that they answer.
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
    """Cuts a stretch of the conversation before each message of the opening role."""
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
