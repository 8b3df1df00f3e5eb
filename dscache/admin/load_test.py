"""A load of one's choice against one's own Redis, and how long its operations took."""

from __future__ import annotations

import asyncio
import random
import secrets
import string
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from ..cache import AsyncCache
from ..errors import DscacheError

_PREFIX = "dscache-bench/"
_AT_ONCE = 1000
# Of so many steps is each octave of a Latencies: what it tells is off by 3 % at most.
_STEPS = 32
_STEP_BITS = 5
# A task whose operation failed waits for so many seconds, and does not storm what is down.
_AFTER_ERROR = 0.01
# Text around the letters of a record.
_FRAME = b'{"text":""}'


class Latencies:
    """How often an operation took how long: counted in steps, and so of any number of them."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self.longest = 0
        self._steps: Counter[int] = Counter()

    def add(self, nanoseconds: int) -> None:
        """Count one operation."""
        self.count += 1
        self.total += nanoseconds
        if nanoseconds > self.longest:
            self.longest = nanoseconds
        octave = nanoseconds.bit_length() - 1
        if octave >= _STEP_BITS:
            within = (nanoseconds >> (octave - _STEP_BITS)) & (_STEPS - 1)
        else:
            within = (nanoseconds << (_STEP_BITS - octave)) & (_STEPS - 1) if nanoseconds else 0
        self._steps[(octave << _STEP_BITS) | within] += 1

    @property
    def mean(self) -> float:
        """The mean in milliseconds; 0 of none."""
        return self.total / self.count / 1e6 if self.count else 0.0

    @property
    def most(self) -> float:
        """The longest in milliseconds."""
        return self.longest / 1e6

    def percentile(self, percent: float) -> float:
        """Return in how many milliseconds so many percent were done; 0 of none."""
        wanted = self.count * percent / 100
        seen = 0
        for _, high, count in self.steps():
            seen += count
            if seen >= wanted:
                return min(high, self.most)
        return self.most

    def steps(self) -> Iterator[tuple[float, float, int]]:
        """Give how many operations took from so many milliseconds up to so many, in order."""
        for step in sorted(self._steps):
            octave, within = step >> _STEP_BITS, step & (_STEPS - 1)
            low = 2.0**octave * (1 + within / _STEPS)
            high = 2.0**octave * (1 + (within + 1) / _STEPS)
            yield low / 1e6, high / 1e6, self._steps[step]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What load it is."""

    tasks: int
    seconds: float
    read_ratio: float
    size: int
    """Bytes of each record's JSON text."""
    bulk: int
    """Records of one operation."""
    records: int
    """How many different ones there are."""


@dataclass(slots=True)
class Result:
    """What came of it, up to now."""

    reads: Latencies = field(default_factory=Latencies)
    writes: Latencies = field(default_factory=Latencies)
    records: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    began: float = 0.0

    @property
    def rate(self) -> float:
        """Records a second."""
        return self.records / self.seconds if self.seconds else 0.0


async def apply(cache: AsyncCache, plan: Plan, result: Result) -> None:
    """Put a load on a cache, under names of its own, which are gone afterwards.

    Raises what keeps the records from being written at first, or from being removed.
    """
    prefix = f"{_PREFIX}{secrets.token_hex(4)}/"
    names = [f"{prefix}{i}" for i in range(max(plan.records, plan.bulk))]
    data = _document(plan.size)
    try:
        for first in range(0, len(names), _AT_ONCE):
            await cache.set_bulk(dict.fromkeys(names[first : first + _AT_ONCE], (0, data)), ttl=0)
        result.began = time.perf_counter()
        end = result.began + plan.seconds
        works = [_work(cache, plan, result, names, data, end) for _ in range(plan.tasks)]
        try:
            await asyncio.gather(*works)
        finally:
            result.seconds = time.perf_counter() - result.began
    finally:
        for first in range(0, len(names), _AT_ONCE):
            await cache.delete_bulk(names[first : first + _AT_ONCE])


def _document(size: int) -> msgspec.Raw:
    # Of letters at random, as a server or a link may compress.
    letters = "".join(random.choices(string.ascii_letters, k=max(size - len(_FRAME), 0)))
    return msgspec.Raw(_FRAME[:-2] + letters.encode() + _FRAME[-2:])


async def _work(
    cache: AsyncCache,
    plan: Plan,
    result: Result,
    names: list[str],
    data: msgspec.Raw,
    end: float,
) -> None:
    """Do one operation after the other until the end."""
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
