"""The loop that ``get``, ``head`` and ``delete`` share: names from arguments or standard input."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from ..admin import ndjson
from ..admin.cache import open_cache
from ..cache import AsyncCache
from ..config import Config
from .settings import require_input, run

BATCH = 500
"""Records in one request, which bounds the memory that an endless stream takes."""
STDIN = "standard input"

NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        help="Names of records; without any, one a line from standard input.",
        show_default=False,
    ),
]


def run_by_name(
    names: list[str] | None,
    config: Config,
    handle: Callable[[AsyncCache, list[str]], Awaitable[int]],
) -> None:
    """Call ``handle`` with the cache and some names at a time, until all have been handled.

    ``handle`` returns the number of names without a whole record. Raises typer.Exit with status 1
    if there were any.
    """
    if not names:
        require_input("NAME")

    async def work() -> int:
        lacking = 0
        async with open_cache(config) as cache:
            if names:
                for first in range(0, len(names), BATCH):
                    lacking += await handle(cache, names[first : first + BATCH])
            else:
                lines = ndjson.Lines(ndjson.pieces_of(sys.stdin.fileno()), STDIN)
                async for some in lines.names(BATCH):
                    lacking += await handle(cache, some)
        return lacking

    if run(work()):
        raise typer.Exit(1)
