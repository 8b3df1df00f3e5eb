"""Loads other than those of the peers: more tasks, other documents and writes.

redis-py writes with a ttl in a transaction of SET EX, and has nothing like ``if_newer``.
"""

from __future__ import annotations

from typing import Any

from clients.work import SIZES, WRITTEN, Work
from contest import Row, contest, rows

OURS = ("fast", "pure")
WHO = (*OURS, "redis-py")
TASKS = (1, 10, 100, 1000, 10_000)
MANY = 100
TTL = 3600
HOW: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("ttl", {"ttl": TTL}),
    ("if_newer", {"if_newer": True}),
)


def who_of(tasks: int) -> tuple[str, ...]:
    """Return the clients for that many tasks; redis-py opens a connection for each."""
    return WHO if tasks <= 1000 else OURS


def writers(how: str) -> tuple[str, ...]:
    return OURS if how == "if_newer" else WHO


@contest(
    {
        f"workloads: await {operation}, {tasks:,} tasks": rows(
            who_of(tasks), Work(operation, tasks, decode=False), f"{operation}-{tasks}"
        )
        for operation in ("get", "set")
        for tasks in TASKS
    }
)
def test_tasks(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        "workloads: 90 % get, 10 % set, 100 tasks": rows(
            WHO, Work("mixed", 100, decode=False), "mixed"
        ),
        "workloads: get by Zipf's law, 100 tasks": rows(
            WHO, Work("zipf", 100, decode=False), "zipf"
        ),
    }
)
def test_mix(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"workloads: {title}, documents of {kind}": [
            row
            for decode in ((False, True) if operation != "set" else (True,))
            for row in rows(
                WHO,
                Work(operation, tasks, size=MANY, decode=decode, kind=kind),
                f"{operation}-{kind.replace(' ', '')}",
            )
        ]
        for operation, tasks, title in (
            ("get", 100, "await get, 100 tasks"),
            ("set", 100, "await set, 100 tasks"),
            ("get_many", 1, f"get_bulk, {MANY} records"),
        )
        for kind in SIZES
    }
)
def test_size(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        "workloads: await set, 100 tasks, with options": [
            row
            for name, how in HOW
            for row in rows(writers(name), Work("set", 100, kind=WRITTEN, **how), name)
        ]
    }
)
def test_set_how(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        "workloads: set_bulk, 1,000 records, with options": [
            row
            for name, how in HOW
            for row in rows(writers(name), Work("set_many", kind=WRITTEN, **how), name)
        ]
    }
)
def test_set_bulk_how(race: Any, row: Row) -> None:
    race(row)
