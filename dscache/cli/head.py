"""``dscache head``: versions by name."""

from __future__ import annotations

from .by_name import NamesArgument, run_by_name
from .options import Chosen, with_all_options
from .tables import Results, line_of


@with_all_options
def head(names: NamesArgument = None, *, chosen: Chosen) -> None:
    """Print the versions of records, without their data.

    In a pipe, prints one JSON object a line. The exit status is 1 if a record is missing or
    damaged.
    """
    results = Results(chosen.as_json, "version")

    def describe(name: str, version: int) -> tuple[bytes, str]:
        return line_of(name=name, version=version), str(version)

    run_by_name(
        names,
        chosen.load(),
        lambda cache, some: results.report(some, cache.head_bulk(some), describe),
    )
