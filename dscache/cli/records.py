"""``dscache get``, ``set``, ``head`` and ``delete``: records by their names, or as a stream."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import msgspec
import typer
from rich.text import Text

from .. import cache as caches
from ..admin import ndjson
from ..admin.cache import open_cache
from ..errors import DscacheError, RecordError
from .options import FLAG, Chosen, with_all_options
from .settings import complain, number, plain, require_input, run
from .tables import Answers, Rows, line_of, write_all

# What is asked for at a time, and so what is in memory of an endless stream.
_AT_ONCE = 500
_STDIN = "standard input"

NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        help="Names of records; without any, they are read from standard input, one a line.",
        show_default=False,
    ),
]


# -- the commands


@with_all_options
def get(
    names: NamesArgument = None,
    *,
    chosen: Chosen,
) -> None:
    """Print records: name, version and data.

    In a pipe, one JSON object a line, with the data as it is stored; set takes such lines. The
    exit status is 1 if a record is missing or damaged.
    """
    as_json = chosen.as_json
    rows = Rows("version", "data", fold=names is not None and len(names) == 1)

    async def look(cache: caches.AsyncCache, some: list[str]) -> int:
        with Answers(some, as_json) as bulk:
            bulk.found = await cache.get_bulk(some)
        for name, record in bulk.found.items():
            try:
                line = ndjson.encode(name, record.version, record.raw)
            except RecordError as error:
                bulk.damaged(error)
                continue
            if as_json:
                bulk.out(line)
            else:
                shown = record.raw.decode(errors="replace")
                rows.add(name, Text(str(record.version)), plain(" ".join(shown.split("\n"))))
        if not as_json:
            for name in bulk.missing():
                rows.add_missing(name)
        rows.show()
        return bulk.end()

    _run_by_name(names, chosen.load(), look)


@with_all_options
def head(
    names: NamesArgument = None,
    *,
    chosen: Chosen,
) -> None:
    """Print the versions of records, without their data.

    In a pipe, one JSON object a line. The exit status is 1 if a record is missing or damaged.
    """
    as_json = chosen.as_json
    rows = Rows("version")

    async def look(cache: caches.AsyncCache, some: list[str]) -> int:
        with Answers(some, as_json) as bulk:
            bulk.found = await cache.head_bulk(some)
        for name, version in bulk.found.items():
            if as_json:
                bulk.out(line_of(name=name, version=version))
            else:
                rows.add(name, Text(str(version)))
        if not as_json:
            for name in bulk.missing():
                rows.add_missing(name)
        rows.show()
        return bulk.end()

    _run_by_name(names, chosen.load(), look)


@with_all_options
def delete(
    names: NamesArgument = None,
    *,
    chosen: Chosen,
) -> None:
    """Remove records, and tell of each whether there was one.

    In a pipe, one JSON object a line. The exit status is 1 if a record is missing.
    """
    as_json = chosen.as_json
    rows = Rows("")

    async def look(cache: caches.AsyncCache, some: list[str]) -> int:
        unique = list(dict.fromkeys(some))
        # One tick, and so one flush; a bulk would tell no more than how many there were.
        outcomes = await asyncio.gather(*map(cache.delete, unique), return_exceptions=True)
        with Answers(some, False) as bulk:
            for name, outcome in zip(unique, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome:
                    bulk.found[name] = True
                if as_json:
                    bulk.out(line_of(name=name, deleted=outcome))
                elif outcome:
                    rows.add(name, Text("deleted", "green"))
                else:
                    rows.add_missing(name)
        rows.show()
        return bulk.end()

    _run_by_name(names, chosen.load(), look)


@with_all_options
def set_(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of the record.")] = None,
    version: Annotated[
        int | None, typer.Argument(metavar="VERSION", help="From 0 to 2^63-1.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="JSON text; a text alone needs its quotes: '\"a\"'."),
    ] = None,
    ttl: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS", help="Lifetime of what is written, 0 for none.", show_default=False
        ),
    ] = None,
    if_newer: Annotated[
        bool,
        typer.Option(
            "--if-newer", metavar=FLAG, help="Write only what is newer than what is stored."
        ),
    ] = False,
    *,
    chosen: Chosen,
) -> None:
    """Write a record, or those that come as lines of JSON on standard input.

    A line is {"name": ..., "version": ..., "data": ...}, as get and export print it, with "ttl"
    in seconds or without; --ttl goes before that. The exit status is 1 if a record was not
    written because it isn't newer.
    """
    source: ndjson.Lines | None = None
    one: ndjson.Line | None = None
    if name is None:
        require_input("NAME VERSION DATA")
        source = ndjson.Lines(ndjson.pieces_of(sys.stdin.fileno()), _STDIN)
    elif version is None or data is None:
        raise typer.BadParameter(
            "a name is followed by its version and its data", param_hint="NAME VERSION DATA"
        )
    else:
        one = _from_words(name, version, data)
    settings = chosen.load()
    as_json = chosen.as_json
    rows = Rows("version", "")
    refused = 0

    async def put(cache: caches.AsyncCache, lines: list[ndjson.Line]) -> None:
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
        written: list[bytes] = []
        for line, outcome in zip(lines, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                write_all(written)
                raise outcome
            refused += not outcome
            if as_json:
                written.append(line_of(name=line.name, version=line.version, written=outcome))
            else:
                told = Text("written", "green") if outcome else Text("not newer", "yellow")
                rows.add(line.name, Text(str(line.version)), told)
        write_all(written)
        rows.show()

    async def work() -> None:
        async with open_cache(settings) as cache:
            if one is not None:
                await put(cache, [one])
            if source is not None:
                async for lines in _records(source):
                    await put(cache, lines)

    run(work())
    if refused:
        if as_json:
            complain(f"{number(refused, 'record')} not written, as Redis holds no older one")
        raise typer.Exit(1)


# -- what goes in


async def _records(source: ndjson.Lines) -> AsyncIterator[list[ndjson.Line]]:
    """Give the records of lines; those before a broken one are given before it raises."""
    async for texts in source:
        some: list[ndjson.Line] = []
        for text in texts:
            source.number += 1
            if not text.removeprefix(ndjson.BOM).strip():
                continue
            try:
                some.append(ndjson.decode(text))
            except RecordError as error:
                if some:
                    yield some
                raise DscacheError(f"{source.place(source.number)}: {error}") from error
            if len(some) == _AT_ONCE:
                yield some
                some = []
        if some:
            yield some


def _from_words(name: str, version: int, data: str) -> ndjson.Line:
    try:
        text = data.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is no UTF-8", param_hint="DATA") from None
    try:
        ndjson.encode(name, version, text)
    except RecordError as error:
        why = str(error.__cause__ or error)
        raise typer.BadParameter(
            f"it is no JSON: {why} (a text needs quotes: '\"{data[:20]}\"')"
            if data.isalnum()
            else f"it is no JSON: {why}",
            param_hint="DATA",
        ) from None
    except UnicodeEncodeError:
        raise typer.BadParameter("it is no UTF-8", param_hint="NAME") from None
    return ndjson.Line(name, version, msgspec.Raw(text))


def _run_by_name(
    names: list[str] | None,
    settings: Any,
    look: Callable[[caches.AsyncCache, list[str]], Any],
) -> None:
    """Do something about some names at a time; the exit status tells whether all had a record."""
    if not names:
        require_input("NAME")

    async def work() -> int:
        lacking = 0
        async with open_cache(settings) as cache:
            if names:
                for first in range(0, len(names), _AT_ONCE):
                    lacking += await look(cache, names[first : first + _AT_ONCE])
            else:
                lines = ndjson.Lines(ndjson.pieces_of(sys.stdin.fileno()), _STDIN)
                async for some in lines.names(_AT_ONCE):
                    lacking += await look(cache, some)
        return lacking

    if run(work()):
        raise typer.Exit(1)
