"""The loop that ``get``, ``head`` and ``delete`` share: names from arguments or standard input."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from ..admin.cache import open_cache
from ..cache import AsyncCache
from ..config import Config
from .settings import read_input, run

BATCH = 500
"""Records in one request, which bounds the memory that an endless stream takes."""

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
    lines = None if names else read_input("NAME")

    async def work() -> int:
        lacking = 0
        async with open_cache(config) as cache:
            for first in range(0, len(names or ()), BATCH):
                lacking += await handle(cache, (names or [])[first : first + BATCH])
            if lines is not None:
                async for some in lines.names(BATCH):
                    lacking += await handle(cache, some)
        return lacking

    if run(work()):
        raise typer.Exit(1)
