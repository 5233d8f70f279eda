"""Shorten a conversation that is too long.

Whole units are dropped, the oldest first, until the rest fits:

1. Turns before the last user message. A turn is a user message with everything up to the next one. Assistant messages
   before the first user message are a turn as well.
2. Then, within the last turn, an assistant message together with its tool results. So a model that works on one
   question in a hundred steps loses the first steps, but not the question. The newest step stays.

The items of a Responses request are dropped in the same way: a function call together with its output, and reasoning
together with what follows it. A unit never separates a call from its output.

System and developer messages always stay, and so does the last user message. Text is never cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_PINNED_ROLES = ("system", "developer")

_CALL, _OUTPUT = "_call", "_call_output"
"""How the types of items end that make and answer a call, of a function or of a tool that the operator opened."""


def trim(units: Iterable[Sequence[int]], tokens: Sequence[int], limit: float) -> list[int]:
    """Return the places of the entries that stay, in order.

    If the entries that must stay exceed the limit, they are returned all the same: the caller has to check.

    Args:
        units: the places of entries that can be dropped together, in the order in which they are dropped.
        tokens: tokens of each entry.
        limit: tokens of all entries together.
    """
    total = sum(tokens)
    if total <= limit:
        return list(range(len(tokens)))
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
        if messages[index].get("role") == "user":
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


def droppable_items(items: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Yield the places of items of a Responses request that can be dropped together, in the order of dropping."""
    last_user = _last_user(items)
    answered = _last_outputs(items)
    yield from _item_units(items, range(last_user), answered, _opens_turn)
    yield from list(_item_units(items, range(last_user + 1, len(items)), answered, _opens_step))[:-1]


def _opens_turn(items: Sequence[Mapping[str, Any]], index: int) -> bool:
    return items[index].get("role") == "user"


def _opens_step(items: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Return True if an answer of the model begins with this item: after the output of a call, or after a message."""
    item, before = items[index], items[index - 1] if index else {}
    if _call_id(item, _OUTPUT) is not None:
        return False
    if _call_id(before, _OUTPUT) is not None:
        return True
    is_beginning = item.get("role") == "assistant" or item.get("type") == "reasoning"
    return is_beginning and before.get("role") == "assistant"


def _call_id(item: Mapping[str, Any], kind: str) -> str | None:
    """Return the id of the call that an item of this kind makes or answers; None for any other item."""
    name, call_id = item.get("type"), item.get("call_id")
    return call_id if isinstance(name, str) and name.endswith(kind) and isinstance(call_id, str) else None


def _last_outputs(items: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the place of the last output of each call."""
    ids = ((_call_id(item, _OUTPUT), index) for index, item in enumerate(items))
    return {call_id: index for call_id, index in ids if call_id is not None}


def _item_units(
    items: Sequence[Mapping[str, Any]],
    places: range,
    answered: Mapping[str, int],
    opens: Callable[[Sequence[Mapping[str, Any]], int], bool],
) -> Iterator[list[int]]:
    """Yield the units of a part of the items. A unit never separates a call from its output."""
    unit: list[int] = []
    reach = -1  # the last output of the calls in this unit
    for index in places:
        item = items[index]
        if item.get("role") in _PINNED_ROLES:
            continue
        if unit and index > reach and opens(items, index):
            yield unit
            unit = []
        unit.append(index)
        if (call_id := _call_id(item, _CALL)) is not None:
            reach = max(reach, answered.get(call_id, -1))
    if unit and reach < places.stop:
        yield unit
