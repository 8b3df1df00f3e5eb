"""Rows measured in rounds: each once, then each again, so that a slow spell hits all."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pace:
    """How often each row is measured, and about how many seconds at a time."""

    rounds: int
    seconds: float
    warm: int = 2
    """How often each row is done before: what is cold at first (connections, caches of the
    processor) isn't measured."""
    smoke: bool = False
    """Whether nothing is to be measured, but everything done once."""

    @property
    def taste(self) -> int:
        """Records of a first measurement, which shows how many take the wanted time."""
        return 50 if self.smoke else 1000


def arguments(description: str | None, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """Return a parser of ``--rounds`` and ``--seconds``, with these defaults."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    text = f"of each measurement ({rounds})"
    parser.add_argument("--rounds", type=_at_least_one, default=rounds, help=text)
    text = f"of one measurement ({seconds:g})"
    parser.add_argument("--seconds", type=_above_zero, default=seconds, help=text)
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1, not {text!r}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number above 0, not {text!r}")
    return number


@dataclass
class Row:
    """One row, and its measurements in each round."""

    label: str
    measure: Callable[[int], dict[str, float]] | None
    """Handle about so many records; return records, seconds and what else was measured."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the raw results say of it: who, and which work."""
    needed: bool = False
    """Whether its failure ends the run."""
    missing: str = ""
    """Why there is nothing to show."""
    samples: list[dict[str, float]] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [sample["records"] / sample["seconds"] for sample in self.samples]

    @property
    def median(self) -> float:
        """Records per second."""
        return statistics.median(self.rates)

    @property
    def best(self) -> float:
        """The fastest round, which was disturbed least."""
        return max(self.rates)

    def each(self, what: str) -> float | None:
        """Return the median of a measurement, per record; None if it wasn't made."""
        if not self.samples or any(what not in sample for sample in self.samples):
            return None
        return statistics.median(sample[what] / sample["records"] for sample in self.samples)

    def as_json(self) -> dict[str, Any]:
        """Return all its data."""
        told: dict[str, Any] = {"label": self.label, **self.facts}
        if self.missing:
            return told | {"missing": self.missing}
        return told | {"median_records_per_second": self.median, "rounds": self.samples}


@dataclass
class RowInLoop:
    """One row measured in a running event loop, and its rate in each round."""

    label: str
    measure: Callable[[int], Awaitable[float]]
    """Handle so many; return the seconds that it took."""
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median rate per second."""
        return statistics.median(self.rates)

    @property
    def best(self) -> float:
        """The fastest round, which was disturbed least."""
        return max(self.rates)


@dataclass
class Group:
    """Rows of one workload. The others are compared with the one called ``base``."""

    title: str
    rows: list[Row]
    base: str = ""

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if not row.missing]

    @property
    def reference(self) -> Row | None:
        """The row that the others are compared with: the last one if none is named."""
        rows = [row for row in self.measured if row.label == self.base or not self.base]
        return rows[-1] if rows else None

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "base": self.base, "rows": [r.as_json() for r in self.rows]}


def measure(groups: Sequence[Group], pace: Pace) -> None:
    """Fill the rows.

    Raises RuntimeError if a required row fails; any other keeps the reason in its place.
    """
    rows = [row for group in groups for row in group.rows if not row.missing]
    sizes = {id(row): size for row in rows if (size := _size(row, pace))}
    for _ in range(pace.rounds):
        for row in rows:
            if not row.missing and (sample := _sample(row, sizes[id(row)])):
                row.samples.append(sample)


async def measure_in_loop(rows: Sequence[RowInLoop], sizes: Sequence[int], rounds: int) -> None:
    """Fill the rows, each with that many operations at a time."""
    for _ in range(rounds):
        for row, size in zip(rows, sizes, strict=True):
            row.rates.append(size / await row.measure(size))


def _size(row: Row, pace: Pace) -> int:
    """Return how many records take that long."""
    sample = None
    for _ in range(pace.warm):
        sample = _sample(row, pace.taste)
    if sample is None:
        return 0
    return max(1, round(sample["records"] / sample["seconds"] * pace.seconds))


def _sample(row: Row, records: int) -> dict[str, float] | None:
    assert row.measure is not None, row.label
    if row.missing:
        return None
    try:
        return row.measure(records)
    except RuntimeError as error:
        if row.needed:
            raise
        row.missing = f"failed: {error}"
        row.samples.clear()
        return None
