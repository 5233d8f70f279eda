"""Tests on both event loops, which treat a lost connection differently. Production runs on uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop

ON_BOTH_LOOPS = {
    "test_nothing_is_written_to_a_lost_connection",
    "test_a_closed_connection_fails_who_waits_at_once",
}


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return the loops that a test runs on, each in turn."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if getattr(item, "originalname", "") in ON_BOTH_LOOPS:
        loops["uvloop"] = uvloop.new_event_loop
    return loops
