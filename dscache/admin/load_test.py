"""A synthetic load on a Redis, and the latencies of its operations."""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import string
import time
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from ..cache import AsyncCache
from ..errors import DscacheError

_PREFIX = "dscache-bench/"
# Records in one request when they are first written, and when they are removed, and bytes of their
# texts.
_BATCH = 1000
_BATCH_BYTES = 4 * 1024 * 1024
# Steps in each octave of a Latencies: its percentiles are off by 3 % at most.
STEPS = 24
FILL_SECONDS = 10.0
"""Seconds for which the records of a load may be written, if the load isn't longer itself."""
MOST_BYTES = 1024**3
"""The memory that the records of a load may take in a server, and those under way at a time."""
_BYTES_BESIDE = 250
"""Bytes that a record takes beside its JSON text, in a server or under way, about."""
# Letters that differ; beyond that a text repeats them, farther apart than a compressor looks.
_LETTERS = 1024 * 1024
# Seconds that a task waits after a failed operation, to spare a server that is down.
_AFTER_ERROR = 0.01
# JSON text around the letters of a record.
_FRAME = b'{"text":""}'


class Latencies:
    """A histogram of latencies with logarithmic steps, in constant memory."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self.longest_ms = 0.0
        """The longest latency in milliseconds."""
        self.steps: Counter[int] = Counter()
        """The operations in each step; step ``i`` begins at ``2 ** (i / STEPS)`` nanoseconds."""

    def add(self, nanoseconds: int) -> None:
        """Count an operation that took this long."""
        self.count += 1
        self.total += nanoseconds
        self.longest_ms = max(self.longest_ms, nanoseconds / 1e6)
        self.steps[int(math.log2(nanoseconds or 1) * STEPS)] += 1

    @property
    def mean(self) -> float:
        """The mean in milliseconds; 0 without operations."""
        return self.total / self.count / 1e6 if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Return a percentile in milliseconds; 0 without operations."""
        wanted = self.count * percent / 100
        seen = 0
        for step in sorted(self.steps):
            seen += self.steps[step]
            if seen >= wanted:
                return min(math.exp2((step + 1) / STEPS) / 1e6, self.longest_ms)
        return self.longest_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The parameters of a load."""

    tasks: int
    read_ratio: float
    size: int
    """Bytes of each record's JSON text."""
    bulk: int
    """Records in one operation."""
    records: int
    """The number of different records, unless they take too long to write, or too much memory."""
    seconds: float

    @property
    def bytes_under_way(self) -> int:
        """The memory that the records of all tasks take at a time, about."""
        return self.tasks * self.bulk * (self.size + _BYTES_BESIDE)

    @property
    def most_records(self) -> int:
        """The number of records that fit into ``MOST_BYTES``, and of those in one operation."""
        return max(MOST_BYTES // (self.size + _BYTES_BESIDE), self.bulk)


@dataclass(slots=True)
class Result:
    """The counts of a load so far."""

    reads: Latencies = field(default_factory=Latencies)
    writes: Latencies = field(default_factory=Latencies)
    records: int = 0
    written: int = 0
    """The number of different records that the load uses."""
    left: str = ""
    """The prefix of the records, until they are removed."""
    removed: bool = False
    """Whether records were removed, perhaps of a write that was interrupted."""
    removal_error: DscacheError | None = None
    """The reason that they could not be removed."""
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    began: float = 0.0

    @property
    def rate(self) -> float:
        """Records per second."""
        return self.records / self.seconds if self.seconds else 0.0


async def apply(cache: AsyncCache, plan: Plan, result: Result) -> None:
    """Put a load on a cache, on records of its own, which it removes afterwards.

    Writes them for as long as the load takes, or ``FILL_SECONDS`` if that is longer, and until they
    take ``MOST_BYTES``. The load uses only those written by then. Counts failed operations in the
    result, which also tells if the records could not be removed. Raises DscacheError if they can't
    be written at the start, or not as many as one operation has.
    """
    prefix = result.left = f"{_PREFIX}{secrets.token_hex(4)}/"
    wanted = min(max(plan.records, plan.bulk), plan.most_records)
    batch = max(min(_BATCH, _BATCH_BYTES // plan.size), 1)
    names: list[str] = []
    data = _document(plan.size)
    try:
        seconds = max(plan.seconds, FILL_SECONDS)
        last = time.perf_counter() + seconds
        while len(names) < wanted:
            if names and time.perf_counter() > last:
                if len(names) >= plan.bulk:
                    break
                raise DscacheError(
                    f"{len(names):,} records could be written in {seconds:g} s, fewer than the "
                    f"{plan.bulk:,} of one operation; choose a smaller --bulk"
                )
            some = [f"{prefix}{i}" for i in range(len(names), min(len(names) + batch, wanted))]
            names += some
            await cache.set_bulk(dict.fromkeys(some, (0, data)), ttl=0)
            result.written = len(names)
        result.began = time.perf_counter()
        end = result.began + plan.seconds
        works = [_work(cache, plan, result, names, data, end) for _ in range(plan.tasks)]
        try:
            await asyncio.gather(*works)
        finally:
            result.seconds = time.perf_counter() - result.began
    finally:
        try:
            for first in range(0, len(names), _BATCH):
                await cache.delete_bulk(names[first : first + _BATCH])
        except DscacheError as error:
            # Raised here, it would replace an interrupt.
            result.removal_error = error
        else:
            result.left, result.removed = "", bool(names)


def _document(size: int) -> msgspec.Raw:
    # Random letters, as a server or a link may compress.
    count = max(size - len(_FRAME), 0)
    letters = "".join(random.choices(string.ascii_letters, k=min(count, _LETTERS))).encode()
    letters = (letters * (count // _LETTERS + 1))[:count]
    return msgspec.Raw(_FRAME[:-2] + letters + _FRAME[-2:])


async def _work(
    cache: AsyncCache,
    plan: Plan,
    result: Result,
    names: list[str],
    data: msgspec.Raw,
    end: float,
) -> None:
    """Run one operation after the other until ``end``."""
    clock, chance, ratio, bulk = time.perf_counter_ns, random.random, plan.read_ratio, plan.bulk
    last = len(names) - bulk + 1
    finish = int(end * 1e9)
    version = 0
    while (began := clock()) < finish:
        first = int(chance() * last)
        is_read = chance() < ratio
        version += 1
        try:
            if bulk > 1:
                some = names[first : first + bulk]
                if is_read:
                    await cache.get_bulk(some)
                else:
                    await cache.set_bulk(dict.fromkeys(some, (version, data)), ttl=0)
            elif is_read:
                await cache.get(names[first])
            else:
                await cache.set(names[first], version, data, ttl=0)
        except DscacheError as error:
            result.errors[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(_AFTER_ERROR)
            continue
        (result.reads if is_read else result.writes).add(clock() - began)
        result.records += bulk
