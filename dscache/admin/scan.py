"""Reading of all records of a prefix: SCAN on each primary, then the records in bounded batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..aio.control import RawCommand
from ..cache import AsyncCache
from ..errors import BulkError, RecordError, ReplyError
from . import progress
from .key_layout import Layout
from .primaries import Primary
from .progress import RECORDS, JobProgress

if TYPE_CHECKING:
    from ..core.pure import Record

SCAN_COUNT = 1000
"""Keys that one SCAN visits; other clients are served between two of them."""
# The lifetime of a key that no longer exists, as PTTL returns it.
_GONE = -2


@dataclass(frozen=True, slots=True)
class Found:
    """A whole record, with its lifetime in seconds."""

    name: str
    version: int
    raw: bytes
    ttl: int | None


async def scan(
    primary: Primary, pattern: bytes, job: JobProgress, cursor: bytes | str = b"0"
) -> AsyncIterator[tuple[bytes, list[bytes]]]:
    """Yield keys of a server, without repetitions, and the cursor that follows them, 0 at the end.

    The server scans on while the caller handles the keys.
    """

    def begin() -> asyncio.Future[tuple[bytes, list[bytes]]]:
        command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)
        task = asyncio.ensure_future(primary.server.execute(*command))
        # Its error is of no use to a caller that has stopped.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    scanning = begin()
    try:
        while True:
            cursor, keys = await scanning
            if is_last := int(cursor) == 0:
                cursor = b"0"
            else:
                scanning = begin()
            job.done = min(job.done + SCAN_COUNT, job.total)
            yield cursor, list(dict.fromkeys(keys))
            if is_last:
                return
    finally:
        scanning.cancel()


class RecordReader:
    """Reads records with their lifetimes, as many at once as fit in some megabytes."""

    def __init__(self, cache: AsyncCache, layout: Layout, job: JobProgress) -> None:
        self._cache = cache
        self._layout = layout
        self._job = job
        self._batch = RECORDS
        self._halves = cache.stats()["halves"]

    async def read(self, primary: Primary, names: Sequence[str]) -> AsyncIterator[list[Found]]:
        """Yield the whole records of some names, in batches; counts halves and damaged ones."""
        while names:
            some, names = names[: self._batch], names[self._batch :]
            yield await self._read(primary, some)

    async def _read(self, primary: Primary, names: Sequence[str]) -> list[Found]:
        records, damaged = await get_whole(self._cache, names)
        for error in damaged.values():
            self._job.note_damaged(error)
        # A record deleted since SCAN found its key isn't counted as a half.
        halves = self._cache.stats()["halves"]
        self._job.halves += halves - self._halves
        self._halves = halves
        if records:
            size = sum(len(record.raw) for record in records.values())
            self._batch = max(min(RECORDS, progress.BYTES * len(records) // (size + 1)), 1)
        keys = [self._layout.keys(name)[0] for name in records]
        left = await lifetimes(primary, keys)
        return [
            Found(name, record.version, record.raw, lifetime)
            for (name, record), lifetime in zip(records.items(), left, strict=True)
            if lifetime != _GONE
        ]


async def get_whole(
    cache: AsyncCache, names: Sequence[str]
) -> tuple[Mapping[str, Record], Mapping[str, Exception]]:
    """Return the whole records of some names, and the errors of damaged ones.

    Raises any other error.
    """
    try:
        return await cache.get_bulk(names), {}
    except BulkError as error:
        for reason in error.errors.values():
            if not isinstance(reason, RecordError):
                raise
        return error.result, error.errors


async def lifetimes(primary: Primary, keys: Sequence[bytes]) -> list[int | None]:
    """Return the remaining seconds of keys: None without a lifetime, _GONE if there is no key."""
    commands: list[RawCommand] = [("PTTL", key) for key in keys]
    left: list[int | None] = []
    for answer in await primary.server.execute_many(*commands):
        if isinstance(answer, ReplyError) and answer.code not in ("MOVED", "ASK", "TRYAGAIN"):
            raise answer
        if not isinstance(answer, int) or answer == -1:
            left.append(None)
        else:
            # Rounded up, so that no lifetime gets shorter.
            left.append(_GONE if answer < 0 else max(-(-answer // 1000), 1))
    return left
