"""Rows for the operations of programs beside reads and writes of records.

An ``update`` reads, decodes, changes and encodes a record, and writes it under the version read.
No other client writes, so that each succeeds at once. Each round of ``watch`` writes 10,000
records, and ends when their changes were heard. ``redis-cli --scan`` prints the versions' keys.
"""

from __future__ import annotations

from typing import Any

from clients.work import CHANGED, WRITTEN, Work
from contest import Row, contest, rows
from contestants import SCAN

OURS = ("fast", "pure")
TASKS = {"one": 1, "many": 100}


@contest(
    {
        f"programs: hits of fetch, {tasks} tasks": [
            *rows(OURS, Work("fetch", tasks, decode=False), name),
            *rows(OURS, Work("read", tasks, decode=False), f"{name}-get"),
        ]
        for name, tasks in TASKS.items()
    }
)
def test_fetch(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"programs: hits of fetch, near cache, {tasks} tasks": [
            *rows(("fast-near", "pure-near"), Work("fetch", tasks, decode=False), name),
            *rows(("fast-near", "pure-near"), Work("read", tasks, decode=False), f"{name}-get"),
        ]
        for name, tasks in TASKS.items()
    }
)
def test_fetch_near(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"programs: update, {tasks} tasks": [
            *rows(OURS, Work("update", tasks, decode=False, kind=CHANGED), name),
            *rows(OURS, Work("rewrite", tasks, decode=False, kind=CHANGED), f"{name}-rewrite"),
        ]
        for name, tasks in TASKS.items()
    }
)
def test_update(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        "programs: set with if_version, 100 tasks": [
            *rows(OURS, Work("replace", 100)),
            *rows(OURS, Work("set", 100, kind=WRITTEN, if_newer=True), "if_newer"),
        ]
    }
)
def test_replace(race: Any, row: Row) -> None:
    race(row)


@contest(
    {"programs: scan of all names": rows((*OURS, "redis-py", SCAN), Work("scan", decode=False))}
)
def test_scan(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        "programs: watch": rows(OURS, Work("watch", kind=WRITTEN, if_newer=True)),
        "programs: from a write to its event": rows(
            OURS, Work("hear", kind=WRITTEN, if_newer=True), "alone"
        ),
    }
)
def test_watch(race: Any, row: Row) -> None:
    race(row)
