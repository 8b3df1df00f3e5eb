"""The gain of the near cache, in one run: interleaved rounds, medians, and the wanted ratios.

``python bench/compare_near.py`` prints two tables. The first is of one task that reads a thousand
cached records one after the other, beside redis-py's asyncio client. The second is of a hundred
tasks that read a hundred thousand records, the popular ones more often, while another process
rewrites a hundredth of them each second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol

import redis
import redis.asyncio
import uvloop

import dscache
from dscache.embedded import EmbeddedServer
from machine import facts
from report import goal
from rounds import RowInLoop, arguments, measure_in_loop
from workload import DOCUMENT, NAMES, VERSION, apart, chosen, drawn, encode

MANY = 100_000
TASKS = 100
DRAWS = 200_000
REWRITTEN = 0.01
# The writer's turns a second.
TURNS = 100
# A hit doesn't yield to the event loop, so readers yield now and then to let invalidations in.
BURST = 500


class Reader(Protocol):
    """A reader of records: a cache, or redis-py in its place."""

    def get(self, name: str) -> Awaitable[object]: ...


class RedisPy:
    """redis-py's asyncio client with hiredis: a command for each record, without decoding."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._redis: Any = redis.asyncio.Redis(host=server.host, port=server.port)
        self._keys = {name: (name + "_v", name + "_d") for name in NAMES}

    def get(self, name: str) -> Awaitable[object]:
        found: Awaitable[object] = self._redis.mget(*self._keys[name])
        return found

    async def close(self) -> None:
        await self._redis.aclose()


def many_names() -> list[str]:
    """Return the names of the second table, the most popular ones first."""
    return [f"record/{number}" for number in range(MANY)]


# -- measurements


def one_after_the_other(cache: Reader) -> Callable[[int], Any]:
    async def read(count: int) -> None:
        for first in range(0, count, BURST):
            for name in NAMES[:BURST] if first // BURST % 2 else NAMES[-BURST:]:
                await cache.get(name)
            await asyncio.sleep(0)

    return read


