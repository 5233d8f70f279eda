"""What others wrote and we keep: cut to a size that can be stored, written and read again.

The parser reads what its writer refuses (nesting over 254 levels), and an upstream may put megabytes where a word is
expected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_OBJECT = 64 * 1024
"""Bytes of JSON of an object that is kept as it is; of a larger one, the small members are kept."""

MAX_MEMBER = 1024
"""Bytes of JSON of a small member."""

MAX_MEMBERS = 64
"""Members that are kept of an object that is too large."""

SMALL = 64 * 1024
"""Bytes of JSON that can be parsed whatever stands in it."""

MAX_VALUES = 100_000
"""Values of a chunk or a whole answer; the parser and we take some 30 ms for so many."""

MAX_TEXT = 512
"""Characters of a name, an id or a reason."""

MAX_DEPTH = 32
"""Arrays and objects of a kept object that may stand inside each other; those who read it may count from outside."""


def is_too_large_to_parse(data: bytes, *, most_values: int = MAX_VALUES) -> bool:
    """Return True for JSON of so many values that parsing it, and looking at each, would hold up everybody else.

    Counts commas, at the speed of C: there are no more values than commas and levels of nesting, and a parser bounds
    the latter. Commas in texts count as well.
    """
    return len(data) > SMALL and data.count(b",") > most_values


def bounded_object(value: dict[str, Any], *, first: Iterable[str] = ()) -> dict[str, Any]:
    """Return an upstream's object, whole where that can be kept, else the first of its small members.

    Args:
        value: as it was parsed.
        first: names of members that are kept before others.
    """
    if fits(value, MAX_OBJECT):
        return value
    names = (*(name for name in first if name in value), *value)
    small = (name for name in names if fits({name: value[name]}, MAX_MEMBER))
    return {name: value[name] for name, _ in zip(small, range(MAX_MEMBERS), strict=False)}


def bounded_text(value: str) -> str:
    """Return a name, an id or a reason of an upstream, cut."""
    return value[:MAX_TEXT]


def fits(value: Any, size: int) -> bool:
    """Return True if a value can be written as JSON, in so many bytes and not nested too deep."""
    try:
        text = orjson.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return len(text) <= size and not _is_deep(value)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for container in level:
            members = container.values() if isinstance(container, dict) else container
            inner.extend(member for member in members if isinstance(member, dict | list))
        if not inner:
            return False
        level = inner
    return True
