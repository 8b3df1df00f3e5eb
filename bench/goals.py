"""The goals: ratios that dscache is meant to reach on any machine, within one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A ratio between two benchmarks, named by their file's and their own name."""

    text: str
    ours: str
    against: str
    at_least: float = 0
    at_most: float = 0
    of: str = "speed"
    """speed, time, added (milliseconds in place of a ratio), or a quantity in extra_info."""

    def ratio(self, ours: Mapping[str, Any], against: Mapping[str, Any]) -> float:
        """Return how often ours is as fast, or as expensive."""
        if self.of == "speed":
            return float(against["stats"]["median"] / ours["stats"]["median"])
        if self.of == "time":
            return float(ours["stats"]["median"] / against["stats"]["median"])
        if self.of == "added":
            return float(ours["stats"]["median"] - against["stats"]["median"]) * 1e3
        return float(ours["extra_info"][self.of] / (against["extra_info"][self.of] or 1e-9))

    @property
    def unit(self) -> str:
        return "ms more" if self.of == "added" else "x"

    @property
    def wanted(self) -> str:
        if self.at_least:
            return f"at least {self.at_least:g} {self.unit}"
        return f"at most {self.at_most:g} {self.unit}"

    def is_reached(self, ratio: float) -> bool:
        return ratio >= self.at_least if self.at_least else ratio <= self.at_most


