"""A short random walk; `python -m tests.system.walk` takes longer ones."""

from __future__ import annotations

import os
import secrets

import pytest

from tests.system.walk import profiles, walk


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_pages_see_one_sequence_and_one_end_under_faults() -> None:
    """Set ``WALK_SEED`` to choose another walk, or to take one again."""
    seed = int(os.environ.get("WALK_SEED") or secrets.randbelow(2**32))
    print(f"seed {seed}")
    report = await walk(300, seed, rounds=len(profiles()))  # one of each profile of faults
    print(report)
    assert report.sessions > 20, report
    assert sum(report.faults.values()) > 5, report
    assert not report.findings, report
