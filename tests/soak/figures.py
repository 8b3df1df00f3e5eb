"""Measurements of a soak row, and their limits."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import dscache
from tests.soak.load import Load
from tests.support.faults import FaultProxy

# Limits that depend on the machine: seconds, bytes, connections.
LATENESS = 0.050
RECOVERY = 1.0
DEAD_PEER = 10.0
MEMORY = 16 * 1024 * 1024
ATTEMPTS_A_MINUTE = 25
# Bytes that a fuzzer may hold after a hundred thousand cases more than before. It keeps nothing of
# a case, so that one lost object of 32 bytes in each would be beyond it.
LEFT = 2 * 1024 * 1024

# A warm process under load holds the same from minute to minute: bytes, and Python objects, of
# which a few hundred more or less are in use.
WARM_AFTER = 300.0
PLATEAU = 64 * 1024
OBJECTS = 300
OBJECTS_A_FAULT = 0.25

# How long anything may take that depends on the return of the other side.
PATIENCE = 60.0
COUNTERS = ("pending", "pending_bytes", "in_flight", "queued")


async def until(condition: Callable[[], object], what: str) -> float:
    """Wait until a condition holds, and return for how long; raises if that is too long."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE:
            raise AssertionError(f"{what}: not within {PATIENCE:g} s")
        await asyncio.sleep(0.001)
    return time.monotonic() - began


class Samples:
    """Memory and objects of this process after each fault, in space allocated at the beginning.

    Otherwise the measurement itself would grow.
    """

    def __init__(self, room: int) -> None:
        self.count = 0
        self._times = array("d", [0.0]) * room
        self._memory = array("q", [0]) * room
        self._objects = array("q", [0]) * room

    def take(self) -> None:
        """Take a sample after a garbage collection; once the space is used up, none."""
        if self.count < len(self._times):
            gc.collect()
            self._times[self.count] = time.monotonic()
            self._memory[self.count] = resident()
            self._objects[self.count] = sys.getallocatedblocks()
            self.count += 1

    def plateau(self) -> Plateau | None:
        """Compare the samples of a warm process; None if there are too few.

        The first and the last third are compared, by their medians, as the work in flight varies
        from moment to moment.
        """
        if not self.count:
            return None
        begun, ended = self._times[0], self._times[self.count - 1]
        warm = begun + max(WARM_AFTER, (ended - begun) / 3)
        first = bisect_left(self._times, warm, 0, self.count)
        third = (self.count - first) // 3
        if third < 3:
            return None
        early, late = slice(first, first + third), slice(self.count - third, self.count)
        kept = slice(first, self.count)
        fit = statistics.linear_regression(self._times[kept], self._memory[kept])
        return Plateau(
            memory=(_median(self._memory[early]), _median(self._memory[late])),
            memory_a_minute=fit.slope * 60,
            objects=_median(self._objects[late]) - _median(self._objects[early]),
            faults=self.count - first - third,
        )


@dataclass(frozen=True, slots=True)
class Plateau:
    """The growth of a warm process: its memory, by a line through it, and its objects.

    ``faults`` is how many there were between the two times that are compared.
    """

    memory: tuple[int, int]
    memory_a_minute: float
    objects: int
    faults: int


def _median(values: array[int]) -> int:
    return int(statistics.median(values))


