"""Fixtures of the micro-benchmarks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

ScriptTimes = dict[str, float]
"""Microseconds of a call in the server, by the name of the test."""

_TIMES = pytest.StashKey[ScriptTimes]()


@pytest.fixture
def script_times(request: pytest.FixtureRequest) -> ScriptTimes:
    """What the summary shows of scripts."""
    return request.config.stash.setdefault(_TIMES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List what scripts take in the server."""
    if times := config.stash.get(_TIMES, None):
        terminalreporter.section("microseconds of a script in the server, for each call")
        for name, microseconds in times.items():
            terminalreporter.write_line(f"{name:32} {microseconds:8.1f}")


if importlib.util.find_spec("pytest_benchmark") is None:

    class _Once:
        """Stands for pytest-benchmark where it is not installed: calls once, so that the test says what it did."""

        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
            return function(*args)

        def pedantic(
            self,
            target: Callable[..., Any],
            *,
            setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
            rounds: int,
        ) -> Any:
            args, kwargs = setup()
            return target(*args, **kwargs)

    @pytest.fixture
    def benchmark() -> _Once:
        """Call what is measured once."""
        return _Once()
