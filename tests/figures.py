"""What a row of the soak test measures, and what that may be."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import dscache
from faults import FaultProxy
from load import Load

# What must hold, where it depends on the machine: seconds, bytes, connections.
LATENESS = 0.050
RECOVERY = 1.0
DEAD_PEER = 10.0
MEMORY = 16 * 1024 * 1024
SLOPE = 1024 * 1024
ATTEMPTS_A_MINUTE = 25

# How long anything may take that depends on the other side coming back.
PATIENCE = 60.0
COUNTERS = ("pending", "pending_bytes", "in_flight", "queued")


@dataclass
class Figures:
    """What a row measured: ``problems`` must never be, ``slow`` not on a machine for the job."""

    row: str
    operations: int = 0
    seconds: float = 0.0
    lateness: float | None = None
    recovery: float | None = None
    memory: tuple[int, int] = (0, 0)
    files: tuple[int, int] = (0, 0)
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    def take(self, load: Load) -> None:
        """Add what a load counted and what it found wrong."""
        self.operations += load.operations
        self.outcomes += load.outcomes
        self.problems += load.wrong
        self.lateness = max(load.lateness, self.lateness or -math.inf)

    def recovered(self, seconds: float) -> None:
        """Note how long it took to serve again; the longest counts."""
        self.recovery = max(seconds, self.recovery or 0.0)

    def drained(self, cache: dscache.AsyncCache) -> None:
        """Check that nothing is counted as pending any more."""
        counters = {name: cache.stats()[name] for name in COUNTERS}
        if any(counters.values()):
            self.problems.append(f"not drained: {counters}")

    def judge(self) -> None:
        """Compare what was measured with what it may be."""
        if self.lateness is not None and self.lateness > LATENESS:
            self.slow.append(f"{self.lateness * 1000:.0f} ms beyond a deadline")
        if self.recovery is not None and self.recovery > RECOVERY:
            self.slow.append(f"{self.recovery:.2f} s to serve again")
        if self.memory[1] - self.memory[0] > MEMORY:
            self.slow.append(f"memory grew by {(self.memory[1] - self.memory[0]) >> 20} MiB")
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
    """Measure what is around: time, memory and open files, and judge it at the end."""
    await _warm_up()
    gc.collect()
    # As servers do: a collection that walks all that was imported takes 100 ms of its own.
    gc.freeze()
    memory, files, began = resident(), open_files(), time.monotonic()
    try:
        yield
    finally:
        gc.unfreeze()
    figures.seconds = time.monotonic() - began
    await asyncio.sleep(0.05)
    gc.collect()
    figures.memory = figures.memory if figures.memory != (0, 0) else (memory, resident())
    figures.files = (files, open_files())
    figures.judge()


async def _warm_up() -> None:
    """Make what is made once in a process or loop, which belongs to no row's account."""
    async with FaultProxy("127.0.0.1", 1) as proxy:
        reader, writer = await asyncio.open_connection("localhost", proxy.port)
        with contextlib.suppress(ConnectionError):
            await reader.read()
            writer.close()
            await writer.wait_closed()
    await asyncio.sleep(0.05)


def resident() -> int:
    """Return how many bytes of memory this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        shown = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, check=True
        )
        return int(shown.stdout) * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Return how many files and sockets this process has open."""
    return len(os.listdir("/dev/fd"))
