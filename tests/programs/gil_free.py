"""Use dscache in many threads at once: without the GIL where this Python can do without.

    python -m tests.programs.gil_free --seconds 600     check all that is read
    python -m tests.programs.gil_free --scaling         what two threads do in the time of one

Threads of one kind each have an event loop and an AsyncCache, threads of the other kind share one
Cache, and some of these come and go. All of them share Records, and count on one server. What was
found is printed as JSON. hiredis and redis-py stay outside: they switch the GIL on.

A record tells in its data which name and version it has to have. Each name has one thread that
writes it. Each read is held against these rules:

1. The data is that of the name and the version, and all threads get the same object of a Record.
2. The thread that writes a name reads what it has written, through the cache by which it writes.
3. No thread reads a version that is older than one that it has read by the same cache, or newer
   than the last one that was begun to be written.
4. A fetch returns the record of its name. Some of these are loaded, and any thread removes them.
5. A record that was dropped is no hit, however late a thread that has found it goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import pickle
import random
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import dscache
from dscache import _backend
from dscache.embedded import EmbeddedServer

LOOPS, BLOCKING, FETCHING, PASSING = 4, 4, 3, 2
NAMES = 12  # of each thread
SHARED = 64
LOADED = [f"loaded/{i}" for i in range(8)]
HITS = 100_000
MOST_PROBLEMS = 5
OPTIONS: dict[str, Any] = {"commandTimeout": 60_000, "connectTimeout": 60_000}
Record = dscache.Record[Any]


def data_of(name: str, version: int) -> Any:
    """Return the data that a record has to have."""
    return {"name": name, "version": version, "list": [version] * (version % 40), "text": name * 3}


def load(name: str) -> Any:
    """Return the data of a record that is missing."""
    return data_of(name, 7)


async def async_load(name: str) -> Any:
    return load(name)


# The options of some calls of fetch; those of a call in a program's text have names of their own.
FETCHES: list[dict[str, Any]] = [
    {"ttl": 60, "jitter": 0},
    {"ttl": 60, "refresh_after": 1},
    {"refresh_after": 1, "ttl": 90},
    {"ttl": 60, "keep_missing": 5},
]


class Board:
    """Objects that the threads share, beside the cache."""

    def __init__(self, url: str, ends: float) -> None:
        self.url = url
        self.ends = ends
        self.records: list[Record | None] = [None] * SHARED
        self.problems: list[str] = []
        # For each name, the last version that its thread has begun to write.
        self.begun: dict[str, int] = {
            f"{number}/{i}": 0 for number in range(LOOPS + BLOCKING) for i in range(NAMES)
        }
        self.names = [*self.begun]
        self.counts: list[int] = []
        self.passed = 0

    @property
    def is_over(self) -> bool:
        """Whether the time is up, or enough has been found."""
        return time.monotonic() >= self.ends or len(self.problems) >= MOST_PROBLEMS

    def open(self, cache: Any, records: int = 100) -> Any:
        """Open a cache of a class, with a near cache of so many records."""
        near = {"nearCache": {"maxRecords": records}}
        options = {"url": self.url, "maxConnections": 3, **OPTIONS, **near}
        if cache is dscache.AsyncCache:
            del options["maxConnections"]
        return cache.from_config({"name": "redis", "options": options})


class Worker:
    """One thread's part: what it does next, and whether what it reads is right."""

    def __init__(self, board: Board, number: int | None) -> None:
        self.board = board
        self.random = random.Random(number)
        self.own = [] if number is None else [f"{number}/{i}" for i in range(NAMES)]
        self.seen: dict[str, int] = {}
        self.count = 0

    def begin(self, name: str) -> tuple[int, Any]:
        """Return the next version of an own name, and its data."""
        version = self.board.begun[name] + 1
        self.board.begun[name] = version
        return version, data_of(name, version)

    def check(self, name: str, record: Record | None) -> None:
        """Check a record that was just read."""
        if record is None:
            assert name not in self.seen, f"{name}: gone"
            return
        assert record.name == name, f"{name}: {record!r}"
        self.check_version(name, record.version)
        self.check_data(record)
        place = self.random.randrange(SHARED)
        self.board.records[place] = record
        other = self.board.records[self.random.randrange(SHARED)]
        if other is not None:
            self.check_data(other)
            if self.count % 16 == 0:
                assert pickle.loads(pickle.dumps(other)) == other
                assert (hash(other), repr(other)) == (hash(other), repr(other))

    def check_version(self, name: str, version: int) -> None:
        """Check the version that was just read of a name."""
        begun = self.board.begun[name]
        least = begun if name in self.own else self.seen.get(name, 1)
        assert least <= version <= begun, f"{name}: read {version} of {least} to {begun}"
        self.seen[name] = version

    def check_data(self, record: Record) -> None:
        data = record.data
        assert data is record.data, f"{record!r}: decoded twice"
        assert data == data_of(record.name, record.version), f"{record!r}: {data}"

    def check_fetched(self, name: str, record: Record | None) -> None:
        """Check a record that others may remove."""
        assert record is not None, f"{name}: not loaded"
        assert (record.name, record.data) == (name, load(name)), f"{name}: {record!r}"

    def is_there(self, name: str) -> bool:
        """Whether there is a record of the name, which nobody removes."""
        return name in self.seen or (name in self.own and self.board.begun[name] > 0)

    def some(self) -> list[str]:
        return self.random.sample(self.board.names, 10)

    def guarded(self, work: Callable[[], Any]) -> None:
        """Do the work of the thread, and put down what goes wrong."""
        try:
            work()
        except BaseException:
            self.board.problems.append(traceback.format_exc(limit=-6))
        self.board.counts.append(self.count)


