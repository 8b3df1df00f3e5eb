"""``dscache head``: versions by name."""

from __future__ import annotations

from rich.text import Text

from ..cache import AsyncCache
from .by_name import NamesArgument, run_by_name
from .options import Chosen, with_all_options
from .tables import Answers, Rows, line_of


@with_all_options
def head(
    names: NamesArgument = None,
    *,
    chosen: Chosen,
) -> None:
    """Print the versions of records, without their data.

    In a pipe, prints one JSON object a line. The exit status is 1 if a record is missing or
    damaged.
    """
    as_json = chosen.as_json
    rows = Rows("version")

    async def handle(cache: AsyncCache, some: list[str]) -> int:
        with Answers(some, as_json) as answers:
            answers.found = await cache.head_bulk(some)
        for name, version in answers.found.items():
            if as_json:
                answers.add_line(line_of(name=name, version=version))
            else:
                rows.add(name, Text(str(version)))
        return rows.finish(answers, as_json)

    run_by_name(names, chosen.load(), handle)
