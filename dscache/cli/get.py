"""``dscache get``: records by name, once or at each change."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..admin import ndjson
from ..admin.cache import AdminCache, open_cache
from ..admin.listing import lifetimes_of
from ..admin.scan import get_whole
from ..core.keys import common_prefix
from ..errors import DscacheError, RecordError, UsageError
from ..net.watch import DAMAGED, FLUSHED, GAP, RESUMED, is_final
from . import signals
from .by_name import NamesArgument, run_by_name
from .options import Chosen, flag, with_all_options
from .output import complain
from .settings import run
from .tables import Blocks, Results, line_of, with_lifetime

if TYPE_CHECKING:
    from ..core.pure import Record

# Seconds before records that couldn't be read after a gap are read again.
_PAUSE = 0.5


@with_all_options
def get(
    names: NamesArgument = None,
    watch: Annotated[
        bool, flag("--watch", "Print the records again at each change, until Ctrl-C.")
    ] = False,
    *,
    chosen: Chosen,
) -> None:
    """Print records: name, version and data.

    On a terminal, the data is indented, beside its size and remaining lifetime. In a pipe, prints
    one JSON object a line with the data as stored; set reads such lines. The exit status is 1 if a
    record is missing or damaged.
    """
    if watch and not names:
        raise typer.BadParameter("--watch needs the names as arguments", param_hint="NAME")
    shown = _Shown(chosen.as_json)
    config = chosen.load()
    if not watch:
        run_by_name(names, config, shown.report)
        return

    async def work() -> None:
        async with open_cache(config) as cache:
            await _watch(cache, names or [], shown)

    try:
        run(work())
    except KeyboardInterrupt:
        # Ctrl-C is the usual way to end it, so nothing is printed.
        raise typer.Exit(signals.exit_status()) from None


class _Shown:
    """The records that were printed, and the output for more of them."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._results = Results(True) if as_json else Blocks()
        self._last: dict[str, tuple[int, bytes] | None] = {}
        self.times = False
        """Whether a block tells the time."""

    async def report(self, cache: AdminCache, names: Sequence[str]) -> int:
        """Print records; return the number of names without a whole record."""
        reply = cache.get_bulk(names)
        lifetimes = await self._lifetimes(cache, names)

        def describe(name: str, record: Record) -> tuple[bytes, Text]:
            self._last[name] = _content(record)
            return self._described(name, record, lifetimes)

        self._last.update(dict.fromkeys(names))
        return await self._results.report(names, reply, describe)

    async def report_changed(self, cache: AdminCache, found: Mapping[str, Record | None]) -> None:
        """Print the records that aren't as they were printed last."""
        changed = {
            name: record
            for name, record in found.items()
            if self._last.get(name) != _content(record)
        }
        lifetimes = await self._lifetimes(cache, list(changed))
        for name, record in changed.items():
            self._last[name] = _content(record)
            try:
                if record is None:
                    line = line_of(name=name, version=None, data=None)
                    self._results.add(name, line, Text("no record", "yellow"))
                else:
                    self._results.add(name, *self._described(name, record, lifetimes))
            except RecordError as error:
                complain(str(error))
        self._results.show()

    async def _lifetimes(self, cache: AdminCache, names: Sequence[str]) -> Mapping[str, int | None]:
        if self._as_json or not names:
            return {}
        try:
            return await lifetimes_of(cache, names)
        except DscacheError:
            return {}  # a server or a user without PTTL; the records are there all the same

    def _described(
        self, name: str, record: Record, lifetimes: Mapping[str, int | None]
    ) -> tuple[bytes, Text]:
        line = ndjson.encode(name, record.version, record.raw)
        if self._as_json:
            return line, Text()
        text = ndjson.on_one_line(name, record.version, record.raw)
        head = f"version {record.version}, {len(record.raw):,} bytes"
        time = f"{datetime.now():%H:%M:%S}, " if self.times else ""
        return line, Blocks.block(time + with_lifetime(head, name, lifetimes), text)


async def _watch(cache: AdminCache, names: Sequence[str], shown: _Shown) -> None:
    """Print records, and each of them again when it has changed. Ends with its task."""
    prefix = common_prefix(names)
    async with cache.watch(prefix, records=True) as changes:
        shown.times = True
        await shown.report(cache, names)
        async for change in changes:
            if change.kind == GAP:
                where = f"{change.node}: " if change.node else ""
                complain(f"changes may be missed from here on: {where}{change.reason}")
            elif change.kind in (FLUSHED, RESUMED):
                found, damaged = await _read_again(cache, names)
                for error in damaged.values():
                    complain(str(error))
                whole = (name for name in names if name not in damaged)
                await shown.report_changed(cache, {name: found.get(name) for name in whole})
            elif change.name not in names:
                continue
            elif change.kind == DAMAGED:
                complain(change.reason)
            else:
                await shown.report_changed(cache, {change.name: change.record})


async def _read_again(
    cache: AdminCache, names: Sequence[str]
) -> tuple[Mapping[str, Record], Mapping[str, Exception]]:
    """Return whole records, and the errors of damaged ones, once the server answers.

    Raises an error that would come again.
    """
    while True:
        try:
            return await get_whole(cache, names)
        except DscacheError as error:
            if is_final(error) or isinstance(error, UsageError):
                raise
            await asyncio.sleep(_PAUSE)


def _content(record: Record | None) -> tuple[int, bytes] | None:
    return None if record is None else (record.version, record.raw)
