"""SECURITY.md names a test for each threat, and each test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\*|\w+)`", TEXT)
ROWS = re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \| (.+?) \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path: str, name: str) -> None:
    source = (ROOT / path).read_text()
    wanted = r"test_\w+" if name == "*" else name
    assert re.search(rf"^(async )?def {wanted}\(", source, re.MULTILINE), f"{path}::{name}"


def test_every_threat_has_an_answer_and_a_test() -> None:
    assert len(ROWS) > 20
    assert TEXT.count("\n| **") == len(ROWS)
    for threat, answer, shown in ROWS:
        assert len(answer) > 20, threat
        assert re.search(r"`tests/[\w/]+\.py::", shown), threat
