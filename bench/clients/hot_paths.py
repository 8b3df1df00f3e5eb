"""The hottest paths of the compiled core, whose instructions are counted.

The process takes one JSON object a line and answers with one: ``python -m clients.hot_paths
SERVER CLUSTER``. It does nothing by chance: no garbage is collected, and no clock decides.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable, Coroutine
from itertools import cycle, islice
from typing import Any

import uvloop

import dscache
from clients.work import DOCUMENT, ORDINARY, VERSION, chosen, core, encode, names_of

# All in one command.
NAMES = names_of(ORDINARY, 100)
TEXT = encode(DOCUMENT)
WRITTEN = dict.fromkeys(NAMES, (VERSION, DOCUMENT))
FOREVER = 1e9
# Handles every name as often as that.
Path = Callable[[int], None]
PATIENCE = {"commandTimeout": 600_000, "connectTimeout": 600_000}
TTL = 600
ENDLESS = {"maxAge": 3_600_000, "idleLimit": 3_600_000}


class Waiter:
    """A minimal waiter: it takes a result, and an error ends the program."""

    __slots__ = ("result",)

    def set_result(self, result: object) -> None:
        self.result = result

    def set_exception(self, error: Exception) -> None:
        raise error


def array_of(records: int) -> bytes:
    """Return a server's reply to an MGET of that many records."""
    version = b"%d" % VERSION
    one = b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(version), version, len(TEXT), TEXT)
    return b"*%d\r\n%b" % (2 * records, records * one)


def flushed(pipeline: Any) -> bytes:
    """Return everything that a pipeline has to send."""
    return b"".join(iter(pipeline.take_output, b""))


GOT = array_of(len(NAMES))
STORED = b"+OK\r\n"
NEWER = b":1\r\n"


def repeated(run: Callable[[], None]) -> Path:
    def path(times: int) -> None:
        for _ in range(times):
            run()

    return path


def alone() -> dict[str, Path]:
    """Return the paths without a server: each handles every name once."""
    pipeline = core("fast").Pipeline(Waiter, lambda: None, timeout=FOREVER)

    def answered(reply: bytes) -> None:
        flushed(pipeline)
        pipeline.feed(reply)

    def get() -> None:
        for name in NAMES:
            pipeline.get(name)
        answered(GOT)

    def set_() -> None:
        for name in NAMES:
            pipeline.set(name, VERSION, DOCUMENT)
        answered(STORED)

    def if_newer() -> None:
        for name in NAMES:
            pipeline.set(name, VERSION, DOCUMENT, None, True)
        answered(NEWER)

    def get_bulk() -> None:
        pipeline.get_bulk(NAMES)
        answered(GOT)

    def set_bulk() -> None:
        pipeline.set_bulk(WRITTEN)
        answered(STORED)

    tracked = core("fast").Pipeline(Waiter, lambda: None, timeout=FOREVER)
    endless = {"timeout": FOREVER, "idle_limit": FOREVER, "max_age": FOREVER}
    near = tracked.near = core("fast").NearCache(Waiter, tracked, **endless)
    tracked.connected(True)
    near.get_bulk(NAMES)
    flushed(tracked)
    tracked.feed(GOT)

    def near_hit() -> None:
        for name in NAMES:
            near.get(name)

    assert near.stats()["records"] == len(NAMES)
    return {
        "pipeline get": repeated(get),
        "pipeline set": repeated(set_),
        "pipeline if_newer": repeated(if_newer),
        "pipeline get_bulk": repeated(get_bulk),
        "pipeline set_bulk": repeated(set_bulk),
        "near cache hit": repeated(near_hit),
    }


def served(runner: asyncio.Runner, server: Any, cluster: Any) -> dict[str, Path]:
    """Return the paths with a server: each reads every name once."""

    def config(options: Any, **more: Any) -> dict[str, Any]:
        return {"name": "redis", "options": {**options, **PATIENCE, **more}}

    async def opened(**more: Any) -> dscache.AsyncCache:
        cache = dscache.AsyncCache.from_config(config(server, **more))
        await cache.when_ready()
        return cache

    with chosen("fast"):
        blocking = dscache.Cache.from_config(config(server))
        kept = dscache.Cache.from_config(config(server, nearCache=ENDLESS))
        routed = dscache.Cache.from_config(config(cluster))
        soon = runner.run(opened())
        near = runner.run(opened(nearCache=ENDLESS))
    for cache in (blocking, routed):
        cache.set_bulk(WRITTEN)

    async def get_each(times: int) -> None:
        async def task() -> None:
            for name in left:
                await soon.get(name)

        left = islice(cycle(NAMES), times * len(NAMES))
        await asyncio.gather(*(task() for _ in NAMES))

    async def fetch_each(times: int) -> None:
        async def task() -> None:
            for name in left:
                await soon.fetch(name, load, ttl=TTL)

        left = islice(cycle(NAMES), times * len(NAMES))
        await asyncio.gather(*(task() for _ in NAMES))

    async def hits(times: int) -> None:
        for _ in range(times):
            for name in NAMES:
                await near.get(name)

    async def fetched_hits(times: int) -> None:
        for _ in range(times):
            for name in NAMES:
                await near.fetch(name, load, ttl=TTL)

    def one_by_one(cache: dscache.Cache) -> Path:
        def run() -> None:
            for name in NAMES:
                cache.get(name)

        return repeated(run)

    def fetched_one_by_one(cache: dscache.Cache) -> Path:
        def run() -> None:
            for name in NAMES:
                cache.fetch(name, load, ttl=TTL)

        return repeated(run)

    def soon_path(work: Callable[[int], Coroutine[Any, Any, None]]) -> Path:
        return lambda times: runner.run(work(times))

    return {
        "blocking get": one_by_one(blocking),
        "blocking get, cluster": one_by_one(routed),
        "blocking get, near cache hit": one_by_one(kept),
        "blocking fetch": fetched_one_by_one(blocking),
        "blocking fetch, near cache hit": fetched_one_by_one(kept),
        "await get, 100 tasks": soon_path(get_each),
        "await get, near cache hit": soon_path(hits),
        "await fetch, 100 tasks": soon_path(fetch_each),
        "await fetch, near cache hit": soon_path(fetched_hits),
    }


def load(name: str) -> None:
    raise AssertionError(f"{name} is missing")


def main(server: str, cluster: str) -> None:
    gc.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        paths = {**alone(), **served(runner, json.loads(server), json.loads(cluster))}
        print("{}", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            paths[asked["do"]](asked["records"] // len(NAMES))
            print("{}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
