"""dscache beside its peers and beside the limit: the same work on the same server.

A read is both keys of a record, and a write too. All clients decode each document, except in the
benchmarks called *raw*, which leave it as text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.work import RECORDS, Work
from contest import Row, contest, rows
from contestants import DEEPSTREAM

TASKS = 100
MANY_TASKS = 1000
OURS = ("fast", "fast-asyncio", "pure")
OTHERS = (
    *("redis-py", "valkey-py", "coredis", "glide", "ruvio", "redis-rs", "vcache", "aiocache"),
    DEEPSTREAM,
)
IN_BULK = ("redis-py", "redis-py-pipelined", *OTHERS[1:])


def reading(others: tuple[str, ...], work: Work) -> list[Row]:
    """Return the rows of dscache and redis-py, raw and decoded, and of the others."""
    raw = replace(work, decode=False)
    return [*rows((*OURS, "redis-py"), raw), *rows(OURS, work), *rows(others, work)]


@contest({"peers: await get, one after the other": reading((*OTHERS, "limit-alone"), Work("get"))})
def test_get_alone(race: Any, row: Row) -> None:
    race(row)


@contest({f"peers: await get, {TASKS} tasks": reading(OTHERS, Work("get", TASKS))})
def test_get(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"peers: await get, {MANY_TASKS:,} tasks": reading(
            (*OTHERS, "limit-single"), Work("get", MANY_TASKS)
        )
    }
)
def test_get_many(race: Any, row: Row) -> None:
    race(row)


@contest({f"peers: await set, {TASKS} tasks": rows((*OURS, *OTHERS), Work("set", TASKS))})
def test_set(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"peers: get_bulk, {RECORDS:,} records": [
            *reading((*IN_BULK, "limit-batched"), Work("get_many")),
            *rows(("fast", "pure"), Work("get_many", 2, decode=False), "two"),
        ]
    }
)
def test_get_bulk(race: Any, row: Row) -> None:
    race(row)


@contest({f"peers: set_bulk, {RECORDS:,} records": rows((*OURS, *IN_BULK), Work("set_many"))})
def test_set_bulk(race: Any, row: Row) -> None:
    race(row)
