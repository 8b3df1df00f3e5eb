"""The goals: ratios that dscache is meant to reach on any machine, within one run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Each line: our benchmark, the one that it is compared with in the same file, a quantity, and the
# wanted ratio. Speed is the inverse of time; added are milliseconds in place of a ratio.
TABLE = """
peers::test_get[fast-raw]               redis-py                    speed >= 20
peers::test_get[fast]                   redis-py                    speed >= 12
peers::test_get[fast-raw]               glide                       speed >= 12
peers::test_get[fast-raw]               deepstream                  speed >= 3.5
peers::test_get[fast-raw]               ruvio                       speed >= 2.5
peers::test_get[fast-raw]               vcache                      speed >= 5
peers::test_get[fast-raw]               redis-rs                    speed >= 6
peers::test_get[pure-raw]               redis-py                    speed >= 4
peers::test_get[pure-raw]               ruvio                       speed >= 1.2
peers::test_get_many[fast-raw]          limit-single                speed >= 0.5
peers::test_get_alone[fast-raw]         redis-py                    speed >= 1.3
peers::test_get_bulk[fast-raw]          redis-py                    speed >= 9
peers::test_get_bulk[fast-raw]          deepstream                  speed >= 12
peers::test_get_bulk[fast-raw]          limit-batched               speed >= 0.6
peers::test_get_bulk[two-fast-raw]      limit-batched               speed >= 0.75
peers::test_get_bulk[fast]              redis-py                    speed >= 3
peers::test_get_bulk[pure-raw]          redis-py                    speed >= 2
peers::test_set[fast]                   redis-py                    speed >= 15
peers::test_set[fast]                   glide                       speed >= 9
peers::test_set_bulk[fast]              redis-py-pipelined          speed >= 10
cost::test_import[dscache]              redis                       added <= 60
micro::test_data[fast]                  msgspec                     time <= 1.15
workloads::test_set_bulk_how[if_newer-fast]  plain-fast             server_us <= 3
workloads::test_set_bulk_how[ttl-fast]  plain-fast                  time <= 1.7
near_cache::test_hits[fast-near-raw]    empty-raw                   time <= 2.5
near_cache::test_hits[fast-near-raw]    redis-py-raw                speed >= 400
near_cache::test_popular[fast-near-raw] fast-raw                    speed >= 4
near_cache::test_hits_blocking[blocking-near-raw]     blocking-raw               speed >= 60
near_cache::test_hits_blocking[blocking-near-raw]     redis-py-blocking-near-raw speed >= 25
near_cache::test_hits_blocking[blocking-near-raw]     vcache-blocking-near-raw   speed >= 1.4
near_cache::test_threads[four-blocking-near-raw]      one-blocking-near-raw      speed >= 0.95
near_cache::test_popular_blocking[blocking-near-raw]  blocking-raw               speed >= 6
cluster::test_get[three-fast-raw]       three-redis-py-cluster-raw  speed >= 10
cluster::test_get_bulk[one-fast-raw]    server-fast-single-raw      speed >= 0.55
blocking::test_get[blocking-raw]        limit-alone                 time <= 1.25
blocking::test_get[blocking-raw]        redis-py-blocking           speed >= 1
blocking::test_get_bulk[blocking-raw]   redis-py-blocking           speed >= 6
blocking::test_set_bulk[blocking]       redis-py-blocking-pipelined speed >= 4
blocking::test_cluster[get-blocking-raw]  get-redis-py-blocking-cluster   speed >= 1
blocking::test_cluster[bulk-blocking-raw] bulk-redis-py-blocking-cluster  speed >= 4
programs::test_fetch[one-fast-raw]      one-get-fast-raw            time <= 1.05
programs::test_update[one-fast-raw]     one-rewrite-fast-raw        time <= 2.2
programs::test_replace[fast]            if_newer-fast               time <= 1.2
programs::test_scan[fast-raw]           redis-cli-scan-raw          speed >= 0.6
export::test_export[1000000-export]     1000000-redis-cli           time <= 1
stores::test_get[record-store]          redis-store                 speed >= 10
stores::test_put[record-store]          redis-store                 speed >= 10
messages::test_tasks[fast-node]         redis-py-node               speed >= 8
messages::test_window[fast-node]        deepstream                  speed >= 2
"""
HEADER = ("goal", "against", "asked", "measured", "by processor time", "")


@dataclass(frozen=True)
class Goal:
    """A ratio between two benchmarks, named by their file's and their own name."""

    ours: str
    peer: str
    of: str
    sign: str
    wanted: float

    @property
    def against(self) -> str:
        return re.sub(r"\[.*", f"[{self.peer}]", self.ours)

    def value(self, ours: Mapping[str, Any], against: Mapping[str, Any]) -> float:
        if self.of in ("speed", "time", "added"):
            one, other = ours["stats"]["median"], against["stats"]["median"]
        else:
            one, other = ours["extra_info"][self.of], against["extra_info"][self.of] or 1e-9
        if self.of == "added":
            return float(one - other) * 1e3
        return float(other / one if self.of == "speed" else one / other)


GOALS = [
    Goal(ours, peer, of, sign, float(wanted))
    for ours, peer, of, sign, wanted in map(str.split, TABLE.strip().splitlines())
]
COMPARED = frozenset(name for goal in GOALS for name in (goal.ours, goal.against))


def key_of(nodeid: str) -> str:
    """Return a benchmark's name as goals have it: ``peers::test_get[fast-raw]``."""
    file, _, name = nodeid.partition("::")
    return f"{file.rpartition('/')[2].removeprefix('test_').removesuffix('.py')}::{name}"


def table(benchmarks: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> list[list[str]]:
    """Return the goals of the selected benchmarks, and whether they are reached."""
    by_key = {key_of(one["fullname"]): one for one in benchmarks}
    rows = []
    for goal in GOALS:
        ours, against = by_key.get(goal.ours), by_key.get(goal.against)
        asked = f"{goal.of} {goal.sign} {goal.wanted:g} {'ms' if goal.of == 'added' else 'x'}"
        row = [goal.ours.replace("test_", ""), goal.peer, asked]
        by_processor = ratio_of_processor_time(goal, ours, against)
        if ours and against:
            value = goal.value(ours, against)
            reached = value >= goal.wanted if goal.sign == ">=" else value <= goal.wanted
            rows.append(
                [*row, f"{value:.2f}", by_processor, "reached" if reached else "NOT REACHED"]
            )
        elif ours:
            why = skipped.get(goal.against, "not selected")
            rows.append([*row, "-", "-", f"not measured: {why}"])
    return rows


def ratio_of_processor_time(
    goal: Goal, ours: Mapping[str, Any] | None, against: Mapping[str, Any] | None
) -> str:
    """Return the ratio of the clients' processor times, which a busy machine hardly changes."""
    if goal.of not in ("speed", "time") or not ours or not against:
        return "-"
    one, other = (each["extra_info"].get("client_us") for each in (ours, against))
    if not one or not other:
        return "-"
    return f"{other / one if goal.of == 'speed' else one / other:.2f}"


def as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the table for a terminal."""
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [HEADER, *rows]
    ]