def loop_thread(board: Board, number: int) -> None:
    """Use an AsyncCache in a loop of its own."""
    worker = Worker(board, number)
    worker.guarded(lambda: asyncio.run(_in_loop(board, worker)))


async def _in_loop(board: Board, worker: Worker) -> None:
    async with board.open(dscache.AsyncCache) as cache:
        while not board.is_over:
            for _ in range(20):
                await _async_step(worker, cache)
                worker.count += 1
            cache.stats()


async def _async_step(worker: Worker, cache: Any) -> None:
    kind = worker.random.randrange(10)
    name = worker.random.choice(worker.board.names)
    own = worker.random.choice(worker.own)
    if kind == 9:
        await _async_fetch(worker, cache, name)
    elif kind == 0:
        assert await cache.set(own, *worker.begin(own)) is True
        worker.check(own, await cache.get(own))
    elif kind == 1:
        await cache.set_bulk({one: worker.begin(one) for one in worker.own})
    elif kind == 2:
        for one, record in (await cache.get_bulk(worker.some())).items():
            worker.check(one, record)
    elif kind == 3:
        version = await cache.head(name)
        if version is not None:
            worker.check_version(name, version)
    else:
        several = [worker.random.choice(worker.board.names) for _ in range(6)]
        for one, record in zip(
            several, await asyncio.gather(*map(cache.get, several)), strict=True
        ):
            worker.check(one, record)


async def _async_fetch(worker: Worker, cache: Any, name: str) -> None:
    if worker.is_there(name):
        worker.check(name, await cache.fetch(name, async_load, ttl=60))
    name = worker.random.choice(LOADED)
    fetched = (cache.fetch(name, async_load, **options) for options in FETCHES)
    for record in await asyncio.gather(*fetched):
        worker.check_fetched(name, record)
    if worker.count % 8 == 0:
        await cache.delete(name)


def blocking_thread(board: Board, cache: dscache.Cache, number: int) -> None:
    """Use the one Cache."""
    worker = Worker(board, number)

    def work() -> None:
        while not board.is_over:
            _step(worker, cache)
            worker.count += 1

    worker.guarded(work)


