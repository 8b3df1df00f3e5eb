"""Scans beside ``redis-cli --scan``, conditions beside each other, and the delay of a watch.

``python bench/scan_and_watch.py [ROUNDS] [REDIS_CLI]``. Each round measures everything in turn on
one private server, and the medians of the rounds are shown, so that a busy machine slows all alike.
Processor times are of this process, or of redis-cli.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from statistics import median

import dscache
from dscache.embedded import EmbeddedServer

NAMES = [f"n/{number}" for number in range(100_000)]
CHANGED = [f"w/{number}" for number in range(10_000)]
TASKS = 100
CONDITIONS = ("if_version", "if_newer")
DATA = {"name": "Ada Lovelace", "visits": 17, "tags": ["a", "b"], "active": True}
Figures = defaultdict[str, list[float]]


async def scan(cache: dscache.AsyncCache, figures: Figures) -> None:
    """Scan all names, by this library."""
    began, processor = time.perf_counter(), time.process_time()
    found = {name async for name in cache.scan("n/")}
    figures["scan, names/s"].append(len(found) / (time.perf_counter() - began))
    figures["scan, processor us a name"].append(
        (time.process_time() - processor) / len(found) * 1e6
    )
    assert len(found) == len(NAMES)


def scan_by(redis_cli: str, server: EmbeddedServer, figures: Figures) -> None:
    """Scan the keys of the versions of all names, by redis-cli."""
    command = [redis_cli, "-h", server.host, "-p", str(server.port), "--scan", "--pattern", "n/*_v"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = printed.count(b"\n")
    assert found >= len(NAMES)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures["redis-cli --scan, names/s"].append(found / seconds)
    figures["redis-cli --scan, processor us a name"].append(used / found * 1e6)


async def guarded(cache: dscache.AsyncCache, figures: Figures, turn: int) -> None:
    """Write the names by 100 tasks under each condition."""

    async def write(first: int, condition: str) -> None:
        for name in NAMES[first:20_000:TASKS]:
            if condition == "if_version":
                assert await cache.set(name, turn + 1, DATA, if_version=turn)
            else:
                assert await cache.set(name, turn + 1, DATA, if_newer=True)

    for condition in CONDITIONS:
        await cache.set_bulk(dict.fromkeys(NAMES[:20_000], (turn, DATA)))
        began, processor = time.perf_counter(), time.process_time()
        await asyncio.gather(*(write(first, condition) for first in range(TASKS)))
        seconds = time.perf_counter() - began
        figures[f"set({condition}) of {TASKS} tasks, us"].append(seconds / 20_000 * 1e6)
        figures[f"set({condition}), processor us"].append(
            (time.process_time() - processor) / 20_000 * 1e6
        )


async def watch(
    cache: dscache.AsyncCache, other: dscache.AsyncCache, figures: Figures, turn: int
) -> None:
    """Write names in bulks and one by one, and hear of each change."""
    async with cache.watch("w/", max_pending=2 * len(CHANGED)) as changes:
        began, processor, left = time.perf_counter(), time.process_time(), set(CHANGED)
        writing = asyncio.ensure_future(other.set_bulk(dict.fromkeys(CHANGED, (2 * turn, DATA))))
        async for change in changes:
            left.discard(change.name)
            if not left:
                break
        figures["watch, changes/s"].append(len(CHANGED) / (time.perf_counter() - began))
        figures["watch and writes, processor us a change"].append(
            (time.process_time() - processor) / len(CHANGED) * 1e6
        )
        await writing
        delays = []
        for name in CHANGED[:200]:
            await asyncio.sleep(0.002)
            began = time.perf_counter()
            other.set(name, 2 * turn + 1, DATA)
            async for change in changes:
                if change.name == name and change.version == 2 * turn + 1:
                    break
            delays.append((time.perf_counter() - began) * 1e3)
        figures["watch, p50 from write to event, ms"].append(median(delays))


async def main(rounds: int, redis_cli: str | None) -> None:
    """Measure all in every round, and print the medians."""
    figures: Figures = defaultdict(list)
    with EmbeddedServer() as server:
        config = {"name": "redis", "options": {"url": server.url}}
        async with (
            dscache.AsyncCache.from_config(config) as cache,
            dscache.AsyncCache.from_config(config) as other,
        ):
            for first in range(0, len(NAMES), 10_000):
                part = NAMES[first : first + 10_000]
                await cache.set_bulk(dict.fromkeys(part, (1, DATA)))
            for turn in range(1, rounds + 1):
                await scan(cache, figures)
                if redis_cli is not None:
                    await asyncio.to_thread(scan_by, redis_cli, server, figures)
                await guarded(cache, figures, turn)
                await watch(cache, other, figures, turn)
    print(f"{rounds} rounds, load of the machine {os.getloadavg()[0]:.1f}")
    for what, values in figures.items():
        print(f"{what:42}{median(values):12,.2f}")
    for what, one, two in (
        ("scan / redis-cli --scan", "scan, names/s", "redis-cli --scan, names/s"),
        ("if_version / if_newer", *(f"set({of}) of {TASKS} tasks, us" for of in CONDITIONS)),
    ):
        ratios = [a / b for a, b in zip(figures[one], figures[two], strict=False)]
        if ratios:
            print(f"{what:42}{median(ratios):12.2f}")


if __name__ == "__main__":
    given = sys.argv[1:]
    cli = given[1] if len(given) > 1 else shutil.which("redis-cli")
    asyncio.run(main(int(given[0]) if given else 7, cli))
