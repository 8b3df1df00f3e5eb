"""The counters of ``stats()``: their names, and their sum over several pipelines."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from .constants import LATENCY_BOUNDS, TIMED

if TYPE_CHECKING:
    from .pipeline import Pipeline

# Momentary counters, which end with their pipeline.
OF_THE_MOMENT: Final = ("queued", "in_flight", "pending", "pending_bytes")
# The counters of a Pipeline, of which each is the sum of those of several.
NAMES: Final = (
    *("operations", "records", "reads", "hits", "misses", "halves", "damaged"),
    *("writes", "not_newer", "deletes", "failed", "overloaded"),
    *("batches", "sent", "commands", "flushes", "bytes_out", "bytes_in"),
    *OF_THE_MOMENT,
)


# The counters that each core keeps for itself, in the order in which it passes them.
_COUNTED: Final = (
    *("operations", "reads", "hits", "misses", "halves", "damaged"),
    *("writes", "not_newer", "deletes", "overloaded"),
    *("batches", "sent", "commands", "flushes", "bytes_out", "bytes_in"),
)


class Counted(Protocol):
    """Whatever has the counters of a Pipeline."""

    def stats(self) -> dict[str, Any]: ...


def stats_of(pipeline: Pipeline, counted: Iterable[int], latency: dict[str, Any]) -> dict[str, Any]:
    """Return the ``stats()`` of a pipeline, of either core."""
    counts = dict(zip(_COUNTED, counted, strict=True))
    counts |= {
        "records": sum(counts[kind] for kind in ("reads", "writes", "not_newer", "deletes")),
        "failed": pipeline.failed,
        "queued": pipeline.queued,
        "in_flight": pipeline.in_flight,
        "pending": pipeline.operations,
        "pending_bytes": pipeline.pending_bytes,
    }
    numbers = {name: counts[name] for name in NAMES}
    return {**numbers, "mean_batch": mean_batch(numbers), "latency": latency}


def add(total: dict[str, Any], counts: Mapping[str, Any], *, lasting: bool = False) -> None:
    """Add another pipeline's counters; with ``lasting``, without the momentary ones."""
    # Copied, since other threads may add the first counters of a kind meanwhile.
    for name, count in dict(counts).items():
        if isinstance(count, int) and not (lasting and name in OF_THE_MOMENT):
            total[name] = total.get(name, 0) + count
    if (latency := counts.get("latency")) is None:
        return
    rows = total.setdefault("latency", latency_of({}))["operations"]
    for operation, row in dict(latency["operations"]).items():
        own = rows.setdefault(operation, {"count": 0, "sum": 0.0, "buckets": []})
        buckets = own["buckets"] or [0] * len(row["buckets"])
        rows[operation] = {
            "count": own["count"] + row["count"],
            "sum": own["sum"] + row["sum"],
            "buckets": [one + more for one, more in zip(buckets, row["buckets"], strict=True)],
        }


def of(counted: Counted, momentary: bool) -> dict[str, Any]:
    """Return the counters of a pipeline or the like, perhaps without the momentary ones."""
    counts = counted.stats()
    return counts if momentary else counts | dict.fromkeys(OF_THE_MOMENT, 0)


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the counters of several as a Pipeline tells its own; others are left out."""
    total: dict[str, Any] = dict.fromkeys(NAMES, 0)
    for part in parts:
        add(total, part)
    numbers = {name: total[name] for name in NAMES}
    latency = total.get("latency") or latency_of({})
    return {**numbers, "mean_batch": mean_batch(numbers), "latency": latency}


class Latencies:
    """The latencies of ``TIMED``, counted in buckets; the compiled core has its own in C.

    Time runs from the call, as the deadline does, to the reading of the answer. The operations of
    one tick have the time of the first of them, and replies read at once have one time of arrival.
    So the clock is read twice for a batch, one of these for its deadline anyway.
    """

    __slots__ = ("_buckets", "_seconds")

    def __init__(self) -> None:
        self._seconds = [0.0] * len(TIMED)
        self._buckets = [[0] * (len(LATENCY_BOUNDS) + 1) for _ in TIMED]

    def add(self, row: int, seconds: float, count: int) -> None:
        """Count that so many operations have taken so long."""
        self._seconds[row] += seconds * count
        self._buckets[row][bisect_left(LATENCY_BOUNDS, seconds)] += count

    def stats(self) -> dict[str, Any]:
        """Return the latencies for ``stats()``, without operations that never occurred."""
        rows = zip(TIMED, self._seconds, self._buckets, strict=True)
        return latency_of({name: (took, [*bucket]) for name, took, bucket in rows if any(bucket)})


def latency_of(rows: Mapping[str, tuple[float, list[int]]]) -> dict[str, Any]:
    """Return the latencies of ``stats()``: the seconds and buckets of each operation."""
    return {
        "bounds": list(LATENCY_BOUNDS),
        "operations": {
            operation: {"count": sum(buckets), "sum": seconds, "buckets": buckets}
            for operation, (seconds, buckets) in rows.items()
        },
    }


def mean_batch(counts: Mapping[str, Any]) -> float:
    """Return how many records a batch has brought on its way, on average; 0.0 without any."""
    mean: float = counts["sent"] / counts["batches"] if counts["batches"] else 0.0
    return mean
