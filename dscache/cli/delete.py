"""``dscache delete``: removal by name."""

from __future__ import annotations

import asyncio

from rich.text import Text

from ..cache import AsyncCache
from .by_name import NamesArgument, run_by_name
from .options import Chosen, with_all_options
from .tables import NO_RECORD, Results, line_of


@with_all_options
def delete(names: NamesArgument = None, *, chosen: Chosen) -> None:
    """Remove records, and print for each whether it existed.

    In a pipe, prints one JSON object a line. The exit status is 1 if a record is missing.
    """
    results = Results(chosen.as_json, "")

    async def handle(cache: AsyncCache, some: list[str]) -> int:
        unique = list(dict.fromkeys(some))
        # Calls of one tick share a flush; delete_bulk would return no more than their number.
        outcomes = await asyncio.gather(*map(cache.delete, unique), return_exceptions=True)
        for name, deleted in zip(unique, outcomes, strict=True):
            if not isinstance(deleted, BaseException):
                shown = Text("deleted", "green") if deleted else NO_RECORD
                results.add(name, line_of(name=name, deleted=deleted), shown)
        results.show()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes.count(False)

    run_by_name(names, chosen.load(), handle)
