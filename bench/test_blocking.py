"""Cache, which blocks, beside other blocking clients, on one server and on a cluster of three.

dscache leaves documents as text in the benchmarks called *raw*; all other reads decode them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients.work import RECORDS, Work
from contest import Row, contest, rows

OURS = ("blocking", "blocking-pure")
OTHERS = ("redis-py-blocking", "valkey-py-blocking", "glide-blocking", "ruvio-blocking")
IN_BULK = (*OTHERS, "redis-py-blocking-pipelined")


def reading(
    others: tuple[str, ...], work: Work, variant: str = "", on: str = "server"
) -> list[Row]:
    raw = replace(work, decode=False)
    return [
        *rows(OURS, raw, variant, on),
        *rows(OURS, work, variant, on),
        *rows(others, work, variant, on),
    ]


@contest({"blocking: get, one after the other": reading((*OTHERS, "limit-alone"), Work("get"))})
def test_get(race: Any, row: Row) -> None:
    race(row)


@contest({"blocking: set, one after the other": rows((*OURS, *OTHERS), Work("set"))})
def test_set(race: Any, row: Row) -> None:
    race(row)


@contest({f"blocking: get_bulk, {RECORDS:,} records": reading(IN_BULK, Work("get_many"))})
def test_get_bulk(race: Any, row: Row) -> None:
    race(row)


@contest({f"blocking: set_bulk, {RECORDS:,} records": rows((*OURS, *IN_BULK), Work("set_many"))})
def test_set_bulk(race: Any, row: Row) -> None:
    race(row)


@contest(
    {
        f"blocking: {title}, cluster of 3": reading(
            ("redis-py-blocking-cluster",), work, variant, "three"
        )
        for variant, title, work in (
            ("get", "get, one after the other", Work("get")),
            ("bulk", f"get_bulk, {RECORDS:,} records", Work("get_many")),
        )
    }
)
def test_cluster(race: Any, row: Row) -> None:
    race(row)
