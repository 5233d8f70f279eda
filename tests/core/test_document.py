from __future__ import annotations

import json
import math
import sys
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.document import MAX_DEPTH, MAX_VALUES, SMALL_BODY, outline, parse_json
from broker.core.errors import InvalidJson, InvalidRequest, RequestError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=25,
)


def sentence_for(body: bytes, kind: type[RequestError] = InvalidJson) -> str:
    with pytest.raises(kind) as caught:
        parse_json(body)
    return caught.value.message


def values_of(document: Any) -> int:
    if isinstance(document, dict):
        return 1 + sum(map(values_of, document.values()))
    return 1 + sum(map(values_of, document)) if isinstance(document, list) else 1


def keys_of(document: Any) -> int:
    if isinstance(document, dict):
        return len(document) + sum(map(keys_of, document.values()))
    return sum(map(keys_of, document)) if isinstance(document, list) else 0


def strictly(body: bytes) -> Any:
    """The standard library's reader without its leniences; a value, or ValueError."""

    def fail(*_: Any) -> NoReturn:
        raise ValueError

    def whole(digits: str) -> int:
        number = int(digits)
        return number if -(2**63) <= number < 2**64 else fail()

    def fraction(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else fail()

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(found) if len(dict(found)) == len(found) else fail()

    value = json.loads(
        body.decode(), parse_constant=fail, parse_int=whole, parse_float=fraction, object_pairs_hook=pairs
    )
    json.dumps(value, ensure_ascii=False).encode()
    return value


@given(DOCUMENTS, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_written_documents_are_parsed_unchanged(document: Any, ascii_only: bool, indent: Any) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    assert parse_json(body) == document
    assert json.dumps(parse_json(body)) == json.dumps(document)


JSON_PIECES = (
    b'{ } [ ] , : " "a" \\ \\u0000 \\ud800 \\udc00 \\n - 0 1 12 .5 e9 E-3 e400 18446744073709551616 true null NaN '
    b'Infinity "a":1 {} []'
).split()
OTHER_PIECES = [
    b" ",
    b"\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc3\xa9",
    b"\x00",
    b"\x1f",
    b'"a" :2',
]
JSONISH = st.lists(st.sampled_from([*JSON_PIECES, *OTHER_PIECES]), max_size=12).map(b"".join)


@given(st.binary(max_size=40) | JSONISH)
def test_any_bytes_are_a_value_or_invalid_json(body: bytes) -> None:
    try:
        expected = strictly(body)
    except (ValueError, UnicodeError):
        with pytest.raises(InvalidJson):
            parse_json(body)
    else:
        assert parse_json(body) == expected


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "empty"),
        (b" \r\n", "empty"),
        (b'{"a": [1,}', "line 1, column 10"),
        (b'{\n "a": tru\n}', "line 2"),
        (b"{} x", "column 4"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"[NaN]", "column 2"),
        (b"[Infinity]", "column 2"),
        (b"[1e400]", "infinity"),
        (b"[-1e400]", "infinity"),
        (b'"a\x00b"', "control character"),
        (b'{"a": 1, "b": {"seed": 1, "seed": 2}}', '"seed" occurs twice'),
        (b'{"a" :1,"a":2}', '"a" occurs twice'),
        (b'{"a":1,"\\u0061":2}', '"a" occurs twice'),
        (b'{"seed": 1180591620717411303424}', "does not fit 64 bits"),
        (b"-9223372036854775809", "does not fit 64 bits"),
    ],
)
def test_the_message_names_the_fault_and_its_place(body: bytes, part: str) -> None:
    assert part in sentence_for(body)


def test_a_number_of_thousands_of_digits_is_invalid_json() -> None:
    assert "column" in sentence_for(b"[" + b"9" * 100_000 + b"]")


def test_a_colon_in_a_text_does_not_make_a_key_double() -> None:
    assert parse_json(b'{"a": ":", "b": "\\":", "c": {"a": ":::"}}') == {
        "a": ":",
        "b": '":',
        "c": {"a": ":::"},
    }


