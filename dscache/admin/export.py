"""All records of a prefix into lines of text: in bounded memory, and to be gone on with.

An export goes through the keys of each primary by SCAN. Where it stands is kept in a file beside
the one it writes: how far that is whole, and the cursor of each server.
"""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ..cache import AsyncCache
from ..errors import BulkError, DscacheError, RecordError, ReplyError
from . import ndjson, progress
from .control import RawCommand
from .key_layout import Layout
from .primaries import SCAN_COUNT, Primaries, Primary
from .progress import RECORDS, JobProgress, errors_of, read_state, write_state

# The lifetime of what has ended.
_GONE = -2


# -- where an export goes


class Sink:
    """A file that lines are written to; gzip in pieces that can be gone on after."""

    def __init__(self, file: BinaryIO, *, compressed: bool, durable: bool) -> None:
        self._file = file
        self._durable = durable
        self._compressed = compressed
        self._gzip: Any = None
        self.is_whole = True
        """Whether all that was written was taken: after an error, some of it may not have been."""

    def write(self, lines: bytes) -> None:
        self.is_whole = False
        if not self._compressed:
            self._file.write(lines)
        else:
            if self._gzip is None:
                self._gzip = zlib.compressobj(wbits=31)
            self._file.write(self._gzip.compress(lines))
        self.is_whole = True

    def settle(self) -> int:
        """Have on disk what was written; return how long the file is then, if it is durable."""
        self.is_whole = False
        if self._gzip is not None:
            # The next piece is a member of its own, which readers of gzip join to this one.
            self._file.write(self._gzip.flush())
            self._gzip = None
        self._file.flush()
        size = 0
        if self._durable:
            os.fsync(self._file.fileno())
            size = self._file.tell()
        self.is_whole = True
        return size


class _ScanState(msgspec.Struct, forbid_unknown_fields=True):
    """How far the keys of one server have been gone through."""

    run_id: str
    cursor: str = "0"
    done: bool = False


class ExportState(msgspec.Struct, forbid_unknown_fields=True):
    """Where an export stands; it holds for the same records alone."""

    of: dict[str, str]
    slots: list[tuple[int, int, str]] = []
    size: int = 0
    visited: int = 0
    records: int = 0
    halves: int = 0
    damaged: int = 0
    servers: dict[str, _ScanState] = {}


