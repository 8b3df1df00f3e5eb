"""``dscache delete``: removal by name."""

from __future__ import annotations

import asyncio

from rich.text import Text

from ..cache import AsyncCache
from .by_name import NamesArgument, run_by_name
from .options import Chosen, with_all_options
from .tables import Answers, Rows, line_of


@with_all_options
def delete(
    names: NamesArgument = None,
    *,
    chosen: Chosen,
) -> None:
    """Remove records, and print for each whether it existed.

    In a pipe, prints one JSON object a line. The exit status is 1 if a record is missing.
    """
    as_json = chosen.as_json
    rows = Rows("")

    async def handle(cache: AsyncCache, some: list[str]) -> int:
        unique = list(dict.fromkeys(some))
        # Calls of one tick share a flush; delete_bulk would return no more than their number.
        outcomes = await asyncio.gather(*map(cache.delete, unique), return_exceptions=True)
        with Answers(some, complains=False) as answers:
            for name, outcome in zip(unique, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome:
                    answers.found[name] = True
                if as_json:
                    answers.add_line(line_of(name=name, deleted=outcome))
                elif outcome:
                    rows.add(name, Text("deleted", "green"))
                else:
                    rows.add_missing(name)
        rows.show()
        return answers.end()

    run_by_name(names, chosen.load(), handle)
