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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from ..core.keys import names_with
from ..errors import DscacheError, RecordError
from . import ndjson, progress
from .cache import AdminCache
from .key_layout import Layout
from .primaries import Primaries, Primary
from .progress import JobProgress, cancel_all, errors_of, read_state, write_state
from .scan import Found, RecordReader, scan

if TYPE_CHECKING:
    from zlib import _Compress


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
        if self._compressed:
            self._gzip = self._gzip or zlib.compressobj(wbits=31)
            lines = self._gzip.compress(lines)
        self._file.write(lines)
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


class _ScanPosition(msgspec.Struct, forbid_unknown_fields=True):
    """The progress of SCAN on one server."""

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
    servers: dict[str, _ScanPosition] = {}


class Target:
    """The output of an export: a partial file until it is complete, and the state beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._state = path.with_name(path.name + ".resume")

    def state(self, of: dict[str, str], *, restart: bool) -> ExportState:
        """Return the state of an unfinished export, or a new one if there is none.

        With ``restart`` it removes the files of the unfinished one. Raises DscacheError if the
        state can't be read.
        """
        if restart:
            self._state.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)
        found = read_state(self._state, ExportState) if self._partial.exists() else None
        return found or ExportState(of)

    @contextmanager
    def open(self, state: ExportState) -> Iterator[Sink]:
        """Open the partial file, cut to the length in the state.

        Raises DscacheError if another export writes it, or if it is shorter than the state.
        """
        # Not "wb": that would empty a file that another export is writing.
        with errors_of(self._partial), self._partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DscacheError(
                    f"{self.path}: another export is writing it; wait until it ends"
                ) from None
            if file.seek(0, io.SEEK_END) < state.size:
                raise DscacheError(
                    f"{self._partial}: it is shorter than before; start over with --restart"
                )
            file.truncate(state.size)
            file.seek(state.size)
            yield Sink(file, compressed=self.path.suffix == ".gz", durable=True)

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
        self, cache: AdminCache, primaries: Primaries, prefix: str, job: JobProgress
    ) -> None:
        self._primaries = primaries
        self._layout = Layout.of(cache.config.options)
        self._prefix = prefix
        self._job = job
        self._reader = RecordReader(cache, self._layout, job)

    async def run(
        self, sink: Sink, state: ExportState, save: Callable[[ExportState], object]
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
            if sink.is_whole:  # otherwise the last saved state is still valid
                state.size = sink.settle()
                save(state)

        async def export_from(primary: Primary) -> None:
            nonlocal saved
            async for lines in self._lines(primary, state):
                sink.write(lines)
                if time.monotonic() > saved + progress.SAVE_INTERVAL:
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
            position = state.servers.get(primary.address)
            if position is None or not position.run_id or position.run_id != primary.run_id:
                # A cursor is void in another process, which orders its keys differently.
                position = _ScanPosition(primary.run_id)
            servers[primary.address] = position
        state.servers = servers
        job.total = max(self._primaries.size, state.visited)
        job.done = state.visited
        job.records = job.resumed = state.records
        job.halves, job.damaged = state.halves, state.damaged

    async def _lines(self, primary: Primary, state: ExportState) -> AsyncIterator[bytes]:
        """Yield the records of one server as lines, and update the state after each SCAN."""
        job = self._job
        position = state.servers[primary.address]
        if position.done:
            return
        pattern = self._layout.pattern(self._prefix)
        async for cursor, keys in scan(primary, pattern, job, position.cursor):
            ours = names_with(self._prefix, map(self._layout.name_of, keys))
            lines: list[bytes] = []
            async for found in self._reader.read(primary, ours):
                lines += self._encode(found)
            position.cursor, position.done = cursor.decode(), cursor == b"0"
            state.records += len(lines)
            state.visited, state.halves, state.damaged = job.done, job.halves, job.damaged
            yield b"".join(lines)

    def _encode(self, found: Sequence[Found]) -> list[bytes]:
        """Return records as lines, and count the damaged ones."""
        lines = []
        for one in found:
            try:
                lines.append(ndjson.encode(one.name, one.version, one.raw, one.ttl))
            except RecordError as error:
                self._job.note_damaged(error)
        self._job.records += len(lines)
        return lines

    async def _slots(self) -> list[tuple[int, int, str]]:
        found = await self._primaries.slots()
        return [(one.first, one.last, f"{one.primary[0]}:{one.primary[1]}") for one in found]


async def run_all(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines at once; raises the first error after all have ended."""
    tasks = [asyncio.ensure_future(one) for one in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)
