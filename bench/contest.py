"""The contests: groups of benchmarks whose contestants are measured in turn."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from clients.work import Work

Sample = Mapping[str, float]
# Quantities of a sample that are reported by the record, in microseconds.
_COSTS = {"cpu": "client_us", "server_cpu": "server_us"}
_times: deque[float] = deque()


@dataclass(frozen=True)
class Row:
    """One contestant and its work."""

    client: str
    work: Work
    target: str = "server"
    """The server, "hashtag" for the same with a cluster's keys, or a cluster: "one" or "three"."""
    id: str = ""


def rows(
    clients: Iterable[str], work: Work, variant: str = "", target: str = "server"
) -> list[Row]:
    """Return a row for each client; ``variant`` begins the names of their benchmarks."""
    raw = "raw" if work.reads and not work.decode and work.operation != "latency" else ""
    return [
        Row(client, work, target, "-".join(filter(None, (variant, client, raw))))
        for client in clients
    ]


def contest(groups: Mapping[str, Sequence[Row]]) -> pytest.MarkDecorator:
    """Parametrize a benchmark with the rows of these groups, by their titles."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(
                row,
                id=row.id,
                marks=[grouped(title), *([pytest.mark.large] if row.work.is_large else [])],
            )
            for title, some in groups.items()
            for row in some
        ],
    )


def grouped(title: str) -> pytest.MarkDecorator:
    """Put benchmarks that were measured elsewhere into a group of pytest-benchmark's."""
    return pytest.mark.benchmark(group=title, timer=replayed)


def replayed() -> float:
    """Return the next time of a measurement that was made in another process."""
    return _times.popleft() if _times else 0.0


def replay(benchmark: BenchmarkFixture, samples: Sequence[Sample], **facts: object) -> None:
    """Report the rounds of a measurement to pytest-benchmark: the seconds of a record in each."""
    each = [sample.get("each", sample["seconds"] / sample["records"]) for sample in samples]
    _times.clear()
    _times.extend(time for seconds in each for time in (0.0, seconds))
    info = benchmark.extra_info
    info["records_per_second"] = 1 / statistics.median(each)
    for what in samples[0]:
        if what in ("records", "seconds", "each"):
            continue
        if what in _COSTS:
            costs = [sample[what] / sample["records"] * 1e6 for sample in samples]
            info[_COSTS[what]] = statistics.median(costs)
        else:
            info[what] = statistics.median(sample[what] for sample in samples)
    info.update(facts)
    benchmark.pedantic(lambda: None, rounds=len(samples))  # type: ignore[no-untyped-call]


def facts_of(row: Row, label: str, version: str) -> dict[str, object]:
    """Return the row as the JSON shows it."""
    work = {name: value for name, value in asdict(row.work).items() if value is not None}
    return {"label": label, "version": version, "target": row.target, "work": work}
