"""``dscache set``: one record from arguments, or a stream of them from standard input."""

from __future__ import annotations

import asyncio
import shlex
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from ..admin import ndjson
from ..admin.cache import open_cache
from ..cache import AsyncCache
from ..core.constants import MAX_TTL, MAX_VERSION
from ..errors import RecordError
from .by_name import BATCH, batches_of
from .options import Chosen, IfNewerOption, number_option, number_parser, with_all_options
from .output import NOT_NEWER, complain, number
from .settings import read_input, run
from .tables import Results, line_of

_REST = "; the lines after it weren't tried"


@with_all_options
def set_(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of the record.")] = None,
    version: Annotated[
        int | None,
        typer.Argument(
            metavar="VERSION", help="From 0 to 2^63-1.", parser=number_parser(int, 0, MAX_VERSION)
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="JSON text; a string needs its quotes: '\"a\"'."),
    ] = None,
    ttl: Annotated[
        int | None,
        number_option(
            int,
            "Lifetime of the records, 0 for none.",
            metavar="SECONDS",
            least=0,
            most=MAX_TTL,
            show_default=False,
        ),
    ] = None,
    if_newer: IfNewerOption = False,
    *,
    chosen: Chosen,
) -> None:
    """Write a record, or records in lines of JSON on standard input.

    A line is {"name": ..., "version": ..., "data": ...}, as get and export print it, and may have
    "ttl" in seconds, which --ttl overrides. The exit status is 1 if a record was not written
    because Redis holds the same or a newer version.
    """
    if name is None:
        batches = read_input("NAME VERSION DATA").items(ndjson.decode, BATCH, rest=_REST)
    elif version is None or data is None:
        raise typer.BadParameter("a name needs a version and data", param_hint="NAME VERSION DATA")
    else:
        batches = batches_of([_from_words(name, version, data)])
    config = chosen.load()
    results = Results(chosen.as_json, "version", "")
    refused = 0

    async def put(cache: AsyncCache, lines: list[ndjson.Line]) -> None:
        nonlocal refused
        waiting = [
            cache.set(
                line.name,
                line.version,
                line.data,
                ttl=line.ttl if ttl is None else ttl,
                if_newer=if_newer,
            )
            for line in lines
        ]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        for line, outcome in zip(lines, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                continue
            refused += not outcome
            written = line_of(name=line.name, version=line.version, written=outcome)
            shown = Text("written", "green") if outcome else Text(NOT_NEWER, "yellow")
            results.add(line.name, written, str(line.version), shown)
        results.show()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def work() -> None:
        given = False
        async with open_cache(config) as cache:
            async for lines in batches:
                given = True
                await put(cache, lines)
        if not given:
            complain("no record was given")

    run(work())
    if refused:
        if chosen.as_json:
            complain(f"{number(refused, 'record')} {NOT_NEWER}")
        raise typer.Exit(1)


def _from_words(name: str, version: int, data: str) -> ndjson.Line:
    try:
        text = data.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8", param_hint="DATA") from None
    try:
        ndjson.encode(name, version, text)
    except RecordError as error:
        hint = ""
        if data and data[0] not in "[{\"'":
            quoted = shlex.quote(msgspec.json.encode(data[:20]).decode())
            hint = f" (a string needs quotes: {quoted})"
        raise typer.BadParameter(
            f"it is not JSON: {error.__cause__ or error}{hint}", param_hint="DATA"
        ) from None
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8", param_hint="NAME") from None
    return ndjson.Line(name, version, msgspec.Raw(text))