@dataclass
class Figures:
    """A row's measurements: ``problems`` are never allowed, ``slow`` not on a suitable machine."""

    row: str
    operations: int = 0
    seconds: float = 0.0
    lateness: float | None = None
    recovery: float | None = None
    memory: tuple[int, int] = (0, 0)
    most_growth: int = MEMORY
    files: tuple[int, int] = (0, 0)
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    def take(self, load: Load) -> None:
        """Add the counts of a load and its violations."""
        self.operations += load.operations
        self.outcomes += load.outcomes
        self.problems += load.wrong
        self.lateness = max(load.lateness, self.lateness or -math.inf)

    def recovered(self, seconds: float) -> None:
        """Record how long the recovery took; the longest counts."""
        self.recovery = max(seconds, self.recovery or 0.0)

    def drained(self, cache: dscache.AsyncCache) -> None:
        """Check that nothing is counted as pending any more."""
        counters = {name: cache.stats()[name] for name in COUNTERS}
        if any(counters.values()):
            self.problems.append(f"not drained: {counters}")

    def grew(self, samples: Samples) -> None:
        """Check that a process still holds after many faults what it held before."""
        plateau = samples.plateau()
        if plateau is None:
            return
        self.memory = plateau.memory
        slope = f"RSS {plateau.memory_a_minute / 1024:+.1f} KiB/min"
        self.notes.append(f"{slope}, {plateau.objects:+d} objects over {plateau.faults} faults")
        if plateau.memory[1] - plateau.memory[0] > PLATEAU:
            self.slow.append(f"memory grows: {slope}")
        if plateau.objects > max(OBJECTS, OBJECTS_A_FAULT * plateau.faults):
            self.slow.append(f"{plateau.objects} objects were left by {plateau.faults} faults")

    def judge(self) -> None:
        """Compare the measurements with their limits."""
        if self.lateness is not None and self.lateness > LATENESS:
            self.slow.append(f"{self.lateness * 1000:.0f} ms beyond a deadline")
        if self.recovery is not None and self.recovery > RECOVERY:
            self.slow.append(f"{self.recovery:.2f} s to serve again")
        growth = self.memory[1] - self.memory[0]
        if growth > self.most_growth:
            self.slow.append(f"memory grew by {growth / 2**20:.1f} MiB")
        if self.files[1] > self.files[0]:
            self.problems.append(f"{self.files[1] - self.files[0]} files were left open")

    def line(self) -> str:
        """Return the figures in one line, below those of ``HEADING``."""
        late = "-" if self.lateness is None else f"{self.lateness * 1000:+.0f}"
        recovery = "-" if self.recovery is None else f"{self.recovery:.2f}"
        memory = f"{self.memory[0] / 2**20:.1f}>{self.memory[1] / 2**20:.1f}"
        files = f"{self.files[0]}>{self.files[1]}"
        outcomes = ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common())
        verdict = "; ".join([*self.problems[:3], *self.slow]) or "holds"
        return (
            f"{self.row:<12}{self.seconds:>7.1f}{self.operations:>10}{late:>9}{recovery:>9}"
            f"{memory:>14}{files:>8}  {verdict}  [{'; '.join([outcomes, *self.notes])}]"
        )


HEADING = (
    f"{'row':<12}{'seconds':>7}{'ops':>10}{'late ms':>9}{'again s':>9}{'RSS MiB':>14}{'files':>8}"
    "  verdict  [operations by outcome; further figures]"
)


@contextlib.asynccontextmanager
async def measured(figures: Figures) -> AsyncIterator[None]:
    """Measure time, memory and open files around a block, and judge them at the end."""
    await _warm_up()
    memory = held()
    # As servers do: a collection that walks all imported modules takes 100 ms by itself.
    were_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    files, began = open_files(), time.monotonic()
    try:
        yield
    finally:
        if not were_frozen:
            gc.unfreeze()
    figures.seconds = time.monotonic() - began
    await asyncio.sleep(0.05)
    figures.memory = figures.memory if figures.memory != (0, 0) else (memory, held())
    figures.files = (files, open_files())
    figures.judge()


async def _warm_up() -> None:
    """Make the objects that a process or loop makes once, which count for no row."""
    async with FaultProxy("127.0.0.1", 1) as proxy:
        reader, writer = await asyncio.open_connection("localhost", proxy.port)
        with contextlib.suppress(ConnectionError):
            await reader.read()
            writer.close()
            await writer.wait_closed()
    await asyncio.sleep(0.05)


def resident() -> int:
    """Return how many bytes of memory this process holds."""
    # Linux sums the counters of statm per processor, and may be half a MiB off with two of them.
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        lines = [
            "Rss: "
            + subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())], text=True)
        ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024


def held() -> int:
    """Return how many bytes this process holds once it has returned its free memory.

    The many proxies of a row fragment its heap into tens of MiB of free pieces. The allocator of
    AddressSanitizer keeps as much and can't be told to return it; it counts the bytes in use.
    """
    gc.collect()
    process = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # only a process with AddressSanitizer has this call
        in_use = process.__sanitizer_get_current_allocated_bytes
        in_use.restype = ctypes.c_size_t
        return int(in_use())
    with contextlib.suppress(AttributeError):  # only glibc has this call
        process.malloc_trim(0)
    return resident()


def open_files() -> int:
    """Return how many files and sockets this process has open."""
    return len(os.listdir("/dev/fd"))
