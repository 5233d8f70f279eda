"""What the tests of keys and tokens stand on: a clock that they turn, and the log."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
import structlog

from broker.logs import configure_logs
from tests.identity.issuer import Clock


@pytest.fixture
def clock() -> Clock:
    """Time that passes when a test says so."""
    return Clock()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, with nothing held back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    configure_logs("debug", "json", out=out)
    yield out
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
