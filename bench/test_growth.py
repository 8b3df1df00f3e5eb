"""The growth of a record's cost: with the records of a bulk, and with the connections.

The wanted cost is flat. A small bulk costs a round trip, whatever is in it. With the connections
grow the tasks, and Python's garbage collector looks at all that each of them holds: a benchmark
without collection shows its share. The rest is memory beyond the processor's caches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.work import Work
from contest import Row, contest, rows

WHO = ("fast", "pure", "redis-py")
BULKS = tuple(10**exponent for exponent in range(7))
CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
TASKS = 100


@contest(
    {
        f"growth: {operation.replace('many', 'bulk')}, {size:,} records": [
            *rows(WHO, Work(operation, size=size, decode=False), f"{operation[:3]}-{size}"),
            *(
                rows(["fast"], Work(operation, size=size), f"{operation[:3]}-{size}")
                if operation == "get_many"
                else ()
            ),
        ]
        for operation in ("get_many", "set_many")
        for size in BULKS
    }
)
def test_bulk(race: Any, row: Row) -> None:
    race(row)


def connecting(number: int) -> list[Row]:
    work = Work("get", TASKS * number, decode=False, connections=number)
    uncollected = replace(work, collects=False)
    return [
        *rows(("fast", "pure"), work, str(number)),
        *rows(["fast"], uncollected, f"{number}-uncollected"),
    ]


@contest(
    {
        f"growth: get, {number} connections, {TASKS} tasks on each": connecting(number)
        for number in CONNECTIONS
    }
)
def test_connections(race: Any, row: Row) -> None:
    race(row)
