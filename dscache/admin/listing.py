"""A listing of the records of a prefix: name, version, size and lifetime of each."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..net.scan import NameScan
from .cache import AdminCache
from .key_layout import Layout
from .primaries import Primaries, open_primaries
from .progress import RECORDS, JobProgress
from .scan import RecordReader, lifetimes, scan, seconds


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
    job = JobProgress()
    reader = RecordReader(cache, primaries, Layout.of(cache.config.options), job, on_damaged)
    async for _, names in scan(cache, NameScan, prefix, job):
        async for found in reader.read(names):
            yield [Row(one.name, one.version, len(one.raw), one.ttl) for one in found]


async def lifetimes_of(cache: AdminCache, names: Sequence[str]) -> dict[str, int | None]:
    """Return the lifetimes of records in seconds, rounded up; None for one without.

    A record that no longer exists has none either. Raises ConnectError, ConnectionLost, and
    ReplyError if a server refuses.
    """
    layout = Layout.of(cache.config.options)
    keys = [layout.keys(name)[0] for name in names]
    async with open_primaries(cache) as primaries:
        return dict(zip(names, map(seconds, await lifetimes(primaries, keys)), strict=True))


async def sorted_records(
    found: AsyncIterator[list[Row]], order: Order, most: int | None
) -> list[Row]:
    """Return rows in an order, each record once; at most ``most``, with memory for as many."""
    rows: dict[str, Row] = {}
    async for some in found:
        rows.update({row.name: row for row in some})
        if most is not None and len(rows) > most + RECORDS:
            best = heapq.nsmallest(most, rows.values(), key=lambda row: row.key(order))
            rows = {row.name: row for row in best}
    ordered = sorted(rows.values(), key=lambda row: row.key(order))
    return ordered if most is None else ordered[:most]
