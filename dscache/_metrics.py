"""What metrics are made of ``stats()``: declared once, for whoever shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

NAMESPACE: Final = "dscache"


class Metric(NamedTuple):
    """One number of ``stats()``, or of a part of it, as a metric.

    ``name`` is in words with underscores; ``labels`` tell apart those that share it.
    """

    key: str
    name: str
    unit: str
    text: str
    labels: tuple[tuple[str, str], ...] = ()


_FOUND: Final = "Records that were read, by whether Redis had them."
_WRITTEN: Final = "Records that were written, and those that if_newer has kept from it."

COUNTERS: Final = (
    Metric("operations", "operations", "{operation}", "Calls of get, set, get_bulk and the like."),
    Metric("hits", "reads", "{record}", _FOUND, (("result", "hit"),)),
    Metric("misses", "reads", "{record}", _FOUND, (("result", "miss"),)),
    Metric("writes", "writes", "{record}", _WRITTEN, (("result", "written"),)),
    Metric("not_newer", "writes", "{record}", _WRITTEN, (("result", "not_newer"),)),
    Metric("deletes", "deletes", "{record}", "Records that were to be deleted."),
    Metric("halves", "half_records", "{record}", "Misses of which Redis held one of two keys."),
    Metric("damaged", "damaged_records", "{record}", "Records whose stored version is none."),
    Metric("failed", "failed_records", "{record}", "Records whose call ended in an error."),
    Metric("overloaded", "overloads", "{operation}", "Calls that were refused by whenFull: error."),
    Metric("batches", "batches", "{batch}", "Batches of records that were sent together."),
    Metric("sent", "sent_records", "{record}", "Records in these batches, repeats included."),
    Metric("commands", "commands", "{command}", "Commands that were sent for records."),
    Metric("flushes", "flushes", "{flush}", "Writes to sockets that brought them out."),
    Metric("bytes_out", "sent_bytes", "By", "Bytes that were sent for records."),
    Metric("bytes_in", "received_bytes", "By", "Bytes that were received."),
    Metric("connects", "connects", "{connection}", "Connections that were made."),
    Metric("reconnections", "reconnections", "{connection}", "Those made after one was lost."),
    Metric("redirections", "redirections", "{redirection}", "What nodes of a cluster sent away."),
    Metric("refreshes", "topology_refreshes", "{refresh}", "Views of a cluster that were taken."),
)
GAUGES: Final = (
    Metric("connections", "connections", "{connection}", "Connections that are ready."),
    Metric("queued", "queued_records", "{record}", "Records that wait to be sent."),
    Metric("in_flight", "in_flight_records", "{record}", "Records that wait for their answer."),
    Metric("pending", "pending_operations", "{operation}", "Operations under way."),
    Metric("pending_bytes", "pending_bytes", "By", "Bytes of writes under way."),
    Metric("waiting", "waiting_threads", "{thread}", "Threads that wait for a connection."),
)
_NEAR_READS: Final = "Reads of the near cache: kept, asked of Redis, or joined to one under way."
NEAR_COUNTERS: Final = (
    Metric("hits", "near_reads", "{record}", _NEAR_READS, (("result", "hit"),)),
    Metric("misses", "near_reads", "{record}", _NEAR_READS, (("result", "miss"),)),
    Metric("joins", "near_reads", "{record}", _NEAR_READS, (("result", "join"),)),
    Metric("stale", "near_stale_reads", "{record}", "Records served while Redis was away."),
    Metric("invalidations", "near_invalidations", "{record}", "Kept records that have changed."),
    Metric("evictions", "near_evictions", "{record}", "Kept records that made room for others."),
    Metric("dropped_fills", "near_dropped_fills", "{record}", "Reads too old to be kept."),
)
NEAR_GAUGES: Final = (
    Metric("records", "near_records", "{record}", "Records that are kept."),
    Metric("bytes", "near_bytes", "By", "Bytes that they take."),
)
# What is told of each node of a cluster besides.
OF_NODES: Final = frozenset(
    (
        *("operations", "failed", "bytes_out", "bytes_in", "connects", "reconnections"),
        *("redirections", "connections", "queued", "in_flight"),
    )
)


class Sample(NamedTuple):
    """One value of a metric."""

    name: str
    unit: str
    text: str
    labels: dict[str, str]
    value: int


def counters(stats: Mapping[str, Any]) -> Iterator[Sample]:
    """Return what only grows, as far as a cache has counted it."""
    yield from _samples(COUNTERS, stats)
    yield from _samples(NEAR_COUNTERS, stats.get("near_cache", {}))
    for reason, count in stats.get("near_cache", {}).get("flushes", {}).items():
        text = "How often all that was kept was forgotten."
        yield Sample("near_flushes", "{flush}", text, {"reason": reason}, count)
    yield from _of_nodes(COUNTERS, stats)


def gauges(stats: Mapping[str, Any]) -> Iterator[Sample]:
    """Return what goes up and down."""
    yield from _samples(GAUGES, stats)
    yield from _samples(NEAR_GAUGES, stats.get("near_cache", {}))
    yield from _of_nodes(GAUGES, stats)


def _samples(metrics: Iterable[Metric], stats: Mapping[str, Any]) -> Iterator[Sample]:
    for metric in metrics:
        if metric.key in stats:
            labels = dict(metric.labels)
            yield Sample(metric.name, metric.unit, metric.text, labels, stats[metric.key])


def _of_nodes(metrics: Iterable[Metric], stats: Mapping[str, Any]) -> Iterator[Sample]:
    chosen = [metric for metric in metrics if metric.key in OF_NODES]
    for node, counts in stats.get("nodes", {}).items():
        for one in _samples(chosen, counts):
            labels = {"node": node, **one.labels}
            text = f"Of one node: {one.text}"
            yield one._replace(name=f"node_{one.name}", text=text, labels=labels)