def from_tasks(cache: Reader, names: list[str]) -> Callable[[int], Any]:
    async def task(at: int, count: int) -> None:
        for first in range(at, at + count, BURST):
            start = first % (len(names) - BURST)
            for name in names[start : start + min(BURST, at + count - first)]:
                await cache.get(name)
            await asyncio.sleep(0)

    async def read(count: int) -> None:
        each = max(1, count // TASKS)
        starts = (random.randrange(len(names)) for _ in range(TASKS))
        await asyncio.gather(*(task(at, each) for at in starts))

    return read


def timed(label: str, read: Callable[[int], Awaitable[None]]) -> RowInLoop:
    """Return a row that measures how long it takes to read that many records."""

    async def measured(count: int) -> float:
        began = time.perf_counter()
        await read(count)
        return time.perf_counter() - began

    return RowInLoop(label, measured)


async def measure(rows: list[RowInLoop], rounds: int, seconds: float, warm: float) -> None:
    """Fill the rows, after a warm-up of that many seconds each."""
    least = TASKS * 20
    sizes = []
    for row in rows:
        end = time.perf_counter() + warm
        usual = least / await row.measure(least)
        while time.perf_counter() < end:
            usual = least * 5 / await row.measure(least * 5)
        sizes.append(max(1, round(usual * seconds / least)) * least)
    await measure_in_loop(rows, sizes, rounds)


# -- the other process


def write(host: str, port: int) -> None:
    """Rewrite a hundredth of the records each second, until this process is ended."""
    names, version = many_names(), VERSION
    each = round(MANY * REWRITTEN / TURNS)
    text = encode(DOCUMENT)
    with redis.Redis(host, port) as client:
        at = time.monotonic()
        while True:
            version += 1
            pairs: dict[str, Any] = {}
            for name in random.sample(names, each):
                pairs[name + "_v"], pairs[name + "_d"] = version, text
            client.mset(pairs)
            at += 1 / TURNS
            time.sleep(max(0.0, at - time.monotonic()))


@contextlib.contextmanager
def writing(server: EmbeddedServer) -> Iterator[None]:
    """Let the other process write, on the server's core rather than on this one's."""
    command = [sys.executable, __file__, "--write", server.host, str(server.port)]
    writer = subprocess.Popen(command)
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(writer.pid, os.sched_getaffinity(server.pid))
        yield
        if writer.poll() is not None:
            raise RuntimeError(f"the writer has ended with {writer.returncode}")
    finally:
        writer.kill()
        writer.wait()


# -- the run


@contextlib.asynccontextmanager
async def cache_on(server: EmbeddedServer, core: str, near: bool) -> AsyncIterator[Any]:
    options: dict[str, Any] = {"url": server.url, "commandTimeout": 60_000}
    if near:
        options["nearCache"] = True
    with chosen(core):
        cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
        await cache.when_ready()
    async with cache:
        yield cache


async def run(
    server: EmbeddedServer, rounds: int, seconds: float, warm: float
) -> tuple[list[RowInLoop], list[RowInLoop], dict[str, Any]]:
    names = many_names()
    async with contextlib.AsyncExitStack() as stack:
        near = {
            core: await stack.enter_async_context(cache_on(server, core, True))
            for core in ("fast", "pure")
        }
        plain = await stack.enter_async_context(cache_on(server, "fast", False))
        for first in range(0, MANY, 1000):
            some = names[first : first + 1000]
            await plain.set_bulk(dict.fromkeys(some, (VERSION, DOCUMENT)))
        await plain.set_bulk(dict.fromkeys(NAMES, (VERSION, DOCUMENT)))
        peer = RedisPy(server)
        stack.push_async_callback(peer.close)
        alone = [
            timed("dscache, fast core, near cache", one_after_the_other(near["fast"])),
            timed("dscache, pure core, near cache", one_after_the_other(near["pure"])),
            timed("dscache, fast core", one_after_the_other(plain)),
            timed("redis-py, hiredis: MGET", one_after_the_other(peer)),
        ]
        picked = drawn(names, DRAWS)
        for cache in near.values():
            await cache.get_bulk([*NAMES, *names])
        together = [
            timed("dscache, fast core, near cache", from_tasks(near["fast"], picked)),
            timed("dscache, pure core, near cache", from_tasks(near["pure"], picked)),
            timed("dscache, fast core", from_tasks(plain, picked)),
        ]
        await measure(alone, rounds, seconds, min(warm, seconds))
        with writing(server):
            await measure(together, rounds, seconds, warm)
        return alone, together, near["fast"].stats()["near_cache"]


def show(title: str, rows: list[RowInLoop]) -> None:
    print(f"\n{title:48}{'reads/s':>12}{'best round':>12}{'ratio':>10}")
    for row in rows:
        ratio = row.median / rows[-1].median
        print(f"  {row.label:46}{row.median:12,.0f}{row.best:12,.0f}{ratio:8.1f} x")


def main() -> None:
    parser = arguments(__doc__, rounds=9, seconds=0.3)
    parser.add_argument("--write", nargs=2, metavar=("HOST", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write[0], int(options.write[1]))
    with EmbeddedServer() as server, apart(server) as placing:
        # Until reads and invalidations have reached a balance.
        warm = 10 * options.seconds
        alone, together, counts = uvloop.run(run(server, options.rounds, options.seconds, warm))
        header = facts(server, placing, options.rounds)
    print(*header, sep="\n")
    show(f"{len(NAMES)} records, one after the other", alone)
    show(f"{TASKS} tasks, {MANY:,} records by Zipf, 1 % written/s", together)
    asked = counts["misses"] + counts["joins"]
    print(f"\nof the fast core's reads {counts['hits'] / (counts['hits'] + asked):.2%} were hits")
    print(goal("hits one after the other, fast core to redis-py", alone[0], alone[-1], 400))
    print(goal("from tasks, fast core with near cache to without", together[0], together[-1], 4))


if __name__ == "__main__":
    main()
