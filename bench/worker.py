"""The process in which one Python client is measured, so that none disturbs another.

It takes one JSON object a line and answers with one. ``contestants.py`` starts it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import random
import resource
import sys
import time
import traceback
import tracemalloc
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

import msgspec

from peers import PYTHON, Peer, Python
from workload import KINDS, Start, Work, from_tasks, mixed_tasks, names_of, repeatedly, zipf_names

# The percentiles that a reply about latency lists.
PERCENTILES = (50, 90, 99, 99.9)
SEED = 1


class Sample:
    """The cost of some work: time, processor time, and allocations if they are counted."""

    def __init__(self) -> None:
        self._heap = _counted_allocations()
        self._calls, self._bytes = self._heap() if self._heap else (0, 0)
        self._cpu = _processor_seconds()
        self._began = time.perf_counter()

    def end(self, records: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._began
        told = {"records": records, "seconds": seconds, "cpu": _processor_seconds() - self._cpu}
        if self._heap:
            calls, size = self._heap()
            told |= {"allocations": calls - self._calls, "bytes": size - self._bytes}
        return told


@contextmanager
def _garbage(work: Work) -> Iterator[None]:
    """Collect all garbage first, and disable collection if the work is measured without."""
    gc.collect()
    if not work.collects:
        gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _processor_seconds() -> float:
    """Return the processor time of all threads, in user mode and in the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _counted_allocations() -> Callable[[], tuple[int, int]] | None:
    """Return a function for the calls of malloc so far and their bytes, if they are counted."""
    if "allocations" not in os.environ.get("LD_PRELOAD", ""):
        return None
    told = (ctypes.c_uint64 * 2).in_dll(ctypes.CDLL(None), "allocations")
    return lambda: (told[0], told[1])


