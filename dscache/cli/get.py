"""``dscache get``: records by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..admin import ndjson
from .by_name import NamesArgument, run_by_name
from .options import Chosen, with_all_options
from .tables import Results

if TYPE_CHECKING:
    from ..core.pure import Record


@with_all_options
def get(names: NamesArgument = None, *, chosen: Chosen) -> None:
    """Print records: name, version and data.

    In a pipe, prints one JSON object a line with the data as stored; set reads such lines. The
    exit status is 1 if a record is missing or damaged.
    """
    results = Results(chosen.as_json, "version", "data", fold=names is not None and len(names) == 1)

    def describe(name: str, record: Record) -> tuple[bytes, str, str]:
        data = record.raw.decode(errors="replace").replace("\n", " ")
        return ndjson.encode(name, record.version, record.raw), str(record.version), data

    run_by_name(
        names,
        chosen.load(),
        lambda cache, some: results.report(some, cache.get_bulk(some), describe),
    )
