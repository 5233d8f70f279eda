from __future__ import annotations

import uuid

import pytest

from broker.core.errors import InvalidCursor
from broker.core.session import (
    START,
    Cursor,
    is_session_id,
    parse_cursor,
    short,
)


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("1-0", Cursor(1, 0)),
        ("1-57", Cursor(1, 57)),
        ("2-57.end", Cursor(2, 57, end=True)),
        ("1-9999999999999999", Cursor(1, 9_999_999_999_999_999)),
    ],
)
def test_a_cursor_is_read_and_written_the_same(text: str, cursor: Cursor) -> None:
    assert parse_cursor(text) == cursor
    assert str(cursor) == text


def test_an_empty_cursor_is_none() -> None:
    assert parse_cursor("") is None


def test_the_start_is_before_the_first_event() -> None:
    assert str(START) == "1-0"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "1",
            "1-",
            "-1",
            "0-1",
            "3-1",
            "11-1",
            "1-01",
            "1-00",
            "1--1",
            "1-+1",
            "1-1.",
            "1-1.end.end",
            "1-1.END",
        ),
        *(
            " 1-1",
            "1-1 ",
            "1-1\n",
            "1-1\r",
            "1-\u0661",
            "1-12345678901234567",
            "1-1;",
            "null",
            "undefined",
            "1.5",
            "1-1.0",
        ),
    ],
)
def test_an_invalid_cursor_is_refused(text: str) -> None:
    with pytest.raises(InvalidCursor):
        parse_cursor(text)


ID = "946d9dda-1111-4222-8333-444455556666"


def test_an_id_that_we_hand_out_is_known_as_one() -> None:
    assert is_session_id(ID)
    assert all(is_session_id(str(uuid.uuid4())) for _ in range(100))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "0" * 36,
            str(uuid.UUID(int=0)),
            "d01d3c3a-0f6e-11ef-9262-0242ac120002",  # of version 1
            ID.upper(),
            uuid.UUID(ID).hex,
        ),
        *(f"{{{ID}}}", f"{ID}\n", f"{ID}/cancel", f"*{ID[1:]}"),
    ],
)
def test_anything_else_is_not(text: str) -> None:
    assert not is_session_id(text)


def test_a_log_gets_eight_characters_of_an_id() -> None:
    assert short(ID) == "946d9dda"
