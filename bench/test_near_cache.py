"""Hits of the near cache, and a load of which one percent is rewritten each second.

A hit needs no round trip. The least that an awaited read can cost is awaiting an empty coroutine.
"""

from __future__ import annotations

from typing import Any

from clients.rewriter import MANY
from clients.work import RECORDS, Work
from contest import Row, contest, rows

NEAR = ("fast-near", "pure-near")
HITS = Work("cached", decode=False)
POPULAR = Work("popular", 100, size=MANY, decode=False)


@contest(
    {
        f"near cache: {RECORDS:,} records, one after the other": rows(
            (*NEAR, "fast", "cashews", "vcache", "redis-py", "empty"), HITS
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
