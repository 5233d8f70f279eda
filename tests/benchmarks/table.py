"""The results of the benchmarks as a table: a row for each figure, a column for each scenario."""

from __future__ import annotations

from rich.table import Table

from tests.benchmarks.results import Result, ratio
from tests.benchmarks.scenarios import FIGURES


def table(results: dict[str, Result], earlier: dict[str, dict[str, float]] | None, rounds: int) -> Table:
    """Return the table; with an earlier run, each cell also has the ratio to it, or the earlier difference."""
    drawn = Table(title=f"median of {rounds} rounds" if rounds > 1 else "one round")
    drawn.add_column("")
    for scenario in results:
        drawn.add_column(scenario, justify="right")
    for name, figure in FIGURES.items():
        cells = [_cell(name, scenario, result, earlier) for scenario, result in results.items()]
        if any(cells):
            drawn.add_row(figure.title, *cells)
    return drawn


def _cell(name: str, scenario: str, result: Result, earlier: dict[str, dict[str, float]] | None) -> str:
    if (measured := result.figures.get(name)) is None:
        return ""
    text = f"{measured:,.{FIGURES[name].digits}f}"
    before = (earlier or {}).get(scenario, {}).get(name)
    if before is None:
        return text
    if (times := ratio(name, measured, before)) is None:
        return f"{text} (was {before:,.{FIGURES[name].digits}f})"
    return f"{text} ({times:.2f} times)"
