"""Hits of the near cache, and a load of which one percent is rewritten each second.

A hit needs no round trip. The least that an awaited read can cost is awaiting an empty coroutine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.rewriter import MANY
from clients.work import RECORDS, Work
from contest import Row, contest, rows

NEAR = ("fast-near", "pure-near")
BLOCKING = ("blocking-near", "blocking-pure-near")
# One that reads both keys of a record, as all others do, and one that reads a single key.
VCACHE = ("vcache-blocking-near", "vcache-blocking-near-one")
THREADS = 4
HITS = Work("cached", decode=False)
POPULAR = Work("popular", 100, size=MANY, decode=False)
ALONE = Work("popular", size=MANY, decode=False)


@contest(
    {
        f"near cache: {RECORDS:,} records, one after the other": rows(
            (*NEAR, "fast", "cashews", "redis-py", "empty"), HITS
        )
    }
)
def test_hits(race: Any, row: Row) -> None:
    race(row)


@contest(
    {f"near cache: {MANY:,} records by Zipf's law, 1 % written/s": rows((*NEAR, "fast"), POPULAR)}
)
def test_popular(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"near cache, blocking: {RECORDS:,} records, one after the other": rows(
            (*BLOCKING, "blocking", *VCACHE, "redis-py-blocking-near", "redis-py-blocking"), HITS
        )
    }
)
def test_hits_blocking(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"near cache, blocking: {RECORDS:,} records, threads": [
            *rows(BLOCKING, HITS, "one"),
            *rows(BLOCKING, replace(HITS, tasks=THREADS), "four"),
        ]
    }
)
def test_threads(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"near cache, blocking: {MANY:,} records by Zipf's law, 1 % written/s": rows(
            (*BLOCKING, "blocking"), ALONE
        )
    }
)
def test_popular_blocking(race: Any, row: Row) -> None:
    race(row)