class Target:
    """The file that an export writes, whole once it has its name, and what it keeps beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._state = path.with_name(path.name + ".resume")

    @property
    def is_compressed(self) -> bool:
        return self.path.suffix == ".gz"

    def discard(self) -> None:
        """Forget an export that was not finished."""
        self._state.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)

    def state(self) -> ExportState | None:
        """Return where an export stands that was not finished; None if there is none.

        Raises DscacheError if that can't be told any more.
        """
        found: ExportState | None = read_state(self._state, ExportState)
        if found is not None and not self._partial.exists():
            return None
        return found

    @contextmanager
    def open(self, state: ExportState | None) -> Iterator[Sink]:
        """Give the file, cut to what the state knows of. Raises DscacheError."""
        with errors_of(self._partial):
            # A file that another export is writing must not be emptied.
            file = self._partial.open("r+b" if state else "ab")
        with errors_of(self._partial), file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DscacheError(
                    f"{self.path}: another export writes it; wait for its end"
                ) from None
            if not state:
                file.truncate(0)
            else:
                if file.seek(0, io.SEEK_END) < state.size:
                    raise DscacheError(
                        f"{self._partial}: it is shorter than it was; begin anew with --restart"
                    )
                file.truncate(state.size)
                file.seek(state.size)
            yield Sink(file, compressed=self.is_compressed, durable=True)

    def save(self, state: ExportState) -> None:
        """Keep where the export stands."""
        write_state(self._state, state)

    def finish(self) -> None:
        """Give the file its name."""
        self._partial.replace(self.path)
        self._state.unlink(missing_ok=True)


# -- export


class Export:
    """One run of an export: the records of a prefix, from all servers at once."""

    def __init__(
        self, cache: AsyncCache, shards: Primaries, layout: Layout, prefix: str, tally: JobProgress
    ) -> None:
        self._cache = cache
        self._shards = shards
        self._layout = layout
        self._prefix = prefix
        self._pattern = layout.pattern(prefix)
        self._tally = tally
        self._at_once = RECORDS
        self._halves = 0

    async def run(
        self, sink: Sink, state: ExportState, keep: Callable[[ExportState], None] | None
    ) -> None:
        """Write all records to a sink, on from a state; ``keep`` is given it again and again.

        Raises what keeps a server from being read; what was written until then stays.
        """
        slots = await self._slots()
        if not state.servers:
            state.slots = slots
        self._take_up(state)
        noted = time.monotonic()

        def settle() -> None:
            if not sink.is_whole:
                return  # what was kept last still holds
            state.size = sink.settle()
            if keep is not None:
                keep(state)

        async def go_through(shard: Primary) -> None:
            nonlocal noted
            async for lines in self._lines(shard, state):
                sink.write(lines)
                if keep is not None and time.monotonic() > noted + progress.NOTE_EVERY:
                    settle()
                    noted = time.monotonic()

        try:
            await all_of(go_through(shard) for shard in self._shards.all)
            if state.slots != await self._slots():
                self._tally.warnings.append(
                    "slots have moved between nodes meanwhile, and with them records that may "
                    "have been missed: export again"
                )
        finally:
            settle()

    def _take_up(self, state: ExportState) -> None:
        """Go on where it was, on each server that is still the same process."""
        tally = self._tally
        servers = {}
        for shard in self._shards.all:
            scan = state.servers.get(shard.address)
            if scan is None or not scan.run_id or scan.run_id != shard.run_id:
                # A cursor means nothing to another process: its keys are in another order.
                scan = _ScanState(shard.run_id)
            servers[shard.address] = scan
        state.servers = servers
        tally.total = max(self._shards.size, state.visited)
        tally.done = state.visited
        tally.records = tally.resumed = state.records
        tally.halves, tally.damaged = state.halves, state.damaged
        self._halves = state.halves - self._cache.stats()["halves"]

    async def _lines(self, shard: Primary, state: ExportState) -> AsyncIterator[bytes]:
        """Give the records of one server as lines, and note after each how far it is."""
        tally = self._tally
        scan = state.servers[shard.address]
        if scan.done:
            return
        scanning = self._scan(shard, scan.cursor)
        try:
            while not scan.done:
                cursor, keys = await scanning
                scan.done = int(cursor) == 0
                if not scan.done:
                    # The server goes on while what it has found is read and written.
                    scanning = self._scan(shard, cursor)
                found: dict[str, bytes] = {}
                for key in keys:
                    name = self._layout.name_of(key)
                    if name is not None and name.startswith(self._prefix):
                        found[name] = key
                names = list(found)
                lines: list[bytes] = []
                while names:
                    some, names = names[: self._at_once], names[self._at_once :]
                    lines += await self._read(shard, {name: found[name] for name in some})
                scan.cursor = cursor.decode()
                tally.done = min(tally.done + SCAN_COUNT, tally.total)
                state.visited, state.records = tally.done, tally.records
                state.halves, state.damaged = tally.halves, tally.damaged
                yield b"".join(lines)
        finally:
            scanning.cancel()

    def _scan(self, shard: Primary, cursor: bytes | str) -> asyncio.Future[Any]:
        command = ("SCAN", cursor, "MATCH", self._pattern, "COUNT", SCAN_COUNT)
        return asyncio.ensure_future(shard.server.execute(*command))

    async def _read(self, shard: Primary, found: dict[str, bytes]) -> list[bytes]:
        """Return some records as lines."""
        tally = self._tally
        try:
            records = await self._cache.get_bulk(found)
        except BulkError as error:
            for reason in error.errors.values():
                if not isinstance(reason, RecordError):
                    raise
                tally.damaged += 1
                tally.note(str(reason))
            records = error.result
        # What is gone since its key was found is no half.
        tally.halves = self._halves + self._cache.stats()["halves"]
        lines = []
        size = 0
        lifetimes = await lifetimes_of(shard, [found[name] for name in records])
        for (name, record), lifetime in zip(records.items(), lifetimes, strict=True):
            if lifetime == _GONE:
                continue
            raw = record.raw
            size += len(raw)
            try:
                lines.append(ndjson.encode(name, record.version, raw, lifetime))
            except RecordError as error:
                tally.damaged += 1
                tally.note(str(error))
        tally.records += len(lines)
        if records:
            self._at_once = max(min(RECORDS, progress.BYTES * len(records) // (size + 1)), 1)
        return lines

    async def _slots(self) -> list[tuple[int, int, str]]:
        found = await self._shards.slots()
        return [(one.first, one.last, f"{one.primary[0]}:{one.primary[1]}") for one in found]


async def lifetimes_of(shard: Primary, keys: list[bytes]) -> list[int | None]:
    """Return for how many seconds some keys live on: None for ever, _GONE if no more."""
    commands: list[RawCommand] = [("PTTL", key) for key in keys]
    lifetimes: list[int | None] = []
    for answer in await shard.server.execute_many(*commands):
        if isinstance(answer, ReplyError) and answer.code not in ("MOVED", "ASK", "TRYAGAIN"):
            raise answer
        if not isinstance(answer, int) or answer == -1:
            lifetimes.append(None)
        else:
            # It ends no sooner than it would have.
            lifetimes.append(_GONE if answer < 0 else max(-(-answer // 1000), 1))
    return lifetimes


async def all_of(works: Any) -> None:
    """Do all of some work at once; raises the first error, when all of it has ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        for task in asyncio.as_completed(tasks):
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
