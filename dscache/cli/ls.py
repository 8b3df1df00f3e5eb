"""``dscache ls``: the records of a prefix, with their sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from ..admin.cache import open_cache
from ..admin.listing import Order, Row, list_records, sorted_records
from ..admin.primaries import open_primaries
from ..errors import shorten
from .options import Chosen, PrefixArgument, number_option, with_all_options
from .output import complain, interruptible
from .settings import run
from .tables import Results, line_of


@with_all_options
def ls(
    prefix: PrefixArgument = "",
    sort: Annotated[
        Order | None,
        typer.Option(
            metavar="COLUMN",
            help="Sort by name, version, bytes or ttl: names upwards, the others downwards.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None,
        number_option(
            int,
            "Only the first N records, by bytes unless --sort names another column.",
            metavar="N",
            least=1,
            show_default=False,
        ),
    ] = None,
    *,
    chosen: Chosen,
) -> None:
    """List the records of a prefix, with their sizes and lifetimes.

    Prints name, version, bytes of JSON text, and lifetime in seconds. In a pipe, prints one JSON
    object a line. Without --sort and --top, records are printed as they are found. The exit status
    is 1 if records are damaged.
    """
    config = chosen.load()
    results = Results(chosen.as_json, "version", "bytes", "ttl")
    damaged, found_any = 0, False

    def report(error: Exception) -> None:
        nonlocal damaged
        damaged += 1
        complain(str(error))

    def show(rows: Iterable[Row]) -> None:
        nonlocal found_any
        for row in rows:
            found_any = True
            line = line_of(name=row.name, version=row.version, bytes=row.size, ttl=row.ttl)
            lifetime = "" if row.ttl is None else str(row.ttl)
            results.add(row.name, line, str(row.version), str(row.size), lifetime)
        results.show()

    async def work() -> None:
        async with open_cache(config) as cache, open_primaries(cache) as primaries:
            found = list_records(cache, primaries, prefix, report)
            if sort is None and top is None:
                async for some in found:
                    show(some)
            else:
                show(await sorted_records(found, sort or Order.BYTES, top))

    with interruptible("there are more records"):
        run(work())
    if not (found_any or damaged or chosen.as_json):
        complain(f"no records begin with {shorten(prefix)}" if prefix else "no records")
    if damaged:
        raise typer.Exit(1)
