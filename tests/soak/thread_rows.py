"""Soak rows for the blocking Cache: threads, interruptions, and lost servers."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import redis as redis_py

import dscache
from dscache import _backend
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.soak import cluster_rows
from tests.soak.figures import Figures, until
from tests.soak.load import Load
from tests.support.blocking import Model, ThreadedCache, in_threads, run_child

_POOL = 8
_LOADED = 16
# How many connections a run of interrupts.py may have to a server: one for each of its threads.
_UNDISTURBED = 4


async def threads(
    figures: Figures, binary: ServerBinary, *, operations: int = 1_000_000, count: int = 32
) -> None:
    """Let many threads use few connections; each checks its own records."""
    await asyncio.to_thread(_threads, figures, binary, operations, count)


def _threads(figures: Figures, binary: ServerBinary, operations: int, count: int) -> None:
    peak = 0
    done = [0] * count
    ended = threading.Event()
    with EmbeddedServer(binary) as server, redis_py.Redis.from_url(server.url) as redis:
        options = {
            "url": server.url, "maxConnections": _POOL, "connectionName": "pool",
            "commandTimeout": 60_000,
        }  # fmt: skip
        cache = dscache.Cache.from_config({"name": "redis", "options": options})

        def work(number: int) -> None:
            model = Model(number)
            try:
                for _ in range(operations // count):
                    model.step(cache)
                    done[number] += 1
            except (AssertionError, dscache.DscacheError) as error:
                figures.problems.append(f"thread {number}: {type(error).__name__}: {error}")

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.01):
                peak = max(peak, sum(one["name"] == "pool" for one in redis.client_list()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            in_threads(count, work)
        finally:
            ended.set()
            watcher.join()
        figures.operations = sum(done)
        figures.outcomes["ok"] += figures.operations
        stats = cache.stats()
        figures.notes.append(f"{count} threads, {peak} connections at most")
        if peak > _POOL or stats["connects"] > _POOL or stats["last_loss"]:
            figures.problems.append(f"{peak} connections, {stats['connects']} in all")
        cache.close()
        _drained(figures, cache)


async def interrupts(figures: Figures, binary: ServerBinary, *, count: int = 10_000) -> None:
    """Raise from a signal handler at random moments, on one server and on a cluster."""
    with EmbeddedServer(binary) as server:
        await asyncio.to_thread(_interrupts, figures, "one server", server.url, count // 2)
    group = await asyncio.to_thread(cluster_rows.start(binary).__enter__)
    try:
        where = json.dumps(group.options)
        await asyncio.to_thread(_interrupts, figures, "cluster", where, count - count // 2)
    finally:
        await asyncio.to_thread(group.close)


def _interrupts(figures: Figures, what: str, where: str, count: int) -> None:
    seconds = 120 + count / 5
    result = run_child(
        "interrupts.py", where, str(count), backend=_backend.BACKEND, seconds=seconds
    )
    figures.operations += sum(result["outcomes"].values())
    figures.outcomes.update(result["outcomes"])
    figures.notes.append(f"{what}: {result['caught']} caught, {result['connects']} connections")
    figures.problems += [f"{what}: {wrong}" for wrong in result["wrong"]]
    reported = result["caught"] + result["swallowed"]
    if result["raised"] != count or reported < 0.98 * count:
        figures.problems.append(
            f"{what}: {result['raised']} raised, {result['caught']} caught, "
            f"{result['swallowed']} swallowed"
        )
    if result["connections"] > _UNDISTURBED or result["pending"]:
        figures.problems.append(
            f"{what}: {result['connections']} connections and {result['pending']} pending at last"
        )


async def kill(figures: Figures, binary: ServerBinary, *, rounds: int = 20) -> None:
    """Kill the server and start it again under threads; it keeps the acknowledged writes."""
    safe = ("--appendonly", "yes", "--appendfsync", "always")
    with EmbeddedServer(binary, args=safe) as server:
        options = {"host": server.host, "port": server.port}
        async with _threaded(options, _LOADED) as cache:
            load = _load(cache)
            for _ in range(rounds):
                async with load:
                    await asyncio.sleep(random.uniform(0.2, 0.5))
                    await asyncio.to_thread(server.kill)
                    await asyncio.sleep(random.uniform(0, 0.5))
                    await asyncio.to_thread(server.start)
                    answers = load.last_success
                    again = await until(_beyond(load, answers), "an answer")
                    figures.recovered(again)
                    await asyncio.sleep(0.1)
                await load.verify()
            figures.take(load)
            stats = cache.stats()
            figures.notes.append(f"{rounds} kills, {stats['connects']} connections")
            if stats["connections"] > _LOADED:
                figures.problems.append(f"{stats['connections']} connections")
        _drained(figures, cache.cache)


async def reshard(figures: Figures, binary: ServerBinary, *, slots: int = 4000) -> None:
    """Move slots to another primary and back, under threads."""
    group = await asyncio.to_thread(cluster_rows.start(binary).__enter__)
    try:
        async with _threaded(group.options | {"commandTimeout": 5000}, 2 * _LOADED) as cache:
            await cluster_rows.move_slots(figures, group, cache, slots)
            nodes = cache.stats()["nodes"]
            most = max(node["connections"] for node in nodes.values())
            figures.notes.append(f"{most} connections to a node")
            if most > 2 * _LOADED:
                figures.problems.append(f"{most} connections to a node")
        _drained(figures, cache.cache)
    finally:
        await asyncio.to_thread(group.close)


def _threaded(options: dict[str, Any], count: int) -> Any:
    """Return a cache that many threads use, to be entered; driven as an asyncio one."""
    return ThreadedCache(dscache.Cache.from_config({"name": "redis", "options": options}), count)


def _load(cache: Any) -> Load:
    # As many as there are threads: an operation that waits for a thread would seem late.
    return Load(cache, timeout=1.0, names=_LOADED // 2, readers=_LOADED // 2)


def _beyond(load: Load, moment: float) -> Callable[[], bool]:
    return lambda: load.last_success > moment


def _drained(figures: Figures, cache: dscache.Cache) -> None:
    stats = cache.stats()
    left = {name: stats[name] for name in ("pending", "in_flight", "queued", "connections")}
    if any(left.values()):
        figures.problems.append(f"not drained: {left}")
