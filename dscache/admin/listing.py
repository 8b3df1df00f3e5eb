"""A listing of the records of a prefix: name, version, size and lifetime of each."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ..errors import BulkError, RecordError, ReplyError
from .cache import AdminCache
from .key_layout import Layout
from .primaries import Primaries, open_primaries

if TYPE_CHECKING:
    from ..core.pure import Record

# Records of one request for lifetimes.
_BATCH = 256
# A slot that moves is asked for again, this often and after so many seconds.
_TRIES, _PAUSE = 40, 0.05
_MOVING = ("MOVED", "ASK", "TRYAGAIN")
# The lifetime of a key that no longer exists, as PTTL returns it.
_GONE = -2


class Order(StrEnum):
    """The values of ``--sort``."""

    NAME = "name"
    VERSION = "version"
    BYTES = "bytes"
    TTL = "ttl"


@dataclass(frozen=True, slots=True)
class Row:
    """A record in a listing: ``size`` is that of its JSON text, and ``ttl`` in seconds."""

    name: str
    version: int
    size: int
    ttl: int | None

    def key(self, order: Order) -> tuple[float | str, ...]:
        """Return the key to sort by: names go up, and all else goes down."""
        if order is Order.NAME:
            return (self.name,)
        if order is Order.TTL:
            return (float("-inf") if self.ttl is None else -self.ttl, self.name)
        return (-self.version if order is Order.VERSION else -self.size, self.name)


async def list_records(
    cache: AdminCache, primaries: Primaries, prefix: str, on_damaged: Callable[[Exception], object]
) -> AsyncIterator[list[Row]]:
    """Yield the whole records of a prefix in batches, as a scan finds them.

    Calls ``on_damaged`` with the error of each damaged record. Raises any other error.
    """
    scan = cache.scan(prefix, records=True)
    layout = Layout.of(cache.config.options)
    batch: list[Record] = []
    while True:
        try:
            record = await anext(scan, None)
        except BulkError as error:
            for reason in error.errors.values():
                if not isinstance(reason, RecordError):
                    raise reason from None
                on_damaged(reason)
            continue
        if record is not None:
            batch.append(record)
        if batch and (record is None or len(batch) == _BATCH):
            keys = [layout.keys(one.name)[0] for one in batch]
            lifetimes = await _lifetimes(primaries, keys)
            yield [
                Row(one.name, one.version, len(one.raw), _seconds(lifetime))
                for one, lifetime in zip(batch, lifetimes, strict=True)
                if lifetime != _GONE
            ]
            batch = []
        if record is None:
            return


async def lifetimes_of(cache: AdminCache, names: Sequence[str]) -> dict[str, int | None]:
    """Return the lifetimes of records in seconds, rounded up; None for one without.

    A record that no longer exists has none either. Raises ConnectError, ConnectionLost, and
    ReplyError if a server refuses.
    """
    layout = Layout.of(cache.config.options)
    keys = [layout.keys(name)[0] for name in names]
    async with open_primaries(cache) as primaries:
        return dict(zip(names, map(_seconds, await _lifetimes(primaries, keys)), strict=True))


async def sorted_records(
    found: AsyncIterator[list[Row]], order: Order, most: int | None
) -> list[Row]:
    """Return rows in an order, each record once; at most ``most``, with memory for as many."""
    rows: dict[str, Row] = {}
    async for some in found:
        rows.update({row.name: row for row in some})
        if most is not None and len(rows) > most + _BATCH:
            best = heapq.nsmallest(most, rows.values(), key=lambda row: row.key(order))
            rows = {row.name: row for row in best}
    ordered = sorted(rows.values(), key=lambda row: row.key(order))
    return ordered if most is None else ordered[:most]


async def _lifetimes(primaries: Primaries, keys: Sequence[bytes]) -> list[int]:
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


def _seconds(milliseconds: int) -> int | None:
    """Return a lifetime in seconds, rounded up; None for a key without one."""
    return None if milliseconds < 0 else -(-milliseconds // 1000)
