"""Export of all records of a prefix into lines of JSON, resumable and in bounded memory.

A file beside the output keeps its state: the number of valid bytes, and the cursor of the scan.
"""

from __future__ import annotations

import fcntl
import io
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from ..errors import DscacheError, RecordError
from ..net.scan import NameScan
from . import ndjson, progress
from .cache import AdminCache
from .key_layout import Layout
from .primaries import Primaries
from .progress import JobProgress, errors_of, read_state, write_state
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


class ExportState(msgspec.Struct, forbid_unknown_fields=True):
    """The state of an export; ``of`` identifies its records."""

    of: dict[str, str]
    cursor: str = ""
    size: int = 0
    visited: int = 0
    records: int = 0
    halves: int = 0
    damaged: int = 0


class Target:
    """The output of an export: a partial file until it is complete, and the state beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._state = path.with_name(path.name + ".resume")

    def state(self, of: dict[str, str], *, restart: bool) -> ExportState:
        """Return the state of an unfinished export, or a new one if there is none.

        With ``restart`` it removes the files of the unfinished one. Raises DscacheError if the
        state can't be read, or if that export still runs.
        """
        if restart:
            with self._locked() if self._partial.exists() else nullcontext():
                self._state.unlink(missing_ok=True)
                self._partial.unlink(missing_ok=True)
        found = read_state(self._state, ExportState) if self._partial.exists() else None
        return found or ExportState(of)

    @contextmanager
    def open(self, state: ExportState) -> Iterator[Sink]:
        """Open the partial file, cut to the length in the state.

        Raises DscacheError if another export writes it, or if it is shorter than the state.
        """
        with self._locked() as file:
            if file.seek(0, io.SEEK_END) < state.size:
                raise DscacheError(
                    f"{self._partial}: it is shorter than before; start over with --restart"
                )
            file.truncate(state.size)
            file.seek(state.size)
            yield Sink(file, compressed=self.path.suffix == ".gz", durable=True)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Open the partial file as the only export. Raises DscacheError if there is another."""
        # Not "wb": that would empty a file that another export is writing.
        with errors_of(self._partial), self._partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another export may have renamed or removed it since it was opened here.
                is_mine = os.path.samestat(os.fstat(file.fileno()), self._partial.stat())
            except OSError:
                is_mine = False
            if not is_mine:
                raise DscacheError(f"{self.path}: another export is writing it; wait until it ends")
            yield file

    def save(self, state: ExportState) -> None:
        """Save the state."""
        write_state(self._state, state)

    def finish(self) -> None:
        """Rename the partial file, which is still open, to its final name; remove the state."""
        with errors_of(self.path):
            self._partial.replace(self.path)
        self._state.unlink(missing_ok=True)


# -- export


class Export:
    """One run of an export of the records of a prefix."""

    def __init__(
        self, cache: AdminCache, primaries: Primaries, prefix: str, job: JobProgress
    ) -> None:
        self._cache = cache
        self._primaries = primaries
        self._prefix = prefix
        self._job = job
        self._reader = RecordReader(cache, primaries, Layout.of(cache.config.options), job)

    async def run(
        self, sink: Sink, state: ExportState, save: Callable[[ExportState], object]
    ) -> None:
        """Write the records to a sink, from a state on; ``save`` receives the state now and then.

        Raises ConnectionLost, ReplyError or another DscacheError if a server can't be read; the
        lines before remain written.
        """
        job = self._job
        job.total = max(self._primaries.size, state.visited)
        job.done = state.visited
        job.records = job.resumed = state.records
        job.halves, job.damaged = state.halves, state.damaged
        saved = time.monotonic()

        def settle() -> None:
            if sink.is_whole:  # otherwise the last saved state is still valid
                state.size = sink.settle()
                save(state)

        pages = scan(self._cache, NameScan, self._prefix, job, state.cursor or None)
        try:
            async for cursor, names in pages:
                lines: list[bytes] = []
                async for found in self._reader.read(names):
                    lines += self._encode(found)
                sink.write(b"".join(lines))
                state.cursor, state.visited = cursor, job.done
                state.records += len(lines)
                state.halves, state.damaged = job.halves, job.damaged
                if time.monotonic() > saved + progress.SAVE_INTERVAL:
                    settle()
                    saved = time.monotonic()
        finally:
            await pages.aclose()
            settle()

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
