"""``dscache export`` beside redis-cli, which scans the same keys and reads them by MGET.

Each program is timed from its start to its end, and writes a file. dscache reads lifetimes too.
"""

from __future__ import annotations

from typing import Any

from clients.work import Work
from contest import Row, contest, rows
from contestants import EXPORT, EXPORT_BY_CLI

# In this order: the server keeps the records of the smaller one.
SIZES = (10_000, 1_000_000)


@contest(
    {
        f"export: {size:,} records": rows(
            (EXPORT, EXPORT_BY_CLI), Work("export", size=size), str(size)
        )
        for size in SIZES
    }
)
def test_export(race: Any, row: Row) -> None:
    race(row)
