"""Reading of all records of a prefix: a scan of their servers, then the records in batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..aio.memory import MemoryNode
from ..aio.scan import Pages
from ..cache import AsyncCache
from ..errors import BulkError, RecordError, ReplyError
from ..net.scan import KeyScan
from . import progress
from .cache import AdminCache
from .key_layout import Layout
from .primaries import Primaries
from .progress import RECORDS, JobProgress

if TYPE_CHECKING:
    from ..core.pure import Record

SCAN_COUNT = 1000
"""Keys that one SCAN visits; other clients are served between two of them."""
GONE: Final = -2
"""The lifetime of a key that no longer exists, as PTTL returns it."""
# A slot that moves is asked for again, this often and after so many seconds.
_TRIES, _PAUSE = 40, 0.05
_MOVING = ("MOVED", "ASK", "TRYAGAIN")


@dataclass(frozen=True, slots=True)
class Found:
    """A whole record, with its lifetime in seconds."""

    name: str
    version: int
    raw: bytes
    ttl: int | None


async def scan(
    cache: AdminCache,
    make: Callable[..., KeyScan],
    text: Any,
    job: JobProgress,
    cursor: str | None = None,
) -> AsyncGenerator[tuple[str, list[Any]], None]:
    """Yield what a scan finds, page by page, and the cursor behind each page.

    ``make`` is NameScan, for the names that begin with ``text``, or KeyScan, for the keys that
    match it. The servers scan on while the caller handles a page.
    """
    topology = cache.topology
    assert not isinstance(topology, MemoryNode)
    pages = Pages(topology, make, cache.config.options, text, SCAN_COUNT, cursor)
    before = job.done
    scanning = asyncio.ensure_future(pages.next())
    try:
        while (page := await scanning) is not None:
            scanning = asyncio.ensure_future(pages.next())
            found, cursor, visited = page
            job.done = min(before + visited, job.total)
            yield cursor, found
    finally:
        scanning.cancel()
        # Its error is of no use to a caller that has stopped.
        scanning.add_done_callback(lambda task: task.cancelled() or task.exception())


class RecordReader:
    """Reads records with their lifetimes, as many at once as fit in some megabytes.

    ``on_damaged`` is called with the error of each damaged record, in place of counting it.
    """

    def __init__(
        self,
        cache: AsyncCache,
        primaries: Primaries,
        layout: Layout,
        job: JobProgress,
        on_damaged: Callable[[Exception], object] | None = None,
    ) -> None:
        self._cache = cache
        self._primaries = primaries
        self._layout = layout
        self._job = job
        self._on_damaged = on_damaged or job.note_damaged
        self._batch = RECORDS
        self._halves = cache.stats()["halves"]

    async def read(self, names: Sequence[str]) -> AsyncIterator[list[Found]]:
        """Yield the whole records of some names, in batches; counts halves and damaged ones."""
        while names:
            some, names = names[: self._batch], names[self._batch :]
            yield await self._read(some)

    async def _read(self, names: Sequence[str]) -> list[Found]:
        records, damaged = await get_whole(self._cache, names)
        for error in damaged.values():
            self._on_damaged(error)
        # A record deleted since SCAN found its key isn't counted as a half.
        halves = self._cache.stats()["halves"]
        self._job.halves += halves - self._halves
        self._halves = halves
        if records:
            size = sum(len(record.raw) for record in records.values())
            self._batch = max(min(RECORDS, progress.BYTES * len(records) // (size + 1)), 1)
        left = await lifetimes(self._primaries, [self._layout.keys(name)[0] for name in records])
        return [
            Found(name, record.version, record.raw, seconds(lifetime))
            for (name, record), lifetime in zip(records.items(), left, strict=True)
            if lifetime != GONE
        ]


async def get_whole(
    cache: AsyncCache, names: Sequence[str]
) -> tuple[Mapping[str, Record], Mapping[str, Exception]]:
    """Return the whole records of some names, and the errors of damaged ones.

    Raises any other error of a record.
    """
    try:
        return await cache.get_bulk(names), {}
    except BulkError as error:
        for reason in error.errors.values():
            if not isinstance(reason, RecordError):
                raise reason from None
        return error.result, error.errors


async def lifetimes(primaries: Primaries, keys: Sequence[bytes]) -> list[int]:
    """Return the remaining milliseconds of keys, as PTTL does.

    Raises ReplyError if a server refuses, or if a slot moves for too long.
    """
    found: dict[bytes, int] = {}
    answers = await primaries.execute_by_key([(key, ("PTTL", key)) for key in keys])
    error = _note(found, keys, answers)
    for _ in range(_TRIES):
        if error is None:
            break
        missing = [key for key in keys if key not in found]
        for primary in primaries.all:
            answers = await primary.server.execute_many(*(("PTTL", key) for key in missing))
            error = _note(found, missing, answers)
            missing = [key for key in missing if key not in found]
            if not missing:
                break
        else:
            await asyncio.sleep(_PAUSE)
    if error is not None:
        raise error
    return [found[key] for key in keys]


def _note(
    found: dict[bytes, int], keys: Sequence[bytes], answers: Sequence[object]
) -> ReplyError | None:
    """Note the lifetimes that a server told; return its error about a key that it lacks."""
    moving = None
    for key, answer in zip(keys, answers, strict=True):
        if isinstance(answer, ReplyError):
            if answer.code not in _MOVING:
                raise answer
            moving = answer
        elif isinstance(answer, int):
            found[key] = answer
    return moving


def seconds(milliseconds: int) -> int | None:
    """Return a lifetime in seconds, rounded up; None for a key without one."""
    return None if milliseconds < 0 else max(-(-milliseconds // 1000), 1)
