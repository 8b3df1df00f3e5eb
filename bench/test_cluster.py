"""The cost of routing: dscache on clusters of three and of one, beside one server.

On a cluster, records of different slots can't share a command, so one server is also measured with
one record a command, by the same core, which takes its server for a node of a cluster.
"""

from __future__ import annotations

from typing import Any

from clients.work import RECORDS, Work
from contest import Row, contest, rows

GET = Work("get", 100, decode=False)
BULK = Work("get_many", decode=False)
CLUSTERS = ("one", "three")


def everywhere(work: Work) -> list[Row]:
    """Return the rows of dscache on one server, as on a cluster, and on clusters."""
    return [
        *rows(("fast", "pure", "fast-single"), work, "server", "hashtag"),
        *(row for target in CLUSTERS for row in rows(("fast", "pure"), work, target, target)),
    ]


@contest(
    {
        "cluster: await get, 100 tasks": [
            *everywhere(GET),
            *rows(["redis-py-cluster"], GET, "three", "three"),
        ]
    }
)
def test_get(race: Any, row: Row) -> None:
    race(row)


@contest({f"cluster: get_bulk, {RECORDS:,} records, raw": everywhere(BULK)})
def test_get_bulk(race: Any, row: Row) -> None:
    race(row)
