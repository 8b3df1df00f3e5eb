"""dscache's store for py-key-value beside py-key-value's own RedisStore.

Both return values decoded. The near cache of a store keeps what it reads.
"""

from __future__ import annotations

from typing import Any

from clients.work import Work
from contest import Row, contest, rows

STORES = ("record-store", "record-store-near", "redis-store")


@contest({"stores: get, 100 tasks": rows(STORES, Work("get", 100))})
def test_get(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        "stores: put, 100 tasks": rows(STORES, Work("set", 100)),
        "stores: put with a ttl, 100 tasks": rows(STORES, Work("set", 100, ttl=600), "ttl"),
    }
)
def test_put(race: Any, row: Row) -> None:
    race(row)


@contest({"stores: get_many of 100": rows(STORES, Work("get_many", size=100))})
def test_get_many(race: Any, row: Row) -> None:
    race(row)
