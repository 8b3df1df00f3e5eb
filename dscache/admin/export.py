"""Export of all records of a prefix into lines of JSON, resumable and in bounded memory.

It iterates over the keys of each primary with SCAN. A file beside the output keeps its state: the
number of valid bytes, and the cursor of each server.
"""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from ..cache import AsyncCache
from ..errors import BulkError, DscacheError, RecordError, ReplyError
from . import ndjson, progress
from .control import RawCommand
from .key_layout import Layout
from .primaries import SCAN_COUNT, Primaries, Primary
from .progress import RECORDS, JobProgress, errors_of, read_state, write_state

if TYPE_CHECKING:
    from zlib import _Compress

# The lifetime of a key that no longer exists, as PTTL returns it.
_GONE = -2


# -- the output


class Sink:
    """The file that takes the lines; its gzip members end where an export can resume."""

    def __init__(self, file: BinaryIO, *, compressed: bool, durable: bool) -> None:
        self._file = file
        self._durable = durable
        self._compressed = compressed
        self._gzip: _Compress | None = None
        self.is_whole = True
        """Whether all bytes were accepted; False during a write and after a failed one."""

    def write(self, lines: bytes) -> None:
        """Write lines, compressed if so configured."""
        self.is_whole = False
        if not self._compressed:
            self._file.write(lines)
        else:
            if self._gzip is None:
                self._gzip = zlib.compressobj(wbits=31)
            self._file.write(self._gzip.compress(lines))
        self.is_whole = True

    def settle(self) -> int:
        """Flush to disk; return the length of the file in bytes, or 0 if it isn't durable."""
        self.is_whole = False
        if self._gzip is not None:
            # The next piece is a gzip member of its own; readers concatenate members.
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
    """The position of SCAN on one server."""

    run_id: str
    cursor: str = "0"
    done: bool = False


class ExportState(msgspec.Struct, forbid_unknown_fields=True):
    """The state of an export; ``of`` identifies its records."""

    of: dict[str, str]
    slots: list[tuple[int, int, str]] = []
    size: int = 0
    visited: int = 0
    records: int = 0
    halves: int = 0
    damaged: int = 0
    servers: dict[str, _ScanState] = {}


