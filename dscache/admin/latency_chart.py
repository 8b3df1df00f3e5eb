"""A chart of latency distributions as a standalone SVG, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise

from .load_test import STEPS, Latencies

_WIDTH, _HEIGHT = 880, 460
# The edges of the plot.
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 856, 140, 404
# Rows for percentiles above the curves, their height, and the width of a letter, in points.
_ROWS, _ROW, _LETTER = 4, 13, 6.2
# Steps of a Latencies in one part of the axis, for which a curve has one point.
_PART = 4
# The least parts of the axis: two octaves.
_LEAST_PARTS = 2 * STEPS // _PART
_PERCENTILES = (50, 99, 99.9)
_STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2933; }
  .page { fill: #ffffff; }
  .title { font-size: 18px; font-weight: 600; }
  .note, .tick { font-size: 12px; fill: #64707d; }
  .mark { font-size: 11px; }
  .grid { stroke: #e4e8ec; stroke-width: 1; }
  .axis { stroke: #9aa5b1; stroke-width: 1; }
  .c0 { stroke: #2563eb; fill: #2563eb; }
  .c1 { stroke: #d97706; fill: #d97706; }
  .area { fill-opacity: 0.18; stroke-width: 2; stroke-linejoin: round; }
  .line { stroke-width: 1.25; stroke-dasharray: 4 3; }
  text.c0, text.c1 { stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .page { fill: #14181d; }
    .note, .tick { fill: #9aa5b1; }
    .grid { stroke: #2a313a; }
    .c0 { stroke: #6ea8fe; fill: #6ea8fe; }
    .c1 { stroke: #f5a742; fill: #f5a742; }
  }
"""


def draw(title: str, note: str, series: Mapping[str, Latencies]) -> str:
    """Return the SVG of named distributions; omits distributions without operations."""
    drawn = {name: one for name, one in series.items() if one.count}
    plot = _Plot(list(drawn.values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>',
        _text("title", _LEFT, 32, title),
        _text("note", _LEFT, 52, note),
        *_axes(plot),
        *(_curve(plot, number, curve) for number, curve in enumerate(plot.curves)),
        *_marks(plot, drawn.values()),
        *_legend(drawn),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


class _Plot:
    """The curves, and the mapping of latencies to positions on a logarithmic axis."""

    def __init__(self, series: Sequence[Latencies]) -> None:
        first = min((min(one.steps) / _PART for one in series), default=_part(0.1))
        # Nearly all latencies: the slowest of all would leave little room for the others.
        last = max((_part(one.percentile(99.99)) for one in series), default=0.0)
        self._first = int(first) - 1
        self._count = max(int(last) + 2 - self._first, _LEAST_PARTS)
        ends = self._first, self._first + self._count
        self.low, self.high = (math.exp2(part * _PART / STEPS) / 1e6 for part in ends)
        self.curves = [self._shares(one) for one in series]
        self.top = max(map(max, self.curves), default=1.0) * 1.08

    def _shares(self, latencies: Latencies) -> list[float]:
        """Return the share of the operations in each part of the axis."""
        shares = [0.0] * self._count
        for step, count in latencies.steps.items():
            part = min(step // _PART - self._first, self._count - 1)
            shares[part] += count / latencies.count
        return shares

    def x(self, milliseconds: float) -> float:
        """Return the x coordinate of a latency."""
        return self.x_of_part(min(max(_part(milliseconds) - self._first, 0), self._count))

    def x_of_part(self, part: float) -> float:
        """Return the x coordinate at which a part of the axis begins."""
        return _LEFT + part / self._count * (_RIGHT - _LEFT)

    def y(self, share: float) -> float:
        """Return the y coordinate of a share of operations."""
        return _BOTTOM - share / self.top * (_BOTTOM - _TOP)


def _part(milliseconds: float) -> float:
    return math.log2(max(milliseconds * 1e6, 1.0)) * STEPS / _PART


def _axes(plot: _Plot) -> list[str]:
    parts = []
    for milliseconds in _ticks(plot.low, plot.high):
        x = plot.x(milliseconds)
        parts.append(_line("grid", x, _TOP, x, _BOTTOM))
        parts.append(_text("tick", x, _BOTTOM + 18, _milliseconds(milliseconds), "middle"))
    step = _round_step(plot.top / 4)
    for number in range(1, math.ceil(plot.top / step)):
        y = plot.y(number * step)
        parts.append(_line("grid", _LEFT, y, _RIGHT, y))
        parts.append(_text("tick", _LEFT - 8, y + 4, f"{number * step * 100:g} %", "end"))
    parts.append(_line("axis", _LEFT, _BOTTOM, _RIGHT, _BOTTOM))
    words = "latency (logarithmic scale); the height is the share of the operations"
    parts.append(_text("note", (_LEFT + _RIGHT) / 2, _HEIGHT - 14, words, "middle"))
    return parts


def _curve(plot: _Plot, number: int, shares: Sequence[float]) -> str:
    points = [(plot.x_of_part(part + 0.5), plot.y(share)) for part, share in enumerate(shares)]
    path = [f"M{_LEFT},{_BOTTOM}"]
    # Through the midpoints of the segments, with the corners as control points: no overshoot.
    for (x, y), (next_x, next_y) in pairwise([*points, (_RIGHT, _BOTTOM)]):
        path.append(f"Q{x:.1f},{y:.1f} {(x + next_x) / 2:.1f},{(y + next_y) / 2:.1f}")
    path.append(f"L{_RIGHT},{_BOTTOM}Z")
    return f'<path class="area c{number % 2}" d="{"".join(path)}"/>'


def _marks(plot: _Plot, series: Iterable[Latencies]) -> list[str]:
    """Return the lines of the percentiles, with their labels in rows that don't overlap."""
    marks = sorted(
        (one.percentile(percent), number % 2, percent)
        for number, one in enumerate(series)
        for percent in _PERCENTILES
    )
    taken = [0.0] * _ROWS
    parts = []
    for milliseconds, number, percent in marks:
        x = plot.x(milliseconds)
        words = f"p{percent:g} {_milliseconds(milliseconds)}"
        length = len(words) * _LETTER
        begin = x + 4 if x + 4 + length < _WIDTH - 4 else x - 4 - length
        row = next((row for row in range(_ROWS) if taken[row] <= begin), _ROWS - 1)
        taken[row] = begin + length + 6
        y = _TOP - 6 - (_ROWS - 1 - row) * _ROW
        parts.append(_line(f"line c{number}", x, y - 9, x, _BOTTOM))
        parts.append(_text(f"mark c{number}", begin, y, words))
    return parts


def _legend(series: Mapping[str, Latencies]) -> list[str]:
    parts = []
    x = _LEFT
    for number, (name, one) in enumerate(series.items()):
        words = f"{name}: {one.count:,}, mean {_milliseconds(one.mean)}"
        parts.append(f'<rect class="c{number % 2}" x="{x}" y="64" width="12" height="12" rx="2"/>')
        parts.append(_text("note", x + 18, 74, words))
        x += 40 + 7 * len(words)
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Return round latencies for the axis: at most 12, and as many as that allows."""
    found: list[float] = []
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 12:
            break
        found = ticks
    return found


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _milliseconds(value: float) -> str:
    if value < 0.0995:
        return f"{value * 1000:.3g} µs"
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
