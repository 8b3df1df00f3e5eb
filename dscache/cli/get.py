"""``dscache get``: records by name."""

from __future__ import annotations

from rich.text import Text

from ..admin import ndjson
from ..cache import AsyncCache
from ..errors import RecordError
from .by_name import NamesArgument, run_by_name
from .options import Chosen, with_all_options
from .output import plain
from .tables import Answers, Rows


@with_all_options
def get(
    names: NamesArgument = None,
    *,
    chosen: Chosen,
) -> None:
    """Print records: name, version and data.

    In a pipe, prints one JSON object a line with the data as stored; set reads such lines. The
    exit status is 1 if a record is missing or damaged.
    """
    as_json = chosen.as_json
    rows = Rows("version", "data", fold=names is not None and len(names) == 1)

    async def handle(cache: AsyncCache, some: list[str]) -> int:
        with Answers(some, as_json) as answers:
            answers.found = await cache.get_bulk(some)
        for name, record in answers.found.items():
            try:
                line = ndjson.encode(name, record.version, record.raw)
            except RecordError as error:
                answers.add_damaged(error)
                continue
            if as_json:
                answers.add_line(line)
            else:
                shown = record.raw.decode(errors="replace")
                rows.add(name, Text(str(record.version)), plain(" ".join(shown.split("\n"))))
        return rows.finish(answers, as_json)

    run_by_name(names, chosen.load(), handle)
