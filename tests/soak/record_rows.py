"""Soak rows of what programs do with records: updates, fetches, watches and scans, many at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from array import array
from collections.abc import AsyncIterator
from typing import Any

import redis as redis_py

import dscache
from dscache import _backend
from dscache.core.notes import LEASE_SECONDS
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.soak import cluster_rows
from tests.soak.figures import PATIENCE, Figures, until
from tests.support import three_clients
from tests.support.blocking import run_child
from tests.support.clusters import ClusterGroup
from tests.support.either import moving

# Others use the machine too, and a deadline must not decide a row.
_PATIENT = {"commandTimeout": 30_000, "connectTimeout": 30_000}
_SECONDS_OF_LOAD = 2.0


def _cache(**options: Any) -> dscache.AsyncCache:
    return dscache.AsyncCache.from_config({"name": "redis", "options": {**_PATIENT, **options}})


async def updates(
    figures: Figures, binary: ServerBinary, *, processes: int = 8, times: int = 1000
) -> None:
    """Increment one record in many processes while the server is killed; none is lost."""
    safe = ("--appendonly", "yes", "--appendfsync", "always")
    with EmbeddedServer(binary, args=safe) as server:
        config = json.dumps({"name": "redis", "options": {"url": server.url, **_PATIENT}})

        def write(writer: int) -> dict[str, Any]:
            arguments = ("async" if writer % 2 else "blocking", config, "counter", str(writer))
            core = _backend.BACKEND
            return run_child("increments.py", *arguments, str(times), backend=core, seconds=1200)

        writing = [asyncio.to_thread(write, writer) for writer in range(processes)]
        going = asyncio.gather(*writing)
        with redis_py.Redis.from_url(server.url) as client:
            while int(client.get("counter_v") or 0) < processes * times // 3 and not going.done():
                await asyncio.sleep(0.01)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        outcomes = await going
        async with _cache(url=server.url) as cache:
            record = await cache.get("counter")
        assert record is not None, "the record is lost"
        acknowledged = sum(one["acknowledged"] for one in outcomes)
        unknown = sum(one["unknown"] for one in outcomes)
        figures.operations = acknowledged + unknown
        total = record.data["total"]
        figures.notes.append(f"{acknowledged} acknowledged, {unknown} unknown, {total} in Redis")
        if not acknowledged <= total == record.version <= acknowledged + unknown:
            figures.problems.append("the record is not the sum of the increments")


async def crowd(
    figures: Figures, binary: ServerBinary, *, processes: int = 4, callers: int = 1000
) -> None:
    """Fetch a cold record in many processes, and kill the one that loads."""
    with EmbeddedServer(binary) as server, redis_py.Redis.from_url(server.url) as client:
        program = ("-m", "tests.programs.fetching", "async", server.url, str(_SECONDS_OF_LOAD))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"DSCACHE_BACKEND": _backend.BACKEND, "CALLERS": str(callers)}
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
        started = [
            await asyncio.create_subprocess_exec(
                sys.executable, *program, env=environment, limit=1 << 24, **pipes
            )
            for _ in range(processes)
        ]
        try:
            for one in started:
                assert one.stdout is not None
                assert await one.stdout.readline() == b"ready\n"
            began = time.monotonic()
            for one in started:
                assert one.stdin is not None
                one.stdin.write(b"\n")
            await until(lambda: client.get("loader"), "a load")
            loader = int(client.get("loader") or 0)
            os.kill(loader, signal.SIGKILL)
            others = [one for one in started if one.pid != loader]
            async with asyncio.timeout(PATIENCE):
                outputs = [(await one.communicate())[0] for one in others]
            seconds = time.monotonic() - began
        finally:
            for one in started:
                if one.returncode is None:
                    one.kill()
                await one.wait()
        loads = int(client.get("loads") or 0)
        figures.operations = sum(len(json.loads(one)) for one in outputs)
        figures.notes.append(f"{loads} loads, the last caller after {seconds:.1f} s")
        if loads != 2 or figures.operations != (processes - 1) * callers:
            figures.problems.append(f"{loads} loads, {figures.operations} records")
        # Of the load that was killed, its lease, and the next load.
        if seconds > 2 * _SECONDS_OF_LOAD + LEASE_SECONDS + 1:
            figures.slow.append("a caller waited for longer than the loads and the lease")


async def model(figures: Figures, binary: ServerBinary, *, examples: int = 3000) -> None:
    """Let three clients change few records at once, with results that a model must explain."""
    figures.most_growth = 256 * 1024 * 1024  # Hypothesis remembers its examples
    with EmbeddedServer(binary) as server:
        check = three_clients.check
        figures.operations = await asyncio.to_thread(check, server.host, server.port, examples)
        figures.notes.append(f"{examples} examples")


async def mirror(figures: Figures, binary: ServerBinary, *, writes: int = 100_000) -> None:
    """Keep a mirror from a watch: slots move, one primary hands over, and one is killed."""
    with cluster_rows.start(binary) as group:
        async with _cache(**group.options, slotsRefreshInterval=200) as cache:
            kept = _Mirror(cache)
            async with kept.running():
                half = writes // 2
                async with _while_slots_move(group):
                    await _write(cache, half, figures)
                group.wait_until_ok()
                replica = group.replica_of(group.primaries()[1])
                await asyncio.gather(
                    asyncio.to_thread(group.failover, replica), _write(cache, half // 3, figures)
                )
                group.kill(group.primaries()[0])
                await _write(cache, half // 3, figures)
                await asyncio.to_thread(group.heal)
                await _write(cache, half // 3, figures)
                wanted: dict[str, int] = {}
                deadline = time.monotonic() + PATIENCE
                while not wanted or kept.versions != wanted:
                    assert time.monotonic() < deadline, "the mirror differs from the servers"
                    await asyncio.sleep(0.1)
                    wanted = await _versions(cache)
            figures.notes.append(
                f"{kept.changes} changes, {kept.gaps} gaps, {len(wanted)} records at the end"
            )
            if not kept.gaps:
                figures.problems.append("no gap was reported, and a primary was killed")


class _Mirror:
    """The versions of all records, kept from the changes of a watch."""

    def __init__(self, cache: dscache.AsyncCache) -> None:
        self._cache = cache
        self._begun = asyncio.Event()
        self.versions: dict[str, int] = {}
        self.changes = self.gaps = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self._keep())
        try:
            await self._begun.wait()
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _keep(self) -> None:
        async with self._cache.watch("n/") as changes:
            self.versions = await _versions(self._cache)
            self._begun.set()
            async for change in changes:
                self.changes += 1
                self.gaps += change.kind == "gap"
                if change.is_loss:
                    self.versions = await _versions(self._cache)
                elif change.kind == "changed":
                    assert change.version is not None
                    self.versions[change.name] = change.version
                elif change.kind == "deleted":
                    self.versions.pop(change.name, None)


async def _versions(cache: dscache.AsyncCache) -> dict[str, int]:
    while True:
        try:
            return {one.name: one.version async for one in cache.scan("n/", records=True)}
        except dscache.DscacheError:  # a shard is away
            await asyncio.sleep(0.05)


async def _write(cache: dscache.AsyncCache, count: int, figures: Figures) -> None:
    rng = random.Random(count)
    done = 0
    while done < count:
        names = [f"n/{rng.randrange(5000)}" for _ in range(20)]
        try:
            if rng.randrange(4):
                await cache.set_bulk({name: (figures.operations, {}) for name in names})
            else:
                await cache.delete_bulk(names)
        except dscache.DscacheError:
            await asyncio.sleep(0.01)
        done += len(names)
        figures.operations += len(names)


@contextlib.asynccontextmanager
async def _while_slots_move(group: ClusterGroup) -> AsyncIterator[None]:
    ended = threading.Event()
    moves = asyncio.ensure_future(asyncio.to_thread(moving(group, ended)))
    try:
        yield
    finally:
        ended.set()
        await moves


async def scans(figures: Figures, binary: ServerBinary, *, names: int = 1_000_000) -> None:
    """Scan a cluster while its slots move; each name that stays is found."""
    figures.most_growth = 64 * 1024 * 1024  # the sets of a million names leave holes behind
    with cluster_rows.start(binary) as group:
        async with _cache(**group.options) as cache:
            stay = [f"n/{number}" for number in range(names)]
            for first in range(0, names, 10_000):
                await cache.set_bulk(dict.fromkeys(stay[first : first + 10_000], (1, 0)))
            async with _while_slots_move(group):
                found: set[str] = set()
                began = time.monotonic()
                async for name in cache.scan("n/", count=1000):
                    figures.operations += 1
                    found.add(name)
                seconds = time.monotonic() - began
            missing = len(stay) - len(found.intersection(stay))
            figures.notes.append(
                f"{len(found)} names in {seconds:.1f} s, {figures.operations - len(found)} twice"
            )
            if missing:
                figures.problems.append(f"{missing} names were not found")


async def expiry(
    figures: Figures, binary: ServerBinary, *, names: int = 100_000, ttl: int = 20, tasks: int = 20
) -> None:
    """Fetch records that were loaded together, past the end of their time.

    Two spans are for comparison: with hits alone, and with the same number of loads and writes in
    a second, which are spread evenly. Latencies are told in processor time of this process too,
    as other programs lengthen the real one.
    """
    with EmbeddedServer(binary) as server:
        # Another cache loads them all, so that the first one knows no ages.
        async with _cache(url=server.url) as cache, _cache(url=server.url) as other:
            ending = _Readers(cache, "n", names, {"ttl": ttl, "refresh_after": ttl // 2})
            lasting = _Readers(cache, "m", names, {"ttl": 100 * ttl, "refresh_after": 50 * ttl})
            await lasting.load_all(other)
            lasting.options |= {"refresh_after": ttl // 2}  # ages are checked as often
            hits, again = _Span(), _Span()
            await lasting.read(hits, ttl * 0.3, tasks)
            await ending.load_all(other)
            at_end, spread = _Span(), _Span()
            await ending.read(at_end, ttl * 1.4, tasks)
            pace = ending.loads / at_end.seconds
            async with _spread_writes(cache, pace, names):
                await lasting.read(spread, ttl * 0.5, tasks)
            await lasting.read(again, ttl * 0.2, tasks)
            figures.operations = (
                sum(len(span.latencies[0]) for span in (hits, at_end, spread, again)) + ending.waits
            )
            figures.notes.append(
                f"p99 and its processor time: {hits.tell('hits')}, {again.tell('hits again')}, "
                f"{spread.tell('beside writes')}, {at_end.tell('over the end')}; "
                f"{ending.loads} loads, for {ending.waits} of which calls waited"
            )
            if not ending.loads:
                figures.problems.append("nothing was loaded anew")
            if at_end.p99() > 3 * max(hits.p99(), again.p99()):
                figures.slow.append("p99 over the end is more than 3 x that of hits")


class _Span:
    """The latencies of fetches that found a record, each with its processor time."""

    def __init__(self) -> None:
        self.latencies = array("d"), array("d")
        self.seconds = self.processor_seconds = 0.0

    def p99(self, of: int = 0) -> float:
        return sorted(self.latencies[of])[int(len(self.latencies[of]) * 0.99)]

    def tell(self, what: str) -> str:
        share = self.processor_seconds / self.seconds * 100
        return (
            f"{what} {self.p99() * 1e3:.2f} and {self.p99(1) * 1e3:.2f} ms at "
            f"{len(self.latencies[0]) / self.seconds:.0f}/s with {share:.0f} % of a core"
        )


class _Readers:
    """Tasks that fetch records at random, and load the missing ones."""

    def __init__(
        self, cache: dscache.AsyncCache, kind: str, names: int, options: dict[str, Any]
    ) -> None:
        self._cache = cache
        self._names = [f"{kind}/{number}" for number in range(names)]
        self.options = {**options, "jitter": 0.3}
        self.loads = 0
        self.waits = 0
        """Calls that found no record."""

    async def load_all(self, cache: dscache.AsyncCache) -> None:
        async def load_many(names: list[str]) -> dict[str, int]:
            return dict.fromkeys(names, 1)

        for first in range(0, len(self._names), 5000):
            part = self._names[first : first + 5000]
            await cache.fetch_bulk(part, load_many, **self.options)

    async def read(self, span: _Span, seconds: float, tasks: int) -> None:
        began, processor = time.monotonic(), time.process_time()
        await asyncio.gather(*(self._read(span, began + seconds) for _ in range(tasks)))
        span.seconds = time.monotonic() - began
        span.processor_seconds = time.process_time() - processor

    async def _read(self, span: _Span, until: float) -> None:
        loaded = 0

        async def load(name: str) -> int:
            nonlocal loaded
            self.loads += 1
            loaded += name == waiting
            return 1

        while (at := time.monotonic()) < until:
            processor = time.process_time()
            waiting, before = random.choice(self._names), loaded
            record = await self._cache.fetch(waiting, load, **self.options)
            assert record is not None
            if loaded == before:
                span.latencies[0].append(time.monotonic() - at)
                span.latencies[1].append(time.process_time() - processor)
            else:
                self.waits += 1
            waiting = ""


@contextlib.asynccontextmanager
async def _spread_writes(cache: dscache.AsyncCache, pace: float, names: int) -> AsyncIterator[None]:
    """Load and write other records at an even pace, so many in a second."""

    async def load_and_write(number: int) -> None:
        await asyncio.sleep(0)  # as a load
        await cache.set(f"o/{number % names}", number, 1, ttl=600)

    async def go_on() -> None:
        began, done = time.monotonic(), 0
        while True:
            await asyncio.sleep(0.001)
            due = int((time.monotonic() - began) * pace)
            await asyncio.gather(*map(load_and_write, range(done, due)))
            done = due

    writing = asyncio.ensure_future(go_on())
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait([writing])
