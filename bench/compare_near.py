"""What the near cache brings, in one run: interleaved rounds, medians, and the wanted ratios.

``python bench/compare_near.py`` prints two tables. The first is of one task that reads a thousand
records one after the other, all of them at hand, beside redis-py's asyncio client. The second is of
a hundred tasks that read a hundred thousand records, the popular ones more often, while another
process writes a hundredth of them anew each second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis
import redis.asyncio
import uvloop

import dscache
from compare import facts
from dscache.embedded import EmbeddedServer
from workload import DOCUMENT, NAMES, VERSION, apart, chosen, encode

MANY = 100_000
TASKS = 100
ZIPF = 0.99
DRAWS = 200_000
REWRITTEN = 0.01
# The writer's turns a second.
TURNS = 100
# A hit gives way to nobody, so whoever reads does so now and then: messages must come in.
BURST = 500


class Reader(Protocol):
    """Whoever reads a record: a cache, or redis-py in a cache's place."""

    def get(self, name: str) -> Awaitable[object]: ...


class RedisPy:
    """redis-py's asyncio client with hiredis: a command for each record, and nothing decoded."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._redis: Any = redis.asyncio.Redis(host=server.host, port=server.port)
        self._keys = {name: (name + "_v", name + "_d") for name in NAMES}

    def get(self, name: str) -> Awaitable[object]:
        found: Awaitable[object] = self._redis.mget(*self._keys[name])
        return found

    async def close(self) -> None:
        await self._redis.aclose()


@dataclass
class Row:
    """One thing measured, and its reads per second in each round."""

    label: str
    read: Callable[[int], Awaitable[None]]
    """Read so many records."""
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def many_names() -> list[str]:
    """Return the names of the second table, the most popular ones first."""
    return [f"record/{number}" for number in range(MANY)]


def drawn(names: list[str], chance: random.Random) -> list[str]:
    """Return names as often as Zipf's law has it."""
    weights = itertools.accumulate(1 / rank**ZIPF for rank in range(1, len(names) + 1))
    return chance.choices(names, cum_weights=list(weights), k=DRAWS)


# -- what is measured


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


async def rate(row: Row, count: int) -> float:
    began = time.perf_counter()
    await row.read(count)
    return count / (time.perf_counter() - began)


async def measure(rows: list[Row], rounds: int, seconds: float, warm: float) -> None:
    """Fill the rows: one round of each, then the next, so that a slow spell hits all."""
    least = TASKS * 20
    sizes = []
    for row in rows:
        end = time.perf_counter() + warm
        usual = await rate(row, least)
        while time.perf_counter() < end:
            usual = await rate(row, least * 5)
        sizes.append(max(1, round(usual * seconds / least)) * least)
    for _ in range(rounds):
        for row, size in zip(rows, sizes, strict=True):
            row.rates.append(await rate(row, size))


# -- the other process


def write(host: str, port: int) -> None:
    """Write a hundredth of the records anew each second, until this process is ended."""
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
    """Let the other process write, on the server's core rather than on ours."""
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
) -> tuple[list[Row], list[Row], dict[str, Any]]:
    chance = random.Random(1)
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
            Row("dscache, fast core, near cache", one_after_the_other(near["fast"])),
            Row("dscache, pure core, near cache", one_after_the_other(near["pure"])),
            Row("dscache, fast core", one_after_the_other(plain)),
            Row("redis-py, hiredis: MGET", one_after_the_other(peer)),
        ]
        picked = drawn(names, chance)
        for cache in near.values():
            await cache.get_bulk([*NAMES, *names])
        together = [
            Row("dscache, fast core, near cache", from_tasks(near["fast"], picked)),
            Row("dscache, pure core, near cache", from_tasks(near["pure"], picked)),
            Row("dscache, fast core", from_tasks(plain, picked)),
        ]
        await measure(alone, rounds, seconds, min(warm, seconds))
        with writing(server):
            await measure(together, rounds, seconds, warm)
        return alone, together, near["fast"].stats()["near_cache"]


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title:48}{'reads/s':>12}{'best round':>12}{'ratio':>10}")
    for row in rows:
        ratio = row.median / rows[-1].median
        print(f"  {row.label:46}{row.median:12,.0f}{max(row.rates):12,.0f}{ratio:8.1f} x")


def judge(text: str, row: Row, against: Row, at_least: float) -> None:
    ratio = row.median / against.median
    verdict = "reached" if ratio >= at_least else "MISSED"
    print(f"{text}: {ratio:.1f} x, wanted {at_least:g} x: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="of each measurement (9)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one measurement (0.3)")
    parser.add_argument("--write", nargs=2, metavar=("HOST", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write[0], int(options.write[1]))
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds above 0")
    with EmbeddedServer() as server, apart(server) as placing:
        # Until what is read has settled between what is written and what is kept.
        warm = 10 * options.seconds
        alone, together, counts = uvloop.run(run(server, options.rounds, options.seconds, warm))
        header = facts(server, placing, options.rounds)
    print(*header, sep="\n")
    show(f"{len(NAMES)} records, one after the other", alone)
    show(f"{TASKS} tasks, {MANY:,} records by Zipf, 1 % written/s", together)
    asked = counts["misses"] + counts["joins"]
    print(f"\nof the fast core's reads {counts['hits'] / (counts['hits'] + asked):.2%} were hits")
    judge("hits one after the other, fast core to redis-py", alone[0], alone[-1], 400)
    judge("from tasks, fast core with near cache to without", together[0], together[-1], 4)


if __name__ == "__main__":
    main()