def test_the_same_key_may_stand_in_two_objects() -> None:
    assert parse_json(b'[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


def test_the_largest_numbers_stay_whole() -> None:
    assert parse_json(b"[18446744073709551615, -9223372036854775808]") == [2**64 - 1, -(2**63)]


def test_a_large_number_with_an_exponent_is_a_fraction() -> None:
    assert parse_json(b"[1e30, -1.5e300]") == [1e30, -1.5e300]


@pytest.mark.parametrize("inner", [b"0", b"{}", b'{"a": 0}', b"[[]]", b'"[[["', b'"\\"[["'])
def test_the_depth_counts_arrays_and_objects(inner: bytes) -> None:
    own = 0 if inner.startswith(b'"') else inner.count(b"{") + inner.count(b"[")
    fits = MAX_DEPTH - own
    assert parse_json(b"[" * fits + inner + b"]" * fits)
    assert "deeper than 64" in sentence_for(b"[" * (fits + 1) + inner + b"]" * (fits + 1), InvalidRequest)


def test_objects_are_as_deep_as_arrays() -> None:
    assert "deeper than 64" in sentence_for(b'{"a":' * 65 + b"0" + b"}" * 65, InvalidRequest)
    with pytest.raises(InvalidRequest, match="deeper than 2"):
        parse_json(b"[[[]]]", max_depth=2)
    assert parse_json(b"[[]]", max_depth=2) == [[]]


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_a_bottomless_body_is_refused_and_no_recursion_error(opening: bytes) -> None:
    sentence_for(opening * 200_000, InvalidRequest)
    sentence_for(
        opening * 900 + b"0" + {b"[": b"]", b'{"a":': b"}", b'[{"a":': b"}]"}[opening] * 900, InvalidRequest
    )


def test_a_deep_body_is_refused_before_its_double_keys() -> None:
    depth = sys.getrecursionlimit() - 100
    assert "deeper" in sentence_for(b"[" * depth + b'{"a":1,"a":2}' + b"]" * depth, InvalidRequest)


@given(DOCUMENTS, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_the_outline_has_as_many_values_and_keys_as_the_document(
    document: Any, ascii_only: bool, indent: Any
) -> None:
    found = outline(json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode())
    assert (found.values, found.keys) == (values_of(document), keys_of(document))


def depth_of(document: Any) -> int:
    if isinstance(document, dict):
        document = list(document.values())
    return 1 + max(map(depth_of, document), default=0) if isinstance(document, list) else 0


TRICKY = st.text(st.sampled_from('[]{},:"\\\n\t 0\u00e9'), max_size=12)
TRICKY_DOCUMENTS = st.recursive(
    st.none() | st.integers(0, 9) | TRICKY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TRICKY, inner, max_size=4),
    max_leaves=30,
)


@given(TRICKY_DOCUMENTS, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_marks_in_texts_and_keys_do_not_count(document: Any, ascii_only: bool, indent: Any) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    found = outline(body)
    assert (found.values, found.keys) == (values_of(document), keys_of(document))
    depth = depth_of(document)
    assert outline(body, max_depth=max(1, depth)) == found
    if depth > 1:
        with pytest.raises(InvalidRequest, match=f"deeper than {depth - 1} levels"):
            outline(body, max_depth=depth - 1)


@given(JSONISH)
def test_json_never_has_more_values_than_its_outline(body: bytes) -> None:
    try:
        document = json.loads(body, object_pairs_hook=lambda pairs: [value for _, value in pairs])
    except (ValueError, UnicodeError):
        return
    assert outline(body).values == values_of(document)


@given(DOCUMENTS.filter(lambda document: values_of(document) > 1))
def test_one_value_too_many_is_refused(document: Any) -> None:
    body, values = json.dumps(document).encode(), values_of(document)
    assert parse_json(body, max_values=values) == document
    with pytest.raises(InvalidRequest, match=f"more than {values - 1} JSON values"):
        parse_json(body, max_values=values - 1)


@pytest.mark.parametrize(
    ("values", "opening", "value", "closing"),
    [
        (MAX_VALUES - 1, b"[", b"0", b"]"),
        (MAX_VALUES - 1, b"[", b'"\\\\"', b"]"),
        (MAX_VALUES - 1, b"[", b'","', b"]"),
        (MAX_VALUES - 1, b"[", b"{ }", b"]"),
        (MAX_VALUES // 2 - 1, b'{"": [', b'{"": "::"}', b"]}"),
    ],
)
def test_exactly_the_allowed_number_of_values_passes(
    values: int, opening: bytes, value: bytes, closing: bytes
) -> None:
    assert parse_json(opening + b",".join([value] * values) + closing)
    sentence = sentence_for(opening + b",".join([value] * (values + 1)) + closing, InvalidRequest)
    assert sentence == "body: It has more than 50000 JSON values."


def test_marks_inside_a_text_are_not_values() -> None:
    text = ',[]{}:"\\' * 60_000
    assert parse_json(json.dumps({"a": text}).encode()) == {"a": text}


def test_a_key_that_stands_twice_is_found_in_a_large_body_too() -> None:
    large = b'{"text": "' + b":" * SMALL_BODY + b'", "a": 1, %b: 2}'
    assert parse_json(large.replace(b"%b", b'"b"'))["b"] == 2
    assert "occurs twice" in sentence_for(large.replace(b"%b", b'"\\u0061"'))


def test_the_sentence_never_quotes_the_body() -> None:
    for body in (
        b'{"k": "hush hush" x}',
        b'["hush hush", 1e999]',
        b'{"k": "hush hush", "a": 0, "a": 0}',
        b'"hush hush\xff"',
    ):
        assert "hush" not in sentence_for(body)
