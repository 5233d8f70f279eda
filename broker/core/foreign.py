"""Cut values that others wrote to a size that can be stored, written and read again.

The JSON parser accepts what the writer refuses (more than 254 levels), and an upstream may send megabytes instead of a
word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_OBJECT = 64 * 1024
"""Bytes of JSON of an object that is kept whole; of a larger one, only its small members are kept."""

MAX_MEMBER = 1024
"""Bytes of JSON of a small member."""

MAX_MEMBERS = 64
"""Members that are kept of an object that is too large."""

SMALL = 64 * 1024
"""Bytes of JSON that are cheap to parse, whatever they hold."""

MAX_VALUES = 100_000
"""Values of a chunk or of a complete answer; parsing and checking so many takes about 30 ms."""

MAX_TEXT = 512
"""Characters of a name, an id or a reason."""

MAX_DEPTH = 32
"""Levels of arrays and objects in an object that is kept; readers may count the outermost one as well."""


def is_too_large_to_parse(data: bytes, *, most_values: int = MAX_VALUES) -> bool:
    """Return True for JSON with so many values that parsing and checking it would delay all other streams.

    Counts commas, at the speed of C. A document has at most as many values as commas and levels together, and the
    parser limits the levels. Commas in texts count as well.
    """
    return len(data) > SMALL and data.count(b",") > most_values


def bounded_object(value: dict[str, Any], *, first: Iterable[str] = ()) -> dict[str, Any]:
    """Return an upstream's object: whole where it is small enough, else the first of its small members.

    Args:
        value: the parsed object.
        first: names of members that are kept before others.
    """
    if fits(value, MAX_OBJECT):
        return value
    names = (*(name for name in first if name in value), *value)
    small = (name for name in names if fits({name: value[name]}, MAX_MEMBER))
    return {name: value[name] for name, _ in zip(small, range(MAX_MEMBERS), strict=False)}


def bounded_text(value: str) -> str:
    """Return a name, an id or a reason of an upstream, cut to a limit."""
    return value[:MAX_TEXT]


def fits(value: Any, size: int) -> bool:
    """Return True if a value can be written as JSON in so many bytes and is not nested too deep."""
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
