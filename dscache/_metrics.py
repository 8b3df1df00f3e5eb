"""The metrics made of ``stats()``, declared once for all exporters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

NAMESPACE: Final = "dscache"


class Metric(NamedTuple):
    """The metric for the number that ``stats()`` has under ``key``.

    ``name`` is in words with underscores. Metrics of the same name differ in their ``labels``. If
    ``stats()`` has a number for each of several things there, the label ``by`` tells which, and
    ``things`` are exported as 0 until they are there.
    """

    key: str
    name: str
    unit: str
    text: str
    labels: tuple[tuple[str, str], ...] = ()
    by: str = ""
    things: tuple[str, ...] = ()


_FOUND: Final = "Records read, by whether Redis had them."
_WRITTEN: Final = "Records written, and records that if_newer or if_version refused."

COUNTERS: Final = (
    Metric("operations", "operations", "{operation}", "Calls of get, set, get_bulk and the like."),
    Metric("hits", "reads", "{record}", _FOUND, (("result", "hit"),)),
    Metric("misses", "reads", "{record}", _FOUND, (("result", "miss"),)),
    Metric("writes", "writes", "{record}", _WRITTEN, (("result", "written"),)),
    Metric("not_newer", "writes", "{record}", _WRITTEN, (("result", "not_newer"),)),
    Metric("deletes", "deletes", "{record}", "Records passed to delete."),
    Metric("halves", "half_records", "{record}", "Misses of which Redis held one of two keys."),
    Metric("damaged", "damaged_records", "{record}", "Records whose stored version is invalid."),
    Metric("failed", "failed_records", "{record}", "Records whose operation ended in an error."),
    Metric("overloaded", "overloads", "{operation}", "Calls refused by whenFull: error."),
    Metric("batches", "batches", "{batch}", "Batches of records sent together."),
    Metric("sent", "sent_records", "{record}", "Records in these batches, repeats included."),
    Metric("commands", "commands", "{command}", "Commands sent for records."),
    Metric("flushes", "flushes", "{flush}", "Writes to sockets."),
    Metric("bytes_out", "sent_bytes", "By", "Bytes sent for records."),
    Metric("bytes_in", "received_bytes", "By", "Bytes received."),
    Metric("connects", "connects", "{connection}", "Connections made."),
    Metric("reconnections", "reconnections", "{connection}", "Connections made after a loss."),
    Metric("redirections", "redirections", "{redirection}", "Redirections by nodes of a cluster."),
    Metric("refreshes", "topology_refreshes", "{refresh}", "Refreshes of the slots of a cluster."),
)
GAUGES: Final = (
    Metric("connections", "connections", "{connection}", "Connections that are ready."),
    Metric("queued", "queued_records", "{record}", "Records waiting to be sent."),
    Metric("in_flight", "in_flight_records", "{record}", "Records waiting for their reply."),
    Metric("pending", "pending_operations", "{operation}", "Operations under way."),
    Metric("pending_bytes", "pending_bytes", "By", "Bytes of writes under way."),
    Metric("waiting", "waiting_threads", "{thread}", "Threads waiting for a connection."),
)
_NEAR_READS: Final = "Reads of the near cache: hits, reads of Redis, and joins of a pending read."
# Why a near cache is emptied. Each reason is exported from the start, as 0: Prometheus doesn't see
# the increase of a series that begins with it.
FLUSH_REASONS: Final = ("connection", "flushall", "login", "slots", "busy", "fork")
NEAR_COUNTERS: Final = (
    Metric("hits", "near_reads", "{record}", _NEAR_READS, (("result", "hit"),)),
    Metric("misses", "near_reads", "{record}", _NEAR_READS, (("result", "miss"),)),
    Metric("joins", "near_reads", "{record}", _NEAR_READS, (("result", "join"),)),
    Metric("stale", "near_stale_reads", "{record}", "Records served while Redis was unreachable."),
    Metric(
        "invalidations", "near_invalidations", "{record}", "Cached records invalidated by Redis."
    ),
    Metric("evictions", "near_evictions", "{record}", "Cached records evicted for space."),
    Metric("dropped_fills", "near_dropped_fills", "{record}", "Reads too old to be cached."),
    Metric(
        "flushes",
        "near_flushes",
        "{flush}",
        "How often the near cache was emptied.",
        by="reason",
        things=FLUSH_REASONS,
    ),
)
NEAR_GAUGES: Final = (
    Metric("records", "near_records", "{record}", "Records in the near cache."),
    Metric("bytes", "near_bytes", "By", "Bytes of the near cache."),
)
MAINTENANCE_COUNTERS: Final = (
    Metric(
        "notifications",
        "maintenance_notifications",
        "{notification}",
        "Announcements of maintenance, by kind.",
        by="kind",
    ),
    Metric("moves", "maintenance_moves", "{move}", "Moves to the new address of a server."),
    Metric(
        "moved_slots", "maintenance_moved_slots", "{slot}", "Slots that were announced to move."
    ),
    Metric(
        "relaxed", "maintenance_relaxed", "{connection}", "How often a connection got more time."
    ),
)
# Keys that the counters of each node of a cluster have as well.
OF_NODES: Final = frozenset(
    (
        *("operations", "failed", "bytes_out", "bytes_in", "connects", "reconnections"),
        *("redirections", "connections", "queued", "in_flight"),
    )
)


class Sample(NamedTuple):
    """One value of a metric."""

    name: str
    text: str
    labels: dict[str, str]
    value: int


def counters(stats: Mapping[str, Any]) -> Iterator[Sample]:
    """Return the values that only grow, as far as ``stats`` has them."""
    yield from _samples(stats, COUNTERS, NEAR_COUNTERS)
    yield from _present(MAINTENANCE_COUNTERS, stats.get("maintenance", {}))


def gauges(stats: Mapping[str, Any]) -> Iterator[Sample]:
    """Return the values that rise and fall, as far as ``stats`` has them."""
    return _samples(stats, GAUGES, NEAR_GAUGES)


def _samples(
    stats: Mapping[str, Any], metrics: Iterable[Metric], near: Iterable[Metric]
) -> Iterator[Sample]:
    yield from _present(metrics, stats)
    yield from _present(near, stats.get("near_cache", {}))
    chosen = [metric for metric in metrics if metric.key in OF_NODES]
    for node, counts in stats.get("nodes", {}).items():
        for name, text, labels, value in _present(chosen, counts):
            yield Sample(f"node_{name}", f"Of one node: {text}", {"node": node, **labels}, value)


def _present(metrics: Iterable[Metric], stats: Mapping[str, Any]) -> Iterator[Sample]:
    for metric in metrics:
        if metric.key not in stats:
            continue
        value = stats[metric.key]
        if isinstance(value, Mapping):
            counts: dict[str, int] = dict.fromkeys(metric.things, 0) | dict(value)
            for thing, count in counts.items():
                yield Sample(metric.name, metric.text, {metric.by: thing}, count)
        else:
            yield Sample(metric.name, metric.text, dict(metric.labels), value)
