"""Where the operator's system message goes in a request."""

from __future__ import annotations

import pytest

from broker.core.system import with_system_instructions, with_system_message

QUESTION = {"role": "user", "content": "Why?"}
OWN = {"role": "system", "content": "Be brief."}


def test_the_system_message_comes_before_those_of_the_page() -> None:
    expected = [{"role": "system", "content": "Only weather."}, OWN, QUESTION]
    assert with_system_message([OWN, QUESTION], "Only weather.") == expected


def test_without_a_system_message_a_chat_stays_as_it_is() -> None:
    assert with_system_message([OWN, QUESTION], None) == [OWN, QUESTION]


@pytest.mark.parametrize(
    ("instructions", "text", "expected"),
    [
        ("Be brief.", "Only weather.", "Only weather.\n\nBe brief."),
        (None, "Only weather.", "Only weather."),
        ("", "Only weather.", "Only weather."),
        ("Be brief.", None, "Be brief."),
        (None, None, None),
    ],
)
def test_the_system_message_is_the_head_of_instructions(
    instructions: str | None, text: str | None, expected: str | None
) -> None:
    assert with_system_instructions(instructions, text) == expected
