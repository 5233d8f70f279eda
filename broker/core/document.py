"""From the bytes of a request body to a JSON document, or to the sentence that says why they are not one.

What comes out can be written again by any JSON writer without loss: text is valid Unicode, numbers are finite,
whole numbers fit 64 bits, no object has a key twice, and the nesting is shallow enough for every reader behind us.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import orjson

from broker.core.errors import InvalidJson

MAX_DEPTH = 64

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_SHOWN_KEY_CHARACTERS = 64


class _Survey(NamedTuple):
    keys: int
    huge_numbers: bool


def parse_json(body: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """The document that ``body`` holds.

    Stricter than RFC 8259 where a lenient reader would change what was meant: a key given twice in one object is
    refused, and so is a whole number beyond 64 bits (write it with an exponent, or as a string).

    Args:
        body: UTF-8 without a byte order mark.
        max_depth: how many arrays and objects may stand inside each other, the outermost included; at most 500.

    Raises:
        InvalidJson: with what is wrong, and where, as far as that is known.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidJson(_explain(body, error)) from None  # the cause holds the whole body
    survey = _survey(document, max_depth)
    # Each key brings its own colon, so as many colons as keys leave no room for a key that was overwritten.
    if survey.huge_numbers or body.count(b":") != survey.keys:
        json.loads(body, object_pairs_hook=_object_without_doubles, parse_int=_whole_number)
    return document


def _explain(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body.strip():
        return "The body is empty; it must be a JSON document."
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return f"The body is not UTF-8: byte {wrong.start} and what follows is no character."
    return f"The body is not valid JSON: {error.msg}, at line {error.lineno}, column {error.colno}."


def _survey(document: Any, max_depth: int) -> _Survey:
    """Walks the document level by level, without recursion, whatever its depth."""
    keys, huge_numbers, depth = 0, False, 0
    level: list[Any] = [[document]]
    while level:
        if depth > max_depth:
            raise InvalidJson(f"The body is nested deeper than {max_depth} levels.")
        below = []
        for container in level:
            members = container
            if type(container) is dict:
                keys += len(container)
                members = container.values()
            for member in members:
                kind = type(member)
                if kind is dict or kind is list:
                    below.append(member)
                # orjson makes a float of a whole number that does not fit 64 bits
                elif kind is float and not _INT_MIN < member < _INT_MAX:
                    huge_numbers = True
        level = below
        depth += 1
    return _Survey(keys, huge_numbers)


def _object_without_doubles(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise InvalidJson(f'The key "{key[:_SHOWN_KEY_CHARACTERS]}" stands twice in one object.')
        seen.add(key)


def _whole_number(digits: str) -> None:
    # orjson has refused what is longer than 309 digits, so int() is cheap here
    if not _INT_MIN <= int(digits) <= _INT_MAX:
        raise InvalidJson(f"A whole number of {len(digits)} characters does not fit 64 bits.")
