"""Draw the distributions of the benchmarks as SVG: through the broker, and straight to the upstream.

A row for each scenario; in each panel the percentiles go to the right and milliseconds up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from tests.benchmarks.measure import PERCENTILES
from tests.benchmarks.results import Result

PANELS: Final = {"latency": "latency", "gap": "gap between chunks", "first": "time to first chunk"}
COLOURS: Final = {"direct": "#9a9a9a", "broker": "#1f6feb"}
LABELS: Final = {"direct": "straight to the upstream", "broker": "through the broker"}

_FONT = 'font-family="sans-serif" font-size="11"'
_WIDTH, _HEIGHT = 300, 190
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 30, 12, 32
_HEADER = 46
_SMALLEST = 0.001
"""Milliseconds below which nothing is told apart."""


def plot(results: dict[str, Result]) -> str:
    """Return an SVG document of all scenarios that have distributions."""
    drawn = {name: result for name, result in results.items() if result.direct and result.broker}
    width, height = _WIDTH * len(PANELS), _HEADER + _HEIGHT * max(1, len(drawn))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {_FONT}>',
        "<title>What the broker adds</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(),
    ]
    for row, (name, result) in enumerate(drawn.items()):
        for column, (kind, title) in enumerate(PANELS.items()):
            curves = {"direct": result.direct.get(kind), "broker": result.broker.get(kind)}
            shown = {label: curve for label, curve in curves.items() if curve}
            if shown:
                x, y = column * _WIDTH, _HEADER + row * _HEIGHT
                lines += [
                    f'<g transform="translate({x} {y})">',
                    *_panel(f"{name}: {title}, ms", shown),
                    "</g>",
                ]
    return "\n".join((*lines, "</svg>", ""))


def _legend() -> Iterator[str]:
    for n, (label, text) in enumerate(LABELS.items()):
        x = _LEFT + n * 200
        yield f'<path d="M{x} 20h24" stroke="{COLOURS[label]}" stroke-width="2"/>'
        yield f'<text x="{x + 30}" y="24" fill="#222222">{text}</text>'


def _panel(title: str, curves: Mapping[str, Sequence[float]]) -> Iterator[str]:
    scale = _scale([value for curve in curves.values() for value in curve])
    yield f'<text x="{_LEFT}" y="{_TOP - 10}" fill="#222222" font-weight="bold">{escape(title)}</text>'
    for mark in scale.marks:
        y = scale.y(mark)
        yield f'<path d="M{_LEFT} {y}H{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end" fill="#555555">{mark:g}</text>'
    for n, percentile in enumerate(PERCENTILES):
        place = f'x="{_x(n)}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle"'
        yield f'<text {place} font-size="9" fill="#555555">{percentile:g}</text>'
    for label, curve in curves.items():
        points = " ".join(f"{_x(n)},{scale.y(value)}" for n, value in enumerate(curve))
        yield f'<polyline points="{points}" fill="none" stroke="{COLOURS[label]}" stroke-width="2"/>'


class _Scale(NamedTuple):
    """Milliseconds up.

    Attributes:
        marks: values with a line, the lowest first.
        logarithmic: each mark is ten times the one below it.
    """

    marks: list[float]
    logarithmic: bool

    def y(self, value: float) -> float:
        """Return the height of a value in a panel."""
        low, high, at = self.marks[0], self.marks[-1], max(self.marks[0], value)
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return round(_HEIGHT - _BOTTOM - (at - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)


def _scale(values: Sequence[float]) -> _Scale:
    """Choose a scale: logarithmic where the values differ by more than ten times."""
    low, high = max(_SMALLEST, min(values)), max(_SMALLEST, *values)
    if high > low * 10:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return _Scale([10.0**power for power in powers], logarithmic=True)
    step = 10.0 ** math.floor(math.log10(max(_SMALLEST, high - low)))
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return _Scale([n * step for n in range(first, last + 1)], logarithmic=False)


def _x(n: int) -> float:
    return round(_LEFT + n * (_WIDTH - _LEFT - _RIGHT) / (len(PERCENTILES) - 1), 1)