def _resident_bytes() -> int:
    """Return the current memory of this process, or its peak without /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return _most_resident_bytes()


def _most_resident_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Worker:
    """Executes the lines' requests, with one client, or with several of its kind."""

    def __init__(self, peer: Peer, more: Callable[[], Awaitable[Peer]] | None = None) -> None:
        self._peer = peer
        self._more = more
        self._peers = [peer]
        self._kept: Any = None
        self._names: dict[tuple[str, int | None], list[str]] = {}
        self._zipf: list[str] = []

    def names(self, work: Work, count: int | None = None) -> Sequence[str]:
        if work.operation == "zipf":
            self._zipf = self._zipf or zipf_names()
            return self._zipf
        key = work.kind, count
        if key not in self._names:
            self._names[key] = names_of(work.kind, count)
        return self._names[key]

    # -- with a blocking client

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Execute a line's request. A blocking client can only be measured."""
        assert asked["do"] == "work", f"a client that blocks can't be asked for {asked['do']}"
        work = msgspec.convert(asked["work"], Work)
        self._peer.prepare(work)
        records: int = asked["records"]
        with _garbage(work):
            return self._measure_blocking(work, records)

    def _measure_blocking(self, work: Work, records: int) -> dict[str, float]:
        peer = self._peer
        if work.operation.endswith("_many"):
            many = peer.get_many if work.operation == "get_many" else peer.set_many
            names = self.names(work)[: work.size]
            sample = Sample()
            for _ in range(records // work.size):
                many(names)
            return sample.end(records // work.size * work.size)
        one = peer.set if work.operation == "set" else peer.get
        names = self.names(work)
        count = len(names)
        sample = Sample()
        for i in range(records):
            one(names[i % count])
        return sample.end(records)

    # -- with a client of asyncio

    async def answer_soon(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Execute a line's request."""
        work = msgspec.convert(asked["work"], Work)
        self._peer.prepare(work)
        with _garbage(work):
            return await self._do(asked, work)

    async def _do(self, asked: dict[str, Any], work: Work) -> dict[str, Any]:
        match asked["do"]:
            case "work":
                return await self._measure(work, asked["records"])
            case "store":
                return await self._store(work)
            case "latency":
                return await self._latency(work, asked["count"], asked["rate"], asked["window"])
            case "issue":
                return await self._issue(work)
            case "finish":
                return await self._finish()
            case "held":
                return await self._held(work)
            case "peak":
                return await self._peak(work)
            case unknown:
                raise ValueError(f"a worker can't {unknown}")

    async def _measure(self, work: Work, records: int) -> dict[str, float]:
        peer = self._peer
        if work.operation.endswith("_many"):
            many = peer.get_many if work.operation == "get_many" else peer.set_many
            names = self.names(work, max(work.size, KINDS[work.kind].stored))[: work.size]
            times = records // work.size
            sample = Sample()
            await repeatedly(many, times, names)
            return sample.end(times * work.size)
        names = self.names(work)
        peers = await self._several(work)
        tasks, each = work.tasks // len(peers), records // len(peers)
        start = Start(tasks * len(peers))
        if work.operation == "mixed":
            workloads = [mixed_tasks(peer.get, peer.set, tasks, each, names, start)]
        else:
            operations = [one.set if work.operation == "set" else one.get for one in peers]
            workloads = [from_tasks(one, tasks, each, names, start) for one in operations]
        working = asyncio.gather(*workloads)
        await start.all_there()
        # The tasks of a server are old, and have left the youngest generation of the collector.
        gc.collect()
        sample = Sample()
        start.give()
        await working
        return sample.end(each * len(peers))

    async def _several(self, work: Work) -> list[Peer]:
        """Return as many clients as the work wants, ready for it."""
        while len(self._peers) < work.connections:
            assert self._more is not None
            self._peers.append(await self._more())
        peers = self._peers[: work.connections]
        for peer in peers:
            peer.prepare(work)
        return peers

    async def close(self) -> None:
        for peer in self._peers:
            await peer.close()

    async def _store(self, work: Work) -> dict[str, Any]:
        """Write every record that will be read."""
        names = self.names(work, work.size)
        for first in range(0, len(names), 10_000):
            await self._peer.set_many(names[first : first + 10_000])
        return {}

    async def _latency(
        self, work: Work, count: int, rate: float | None, window: int
    ) -> dict[str, Any]:
        """Start operations at times drawn beforehand, regardless of their results.

        Each is timed from its intended start, so that one that delays those behind it counts for
        all of them. Without a rate, ``window`` operations are kept in flight.
        """
        draw = random.Random(SEED).expovariate
        due = array("d")
        at = 0.0
        for _ in range(count if rate else 0):
            at += draw(rate or 1)
            due.append(at)
        names, operation = self.names(work), self._peer.get
        some = len(names)
        latencies = array("d")
        failures: list[Any] = []
        clock, issue = time.perf_counter, asyncio.ensure_future
        all_ended = asyncio.Event()

        def ended(since: float, future: asyncio.Future[Any]) -> None:
            latencies.append(clock() - since)
            if len(latencies) == count:
                all_ended.set()
            if future.exception():
                failures.append(future.exception())

        began = clock()
        i = 0
        while i < count:
            now = clock()
            if rate:
                while i < count and began + due[i] <= now:
                    future = issue(operation(names[i % some]))
                    future.add_done_callback(partial(ended, began + due[i]))
                    i += 1
            else:
                while i < count and i - len(latencies) < window:
                    future = issue(operation(names[i % some]))
                    future.add_done_callback(partial(ended, now))
                    i += 1
            await asyncio.sleep(0)
        await all_ended.wait()
        if failures:
            raise failures[0]
        seconds = clock() - began
        ordered = sorted(latencies)
        told = {f"{one:g}": ordered[min(count - 1, int(count * one / 100))] for one in PERCENTILES}
        return {"rate": count / seconds, "percentiles": told, "most": ordered[-1]}

    async def _issue(self, work: Work) -> dict[str, Any]:
        """Issue operations while the server is stopped, and report the memory before and after."""
        names = self.names(work, work.size)
        get = self._peer.get
        before = _resident_bytes()
        self._kept = [asyncio.ensure_future(get(name)) for name in names]
        # Written at the end of this tick, and after that as much as the socket takes.
        await asyncio.sleep(1)
        return {"before": before, "after": _resident_bytes()}

    async def _finish(self) -> dict[str, Any]:
        """Wait for the issued operations."""
        self._kept = await asyncio.gather(*self._kept)
        return {"after": _resident_bytes()}

    async def _held(self, work: Work) -> dict[str, Any]:
        """Report the memory of a bulk's records while they are kept, as tracemalloc sees it."""
        names = self.names(work)[: work.size]
        await self._peer.get_many(names)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            kept = await self._peer.get_many(names)
            gc.collect()
            now, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return {"records": len(kept), "held": now - before, "peak": most - before}

    async def _peak(self, work: Work) -> dict[str, Any]:
        """Report by how much one bulk raises the peak memory of this process."""
        await self._peer.get_many(self.names(work)[:100])
        names = self.names(work, work.size)
        before = _resident_bytes()
        await self._peer.get_many(names)
        return {"records": len(names), "peak": _most_resident_bytes() - before}


def _error(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _work_blocking(peer: Peer, host: str, port: int, answers: TextIO) -> None:
    peer.open(host, port)
    worker = Worker(peer)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # the run continues without this row, or ends, at its choice
            answer = _error(error)
        print(json.dumps(answer), file=answers, flush=True)
    peer.close()


async def _work_soon(described: Python, host: str, port: int, answers: TextIO) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    peer = described.create()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await peer.open(host, port)

    async def more() -> Peer:
        another = described.create()
        await another.open(host, port)
        return another

    worker = Worker(peer, more)
    print("{}", file=answers, flush=True)
    while line := await lines.readline():
        try:
            answer = await worker.answer_soon(json.loads(line))
        except Exception as error:  # as above
            answer = _error(error)
        print(json.dumps(answer), file=answers, flush=True)
    await worker.close()


def main(name: str, host: str, port: str) -> None:
    # A client may print anything; only answers go to standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    described = PYTHON[name]
    peer = described.create()
    if peer.blocking:
        _work_blocking(peer, host, int(port), answers)
    elif described.uvloop:
        import uvloop

        uvloop.run(_work_soon(described, host, int(port), answers))
    else:
        asyncio.run(_work_soon(described, host, int(port), answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
