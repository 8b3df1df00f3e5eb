"""How long operations take, counted in buckets; what the compiled core has in ``_fast.pyx``.

Time runs from the call, as the deadline does, to the reading of the answer. The operations of one
tick have the time of the first of them, and what is read at once has come at one time: so a clock
is read twice for a batch, and once of these for its deadline anyway.
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
        """Return what ``stats()`` tells of them, without operations that there were none of."""
        rows = zip(c.TIMED, self._seconds, self._buckets, strict=True)
        return c.latency_of({name: (took, [*bucket]) for name, took, bucket in rows if any(bucket)})
