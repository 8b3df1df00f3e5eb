"""The loop that ``get``, ``head`` and ``delete`` share: names from arguments or standard input."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from .. import _backend
from ..admin import ndjson
from ..admin.cache import AdminCache, open_cache
from ..config import Config
from .output import complain
from .settings import read_input, run

T = TypeVar("T")

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
    handle: Callable[[AdminCache, list[str]], Awaitable[int]],
) -> None:
    """Call ``handle`` with the cache and some names at a time, until all have been handled.

    ``handle`` returns the number of names without a whole record. Raises typer.Exit with status 1
    if there were any, and RecordError before anything is done for a name that no record may have.
    """
    for name in names or ():
        # Otherwise the names before a wrong one would be handled, or not.
        _backend.core.check_name(name)
    batches = batches_of(names) if names else read_input("NAME").items(ndjson.name_of, BATCH)

    async def work() -> int:
        async with open_cache(config) as cache:
            missing = [await handle(cache, some) async for some in batches]
        if not missing:
            complain("no name was given")
        return sum(missing)

    if run(work()):
        raise typer.Exit(1)


async def batches_of(items: list[T]) -> AsyncIterator[list[T]]:
    """Yield items from the command line as ``Lines.items`` yields lines of standard input."""
    for first in range(0, len(items), BATCH):
        yield items[first : first + BATCH]
