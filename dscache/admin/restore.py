"""Lines of text back into Redis: in their order, in bounded memory, and to be gone on with.

How far a file has been written to Redis is kept in a file beside it.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from ..cache import AsyncCache
from ..errors import BulkError, DscacheError, RecordError
from . import ndjson, progress
from .progress import BYTES, RECORDS, JobProgress, read_state, write_state

# Chunks that are under way at once.
_CHUNKS = 4


class ImportState(msgspec.Struct, forbid_unknown_fields=True):
    """How far a file has been written; it holds for the same file and the same Redis alone."""

    of: dict[str, str]
    length: int
    changed: int
    offset: int = 0
    line: int = 0
    records: int = 0
    not_newer: int = 0
    broken: int = 0


class ImportFile:
    """The file that an import reads, and what is kept beside it of how far it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = path.with_name(path.name + ".imported")
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise DscacheError(f"{path}: {error.strerror}") from error
        is_gzip = path.suffix == ".gz"
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw) if is_gzip else self._raw)
        status = os.fstat(self._raw.fileno())
        self.length, self._changed = status.st_size, status.st_mtime_ns

    @property
    def position(self) -> int:
        """How many bytes of the file were read."""
        return self._raw.tell()

    def state(self, of: dict[str, str], *, restart: bool) -> ImportState:
        """Return how far this file was imported already; raises DscacheError."""
        found = None if restart else read_state(self._state, ImportState)
        new = ImportState(of, self.length, self._changed)
        if found is None or (found.of, found.length, found.changed) != (
            (of, self.length, self._changed)
        ):
            return new
        return cast(ImportState, found)

    def save(self, state: ImportState) -> None:
        """Keep how far it is, if that can be written there."""
        with suppress(OSError):
            write_state(self._state, state)

    def finish(self) -> None:
        """Forget how far it was, as all is done."""
        self._state.unlink(missing_ok=True)

    async def pieces(self, offset: int) -> AsyncIterator[bytes]:
        """Give the text from an offset on; raises DscacheError if the file is damaged."""
        try:
            self._file.seek(offset)
            while piece := self._file.read(ndjson.PIECE):
                yield piece
        except (OSError, EOFError, zlib.error) as error:
            raise DscacheError(f"{self.path}: it can't be read: {error}") from error

    def close(self) -> None:
        self._file.close()
        self._raw.close()


@dataclass(slots=True)
class _Chunk:
    """Lines that are written together, and where the file stands behind them."""

    records: list[ndjson.Line] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    size: int = 0
    offset: int = 0
    line: int = 0
    broken: int = 0


class Import:
    """One run of an import: lines are written in their order, some chunks at once."""

    def __init__(
        self,
        cache: AsyncCache,
        tally: JobProgress,
        *,
        ttl: int | None,
        if_newer: bool,
        keep_going: bool,
    ) -> None:
        self._cache = cache
        self._tally = tally
        self._ttl = ttl
        self._if_newer = if_newer
        self._keep_going = keep_going

    async def run(
        self,
        lines: ndjson.Lines,
        state: ImportState,
        keep: Callable[[ImportState], None] | None,
        position: Callable[[], int],
    ) -> None:
        """Write what lines state; ``keep`` is given how far it is.

        Raises DscacheError at a line that is broken, unless it is to keep going, and what keeps
        Redis from taking the records.
        """
        tally = self._tally
        tally.records = tally.resumed = state.records
        tally.not_newer, tally.broken = state.not_newer, state.broken
        waiting: deque[tuple[_Chunk, asyncio.Future[int]]] = deque()
        noted = time.monotonic()

        async def settle() -> None:
            """Wait for the oldest chunk, and note that it is done."""
            chunk, future = waiting[0]
            not_newer = await future
            waiting.popleft()
            tally.records += len(chunk.records)
            tally.not_newer += not_newer
            state.offset, state.line = chunk.offset, chunk.line
            state.records, state.not_newer = tally.records, tally.not_newer
            state.broken += chunk.broken

        try:
            async for chunk in self._chunks(lines, state):
                waiting.append((chunk, asyncio.ensure_future(self._write(chunk))))
                if len(waiting) > _CHUNKS:
                    await settle()
                tally.done = position()
                if keep is not None and time.monotonic() > noted + progress.NOTE_EVERY:
                    keep(state)
                    noted = time.monotonic()
        finally:
            # Those under way are done a moment later, also if a line behind them is broken.
            try:
                while waiting:
                    await settle()
            finally:
                for _, future in waiting:
                    future.cancel()
                await asyncio.gather(*(one for _, one in waiting), return_exceptions=True)
                if keep is not None:
                    keep(state)

    async def _chunks(self, lines: ndjson.Lines, state: ImportState) -> AsyncIterator[_Chunk]:
        offset, number = state.offset, state.line
        chunk = _Chunk(offset=offset, line=number)
        async for texts in lines:
            for text in texts:
                number += 1
                offset += len(text) + 1
                line = self._decoded(text, lines.place(number), chunk)
                if line is None and chunk.broken and not self._keep_going:
                    chunk.broken = 0
                    yield chunk
                    raise DscacheError(self._tally.notes[-1])
                if line is not None:
                    if (
                        line.name in chunk.names
                        or len(chunk.records) == RECORDS
                        or chunk.size > BYTES
                    ):
                        yield chunk
                        chunk = _Chunk(offset=chunk.offset, line=chunk.line)
                    chunk.records.append(line)
                    chunk.names.add(line.name)
                    chunk.size += len(text)
                chunk.offset, chunk.line = offset, number
        yield chunk

    def _decoded(self, text: bytes, place: str, chunk: _Chunk) -> ndjson.Line | None:
        if not text.removeprefix(ndjson.BOM).strip():
            return None
        try:
            return ndjson.decode(text)
        except RecordError as error:
            chunk.broken += 1
            self._tally.broken += 1
            self._tally.note(f"{place}: {error}")
            return None

    async def _write(self, chunk: _Chunk) -> int:
        """Write the records of a chunk; return how many were not newer."""
        cache, if_newer = self._cache, self._if_newer
        together: dict[str, tuple[int, Any]] = {}
        waiting: list[asyncio.Future[Any]] = []
        for line in chunk.records:
            if line.ttl is None or self._ttl is not None:
                together[line.name] = line.version, line.data
            else:
                # In one tick, and so in one command with all others of the chunk.
                waiting.append(
                    cache.set(line.name, line.version, line.data, ttl=line.ttl, if_newer=if_newer)
                )
        if together:
            waiting.append(cache.set_bulk(together, ttl=self._ttl, if_newer=if_newer))
        not_newer = 0
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(outcome, BulkError):
                for reason in outcome.errors.values():
                    self._refused(reason, chunk)
                not_newer += len(outcome.result)
            elif isinstance(outcome, BaseException):
                self._refused(outcome, chunk)
            else:
                not_newer += len(outcome) if isinstance(outcome, set) else not outcome
        return not_newer

    def _refused(self, reason: BaseException, chunk: _Chunk) -> None:
        """Pass over a record that is damaged in Redis, or raise why it can't be written."""
        if not (self._keep_going and isinstance(reason, RecordError)):
            raise reason
        chunk.broken += 1
        self._tally.broken += 1
        self._tally.records -= 1
        self._tally.note(str(reason))
