"""``dscache get``, ``set``, ``head`` and ``delete``: records by their names, or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import _ndjson
from . import cache as caches
from ._cli_source import (
    ConfigOption,
    JsonOption,
    LayoutOption,
    UrlOption,
    complain,
    load,
    number,
    opened,
    plain,
    require_input,
    run,
    wants_json,
    write,
)
from .errors import BulkError, DscacheError, RecordError, shorten

# What is asked for at a time, and so what is in memory of an endless stream.
_AT_ONCE = 500
# How many of the names that have no record are told.
_TOLD = 5
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


def get(
    names: NamesArgument = None,
    config: ConfigOption = None,
    url: UrlOption = None,
    layout: LayoutOption = None,
    json: JsonOption = False,
) -> None:
    """Print records: name, version and data.

    In a pipe, one JSON object a line, with the data as it is stored; set takes such lines. The
    exit status is 1 if a record is missing or damaged.
    """
    as_json = wants_json(json)
    rows = _Rows("version", "data", fold=names is not None and len(names) == 1)

    async def look(cache: caches.AsyncCache, some: list[str]) -> int:
        with _Bulk(some, as_json) as bulk:
            bulk.found = await cache.get_bulk(some)
        for name, record in bulk.found.items():
            try:
                line = _ndjson.encode(name, record.version, record.raw)
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

    _run_by_name(names, load(config, url, layout), look)


def head(
    names: NamesArgument = None,
    config: ConfigOption = None,
    url: UrlOption = None,
    layout: LayoutOption = None,
    json: JsonOption = False,
) -> None:
    """Print the versions of records, without their data.

    In a pipe, one JSON object a line. The exit status is 1 if a record is missing or damaged.
    """
    as_json = wants_json(json)
    rows = _Rows("version")

    async def look(cache: caches.AsyncCache, some: list[str]) -> int:
        with _Bulk(some, as_json) as bulk:
            bulk.found = await cache.head_bulk(some)
        for name, version in bulk.found.items():
            if as_json:
                bulk.out(_line(name=name, version=version))
            else:
                rows.add(name, Text(str(version)))
        if not as_json:
            for name in bulk.missing():
                rows.add_missing(name)
        rows.show()
        return bulk.end()

    _run_by_name(names, load(config, url, layout), look)


def delete(
    names: NamesArgument = None,
    config: ConfigOption = None,
    url: UrlOption = None,
    layout: LayoutOption = None,
    json: JsonOption = False,
) -> None:
    """Remove records, and tell of each whether there was one.

    In a pipe, one JSON object a line. The exit status is 1 if a record is missing.
    """
    as_json = wants_json(json)
    rows = _Rows("")

    async def look(cache: caches.AsyncCache, some: list[str]) -> int:
        unique = list(dict.fromkeys(some))
        # One tick, and so one flush; a bulk would tell no more than how many there were.
        outcomes = await asyncio.gather(*map(cache.delete, unique), return_exceptions=True)
        with _Bulk(some, False) as bulk:
            for name, outcome in zip(unique, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome:
                    bulk.found[name] = True
                if as_json:
                    bulk.out(_line(name=name, deleted=outcome))
                elif outcome:
                    rows.add(name, Text("deleted", "green"))
                else:
                    rows.add_missing(name)
        rows.show()
        return bulk.end()

    _run_by_name(names, load(config, url, layout), look)


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
        bool, typer.Option("--if-newer", help="Write only what is newer than what is stored.")
    ] = False,
    config: ConfigOption = None,
    url: UrlOption = None,
    layout: LayoutOption = None,
    json: JsonOption = False,
) -> None:
    """Write a record, or those that come as lines of JSON on standard input.

    A line is {"name": ..., "version": ..., "data": ...}, as get and export print it, with "ttl"
    in seconds or without; --ttl goes before that. The exit status is 1 if a record was not
    written because it isn't newer.
    """
    source: _ndjson.Lines | None = None
    one: _ndjson.Line | None = None
    if name is None:
        require_input("NAME VERSION DATA")
        source = _ndjson.Lines(_ndjson.pieces_of(sys.stdin.fileno()), _STDIN)
    elif version is None or data is None:
        raise typer.BadParameter(
            "a name is followed by its version and its data", param_hint="NAME VERSION DATA"
        )
    else:
        one = _from_words(name, version, data)
    settings = load(config, url, layout)
    as_json = wants_json(json)
    rows = _Rows("version", "")
    refused = 0

    async def put(cache: caches.AsyncCache, lines: list[_ndjson.Line]) -> None:
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
                _write_all(written)
                raise outcome
            refused += not outcome
            if as_json:
                written.append(_line(name=line.name, version=line.version, written=outcome))
            else:
                told = Text("written", "green") if outcome else Text("not newer", "yellow")
                rows.add(line.name, Text(str(line.version)), told)
        _write_all(written)
        rows.show()

    async def work() -> None:
        async with opened(settings) as cache:
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


async def _records(source: _ndjson.Lines) -> AsyncIterator[list[_ndjson.Line]]:
    """Give the records of lines; those before a broken one are given before it raises."""
    async for texts in source:
        some: list[_ndjson.Line] = []
        for text in texts:
            source.number += 1
            if not text.strip():
                continue
            try:
                some.append(_ndjson.decode(text))
            except RecordError as error:
                if some:
                    yield some
                raise DscacheError(f"{source.place(source.number)}: {error}") from error
            if len(some) == _AT_ONCE:
                yield some
                some = []
        if some:
            yield some


def _from_words(name: str, version: int, data: str) -> _ndjson.Line:
    try:
        text = data.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is no UTF-8", param_hint="DATA") from None
    try:
        _ndjson.encode(name, version, text)
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
    return _ndjson.Line(name, version, msgspec.Raw(text))


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
        async with opened(settings) as cache:
            if names:
                for first in range(0, len(names), _AT_ONCE):
                    lacking += await look(cache, names[first : first + _AT_ONCE])
            else:
                lines = _ndjson.Lines(_ndjson.pieces_of(sys.stdin.fileno()), _STDIN)
                async for some in lines.names(_AT_ONCE):
                    lacking += await look(cache, some)
        return lacking

    if run(work()):
        raise typer.Exit(1)


# -- what comes out


class _Bulk(contextlib.AbstractContextManager["_Bulk"]):
    """What came of some names: those found, those missing, and those that are damaged."""

    def __init__(self, names: Iterable[str], complains: bool) -> None:
        self._complains = complains
        self.found: dict[str, Any] = {}
        self._names = list(dict.fromkeys(names))
        self._errors: dict[str, Exception] = {}
        self._lines: list[bytes] = []

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        if not isinstance(error, BulkError):
            return False
        for name, reason in error.errors.items():
            if not isinstance(reason, RecordError):
                raise reason
            self._errors[name] = reason
        self.found = error.result
        return True

    def out(self, line: bytes) -> None:
        self._lines.append(line)

    def damaged(self, error: RecordError) -> None:
        self._errors[str(error.name)] = error

    def missing(self) -> list[str]:
        return [one for one in self._names if one not in self.found and one not in self._errors]

    def end(self) -> int:
        """Write what is to be written; return how many names had no record that is whole."""
        _write_all(self._lines)
        for error in self._errors.values():
            complain(str(error))
        missing = self.missing()
        if missing and self._complains:
            some = ", ".join(shorten(name) for name in missing[:_TOLD])
            more = f" and {len(missing) - _TOLD} more" if len(missing) > _TOLD else ""
            complain(f"no record {some}{more}")
        return len(missing) + len(self._errors)


def _write_all(lines: list[bytes]) -> None:
    if lines:
        write(b"".join(lines))


def _line(**fields: object) -> bytes:
    return msgspec.json.encode(fields) + b"\n"


class _Rows:
    """The table of a terminal: each time that something is shown, what was added since."""

    def __init__(self, *columns: str, fold: bool = False) -> None:
        self._columns = columns
        self._fold = fold
        self._rows: list[tuple[Text, ...]] = []
        self._headed = False

    def add(self, name: str, *cells: Text) -> None:
        self._rows.append((plain(name), *cells))

    def add_missing(self, name: str) -> None:
        rest = len(self._columns) - 1
        self._rows.append((plain(name), Text("no record", "yellow"), *([Text()] * rest)))

    def show(self) -> None:
        if not self._rows:
            return
        console = Console(highlight=False)
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
            show_header=not self._headed,
        )
        heads = ["name", *self._columns]
        widths = [
            max(len(head), *(row[i].cell_len for row in self._rows)) for i, head in enumerate(heads)
        ]
        # What is cut is the data, and a name only where it would leave no room for that.
        widths[0] = min(widths[0], max(console.width // 2, 12))
        if "data" in heads:
            widths[-1] = min(widths[-1], max(console.width - sum(widths[:-1]) - 2 * len(heads), 10))
        for head, width in zip(heads, widths, strict=True):
            folds = head == "name" or (head == "data" and self._fold)
            table.add_column(
                head,
                justify="right" if head == "version" else "left",
                width=width,
                no_wrap=not folds,
                overflow="fold" if folds else "ellipsis",
            )
        for row in self._rows:
            table.add_row(*row)
        console.print(table)
        self._rows.clear()
        self._headed = True
