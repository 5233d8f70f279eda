"""What is said to a person, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.cli.words import complain, printable

if TYPE_CHECKING:
    import pytest


def test_text_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\rc\x07\x9b\n\td\u00e9\U0001f600") == "a[2Jbc\n\td\u00e9\U0001f600"


def test_a_complaint_goes_to_standard_error_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain("no\x1b.") == 1
    assert complain("wrong", 2) == 2
    assert capsys.readouterr() == ("", "broker: no.\nbroker: wrong\n")
