"""Import of lines of JSON into Redis: in order, resumable and in bounded memory.

A file beside the input keeps the position up to which it has been written to Redis.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import stat
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from ..cache import AsyncCache
from ..errors import BulkError, DscacheError, RecordError
from . import ndjson, progress
from .progress import BYTES, RECORDS, JobProgress, cancel_all, read_state, write_state

# Chunks in flight.
_CHUNKS = 4
# The first bytes of compressed text, whatever the name of its file.
_GZIP = b"\x1f\x8b"


class ImportState(msgspec.Struct, forbid_unknown_fields=True):
    """The state of an import; it is valid for the same file and the same Redis only."""

    of: dict[str, str]
    length: int
    changed: int
    offset: int = 0
    line: int = 0
    records: int = 0
    not_newer: int = 0
    broken: int = 0


class ImportFile:
    """The input of an import, and the state beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise DscacheError(f"{path} is a folder; name the file of an export")
        self._state = path.with_name(path.name + ".imported")
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise DscacheError(f"{path}: {error.strerror}") from error
        if not self._raw.seekable():
            self._raw.close()
            raise DscacheError(
                f"{path} can't be read: it is a pipe; lead it into standard input, for which - "
                "stands"
            )
        status = os.fstat(self._raw.fileno())
        is_gzip = path.suffix == ".gz" or (
            stat.S_ISREG(status.st_mode) and self._raw.peek(2).startswith(_GZIP)
        )
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw) if is_gzip else self._raw)
        self.length, self._changed = status.st_size, status.st_mtime_ns

    @property
    def position(self) -> int:
        """The number of bytes read from the file."""
        return self._raw.tell()

    def state(self, of: dict[str, str], *, restart: bool) -> ImportState:
        """Return the state of this file, a new one if none is valid.

        Raises DscacheError if the state can't be read.
        """
        new = ImportState(of, self.length, self._changed)
        found = None if restart else read_state(self._state, ImportState)
        if found is None:
            return new
        is_same = (found.of, found.length, found.changed) == (new.of, new.length, new.changed)
        return found if is_same else new

    def save(self, state: ImportState) -> None:
        """Save the state, if the folder is writable; without any progress, remove it."""
        with suppress(OSError):
            if state.line:
                write_state(self._state, state)
            else:
                self._state.unlink(missing_ok=True)

    @property
    def saved(self) -> Path | None:
        """The file of the state, if there is one."""
        return self._state if self._state.exists() else None

    def finish(self) -> None:
        """Remove the state of a complete import."""
        self._state.unlink(missing_ok=True)

    async def pieces(self, offset: int) -> AsyncIterator[bytes]:
        """Yield the text from an offset on; raises DscacheError if it can't be read."""
        try:
            self._file.seek(offset)
            while piece := self._file.read(ndjson.PIECE):
                yield piece
        except (OSError, EOFError, zlib.error) as error:
            raise DscacheError(f"{self.path} can't be read: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()


@dataclass(slots=True)
class _Chunk:
    """Lines that are written together, and the position in the file after them."""

    records: dict[str, ndjson.Line] = field(default_factory=dict)
    size: int = 0
    offset: int = 0
    line: int = 0
    broken: int = 0


@dataclass(frozen=True, slots=True)
class Import:
    """One run of an import: lines are written in order, several chunks in flight."""

    cache: AsyncCache
    job: JobProgress
    ttl: int | None
    if_newer: bool
    keep_going: bool

    async def run(
        self,
        lines: ndjson.Lines,
        state: ImportState,
        save: Callable[[ImportState], object],
        position: Callable[[], int],
    ) -> None:
        """Write the records of lines; ``save`` receives the state now and then.

        ``position`` returns the bytes read, for the progress. Raises DscacheError at a broken line
        unless ``keep_going``, and the error of a record that Redis doesn't take.
        """
        job = self.job
        job.records = job.resumed = state.records
        job.damaged = state.broken
        waiting: deque[tuple[_Chunk, asyncio.Future[int]]] = deque()
        saved = time.monotonic()

        async def settle() -> None:
            """Wait for the oldest chunk, and count it as done."""
            chunk, future = waiting[0]
            not_newer = await future
            waiting.popleft()
            job.records += len(chunk.records)
            state.offset, state.line, state.records = chunk.offset, chunk.line, job.records
            state.not_newer += not_newer
            state.broken += chunk.broken

        try:
            async for chunk in self._chunks(lines, state):
                waiting.append((chunk, asyncio.ensure_future(self._write(chunk))))
                if len(waiting) > _CHUNKS:
                    await settle()
                job.done = position()
                if time.monotonic() > saved + progress.SAVE_INTERVAL:
                    save(state)
                    saved = time.monotonic()
        finally:
            # Chunks in flight complete, even if a line after them is broken.
            try:
                while waiting:
                    await settle()
            finally:
                await cancel_all([future for _, future in waiting])
                save(state)

    async def _chunks(self, lines: ndjson.Lines, state: ImportState) -> AsyncIterator[_Chunk]:
        offset, number = state.offset, state.line
        chunk = _Chunk(offset=offset, line=number)
        async for texts in lines:
            for text in texts:
                number += 1
                offset += len(text) + 1
                line = None
                try:
                    line = ndjson.decode(text)
                except RecordError as error:
                    message = f"{lines.place(number)}: {error}"
                    if not self.keep_going:
                        yield chunk
                        raise DscacheError(f"{message}; --keep-going skips it") from error
                    chunk.broken += 1
                    self.job.note_damaged(message)
                if line is not None:
                    if (
                        line.name in chunk.records
                        or len(chunk.records) == RECORDS
                        or chunk.size > BYTES
                    ):
                        yield chunk
                        chunk = _Chunk(offset=chunk.offset, line=chunk.line)
                    chunk.records[line.name] = line
                    chunk.size += len(text)
                chunk.offset, chunk.line = offset, number
        yield chunk

    async def _write(self, chunk: _Chunk) -> int:
        """Write the records of a chunk; return the number of records that were not newer."""
        cache, if_newer = self.cache, self.if_newer
        together: dict[str, tuple[int, object]] = {}
        waiting: list[asyncio.Future[bool] | asyncio.Future[set[str]]] = []
        for line in chunk.records.values():
            if line.ttl is None or self.ttl is not None:
                together[line.name] = line.version, line.data
            else:
                # Calls of one tick share a command with the rest of the chunk.
                waiting.append(
                    cache.set(line.name, line.version, line.data, ttl=line.ttl, if_newer=if_newer)
                )
        if together:
            waiting.append(cache.set_bulk(together, ttl=self.ttl, if_newer=if_newer))
        not_newer = 0
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(outcome, BulkError):
                for reason in outcome.errors.values():
                    self._count_broken(reason, chunk)
                not_newer += len(outcome.result)
            elif isinstance(outcome, BaseException):
                self._count_broken(outcome, chunk)
            else:
                not_newer += len(outcome) if isinstance(outcome, set) else not outcome
        return not_newer

    def _count_broken(self, reason: BaseException, chunk: _Chunk) -> None:
        """Count a record that is damaged in Redis, or raise the reason that it isn't written."""
        if not (self.keep_going and isinstance(reason, RecordError)):
            raise reason
        chunk.broken += 1
        self.job.records -= 1
        self.job.note_damaged(reason)
