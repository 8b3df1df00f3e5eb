"""Tables as Markdown, and all measurements as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rounds import Group, Row, RowInLoop


@dataclass
class Table:
    """Rows of text. All columns but the first hold numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: bool = False
    """Whether all columns hold words."""

    def lines(self) -> list[str]:
        """Return it as Markdown, aligned for reading as plain text."""
        table = [list(self.header), *map(list, self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.header))]
        left = len(self.header) if self.words else 1
        rule = [
            "-" * width if i < left else "-" * max(1, width - 1) + ":"
            for i, width in enumerate(widths)
        ]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if i < left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return f"| {' | '.join(padded)} |"

        title = [f"### {self.title}", ""] if self.title else []
        note = ["", self.note] if self.note else []
        return [*title, line(self.header), line(rule), *map(line, self.rows), *note]


@dataclass
class Section:
    """One part of the report."""

    name: str
    title: str
    text: str
    """What it measures, in a sentence or two."""
    tables: list[Table] = field(default_factory=list)
    charts: dict[str, str] = field(default_factory=dict)
    """SVG by file name."""
    printed: str = ""
    """What a program of its own has printed."""
    raw: Any = None
    """What the JSON says."""

    def lines(self) -> list[str]:
        """Return it as Markdown."""
        lines = [f"## {self.title}", "", self.text, ""]
        for name in self.charts:
            lines += [f"![{self.title}]({name})", ""]
        for table in self.tables:
            lines += [*table.lines(), ""]
        if self.printed:
            lines += ["```text", self.printed.strip(), "```", ""]
        return lines


def count(number: float) -> str:
    """Return a number for people: three digits, or all of a larger one."""
    if number >= 100 or number == 0:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def ratio(number: float) -> str:
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} x"


def in_groups(groups: Sequence[Group]) -> list[Table]:
    """Return a table for each group: records per second, and a record's cost on either side."""
    tables = []
    for group in groups:
        reference = group.reference
        rows, notes = [], []
        for row in group.rows:
            if row.missing:
                rows.append([row.label, "-", "-", "-", "-", "-"])
                notes.append(f"- {row.label}: not measured: {row.missing}")
                continue
            costs = [row.each("cpu"), row.each("server_cpu")]
            rows.append(
                [
                    row.label,
                    count(row.median),
                    count(row.best),
                    ratio(row.median / reference.median) if reference else "-",
                    *("-" if cost is None else f"{cost * 1e6:.2f}" for cost in costs),
                ]
            )
        against = f"to {reference.label}" if reference else "ratio"
        header = ["", "records/s", "best round", against, "client µs", "server µs"]
        tables.append(Table(group.title, header, rows, "\n".join(notes)))
    return tables


def as_text(groups: Sequence[Group]) -> list[str]:
    """Return the tables for a terminal: medians, the best rounds, and the medians' ratios."""
    lines = []
    for group in groups:
        reference = group.reference
        lines += ["", f"{group.title:42}{'records/s':>12}{'best round':>12}{'ratio':>9}"]
        for row in group.rows:
            if row.missing:
                lines.append(f"  {row.label:40}not measured: {row.missing}")
                continue
            assert reference is not None
            lines.append(
                f"  {row.label:40}{row.median:12,.0f}{row.best:12,.0f}"
                f"{row.median / reference.median:7.1f} x"
            )
    return lines


def goal(text: str, row: Row | RowInLoop, against: Row | RowInLoop, at_least: float) -> str:
    """Return a line that shows whether a ratio is reached."""
    got = row.median / against.median
    verdict = "reached" if got >= at_least else "MISSED"
    return f"{text}: {got:.1f} x, wanted {at_least:g} x: {verdict}"
