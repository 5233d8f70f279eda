"""The figures in deploy/scaling.md are what its script prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.mark.slow
def test_the_tables_of_scaling_are_what_its_script_prints() -> None:
    printed = subprocess.run(
        [sys.executable, str(DEPLOY / "scaling.py")], check=True, capture_output=True, text=True
    ).stdout
    *tables, comparison = printed.strip().split("\n\n")
    document = (DEPLOY / "scaling.md").read_text(encoding="utf-8")
    for table in tables:
        assert table in document
    for row in comparison.splitlines()[2:]:
        assert row.removesuffix("|") in document


def test_more_readers_need_more() -> None:
    printed = [
        subprocess.run(
            [sys.executable, str(DEPLOY / "scaling.py"), "--seconds", "0.1", "--scale", scale],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for scale in ("1", "0.5")
    ]
    workers = [
        int(next(line for line in text.splitlines() if "workers of a cell" in line).split("|")[3])
        for text in printed
    ]
    assert workers[1] * 2 == pytest.approx(workers[0], abs=2)
