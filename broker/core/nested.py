"""Nested parameters that an operator opened by a dotted name, such as ``messages.cache_control``.

They are removed from a copy of the document before the rest is checked. Only keys that the schema does not know can be
opened; the range of a documented parameter always applies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import translate
from functools import lru_cache
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NamedTuple,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
)

from pydantic import Discriminator, Tag
from typing_extensions import get_type_hints, is_typeddict

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PATH = 256
"""Characters of a dotted name that can be opened."""

MAX_KEYS = 1000
"""Keys of an object in which some can be opened. In a larger object none is, and its unknown keys are refused."""

_WILDCARDS = "*?["


class Opened:
    """The dotted names of an operator's list.

    Args:
        extra_parameters: globs (case-sensitive); those without a dot open nothing here.
    """

    def __init__(self, extra_parameters: tuple[str, ...]) -> None:
        self._globs = tuple(name for name in extra_parameters if "." in name)
        self._prefixes = frozenset(
            name[:end]
            for name in self._globs
            for end, character in enumerate(name)
            if character == "." and not any(mark in name for mark in _WILDCARDS)
        )
        # One expression for all globs: `fnmatchcase` for each glob and key takes twice as long for the largest body.
        self._match = re.compile("|".join(map(translate, self._globs))).match if self._globs else None
        self._anywhere = any(mark in name for name in self._globs for mark in _WILDCARDS)

    def __bool__(self) -> bool:
        return bool(self._globs)

    def __contains__(self, path: str) -> bool:
        return len(path) <= MAX_PATH and self._match is not None and self._match(path) is not None

    def leads_below(self, path: str) -> bool:
        """Return True if a name of the list may be below this path."""
        return self._anywhere or path in self._prefixes


def without_opened(value: Any, kind: Any, opened: Opened, path: str = "") -> Any:
    """Return a value without the nested keys that are opened and that its type does not know.

    Args:
        value: a part of the document; it is not changed.
        kind: its type in the schema.
        opened: the operator's names.
        path: its path, with dots and without places in lists; empty for the document.
    """
    shape = _shape(kind)
    if shape.choose is not None:
        return without_opened(value, shape.members.get(shape.choose(value)), opened, path)
    if path and not opened.leads_below(path):
        return value
    if shape.item is not None and isinstance(value, list):
        return [without_opened(each, shape.item, opened, path) for each in value]
    if shape.keys is None or not isinstance(value, dict) or len(value) > MAX_KEYS:
        return value
    kept = {}
    for key, each in value.items():
        below = f"{path}.{key}" if path else str(key)
        if key in shape.keys:
            kept[key] = without_opened(each, shape.keys[key], opened, below)
        elif not path or below not in opened:
            kept[key] = each
    return kept


class _Shape(NamedTuple):
    """The parts of a type that matter here.

    Attributes:
        choose: returns the tag of the member of a union that a value belongs to.
        members: members of the union, by tag.
        item: type of the items of a list.
        keys: types of the known keys of an object.
    """

    choose: Callable[[Any], Any] | None = None
    members: Mapping[Any, Any] = {}
    item: Any = None
    keys: Mapping[str, Any] | None = None


@lru_cache(maxsize=1024)
def _shape(kind: Any) -> _Shape:
    origin = get_origin(kind)
    if origin in (Required, NotRequired):
        return _shape(get_args(kind)[0])
    if origin is Annotated:
        inner, *marks = get_args(kind)
        for mark in marks:
            if isinstance(mark, Discriminator) and callable(mark.discriminator):
                return _Shape(choose=mark.discriminator, members=_by_tag(inner))
        return _shape(inner)
    if origin in (Union, UnionType):
        # Without a discriminator a union has at most one member besides null.
        return _shape(next(member for member in get_args(kind) if member is not type(None)))
    if origin is list:
        return _Shape(item=get_args(kind)[0])
    if is_typeddict(kind):
        return _Shape(keys=get_type_hints(kind, include_extras=True))
    return _Shape()


def _by_tag(union: Any) -> dict[Any, Any]:
    return {
        mark.tag: member
        for member in get_args(union)
        for mark in getattr(member, "__metadata__", ())
        if isinstance(mark, Tag)
    }
