"""Latencies of operations, counted in buckets; the compiled core has its own in ``_fast.pyx``.

Time runs from the call, as the deadline does, to the reading of the answer. The operations of one
tick have the time of the first of them, and replies read at once have one time of arrival. So the
clock is read twice for a batch, one of these for its deadline anyway.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from . import constants as c


class Latencies:
    """The seconds and buckets of each of ``TIMED``, by its row there."""

    __slots__ = ("_buckets", "_seconds")

    def __init__(self) -> None:
        self._seconds = [0.0] * len(c.TIMED)
        self._buckets = [[0] * (len(c.LATENCY_BOUNDS) + 1) for _ in c.TIMED]

    def add(self, row: int, seconds: float, count: int) -> None:
        """Count that so many operations have taken so long."""
        self._seconds[row] += seconds * count
        self._buckets[row][bisect_left(c.LATENCY_BOUNDS, seconds)] += count

    def told(self) -> dict[str, Any]:
        """Return the latencies for ``stats()``, without operations that never occurred."""
        rows = zip(c.TIMED, self._seconds, self._buckets, strict=True)
        return c.latency_of({name: (took, [*bucket]) for name, took, bucket in rows if any(bucket)})