def passing_thread(board: Board, cache: dscache.Cache) -> None:
    """Read a little of the one Cache, in a thread that ends soon."""
    worker = Worker(board, None)

    def work() -> None:
        for name in worker.some():
            worker.check(name, cache.get(name))
            worker.count += 1

    worker.guarded(work)
    board.passed += 1


def _step(worker: Worker, cache: dscache.Cache) -> None:
    kind = worker.random.randrange(10)
    name = worker.random.choice(worker.board.names)
    own = worker.random.choice(worker.own)
    if kind >= 8:
        _fetch(worker, cache, name)
    elif kind == 0:
        assert cache.set(own, *worker.begin(own)) is True
        worker.check(own, cache.get(own))
    elif kind == 1:
        cache.set_bulk({one: worker.begin(one) for one in worker.own})
    elif kind == 2:
        for one, record in cache.get_bulk(worker.some()).items():
            worker.check(one, record)
    elif kind == 3:
        version = cache.head(name)
        if version is not None:
            worker.check_version(name, version)
    else:
        for _ in range(6):
            worker.check(name, cache.get(name))


def _fetch(worker: Worker, cache: dscache.Cache, name: str) -> None:
    if worker.is_there(name):
        worker.check(name, cache.fetch(name, load, ttl=60))
    name = worker.random.choice(LOADED)
    for options in FETCHES:
        worker.check_fetched(name, cache.fetch(name, load, **options))
    if worker.count % 8 == 0:
        cache.delete(name)


def fetching_thread(board: Board, cache: dscache.Cache) -> None:
    """Fetch from a Cache with hardly any room, by functions and options that differ each time."""
    worker = Worker(board, None)

    def work() -> None:
        loads = [eval("lambda name: load(name)", globals()) for _ in range(4)]
        while not board.is_over:
            name = worker.random.choice(LOADED)
            one = loads[worker.count % len(loads)]
            for _ in range(20):
                worker.check_fetched(name, cache.fetch(name, one, ttl=60))
            for options in FETCHES:
                worker.check_fetched(name, cache.fetch(name, one, **options))
            worker.count += 1

    worker.guarded(work)


