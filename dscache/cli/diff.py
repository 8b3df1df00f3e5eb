"""``dscache diff``: the records that differ between two places."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..admin import ndjson
from ..admin.cache import open_cache
from ..admin.comparison import Difference, ExportedRecords, Records, StoredRecords, compare
from ..admin.progress import with_long_timeouts
from ..config import Config
from ..config.document import SUFFIXES
from ..config.sources import is_url
from .options import Chosen, PrefixOption, with_all_options
from .output import complain, interruptible, number
from .settings import load_source, run, with_layout
from .tables import Results, line_of

_EXPORTS = (".ndjson", ".ndjson.gz", ".jsonl", ".jsonl.gz")
_OTHER = "A URL, host:port, configuration file, or an export (.ndjson, .ndjson.gz)."
_SHOWN_AT_ONCE = 500


@with_all_options
def diff(
    other: Annotated[
        str,
        typer.Argument(
            metavar="OTHER",
            help=_OTHER,
        ),
    ],
    prefix: PrefixOption = "",
    *,
    chosen: Chosen,
) -> None:
    """Compare the records of two servers, or a server and an export.

    Prints the records that are missing or added in OTHER, or have another version, or other data
    under the same version. In a pipe, prints one JSON object a line. Reads all records of both,
    while other clients are served. The exit status is 1 if there are differences, or damaged
    records, which aren't compared.
    """
    file = _export(other)
    config = with_long_timeouts(chosen.load())
    results = Results(chosen.as_json, "here", "there", "")
    count = 0
    damaged: set[str] = set()

    def show(one: Difference) -> None:
        nonlocal count
        count += 1
        line = line_of(name=one.name, here=one.left, there=one.right, difference=one.kind)
        cells = ("" if version is None else str(version) for version in (one.left, one.right))
        results.add(one.name, line, *cells, one.kind)
        if count % _SHOWN_AT_ONCE == 0:
            results.show()

    async def work() -> None:
        async with (
            open_cache(config) as cache,
            _opened(file or other, prefix, chosen, config) as there,
        ):
            here = StoredRecords(cache, prefix)
            async for one in compare(here, there):
                show(one)
            damaged.update(here.damaged, there.damaged)
            for place in (here, there):
                for error in place.damaged.values():
                    complain(str(error))

    with interruptible("not all records were compared"):
        try:
            run(work())
        finally:
            results.show()
    told = f"{number(count, 'record')} differ{'s' if count == 1 else ''}" if count else "equal"
    if damaged:
        verb = "wasn't" if len(damaged) == 1 else "weren't"
        told += f"; {number(len(damaged), 'damaged record')} {verb} compared"
    complain(told)
    if count or damaged:
        raise typer.Exit(1)


def _export(other: str) -> Path | None:
    """Return the file of an export, or None for another place. Raises typer.BadParameter."""
    file = Path(other)
    if other.endswith(_EXPORTS) and not file.is_dir():
        return file
    if other.lower().endswith(SUFFIXES) and _has_records(file):
        return file
    if other.lower().endswith(SUFFIXES) or is_url(other):
        return None
    if file.is_file():
        return file
    fault = "is a folder" if file.is_dir() else "isn't a file that exists"
    shown = other.rpartition("@")[2]  # a mistyped URL may hold a password
    raise typer.BadParameter(
        f"{shown} {fault}; give {_OTHER[0].lower()}{_OTHER[1:-1]}", param_hint="OTHER"
    )


def _has_records(file: Path) -> bool:
    """Return whether a file with the name of a configuration is an export. Raises OSError."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return ndjson.begins_with_record(opened.read(ndjson.PIECE))


@asynccontextmanager
async def _opened(
    other: str | Path, prefix: str, chosen: Chosen, config: Config
) -> AsyncIterator[Records]:
    if isinstance(other, Path):
        yield ExportedRecords(other, prefix)
        return
    loaded = with_long_timeouts(load_source(other, "OTHER"))
    if chosen.layout is not None:
        loaded = with_layout(loaded, chosen.layout)
    async with open_cache(loaded) as cache:
        yield StoredRecords(cache, prefix)
