"""A chart of latency distributions as a standalone SVG, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise

from .load_test import Latencies

_WIDTH, _HEIGHT = 880, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 140, 56
# Rows for percentiles above the curves, their height, and the width of a letter, in points.
_ROWS, _ROW, _LETTER = 4, 13, 6.2
# Points of the curve in one octave of the axis.
_FINENESS = 6
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
    low, high = _range(drawn.values())
    plot = _Plot(low, high)
    curves = {name: plot.shares(one) for name, one in drawn.items()}
    top = max((share for curve in curves.values() for share in curve), default=1.0) * 1.08
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="32">{escape(title)}</text>',
        f'<text class="note" x="{_LEFT}" y="52">{escape(note)}</text>',
        *_axes(plot, top),
    ]
    for number, curve in enumerate(curves.values()):
        parts += _curve(plot, number % 2, curve, top)
    parts += _marks(plot, drawn.values())
    parts += _legend(drawn)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


class _Plot:
    """The mapping of latencies to positions, on a logarithmic axis."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self._first, self._last = math.log2(low), math.log2(high)
        self.count = max(round((self._last - self._first) * _FINENESS), 2)

    def x(self, milliseconds: float) -> float:
        """Return the x coordinate of a latency."""
        share = (math.log2(milliseconds) - self._first) / (self._last - self._first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, share: float, top: float) -> float:
        """Return the y coordinate of a share of operations."""
        return _HEIGHT - _BOTTOM - share / top * (_HEIGHT - _TOP - _BOTTOM)

    def edge(self, number: int) -> float:
        """Return the latency in milliseconds at which a part of the axis begins."""
        return float(2 ** (self._first + (self._last - self._first) * number / self.count))

    def shares(self, latencies: Latencies) -> list[float]:
        """Return the share of the operations in each part of the axis."""
        counts = [0.0] * self.count
        width = (self._last - self._first) / self.count
        for low, high, count in latencies.steps():
            begin = (math.log2(max(low, self.low)) - self._first) / width
            end = (math.log2(min(max(high, self.low), self.high)) - self._first) / width
            span = end - begin
            if span <= 0:
                counts[min(max(int(begin), 0), self.count - 1)] += count
                continue
            # A step across an edge counts in part on either side.
            for part in range(int(begin), min(int(end) + 1, self.count)):
                covered = min(end, part + 1) - max(begin, part)
                counts[part] += count * max(covered, 0) / span
        return [count / latencies.count for count in counts]


def _range(series: Iterable[Latencies]) -> tuple[float, float]:
    """Return the bounds of nearly all latencies, in milliseconds."""
    lows, highs = [], []
    for one in series:
        first = next(one.steps())
        lows.append(first[0])
        highs.append(max(one.percentile(99.99), first[1]))
    low, high = min(lows, default=0.1), max(highs, default=1.0)
    return low / 1.1, max(high * 1.1, low * 4)


def _axes(plot: _Plot, top: float) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for milliseconds in _ticks(plot.low, plot.high):
        x = plot.x(milliseconds)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{_milliseconds(milliseconds)}</text>"
        )
    step = _round_step(top / 4)
    share = step
    while share < top:
        y = plot.y(share, top)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{share * 100:g} %</text>"
        )
        share = round(share + step, 10)
    parts.append(
        f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH - _RIGHT}" y2="{bottom}"/>'
    )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="note" x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">'
        "latency (logarithmic scale); the height is the share of the operations"
        "</text>"
    )
    return parts


def _curve(plot: _Plot, number: int, shares: Sequence[float], top: float) -> list[str]:
    points = [
        (plot.x(math.sqrt(plot.edge(i) * plot.edge(i + 1))), plot.y(share, top))
        for i, share in enumerate(shares)
    ]
    floor = plot.y(0, top)
    points = [(plot.x(plot.low), floor), *points, (plot.x(plot.high), floor)]
    path = [f"M{points[0][0]:.1f},{floor:.1f}"]
    # Through the midpoints of the segments, with the corners as control points: no overshoot.
    for (x, y), (next_x, next_y) in pairwise(points[1:]):
        path.append(f"Q{x:.1f},{y:.1f} {(x + next_x) / 2:.1f},{(y + next_y) / 2:.1f}")
    path.append(f"L{points[-1][0]:.1f},{floor:.1f}Z")
    return [f'<path class="area c{number}" d="{"".join(path)}"/>']


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
        x = plot.x(min(max(milliseconds, plot.low), plot.high))
        words = f"p{percent:g} {_milliseconds(milliseconds)}"
        length = len(words) * _LETTER
        begin = x + 4 if x + 4 + length < _WIDTH - 4 else x - 4 - length
        row = next((row for row in range(_ROWS) if taken[row] <= begin), _ROWS - 1)
        taken[row] = begin + length + 6
        y = _TOP - 6 - (_ROWS - 1 - row) * _ROW
        parts.append(
            f'<line class="line c{number}" x1="{x:.1f}" y1="{y - 9}" x2="{x:.1f}" '
            f'y2="{_HEIGHT - _BOTTOM}"/>'
        )
        parts.append(f'<text class="mark c{number}" x="{begin:.1f}" y="{y}">{words}</text>')
    return parts


def _legend(series: Mapping[str, Latencies]) -> list[str]:
    parts = []
    x = _LEFT
    for number, (name, one) in enumerate(series.items()):
        words = f"{name}: {one.count:,}, mean {_milliseconds(one.mean)}"
        parts.append(
            f'<rect class="c{number % 2}" x="{x}" y="64" width="12" height="12" rx="2"/>'
            f'<text class="note" x="{x + 18}" y="74">{escape(words)}</text>'
        )
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
