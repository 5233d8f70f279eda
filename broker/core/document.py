"""From the bytes of a request body to a JSON document, or to the sentence that says why they are not one.

What comes out can be written again by any JSON writer without loss: text is valid Unicode, numbers are finite,
whole numbers fit 64 bits, no object has a key twice, and the nesting is shallow enough for every reader behind us.

A page decides what stands in a body, so its size in values and in depth is counted first, on the bytes, by steps that
run at the speed of C and are linear. Measured for the worst bodies of 1 MiB: counting 6 ms, parsing 7 ms, checking
8 ms.
"""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any, NamedTuple

import orjson

from broker.core.errors import InvalidJson, InvalidRequest

MAX_DEPTH = 64
"""Arrays and objects that may stand inside each other, the outermost included."""

MAX_VALUES = 50_000
"""Values that a document may hold: each text, number, word, array and object, but not the keys."""

SMALL_BODY = 16 * 1024
"""Bytes up to which a body is cheap to look at, whatever stands in it."""

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_SHOWN_KEY_CHARACTERS = 64
_SHORTEST_HUGE_NUMBER = len(str(2**63))
_SPACE = b" \t\r\n"
_QUOTES_OF_A_MEMBER = 4  # those of its key and those of its value
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS = [0] * 256
_STEPS[ord("[")] = _STEPS[ord("{")] = 1
_STEPS[ord("]")] = _STEPS[ord("}")] = -1
_TO_COMMAS = bytes.maketrans(b"[]{}:", b",,,,,")


class Outline(NamedTuple):
    """What a body holds, counted on its bytes. Exact for JSON; for anything else a bound.

    Attributes:
        values: of any kind, keys not counted.
        keys: of all objects.
        bare: the body without white space, and with one quotation mark in place of each text.
    """

    values: int
    keys: int
    bare: bytes


def outline(body: bytes, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Outline:
    """Count what a body holds, without parsing it.

    Raises:
        InvalidRequest: there are too many values, or they are nested too deep.
    """
    # Within a text, a backslash makes the next character plain. The pairs are taken from the left, as a parser does.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if plain.count(b'"') > _QUOTES_OF_A_MEMBER * max_values:
        raise _too_many(max_values)
    bare = b'"'.join(plain.split(b'"')[::2]).translate(None, _SPACE)
    containers = bare.count(b"[") + bare.count(b"{")
    values = 1 + bare.count(b",") + containers - bare.count(b"[]") - bare.count(b"{}")
    if values > max_values or containers > max_values:
        raise _too_many(max_values)
    if containers > max_depth and _depth(bare, 2 * containers) > max_depth:
        raise InvalidRequest(details=[_fault(f"It is nested deeper than {max_depth} levels")])
    return Outline(values, bare.count(b":"), bare)


def parse_json(body: bytes, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """The document that ``body`` holds.

    Stricter than RFC 8259 where a lenient reader would change what was meant: a key given twice in one object is
    refused, and so is a whole number beyond 64 bits (write it with an exponent, or as a string).

    Args:
        body: UTF-8 without a byte order mark.
        max_depth: how many arrays and objects may stand inside each other, the outermost included.
        max_values: how many values there may be.

    Raises:
        InvalidRequest: there are too many values, or they are nested too deep.
        InvalidJson: with what is wrong, and where, as far as that is known.
    """
    found = outline(body, max_depth=max_depth, max_values=max_values)
    document = read_json(body)
    check_document(document, body, found)
    return document


def read_json(body: bytes) -> Any:
    """Parse a body whose outline is within the bounds.

    Raises:
        InvalidJson: it is not JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidJson(_explain(body, error)) from None  # the cause holds the whole body


def check_document(document: Any, body: bytes, found: Outline) -> None:
    """Refuse a document in which something was lost while it was read.

    Raises:
        InvalidJson: a key stands twice in one object, or a whole number does not fit 64 bits.
    """
    keys, huge_numbers = _survey(document)
    # A colon outside of a text belongs to a key, so fewer keys than colons are keys that were overwritten.
    if keys < found.keys:
        if len(body) <= SMALL_BODY:
            json.loads(body, object_pairs_hook=_object_without_doubles)
        raise InvalidJson("A key stands twice in one object.")
    if huge_numbers:
        _check_numbers(found.bare)


def _explain(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body.strip():
        return "The body is empty; it must be a JSON document."
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return f"The body is not UTF-8: byte {wrong.start} and what follows is no character."
    return f"The body is not valid JSON: {error.msg}, at line {error.lineno}, column {error.colno}."


def _too_many(max_values: int) -> InvalidRequest:
    return InvalidRequest(details=[_fault(f"It holds more than {max_values} JSON values")])


def _fault(sentence: str) -> dict[str, str]:
    return {"field": "body", "message": f"{sentence}."}


def _depth(bare: bytes, brackets: int) -> int:
    """The deepest nesting within so many brackets. What has more of them closes more than it opens and is no JSON."""
    steps = map(_STEPS.__getitem__, bare.translate(None, _NO_BRACKETS)[:brackets])
    return max(accumulate(steps), default=0)


def _survey(document: Any) -> tuple[int, bool]:
    """Count the keys, and tell whether a number may be a whole one that lost digits. Needs no recursion."""
    keys, huge_numbers = 0, False
    containers: list[Any] = [[document]]
    for container in containers:
        members = container
        if type(container) is dict:
            keys += len(container)
            members = container.values()
        for member in members:
            kind = type(member)
            if kind is dict or kind is list:
                containers.append(member)
            # orjson makes a float of a whole number that does not fit 64 bits
            elif kind is float and not _INT_MIN < member < _INT_MAX:
                huge_numbers = True
    return keys, huge_numbers


def _object_without_doubles(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise InvalidJson(f'The key "{key[:_SHOWN_KEY_CHARACTERS]}" stands twice in one object.')
        seen.add(key)


def _check_numbers(bare: bytes) -> None:
    for scalar in bare.translate(_TO_COMMAS).split(b","):
        # orjson has refused what is longer than 309 digits, so int() is cheap here
        whole = len(scalar) >= _SHORTEST_HUGE_NUMBER and scalar.removeprefix(b"-").isdigit()
        if whole and not _INT_MIN <= int(scalar) <= _INT_MAX:
            raise InvalidJson(f"A whole number of {len(scalar)} characters does not fit 64 bits.")