GET, BULK, SET, WRITE = (f"peers::test_{name}" for name in ("get", "get_bulk", "set", "set_bulk"))
NEAR, ALONE = "near_cache::test_hits", "blocking::test_get"
GOALS = (
    Goal("get, 100 tasks", f"{GET}[fast-raw]", f"{GET}[redis-py]", 20),
    Goal("get, 100 tasks, decoded", f"{GET}[fast]", f"{GET}[redis-py]", 12),
    Goal("get, 100 tasks", f"{GET}[fast-raw]", f"{GET}[glide]", 12),
    Goal("get, 100 tasks", f"{GET}[fast-raw]", f"{GET}[deepstream]", 3.5),
    Goal("get, 100 tasks", f"{GET}[fast-raw]", f"{GET}[ruvio]", 2.5),
    Goal("get, 100 tasks", f"{GET}[fast-raw]", f"{GET}[vcache]", 5),
    Goal("get, 100 tasks", f"{GET}[fast-raw]", f"{GET}[redis-rs]", 6),
    Goal("get, 100 tasks, pure core", f"{GET}[pure-raw]", f"{GET}[redis-py]", 4),
    Goal("get, 100 tasks, pure core", f"{GET}[pure-raw]", f"{GET}[ruvio]", 1.2),
    Goal("get, 1000 tasks", f"{GET}_many[fast-raw]", f"{GET}_many[limit-single]", 0.5),
    Goal("get, one by one", f"{GET}_alone[fast-raw]", f"{GET}_alone[redis-py]", 1.3),
    Goal("get_bulk 1000, raw", f"{BULK}[fast-raw]", f"{BULK}[redis-py]", 9),
    Goal("get_bulk 1000, raw", f"{BULK}[fast-raw]", f"{BULK}[deepstream]", 12),
    Goal("get_bulk 1000, raw", f"{BULK}[fast-raw]", f"{BULK}[limit-batched]", 0.6),
    Goal(
        "get_bulk 1000, raw, two under way", f"{BULK}[two-fast-raw]", f"{BULK}[limit-batched]", 0.75
    ),
    Goal("get_bulk 1000, all .data read", f"{BULK}[fast]", f"{BULK}[redis-py]", 3),
    Goal("get_bulk 1000, raw, pure core", f"{BULK}[pure-raw]", f"{BULK}[redis-py]", 2),
    Goal("set, 100 tasks", f"{SET}[fast]", f"{SET}[redis-py]", 15),
    Goal("set, 100 tasks", f"{SET}[fast]", f"{SET}[glide]", 9),
    Goal("set_bulk 1000", f"{WRITE}[fast]", f"{WRITE}[redis-py-pipelined]", 10),
    Goal(
        "import", "cost::test_import[dscache]", "cost::test_import[redis]", at_most=60, of="added"
    ),
    Goal(
        ".data of 1000 texts",
        "micro::test_data[fast]",
        "micro::test_data[msgspec]",
        at_most=1.15,
        of="time",
    ),
    Goal(
        "if_newer, the server's processor time",
        "workloads::test_set_bulk_how[if_newer-fast]",
        "workloads::test_set_bulk_how[plain-fast]",
        at_most=3,
        of="server_us",
    ),
    Goal(
        "ttl",
        "workloads::test_set_bulk_how[ttl-fast]",
        "workloads::test_set_bulk_how[plain-fast]",
        at_most=1.7,
        of="time",
    ),
    Goal("near-cache hit", f"{NEAR}[fast-near-raw]", f"{NEAR}[empty-raw]", at_most=2.5, of="time"),
    Goal("near-cache hit", f"{NEAR}[fast-near-raw]", f"{NEAR}[redis-py-raw]", 400),
    Goal(
        "near cache, 1 % written a second",
        "near_cache::test_popular[fast-near-raw]",
        "near_cache::test_popular[fast-raw]",
        4,
    ),
    Goal(
        "cluster of 3, get, 100 tasks",
        "cluster::test_get[three-fast-raw]",
        "cluster::test_get[three-redis-py-cluster-raw]",
        10,
    ),
    Goal(
        "cluster of 1, get_bulk 1000, raw, to 1 record a command",
        "cluster::test_get_bulk[one-fast-raw]",
        "cluster::test_get_bulk[server-fast-single-raw]",
        0.55,
    ),
    Goal(
        "blocking get", f"{ALONE}[blocking-raw]", f"{ALONE}[limit-alone]", at_most=1.25, of="time"
    ),
    Goal("blocking get", f"{ALONE}[blocking-raw]", f"{ALONE}[redis-py-blocking]", 1),
    Goal(
        "blocking get_bulk 1000, raw",
        f"{ALONE}_bulk[blocking-raw]",
        f"{ALONE}_bulk[redis-py-blocking]",
        6,
    ),
    Goal(
        "blocking set_bulk 1000",
        "blocking::test_set_bulk[blocking]",
        "blocking::test_set_bulk[redis-py-blocking-pipelined]",
        4,
    ),
    Goal(
        "blocking get on a cluster",
        "blocking::test_cluster[get-blocking-raw]",
        "blocking::test_cluster[get-redis-py-blocking-cluster]",
        1,
    ),
    Goal(
        "blocking get_bulk 1000 on a cluster, raw",
        "blocking::test_cluster[bulk-blocking-raw]",
        "blocking::test_cluster[bulk-redis-py-blocking-cluster]",
        4,
    ),
    Goal(
        "messages, 100 tasks",
        "messages::test_tasks[fast-node]",
        "messages::test_tasks[redis-py-node]",
        8,
    ),
    Goal(
        "messages, 1000 on their way",
        "messages::test_window[fast-node]",
        "messages::test_window[deepstream]",
        2,
    ),
)
COMPARED = frozenset(name for goal in GOALS for name in (goal.ours, goal.against))
HEADER = ("goal", "against", "asked", "measured", "")


def key_of(nodeid: str) -> str:
    """Return a benchmark's name as goals have it: ``peers::test_get[fast-raw]``."""
    file, _, name = nodeid.partition("::")
    return f"{file.rpartition('/')[2].removeprefix('test_').removesuffix('.py')}::{name}"


def table(benchmarks: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> list[list[str]]:
    """Return the goals with both sides selected, and whether they are reached."""
    by_key = {key_of(one["fullname"]): one for one in benchmarks}
    rows = []
    for goal in GOALS:
        ours = by_key.get(goal.ours)
        if ours is None:
            continue
        peer = goal.against.partition("[")[2].rstrip("]")
        if against := by_key.get(goal.against):
            ratio = goal.ratio(ours, against)
            verdict = "reached" if goal.is_reached(ratio) else "NOT REACHED"
            rows.append([goal.text, peer, goal.wanted, f"{ratio:.2f} {goal.unit}", verdict])
        else:
            why = skipped.get(goal.against, "not selected")
            rows.append([goal.text, peer, goal.wanted, "-", f"not measured: {why}"])
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the table for a terminal."""
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [HEADER, *rows]
    ]
