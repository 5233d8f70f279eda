"""Messages to people."""

from __future__ import annotations

import pytest

from broker.cli.words import after, complain, one_line, printable


def test_text_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\rc\x07\x9b\n\td\u00e9\U0001f600") == "a[2Jbc\n\td\u00e9\U0001f600"


@pytest.mark.parametrize("char", ["\u202e", "\u202a", "\u2066", "\u2069", "\u200e", "\u061c"])
def test_text_cannot_change_its_order(char: str) -> None:
    assert printable(f"a{char}b") == "ab"


def test_text_of_others_stays_on_one_line() -> None:
    assert one_line("Done.\nbroker: \x1b[1mall\u2028 is\twell") == "Done. broker: [1mall is well"


def test_a_complaint_goes_to_standard_error_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain("no\x1b.") == 1
    assert complain("wrong", 2) == 2
    assert capsys.readouterr() == ("", "broker: no.\nbroker: wrong\n")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (40, "No. Try again in 40 s."),
        (0.2, "No. Try again in 1 s."),
        (119, "No. Try again in 119 s."),
        (120, "No. Try again in 2 minutes."),
        (3601, "No. Try again in 61 minutes."),
        (30_000, "No. Try again in 9 hours."),
        (0, "No."),
        (-5, "No."),
        (None, "No."),
        ("40", "No."),
        (True, "No."),
        (float("inf"), "No."),
        (float("nan"), "No."),
    ],
)
def test_a_known_wait_is_part_of_the_sentence(seconds: object, told: str) -> None:
    assert after("No.", seconds) == told