class Target:
    """The output of an export: a partial file until it is complete, and the state beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._state = path.with_name(path.name + ".resume")

    @property
    def is_compressed(self) -> bool:
        """Whether the name ends in ``.gz``."""
        return self.path.suffix == ".gz"

    def discard(self) -> None:
        """Remove the files of an unfinished export."""
        self._state.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)

    def state(self) -> ExportState | None:
        """Return the state of an unfinished export; None if there is none.

        Raises DscacheError if it can't be read.
        """
        found = read_state(self._state, ExportState)
        if found is not None and not self._partial.exists():
            return None
        return found

    @contextmanager
    def open(self, state: ExportState | None) -> Iterator[Sink]:
        """Open the partial file, cut to the length in the state.

        Raises DscacheError if another export writes it, or if it is shorter than the state.
        """
        with errors_of(self._partial):
            # Not "wb": that would empty a file that another export is writing.
            file = self._partial.open("r+b" if state else "ab")
        with errors_of(self._partial), file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DscacheError(
                    f"{self.path}: another export is writing it; wait until it ends"
                ) from None
            if not state:
                file.truncate(0)
            else:
                if file.seek(0, io.SEEK_END) < state.size:
                    raise DscacheError(
                        f"{self._partial}: it is shorter than before; start over with --restart"
                    )
                file.truncate(state.size)
                file.seek(state.size)
            yield Sink(file, compressed=self.is_compressed, durable=True)

    def save(self, state: ExportState) -> None:
        """Save the state."""
        write_state(self._state, state)

    def finish(self) -> None:
        """Rename the partial file to its final name, and remove the state."""
        self._partial.replace(self.path)
        self._state.unlink(missing_ok=True)


# -- export


class Export:
    """One run of an export: the records of a prefix, read from all primaries at once."""

    def __init__(
        self, cache: AsyncCache, primaries: Primaries, layout: Layout, prefix: str, job: JobProgress
    ) -> None:
        self._cache = cache
        self._primaries = primaries
        self._layout = layout
        self._prefix = prefix
        self._pattern = layout.pattern(prefix)
        self._job = job
        self._batch = RECORDS
        self._halves = 0

    async def run(
        self, sink: Sink, state: ExportState, save: Callable[[ExportState], None] | None
    ) -> None:
        """Write the records to a sink, from a state on; ``save`` receives the state now and then.

        Raises ConnectionLost, ReplyError or another DscacheError if a server can't be read; the
        lines before remain written.
        """
        slots = await self._slots()
        if not state.servers:
            state.slots = slots
        self._resume(state)
        saved = time.monotonic()

        def settle() -> None:
            if not sink.is_whole:
                return  # the last saved state is still valid
            state.size = sink.settle()
            if save is not None:
                save(state)

        async def export_from(primary: Primary) -> None:
            nonlocal saved
            async for lines in self._lines(primary, state):
                sink.write(lines)
                if save is not None and time.monotonic() > saved + progress.SAVE_INTERVAL:
                    settle()
                    saved = time.monotonic()

        try:
            await run_all(export_from(primary) for primary in self._primaries.all)
            if state.slots != await self._slots():
                self._job.warnings.append(
                    "slots moved between nodes during the export, so records may be missing: "
                    "export again"
                )
        finally:
            settle()

    def _resume(self, state: ExportState) -> None:
        """Keep the cursor of each server that is still the same process."""
        job = self._job
        servers = {}
        for primary in self._primaries.all:
            scan = state.servers.get(primary.address)
            if scan is None or not scan.run_id or scan.run_id != primary.run_id:
                # A cursor is void in another process, which orders its keys differently.
                scan = _ScanState(primary.run_id)
            servers[primary.address] = scan
        state.servers = servers
        job.total = max(self._primaries.size, state.visited)
        job.done = state.visited
        job.records = job.resumed = state.records
        job.halves, job.damaged = state.halves, state.damaged
        self._halves = state.halves - self._cache.stats()["halves"]

    async def _lines(self, primary: Primary, state: ExportState) -> AsyncIterator[bytes]:
        """Yield the records of one server as lines, and update the state after each batch."""
        job = self._job
        scan = state.servers[primary.address]
        if scan.done:
            return
        scanning = self._scan(primary, scan.cursor)
        try:
            while not scan.done:
                cursor, keys = await scanning
                scan.done = int(cursor) == 0
                if not scan.done:
                    # The server scans on while the records found are read and written.
                    scanning = self._scan(primary, cursor)
                found: dict[str, bytes] = {}
                for key in keys:
                    name = self._layout.name_of(key)
                    if name is not None and name.startswith(self._prefix):
                        found[name] = key
                names = list(found)
                lines: list[bytes] = []
                while names:
                    some, names = names[: self._batch], names[self._batch :]
                    lines += await self._read(primary, {name: found[name] for name in some})
                scan.cursor = cursor.decode()
                job.done = min(job.done + SCAN_COUNT, job.total)
                state.visited, state.records = job.done, job.records
                state.halves, state.damaged = job.halves, job.damaged
                yield b"".join(lines)
        finally:
            scanning.cancel()

    def _scan(
        self, primary: Primary, cursor: bytes | str
    ) -> asyncio.Future[tuple[bytes, list[bytes]]]:
        command = ("SCAN", cursor, "MATCH", self._pattern, "COUNT", SCAN_COUNT)
        return asyncio.ensure_future(primary.server.execute(*command))

    async def _read(self, primary: Primary, found: dict[str, bytes]) -> list[bytes]:
        """Return records as lines, and count halves and damaged ones."""
        job = self._job
        try:
            records = await self._cache.get_bulk(found)
        except BulkError as error:
            for reason in error.errors.values():
                if not isinstance(reason, RecordError):
                    raise
                job.damaged += 1
                job.note(str(reason))
            records = error.result
        # A record deleted since SCAN found its key isn't counted as a half.
        job.halves = self._halves + self._cache.stats()["halves"]
        lines = []
        size = 0
        lifetimes = await lifetimes_of(primary, [found[name] for name in records])
        for (name, record), lifetime in zip(records.items(), lifetimes, strict=True):
            if lifetime == _GONE:
                continue
            raw = record.raw
            size += len(raw)
            try:
                lines.append(ndjson.encode(name, record.version, raw, lifetime))
            except RecordError as error:
                job.damaged += 1
                job.note(str(error))
        job.records += len(lines)
        if records:
            self._batch = max(min(RECORDS, progress.BYTES * len(records) // (size + 1)), 1)
        return lines

    async def _slots(self) -> list[tuple[int, int, str]]:
        found = await self._primaries.slots()
        return [(one.first, one.last, f"{one.primary[0]}:{one.primary[1]}") for one in found]


async def lifetimes_of(primary: Primary, keys: list[bytes]) -> list[int | None]:
    """Return the remaining seconds of keys: None without a lifetime, _GONE if there is no key."""
    commands: list[RawCommand] = [("PTTL", key) for key in keys]
    lifetimes: list[int | None] = []
    for answer in await primary.server.execute_many(*commands):
        if isinstance(answer, ReplyError) and answer.code not in ("MOVED", "ASK", "TRYAGAIN"):
            raise answer
        if not isinstance(answer, int) or answer == -1:
            lifetimes.append(None)
        else:
            # Rounded up, so that no lifetime gets shorter.
            lifetimes.append(_GONE if answer < 0 else max(-(-answer // 1000), 1))
    return lifetimes


async def run_all(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines at once; raises the first error after all have ended."""
    tasks = [asyncio.ensure_future(one) for one in jobs]
    try:
        for task in asyncio.as_completed(tasks):
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
