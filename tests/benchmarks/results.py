"""The results of a run of the benchmarks: medians, JSON, and the ratios to an earlier run."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.measure import PERCENTILES, Curve, Round
from tests.benchmarks.scenarios import FIGURES

FORM = 1
"""Of the JSON; another one cannot be compared."""


class UnusableError(Exception):
    """A file does not have the results of an earlier run."""


class Result(NamedTuple):
    """What is known of a scenario.

    Attributes:
        figures: the median of each.
        lost: lines on lost streams, of all rounds.
        direct, broker: the distributions of both; the median of the rounds at each percentile.
        rounds: the figures of each round.
    """

    figures: dict[str, float]
    lost: list[str]
    direct: Curve
    broker: Curve
    rounds: list[dict[str, float]]


def summary(rounds: list[Round]) -> Result:
    """Return the medians of several rounds of a scenario."""
    figures = {}
    for name in FIGURES:
        if measured := [each.figures[name] for each in rounds if name in each.figures]:
            figures[name] = statistics.median(measured)
    return Result(
        figures,
        [line for each in rounds for line in each.lost],
        _median([each.direct for each in rounds]),
        _median([each.broker for each in rounds]),
        [each.figures for each in rounds],
    )


def _median(curves: list[Curve]) -> Curve:
    return {
        name: [statistics.median(at) for at in zip(*(curve[name] for curve in curves), strict=True)]
        for name in curves[0]
        if all(name in curve for curve in curves)
    }


def to_json(results: dict[str, Result]) -> str:
    """Return the results as JSON, with what is known of the machine."""
    told = {
        "form": FORM,
        "machine": {"processor": _processor(), "python": platform.python_version(), "system": sys.platform},
        "percentiles": PERCENTILES,
        "scenarios": {name: result._asdict() for name, result in results.items()},
    }
    return json.dumps(told, indent=1)


def read_figures(path: Path) -> dict[str, dict[str, float]]:
    """Return the figures of an earlier run by scenario.

    Raises:
        UnusableError: the file cannot be read, or is not such a run.
    """
    try:
        told: Any = json.loads(path.read_text())
        if told["form"] != FORM:
            raise UnusableError(f"{path} has results of another form")
        return {name: result["figures"] for name, result in told["scenarios"].items()}
    except OSError as error:
        raise UnusableError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnusableError(f"{path} does not have results of this benchmark") from None


def ratio(name: str, figure: float, earlier: float | None) -> float | None:
    """Return how many times an earlier figure this one is; None where that says nothing."""
    if not earlier or FIGURES[name].difference:
        return None
    return figure / earlier


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )
