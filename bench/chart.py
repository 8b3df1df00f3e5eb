"""Charts as SVG: bars beside each other, and lines over an axis. They consist of plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {
    "ours": "#0b7285",
    "twin": "#74b9c4",
    "peer": "#a9b1ba",
    "limit": "#3b4149",
}
# Colours of lines, which must be distinguishable: dark ones for dscache.
STROKES = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#868e96", "#1971c2", "#f08c00")
INK, FAINT, GRID, PAPER = "#212529", "#5c636a", "#dfe3e7", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
WIDTH = 960
MARGIN = 24
_HEAD = 76
"""Height of the title and the legend."""


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    colour: str


@dataclass(frozen=True)
class Panel:
    """Bars of one quantity, on a separate axis."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Lines over one pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    ticks: Sequence[str] | None = None
    """What stands at x = 0, 1, 2...; without it x is a number, on a logarithmic axis."""
    from_zero: bool = False
    """Whether y begins at zero; else it is logarithmic."""


def bars(title: str, axis: str, panels: Sequence[Panel], legend: Mapping[str, str]) -> str:
    """Return a chart of panels, two in a row. ``legend`` has the colour of each kind of bar."""
    left, height, gap = 176, 21, 44
    column = (WIDTH - 3 * MARGIN) / 2
    body: list[str] = []
    y = float(_HEAD)
    for first in range(0, len(panels), 2):
        row = panels[first : first + 2]
        tallest = max(len(panel.bars) for panel in row) * height
        for number, panel in enumerate(row):
            x = MARGIN + number * (column + MARGIN)
            body += _bar_panel(panel, axis, x, y, column, left, height)
        y += 26 + tallest + gap
    return _page(title, y, [*_legend(legend), *body])


def _bar_panel(
    panel: Panel, axis: str, x: float, y: float, width: float, left: float, height: float
) -> Iterator[str]:
    yield _text(x, y + 12, panel.title, size=14, weight=600)
    top, bottom = y + 26, y + 26 + len(panel.bars) * height
    most = max((bar.value for bar in panel.bars), default=1)
    # Space to the right of the longest bar for its number.
    scale = (width - left - 58) / most
    for tick in _ticks(most):
        at = x + left + tick * scale
        yield _line(at, top, at, bottom, GRID)
        yield _text(at, bottom + 14, short(tick), anchor="middle", size=11, ink=FAINT)
    for number, bar in enumerate(panel.bars):
        middle = top + (number + 0.5) * height
        yield _text(x + left - 8, middle + 4, bar.label, anchor="end", size=12)
        length = max(1.0, bar.value * scale)
        yield (
            f'<rect x="{x + left:.1f}" y="{middle - 7.5:.1f}" width="{length:.1f}" height="15" '
            f'rx="2" fill="{COLOURS[bar.colour]}"><title>{escape(bar.label)}: '
            f"{bar.value:,.0f} {escape(axis)}</title></rect>"
        )
        yield _text(x + left + length + 6, middle + 4, short(bar.value), size=11, ink=FAINT)
    yield _line(x + left, top, x + left, bottom, FAINT)
    yield _text(x + left, bottom + 30, axis, size=11, ink=FAINT)


def lines(title: str, plots: Sequence[Plot]) -> str:
    """Return a chart of plots, two in a row, each with its own legend."""
    column = (WIDTH - 3 * MARGIN) / 2
    height = 250.0
    body: list[str] = []
    y = 56.0
    for first in range(0, len(plots), 2):
        row = plots[first : first + 2]
        # The legend is below, two entries in a line.
        below = max((len(plot.lines) + 1) // 2 for plot in row) * 18
        for number, plot in enumerate(row):
            x = MARGIN + number * (column + MARGIN)
            body += _plot(plot, x, y, column, height)
        y += 26 + height + 52 + below + 20
    return _page(title, y, body)


def _plot(plot: Plot, x: float, y: float, width: float, height: float) -> Iterator[str]:
    yield _text(x, y + 12, plot.title, size=14, weight=600)
    left, top = x + 58, y + 26
    right, bottom = x + width - 8, y + 26 + height
    xs = [px for line in plot.lines for px, _ in line.points] or [1.0, 10.0]
    ys = [py for line in plot.lines for _, py in line.points] or [1.0, 10.0]
    across = _categories(len(plot.ticks)) if plot.ticks else _logarithmic(min(xs), max(xs))
    up = _linear(max(ys)) if plot.from_zero else _logarithmic(min(ys), max(ys))

    def place(px: float, py: float) -> tuple[float, float]:
        return left + across.at(px) * (right - left), bottom - up.at(py) * (bottom - top)

    for tick in up.ticks:
        _, at = place(xs[0], tick)
        yield _line(left, at, right, at, GRID)
        yield _text(left - 6, at + 4, short(tick), anchor="end", size=11, ink=FAINT)
    for tick in across.ticks:
        at, _ = place(tick, ys[0])
        told = plot.ticks[int(tick)] if plot.ticks else short(tick)
        yield _line(at, top, at, bottom, GRID)
        yield _text(at, bottom + 15, told, anchor="middle", size=11, ink=FAINT)
    yield _line(left, top, left, bottom, FAINT)
    yield _line(left, bottom, right, bottom, FAINT)
    yield _text((left + right) / 2, bottom + 33, plot.x, anchor="middle", size=12)
    middle = (top + bottom) / 2
    yield _text(x + 10, middle, plot.y, anchor="middle", size=12, turned=True)
    for number, line in enumerate(plot.lines):
        stroke = STROKES[number % len(STROKES)]
        placed = [place(*point) for point in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
        yield f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="2"/>'
        for (px, py), (vx, vy) in zip(placed, line.points, strict=True):
            told = plot.ticks[int(vx)] if plot.ticks else f"{vx:,.0f}"
            yield (
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{stroke}">'
                f"<title>{escape(line.label)}, {escape(told)}: {vy:.3g} {escape(plot.y)}</title>"
                "</circle>"
            )
        at_x = left + (number % 2) * (right - left) / 2
        at_y = bottom + 56 + number // 2 * 18
        yield _line(at_x, at_y - 4, at_x + 18, at_y - 4, stroke, width=3)
        yield _text(at_x + 24, at_y, line.label, size=12)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: Sequence[float]
    log: bool

    def at(self, value: float) -> float:
        """Return the position of a value, from 0 to 1."""
        if self.log:
            value = math.log10(max(value, self.low / 10))
            return (value - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def _categories(number: int) -> _Axis:
    return _Axis(-0.3, number - 0.7, range(number), log=False)


def _linear(most: float) -> _Axis:
    ticks = [0.0, *_ticks(most)]
    step = ticks[1] if len(ticks) > 1 else most
    if ticks[-1] < most:
        ticks.append(ticks[-1] + step)
    return _Axis(0, ticks[-1], ticks, log=False)


def _logarithmic(least: float, most: float) -> _Axis:
    """Return an axis of decades, or of doublings if there are few decades."""
    if most / least <= 100 and math.log2(least).is_integer() and math.log2(most).is_integer():
        first, last = round(math.log2(least)), round(math.log2(most))
        return _Axis(
            least, max(most, 2 * least), [2.0**i for i in range(first, last + 1)], log=True
        )
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    last = max(last, first + 1)
    return _Axis(10.0**first, 10.0**last, [10.0**i for i in range(first, last + 1)], log=True)


def _ticks(most: float) -> list[float]:
    """Return three to six round numbers up to ``most``."""
    if most <= 0:
        return []
    step = 10.0 ** math.floor(math.log10(most))
    while most / step < 3:
        step /= 2
    if most / step > 6:
        step *= 2
    return [step * i for i in range(1, int(most / step) + 1)]


def short(number: float) -> str:
    """Return a number in a few characters: 950, 1.5 k, 20 k, 2.4 M."""
    for limit, unit in ((1e6, " M"), (1e3, " k")):
        if number >= limit * 0.9995:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _legend(legend: Mapping[str, str]) -> Iterator[str]:
    x = float(MARGIN)
    for label, colour in legend.items():
        yield f'<rect x="{x:.0f}" y="46" width="12" height="12" rx="2" fill="{COLOURS[colour]}"/>'
        yield _text(x + 18, 56, label, size=12)
        x += 46 + 6.6 * len(label)


def _page(title: str, height: float, body: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'width="{WIDTH}" height="{height:.0f}" role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="{PAPER}"/>',
            _text(MARGIN, 30, title, size=18, weight=600),
            *body,
            "</svg>\n",
        ]
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    anchor: str = "start",
    ink: str = INK,
    weight: int = 400,
    turned: bool = False,
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{ink}" '
        f'font-weight="{weight}"{turn}>{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, ink: str, *, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink}" '
        f'stroke-width="{width:g}"/>'
    )