def counted_hits(cache: dscache.Cache) -> tuple[int, int]:
    """Return how often threads fetched a cached record, and how many hits were counted."""
    for name in LOADED:
        cache.fetch(name, load, ttl=60)
    barrier = threading.Barrier(2)

    def work() -> None:
        barrier.wait()
        for _ in range(HITS // len(LOADED)):
            for name in LOADED:
                cache.fetch(name, load, ttl=60)

    # Again if a record was read anew, as after a pause of the machine.
    for _ in range(20):
        before = cache.stats()["near_cache"]
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = cache.stats()["near_cache"]
        if after["misses"] == before["misses"]:
            break
    return 2 * HITS, after["hits"] - before["hits"]


def late_hits(seconds: float) -> int:
    """Return how often a record was a hit although it was cached only while no hits were allowed.

    It is dropped before each confirmation that all changes are known, and cached anew after that
    confirmation is too old for hits.
    """
    core: Any = _backend.core
    missing = object()
    near = core.SharedNearCache(lambda _n, _t: missing, lambda _n: missing, idle_limit=1.0)
    node = near.only_node()
    node.connected("node", time.monotonic())
    ends = time.monotonic() + seconds
    late: list[int] = []

    def read() -> None:
        hits = 0
        while time.monotonic() < ends:
            for _ in range(1000):
                hits += near.get("a") is not missing
        late.append(hits)

    reader = threading.Thread(target=read)
    # Without the check for it, the pure core has some 30 late hits in a second, and hardly one if
    # the threads take turns of 5 ms.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reader.start()
    version = 0
    while time.monotonic() < ends:
        version += 1
        near.confirm(node.epoch, time.monotonic() - 5)
        near.settle(near.begin_read("a"), core.Record("a", version, b"{}"), True)
        near.invalidate([b"a_v"])
        near.observe("a", None)  # which drops it in any case
        near.confirm(node.epoch, time.monotonic())
    reader.join()
    sys.setswitchinterval(interval)
    return late[0]


def run(seconds: float) -> dict[str, Any]:
    """Return what was found in so many seconds, and a fifth of them for ``late_hits``."""
    with EmbeddedServer() as server:
        board = Board(server.url, 0)
        with board.open(dscache.Cache) as cache:
            fetched, counted = counted_hits(cache)
        board.ends = time.monotonic() + seconds
        with board.open(dscache.Cache) as cache, board.open(dscache.Cache, 5) as small:
            threads = [threading.Thread(target=loop_thread, args=(board, i)) for i in range(LOOPS)]
            for _ in range(FETCHING):
                threads.append(threading.Thread(target=fetching_thread, args=(board, small)))
            for i in range(LOOPS, LOOPS + BLOCKING):
                arguments = (board, cache, i)
                threads.append(threading.Thread(target=blocking_thread, args=arguments))
            for thread in threads:
                thread.start()
            looks = 0
            while not board.is_over:
                arguments = (board, cache)
                passing = [
                    threading.Thread(target=passing_thread, args=arguments) for _ in range(PASSING)
                ]
                for thread in passing:
                    thread.start()
                while any(thread.is_alive() for thread in passing):
                    cache.stats()
                    looks += 1
                for thread in passing:
                    thread.join()
            for thread in threads:
                thread.join()
            stats = cache.stats()
    return {
        **_interpreter(),
        "fetched": fetched,
        "counted": counted,
        "late_hits": late_hits(seconds / 5),
        "problems": board.problems,
        "steps": sum(board.counts),
        "passed": board.passed,
        "looks": looks,
        "hits": stats["near_cache"]["hits"],
        "pending": stats["pending"],
    }


def _interpreter() -> dict[str, Any]:
    return {
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "hiredis": "hiredis" in sys.modules,
        "backend": dscache.BACKEND,
    }


# -- what two threads do in the time of one


def scaling(rounds: int, seconds: float) -> dict[str, Any]:
    """Return, of each kind of work, how much more two threads do than one, by the median.

    ``ratio`` is of a second, ``of_processors`` of a second of the processors, which counts on a
    machine that has other work. Three things bound what dscache can reach: ``loop`` is of threads
    that share nothing, ``futures`` of threads that only await done futures, and ``processes`` of
    two processes with one thread each.
    """
    figures: dict[str, Any] = _interpreter()
    with EmbeddedServer() as server:
        board = Board(server.url, 0)
        with board.open(dscache.Cache) as cache:
            cache.set_bulk({f"s{i}": (1, data_of(f"s{i}", 20)) for i in range(1000)})
        for kind in (
            _loop,
            _futures,
            _near_hits,
            _near_hits_of_own_caches,
            _near_hits_of_one_cache,
            _bulk_hits_of_one_cache,
            _decoded_bulks,
        ):
            ratios, of_processors, processes, rates = [], [], [], []
            for _ in range(rounds):
                one, one_of_processors = _rates(board, kind, 1, seconds)
                two, two_of_processors = _rates(board, kind, 2, seconds)
                rates.append(one)
                ratios.append(two / one)
                of_processors.append(two_of_processors / one_of_processors)
                one, two = (_rate_of_processes(board, kind, n, seconds) for n in (1, 2))
                processes.append(two / one)
            figures[kind.__name__[1:]] = {
                "per_second": round(statistics.median(rates)),
                "ratio": round(statistics.median(ratios), 2),
                "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
                "of_processors": round(statistics.median(of_processors), 2),
                "processes": round(statistics.median(processes), 2),
            }
    return figures


def _rates(
    board: Board, kind: Callable[..., int], count: int, seconds: float
) -> tuple[float, float]:
    """Return what threads do in a second, and in a second of the processor of each."""
    barrier = threading.Barrier(count)
    done: list[float] = []
    of_processor: list[float] = []

    with board.open(dscache.Cache) as cache:

        def work(number: int) -> None:
            begun = time.thread_time()
            times = kind(board, cache, number, barrier, seconds)
            done.append(times / seconds)
            of_processor.append(times / (time.thread_time() - begun))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(done), sum(of_processor)


def _rate_of_processes(board: Board, kind: Callable[..., int], count: int, seconds: float) -> float:
    """Return what processes with one thread each do in a second."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(count), context.SimpleQueue()
    processes = [
        context.Process(target=_process, args=(board, kind, i, barrier, seconds, times))
        for i in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"{kind.__name__}: a process ended with {process.exitcode}"
    return sum(times.get() for _ in processes) / seconds


def _process(
    board: Board, kind: Callable[..., int], number: int, barrier: Any, seconds: float, times: Any
) -> None:
    with board.open(dscache.Cache) as cache:
        times.put(kind(board, cache, number, barrier, seconds))


def _loop(_board: Board, _cache: Any, _number: int, barrier: Any, seconds: float) -> int:
    count = 0
    barrier.wait()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for _ in range(1000):
            pass
        count += 1000
    return count


def _futures(_board: Board, _cache: Any, _number: int, barrier: Any, seconds: float) -> int:
    async def work() -> int:
        loop = asyncio.get_running_loop()
        count = 0
        await asyncio.to_thread(barrier.wait)
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends:
            for i in range(50):
                future = loop.create_future()
                future.set_result(i)
                await future
            count += 50
        return count

    return asyncio.run(work())


def _near_hits(board: Board, _cache: Any, number: int, barrier: Any, seconds: float) -> int:
    async def work() -> int:
        names = [f"s{number * 50 + i}" for i in range(50)]
        async with board.open(dscache.AsyncCache) as cache:
            for name in names:
                await cache.get(name)
            count = 0
            await asyncio.to_thread(barrier.wait)
            ends = time.perf_counter() + seconds
            while time.perf_counter() < ends:
                for name in names:
                    await cache.get(name)
                count += len(names)
            return count

    return asyncio.run(work())


def _near_hits_of_own_caches(
    board: Board, _cache: Any, number: int, barrier: Any, seconds: float
) -> int:
    with board.open(dscache.Cache) as cache:
        return _near_hits_of_one_cache(board, cache, number, barrier, seconds)


def _near_hits_of_one_cache(
    _board: Board, cache: Any, number: int, barrier: Any, seconds: float
) -> int:
    def read(names: list[str]) -> None:
        for name in names:
            cache.get(name)

    return _hits(read, number, barrier, seconds)


def _bulk_hits_of_one_cache(
    _board: Board, cache: Any, number: int, barrier: Any, seconds: float
) -> int:
    return _hits(cache.get_bulk, number, barrier, seconds)


def _hits(read: Callable[[list[str]], object], number: int, barrier: Any, seconds: float) -> int:
    """Return how many names of its own a thread reads in that time, after the first read."""
    names = [f"s{number * 50 + i}" for i in range(50)]
    read(names)
    count = 0
    barrier.wait()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        read(names)
        count += len(names)
    return count


def _decoded_bulks(board: Board, _cache: Any, _number: int, barrier: Any, seconds: float) -> int:
    async def work() -> int:
        names = [f"s{i}" for i in range(1000)]
        options = {"url": board.url, **OPTIONS}
        config = {"name": "redis", "options": options}
        async with dscache.AsyncCache.from_config(config) as cache:
            count = 0
            await asyncio.to_thread(barrier.wait)
            ends = time.perf_counter() + seconds
            while time.perf_counter() < ends:
                for record in (await cache.get_bulk(names)).values():
                    assert record.data
                count += len(names)
            return count

    return asyncio.run(work())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.scaling:
        print(json.dumps(scaling(arguments.rounds, 1.0), indent=2))
        return
    print(json.dumps(run(arguments.seconds)))


if __name__ == "__main__":
    main()
