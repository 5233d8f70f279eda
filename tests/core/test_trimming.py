from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.trimming import droppable_units, trim

ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}


def talk(roles: str) -> list[dict[str, Any]]:
    """A conversation from initials: ``suat`` is system, user, assistant, tool."""
    return [{"role": ROLES[initial]} for initial in roles.replace(" ", "")]


def kept(roles: str, limit: float) -> list[int]:
    messages = talk(roles)
    return trim(droppable_units(messages), [1] * len(messages), limit)


def test_a_conversation_that_fits_stays_unchanged() -> None:
    assert kept("s ua ua u", 6) == [0, 1, 2, 3, 4, 5]
    assert kept("s ua ua u", math.inf) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("roles", "limit", "stay"),
    [
        ("s ua ua u", 5, [0, 3, 4, 5]),  # the oldest turn, though one message would do
        ("s ua ua u", 3, [0, 5]),
        ("s ua ua u", 0, [0, 5]),  # the least that must stay
        ("ua s ua d u", 3, [2, 5, 6]),  # instructions stay wherever they stand
        ("ua s ua d u", 5, [2, 3, 4, 5, 6]),
        ("a ua u", 3, [1, 2, 3]),  # a greeting is its own turn
        ("u u u", 2, [1, 2]),  # so is each question without an answer
        ("u at at a u", 3, [6]),  # an old turn goes whole
        ("ua u atat a", 7, [2, 3, 4, 5, 6, 7]),
        ("ua u atat a", 6, [2, 3, 4, 5, 6, 7]),  # old turns before steps of the last one
        ("ua u atat a", 5, [2, 5, 6, 7]),
        ("ua u atat a", 2, [2, 7]),  # the newest step stays
        ("u att att", 6, [0, 4, 5, 6]),
        ("u att att", 1, [0, 4, 5, 6]),  # results in progress stay
        ("u a s at", 3, [0, 2, 3, 4]),
        ("s aaa", 3, [0, 2, 3]),  # nobody has asked: steps only
        ("sd", 0, [0, 1]),
        ("u", 0, [0]),
        ("", 0, []),
    ],
)
def test_the_oldest_goes_first(roles: str, limit: int, stay: list[int]) -> None:
    assert kept(roles, limit) == stay


def test_units_are_dropped_in_order() -> None:
    assert list(droppable_units(talk("s a uat s ua u at s att a"))) == [
        [1],
        [2, 3, 4],
        [6, 7],
        [9, 10],
        [12, 13, 14],
    ]


TURNS = st.lists(st.sampled_from(["u", "ua", "uat", "uatta", "s", "d", "sua", "u"]), max_size=12)
CONVERSATIONS = st.tuples(
    st.sampled_from(["", "s", "a", "da"]), TURNS, st.sampled_from(["", "at", "atat", "atta"])
).map(lambda pieces: talk(pieces[0] + "".join(pieces[1]) + pieces[2]))


@given(CONVERSATIONS, st.data())
def test_instructions_question_and_an_unbroken_end_stay(messages: list[Any], data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 50), min_size=len(messages), max_size=len(messages)))
    limit = data.draw(st.integers(0, 300))
    stay = trim(droppable_units(messages), tokens, limit)
    total = sum(tokens[index] for index in stay)

    assert stay == sorted(set(stay))
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    pinned = {
        index for index, message in enumerate(messages) if message["role"] in {"system", "developer"}
    } | {*users[-1:]}
    assert pinned <= set(stay)
    gone = [index for index in range(len(messages)) if index not in stay]
    if gone:
        assert all(index in pinned for index in stay if index < gone[-1])

    for index, message in enumerate(messages):
        if message["role"] == "tool":
            assert (index in stay) == (index - 1 in stay)

    units = list(droppable_units(messages))
    dropped = [unit for unit in units if unit[0] not in stay]
    assert dropped == units[: len(dropped)]
    assert gone == sorted(index for unit in dropped for index in unit)
    assert total <= limit or dropped == units
    if dropped:
        assert total + sum(tokens[index] for index in dropped[-1]) > limit


@given(CONVERSATIONS)
def test_every_message_is_in_one_unit_or_must_stay(messages: list[Any]) -> None:
    places = [index for unit in droppable_units(messages) for index in unit]
    assert len(places) == len(set(places))
    for unit in droppable_units(messages):
        assert messages[unit[0]]["role"] != "tool"
        assert [messages[index]["role"] for index in unit].count("user") <= 1
