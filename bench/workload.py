"""The workloads: the documents, their names, and how many tasks work on them.

JSON goes through msgspec for every Python client, so that clients are compared, not decoders.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import msgspec

from dscache import _backend
from dscache.embedded import EmbeddedServer

DOCUMENT = {
    "firstname": "Ada",
    "lastname": "Lovelace",
    "age": 36,
    "email": "ada@ex.org",
    "tags": ["math", "engine"],
    "active": True,
    "score": 12.5,
}
VERSION = 1
RECORDS = 1000
NAMES = [f"user/{number}" for number in range(RECORDS)]
CORES = {"fast": "dscache._fast", "pure": "dscache.core.pure"}

encode: Callable[[object], bytes] = msgspec.json.Encoder().encode
decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode


@dataclass(frozen=True)
class Kind:
    """Documents of one size, and how many records of them are stored."""

    folder: str
    document: object
    stored: int

    @property
    def bytes(self) -> int:
        return len(encode(self.document))


ORDINARY = "123 B"
KINDS = {
    "20 B": Kind("flag", {"n": 123, "ok": False}, 1_000),
    ORDINARY: Kind("user", DOCUMENT, 10_000),
    "2 KB": Kind("team", {"members": [DOCUMENT] * 16}, 1_000),
    "100 KB": Kind("town", {"people": [DOCUMENT] * 813}, 100),
}
SIZES = tuple(KINDS)
# Records that are only written: reads of the others must not find their long versions.
WRITTEN = "written"
KINDS[WRITTEN] = Kind(WRITTEN, DOCUMENT, 10_000)
# As in YCSB: the most popular of 10,000 records is requested in every tenth read.
ZIPF = 0.99
DRAWS = 100_000


def names_of(kind: str, count: int | None = None) -> list[str]:
    """Return the names of that many records of a kind; by default of all that are stored."""
    folder = KINDS[kind].folder
    return [f"{folder}/{number}" for number in range(count or KINDS[kind].stored)]


def zipf_names() -> list[str]:
    """Return names in the order of requests when some are more popular."""
    return drawn(names_of(ORDINARY), DRAWS)


def drawn(names: Sequence[str], count: int) -> list[str]:
    """Return that many names, the first ones as often as Zipf's law has it."""
    weights = accumulate(1 / rank**ZIPF for rank in range(1, len(names) + 1))
    return random.Random(1).choices(names, cum_weights=list(weights), k=count)


@dataclass(frozen=True)
class Work:
    """The work measured by one row of a table."""

    operation: str
    """get, set, mixed (nine gets to a set), zipf (gets), get_many or set_many."""
    tasks: int = 1
    """How many tasks do it at a time, each one record after the other."""
    size: int = RECORDS
    """Of a bulk."""
    decode: bool = True
    """Whether each document read is decoded, or left as text."""
    kind: str = ORDINARY
    ttl: int | None = None
    if_newer: bool = False
    connections: int = 1
    """Of as many clients in one process, between which the tasks are divided."""
    collects: bool = True
    """Whether Python collects garbage meanwhile."""

    @property
    def least(self) -> int:
        """The smallest sensible number of records."""
        return self.size if self.operation.endswith("_many") else self.tasks


def core(name: str) -> ModuleType:
    """Return the core of that name; a missing one must fail the run, not shorten the table."""
    return importlib.import_module(CORES[name])


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Let caches that are opened in this block use the core of that name."""
    with patch.multiple(_backend, core=core(name), BACKEND=name):
        yield


@contextmanager
def apart(server: EmbeddedServer) -> Iterator[str]:
    """Keep this process and the server on separate cores; yield a sentence that says so.

    Processes started in the block stay on this process's core. Neither core sleeps meanwhile, as
    under the load that is meant here. On a virtual machine, waking one takes a multiple of the
    measured time: with both asleep, a read that takes 75 us took 300, and a bulk of 1000 that takes
    1.1 ms took 3.7.

    With a single core, or if the system can't pin a process, nothing is changed.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield "client and server where the system puts them"
        return
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        yield "client and server share one core"
        return
    ours, theirs, *_ = sorted(allowed)
    os.sched_setaffinity(server.pid, {theirs})
    os.sched_setaffinity(0, {ours})
    spinner = str(Path(__file__).with_name("spinner.py"))
    spinners = [subprocess.Popen([sys.executable, spinner, str(core)]) for core in (ours, theirs)]
    try:
        yield f"client on core {ours}, server on core {theirs}, both kept awake"
    finally:
        for one in spinners:
            one.kill()
            one.wait()
        os.sched_setaffinity(0, allowed)


def share_core(server: EmbeddedServer, beside: EmbeddedServer) -> None:
    """Put a server on the core of another one, if possible."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(server.pid, os.sched_getaffinity(beside.pid))


def keys_of(names: Sequence[str]) -> list[str]:
    """Return the keys of records, in the order in which a bulk requests them."""
    return [key for name in names for key in (name + "_v", name + "_d")]


class Start:
    """A barrier for tasks: making thousands of them takes as long as their measured work."""

    def __init__(self, tasks: int) -> None:
        self._missing = tasks
        self._all_there = asyncio.Event()
        self._given = asyncio.Event()

    async def wait(self) -> None:
        """Wait until it is given."""
        self._missing -= 1
        if not self._missing:
            self._all_there.set()
        await self._given.wait()

    async def all_there(self) -> None:
        """Wait until all tasks wait."""
        await self._all_there.wait()

    def give(self) -> None:
        """Let all tasks continue."""
        self._given.set()


async def from_tasks(
    operation: Callable[[str], Awaitable[object]],
    tasks: int,
    records: int,
    names: Sequence[str] = NAMES,
    start: Start | None = None,
) -> None:
    """Await ``operation`` for that many records altogether, from that many tasks at a time.

    Each takes the next name when it is done with one, so that they end together; tasks in step have
    different names, as reads of one name in a tick would share one read.
    """
    left = islice(cycle(names), records)

    async def task() -> None:
        if start is not None:
            await start.wait()
        for name in left:
            await operation(name)

    await asyncio.gather(*(task() for _ in range(tasks)))


async def mixed_tasks(
    get: Callable[[str], Awaitable[object]],
    set_: Callable[[str], Awaitable[object]],
    tasks: int,
    records: int,
    names: Sequence[str],
    start: Start,
) -> None:
    """The same with two operations: nine times the first, then the second."""
    left = zip(islice(cycle(names), records), cycle((set_, *[get] * 9)), strict=False)

    async def task() -> None:
        await start.wait()
        for name, operation in left:
            await operation(name)

    await asyncio.gather(*(task() for _ in range(tasks)))


async def repeatedly(
    operation: Callable[[Sequence[str]], Awaitable[object]],
    times: int,
    names: Sequence[str] = NAMES,
) -> None:
    """Await a bulk ``operation`` on all names that many times, one after the other."""
    for _ in range(times):
        await operation(names)
