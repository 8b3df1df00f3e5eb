"""The process in which one Python client is measured, so that none disturbs another.

It takes one JSON object a line and answers with one: ``python -m clients.python NAME SERVER``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import sys
import threading
import time
import traceback
import tracemalloc
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any, TextIO

import msgspec

from clients.peers import PYTHON
from clients.work import DRAWS, KINDS, RECORDS, Work, drawn, names_of

PERCENTILES = (50, 90, 99, 99.9)
SEED = 1
WINDOW = 100
# The operations on one name that each client has as a method; all others read.
ONE_BY_ONE = ("set", "read", "fetch", "update", "rewrite", "replace")
# Rare delays need more operations to be seen.
LONGER = 5
# A hit of a near cache doesn't yield to the event loop, so readers yield to let invalidations in.
BURST = 500


class Sample:
    """The cost of some work: time, and processor time."""

    def __init__(self) -> None:
        self._cpu = _processor_seconds()
        self._began = time.perf_counter()

    def end(self, records: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._began
        return {"records": records, "seconds": seconds, "cpu": _processor_seconds() - self._cpu}


class Start:
    """A barrier for tasks: making thousands of them takes as long as their measured work."""

    def __init__(self, tasks: int) -> None:
        self._missing = tasks
        self._all_there = asyncio.Event()
        self._given = asyncio.Event()

    async def wait(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._all_there.set()
        await self._given.wait()

    async def measure(self, working: Awaitable[object], records: int) -> dict[str, float]:
        """Let all tasks begin together; return the cost of their work."""
        await self._all_there.wait()
        # The tasks of a server are old, and have left the youngest generation of the collector.
        gc.collect()
        sample = Sample()
        self._given.set()
        await working
        return sample.end(records)


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


def _resident_bytes(most: bool = False) -> int:
    """Return the current memory of this process; its peak if asked for, or without /proc."""
    if not most and os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Worker:
    """Executes the lines' requests, with one client, or with several of its kind."""

    def __init__(self, peer: Any, more: Callable[[], Awaitable[Any]] | None = None) -> None:
        self._peers = [peer]
        self._more = more
        self._kept: Any = None
        self._names: dict[tuple[str, int], list[str]] = {}
        self._names_read: dict[tuple[str, int], list[str]] = {}
        self._highest = 0.0

    def names(self, work: Work) -> list[str]:
        key = work.kind, work.stored
        if key not in self._names:
            self._names[key] = names_of(*key)
        return self._names[key]

    # -- with a blocking client

    def answer(self, work: Work, records: int) -> dict[str, float]:
        """Measure a blocking client."""
        (peer,) = self._peers
        peer.prepare(work)
        names = self.names(work)
        if work.operation in ("cached", "popular"):
            return self._in_threads(peer, work, records)
        one = getattr(peer, work.operation)
        if work.is_bulk:
            some, times = names[: work.size], records // work.size
            sample = Sample()
            for _ in range(times):
                one(some)
            return sample.end(times * work.size)
        sample = Sample()
        for name in islice(cycle(names), records):
            one(name)
        return sample.end(records)

    def _in_threads(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        """Read again and again what a near cache keeps, in as many threads as there are tasks."""
        names = self.names(work)
        if (key := (work.operation, work.size)) not in self._names_read:
            # A near cache is full before the first measurement.
            is_popular = work.operation == "popular"
            self._names_read[key] = drawn(names, 2 * DRAWS) if is_popular else names[:RECORDS]
            for first in range(0, len(names) if is_popular else RECORDS, RECORDS):
                peer.get_many(names[first : first + RECORDS])
        get, kept = peer.get, self._names_read[key]
        each = max(1, records // work.tasks)

        def read() -> None:
            for name in islice(cycle(kept), each):
                get(name)

        if work.tasks == 1:
            sample = Sample()
            read()
            return sample.end(each)
        begin = threading.Barrier(work.tasks + 1)

        def task() -> None:
            begin.wait()
            read()

        threads = [threading.Thread(target=task) for _ in range(work.tasks)]
        for thread in threads:
            thread.start()
        begin.wait()
        sample = Sample()
        for thread in threads:
            thread.join()
        return sample.end(each * work.tasks)

    # -- with a client of asyncio

    async def answer_soon(self, what: str, work: Work, records: int) -> dict[str, Any]:
        """Execute a line's request."""
        (peer, *_) = self._peers
        peer.prepare(work)
        if what != "work":
            answer: dict[str, Any] = await getattr(self, f"_{what}")(peer, work)
            return answer
        one_by_one = self._many if work.is_bulk else self._one_by_one
        measured = getattr(self, f"_{work.operation}", one_by_one)
        return await measured(peer, work, records)

    async def _many(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        many = getattr(peer, work.operation)
        size, names = work.size, self.names(work)
        times = records // (work.tasks * size)
        start = Start(work.tasks)

        async def task(some: Sequence[str]) -> None:
            await start.wait()
            for _ in range(times):
                await many(some)

        parts = [(names[i * size :] + names)[:size] for i in range(work.tasks)]
        working = asyncio.gather(*(task(part) for part in parts))
        return await start.measure(working, times * work.tasks * size)

    async def _one_by_one(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        """Let each task take the next name when it is done with one, so that they end together.

        Tasks in step have different names, as reads of one name in a tick would share one read.
        """
        peers = await self._several(work)
        names = self.names(work)
        names = drawn(names) if work.operation == "zipf" else names
        start = Start(work.tasks)

        async def task(operation: Callable[[str], Awaitable[object]], left: Iterator[str]) -> None:
            await start.wait()
            for name in left:
                await operation(name)

        async def mixed(left: Iterator[tuple[str, Any]]) -> None:
            await start.wait()
            for name, operation in left:
                await operation(name)

        each = records // len(peers)
        workers: list[Awaitable[None]] = []
        for one in peers:
            left = islice(cycle(names), each)
            if work.operation == "mixed":
                pairs = zip(left, cycle((one.set, *[one.get] * 9)), strict=False)
                workers += [mixed(pairs) for _ in range(work.tasks)]
            else:
                operation = getattr(one, work.operation if work.operation in ONE_BY_ONE else "get")
                tasks = work.tasks // len(peers)
                workers += [task(operation, left) for _ in range(tasks)]
        return await start.measure(asyncio.gather(*workers), each * len(peers))

    async def _several(self, work: Work) -> list[Any]:
        """Return as many clients as the work wants, ready for it."""
        while len(self._peers) < work.connections:
            assert self._more is not None
            self._peers.append(await self._more())
        for peer in self._peers[: work.connections]:
            peer.prepare(work)
        return self._peers[: work.connections]

    async def _cached(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        get, names = peer.get, self.names(work)[:RECORDS]
        bursts = cycle((names[:BURST], names[BURST:]))
        times = -(-records // BURST)
        sample = Sample()
        for some in islice(bursts, times):
            for name in some:
                await get(name)
            await asyncio.sleep(0)
        return sample.end(times * BURST)

    async def _popular(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        if not self._kept:
            # A near cache is full before the first measurement.
            self._kept = drawn(self.names(work), 2 * DRAWS)
            await peer.get_many(self.names(work))
        get, names = peer.get, self._kept
        start = Start(work.tasks)
        each = max(1, records // work.tasks)

        async def task(at: int) -> None:
            await start.wait()
            for first in range(at, at + each, BURST):
                begin = first % (len(names) - BURST)
                for name in names[begin : begin + min(BURST, at + each - first)]:
                    await get(name)
                await asyncio.sleep(0)

        starts = (random.randrange(len(names)) for _ in range(work.tasks))
        working = asyncio.gather(*map(task, starts))
        return await start.measure(working, each * work.tasks)

    async def _messages(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        async with peer.listening():
            sample = Sample()
            await peer.exchange(records, work.tasks)
            return sample.end(records)

    async def _scan(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        prefix = f"{KINDS[work.kind].folder}/"
        found = 0
        sample = Sample()
        while found < records:
            found += await peer.scan(prefix)
        return sample.end(found)

    async def _watch(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        """Write all names again and again, each time once the changes of all were heard."""
        names = self.names(work)[: max(1, records)]
        times = -(-records // len(names))
        async with peer.watch(f"{KINDS[work.kind].folder}/") as changes:
            sample = Sample()
            for _ in range(times):
                left = set(names)
                writing = asyncio.ensure_future(peer.set_many(names))
                async for change in changes:
                    left.discard(change.name)
                    if not left:
                        break
                await writing
            return sample.end(times * len(names))

    async def _hear(self, peer: Any, work: Work, records: int) -> dict[str, float]:
        async with peer.watch(f"{KINDS[work.kind].folder}/") as changes:
            sample = Sample()
            for name in islice(cycle(self.names(work)), records):
                writing = asyncio.ensure_future(peer.set(name))
                async for change in changes:
                    if change.name == name:
                        break
                await writing
            return sample.end(records)

    async def _latency(self, peer: Any, work: Work, records: int) -> dict[str, Any]:
        """Time operations that start at times drawn beforehand, regardless of their results."""
        if not self._highest:
            told = await self._open_loop(peer, work, max(records, 20 * WINDOW), 0)
            self._highest = told["rate"]
        rate = work.rate or self._highest / 2
        count = LONGER * records
        told = await self._open_loop(peer, work, count, rate)
        return told | {"records": count, "seconds": count / rate}

    async def _open_loop(self, peer: Any, work: Work, count: int, rate: float) -> dict[str, Any]:
        """Each operation is timed from its intended start: one that delays others counts for all.

        Without a rate, a constant number of operations is kept in flight.
        """
        draw = random.Random(SEED).expovariate
        due = array("d")
        at = 0.0
        for _ in range(count if rate else 0):
            at += draw(rate)
            due.append(at)
        names, operation = cycle(self.names(work)), peer.get
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
            while i < count and (began + due[i] <= now if rate else i - len(latencies) < WINDOW):
                future = issue(operation(next(names)))
                future.add_done_callback(partial(ended, began + due[i] if rate else now))
                i += 1
            await asyncio.sleep(0)
        await all_ended.wait()
        if failures:
            raise failures[0]
        ordered = sorted(latencies)
        told = {f"p{p:g}": ordered[min(count - 1, int(count * p / 100))] for p in PERCENTILES}
        return {"rate": count / (clock() - began), "each": told["p50"], **told}

    async def close(self) -> None:
        for peer in self._peers:
            await peer.close()

    # -- not measurements of time

    async def _store(self, peer: Any, work: Work) -> dict[str, Any]:
        """Write every record that will be read."""
        names = self.names(work)
        for first in range(0, len(names), 10_000):
            await peer.set_many(names[first : first + 10_000])
        return {}

    async def _issue(self, peer: Any, work: Work) -> dict[str, Any]:
        """Issue reads while the server is stopped, and report the memory before and after."""
        names, get = names_of(work.kind, work.size), peer.get
        before = _resident_bytes()
        self._kept = [asyncio.ensure_future(get(name)) for name in names]
        # Written at the end of this tick, and after that as much as the socket takes.
        await asyncio.sleep(1)
        return {"before": before, "after": _resident_bytes()}

    async def _finish(self, peer: Any, work: Work) -> dict[str, Any]:
        """Wait for the issued reads."""
        self._kept = await asyncio.gather(*self._kept)
        return {"after": _resident_bytes()}

    async def _held(self, peer: Any, work: Work) -> dict[str, Any]:
        """Report the memory of a bulk's records while they are kept, as tracemalloc sees it."""
        names = self.names(work)[: work.size]
        await peer.get_many(names)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            kept = await peer.get_many(names)
            gc.collect()
            now, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return {"records": len(kept), "bytes": now - before}

    async def _peak(self, peer: Any, work: Work) -> dict[str, Any]:
        """Report by how much one bulk raises the peak memory of this process."""
        names = self.names(work)[: work.size]
        await peer.get_many(names[:100])
        before = _resident_bytes()
        await peer.get_many(names)
        return {"records": len(names), "bytes": _resident_bytes(most=True) - before}


def _error(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _asked(line: str | bytes) -> tuple[str, Work, int]:
    asked = json.loads(line)
    return asked["do"], msgspec.convert(asked["work"], Work), asked["records"]


def _work_blocking(peer: Any, where: dict[str, Any], answers: TextIO) -> None:
    peer.open(where)
    worker = Worker(peer)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        _, work, records = _asked(line)
        try:
            with _garbage(work):
                answer: dict[str, Any] = worker.answer(work, records)
        except Exception as error:  # the run reports it in this benchmark
            answer = _error(error)
        print(json.dumps(answer), file=answers, flush=True)
    peer.close()


async def _work_soon(
    create: Callable[[], Any], peer: Any, where: dict[str, Any], answers: TextIO
) -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await peer.open(where)

    async def more() -> Any:
        another = create()
        await another.open(where)
        return another

    worker = Worker(peer, more)
    print("{}", file=answers, flush=True)
    while line := await lines.readline():
        what, work, records = _asked(line)
        try:
            with _garbage(work):
                answer = await worker.answer_soon(what, work, records)
        except Exception as error:  # as above
            answer = _error(error)
        print(json.dumps(answer), file=answers, flush=True)
    await worker.close()


def main(name: str, server: str) -> None:
    # A client may print anything; only answers go to standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    described = PYTHON[name]
    peer, where = described.create(), json.loads(server)
    if peer.blocking:
        _work_blocking(peer, where, answers)
    elif described.uvloop:
        import uvloop

        uvloop.run(_work_soon(described.create, peer, where, answers))
    else:
        asyncio.run(_work_soon(described.create, peer, where, answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
