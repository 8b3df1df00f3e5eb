"""The cost of routing, in one run: dscache on clusters beside redis-py's, and beside one server.

``python bench/compare_cluster.py`` starts two clusters and a plain server. On a cluster, records of
different slots can't share a command, so one server is also measured with one record a command: by
the same core, which takes its server for a node of a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import redis.asyncio
import uvloop

import dscache
from dscache.aio.cluster import Cluster
from dscache.aio.connection import Connection
from dscache.config import load
from dscache.embedded import EmbeddedServer
from machine import facts
from report import as_text, goal
from rounds import Group, Pace, Row, arguments, measure
from workload import (
    DOCUMENT,
    NAMES,
    RECORDS,
    VERSION,
    apart,
    chosen,
    encode,
    from_tasks,
    repeatedly,
)

# The clusters of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.clusters import ClusterGroup

TASKS = 100


class Dscache:
    """An AsyncCache with the fast core, on any server that its options name."""

    def __init__(self, label: str, options: dict[str, object]) -> None:
        self.label = label
        self._options = options | {"commandTimeout": 60_000}

    async def connect(self) -> None:
        with chosen("fast"):
            self._cache = dscache.AsyncCache.from_config(
                {"name": "redis", "options": self._options}
            )
            self._open()
            await self._cache.when_ready()
        self.get = self._cache.get
        self.get_bulk = self._cache.get_bulk
        await self._cache.set_bulk(dict.fromkeys(NAMES, (VERSION, DOCUMENT)))

    async def close(self) -> None:
        await self._cache.close()

    def _open(self) -> None:
        """Prepare the cache before it connects."""


class OneRecordACommand(Dscache):
    """The same on one server, whose connection is made like one to a node of a cluster."""

    def _open(self) -> None:
        config = load({"name": "redis", "options": self._options})
        # It redirects nothing, and so no cluster is needed.
        nobody: Any = object.__new__(Cluster)
        nobody.on_connected = nobody.on_disconnected = lambda node: None
        connection = Connection(config.options, cluster=nobody)
        self._cache._topology = connection


class RedisPyCluster:
    """redis-py's asyncio client of clusters, reading both keys of a record by MGET."""

    label = "redis-py RedisCluster: MGET"

    def __init__(self, port: int) -> None:
        self._port = port

    async def connect(self) -> None:
        self._redis: Any = redis.asyncio.RedisCluster(host="127.0.0.1", port=self._port)
        await self._redis.initialize()
        for name in NAMES:
            await self._redis.mset({f"{{{name}}}_v": VERSION, f"{{{name}}}_d": encode(DOCUMENT)})

    async def close(self) -> None:
        await self._redis.aclose()

    async def get(self, name: str) -> tuple[int, bytes]:
        version, text = await self._redis.mget(f"{{{name}}}_v", f"{{{name}}}_d")
        return int(version), text

    def get_bulk(self, names: Sequence[str]) -> Awaitable[Any]:
        raise NotImplementedError("it has no read of many slots at once")


@contextlib.contextmanager
def pinned(groups: Sequence[ClusterGroup]) -> Iterator[None]:
    """Pin all nodes to the core of the plain server."""
    if hasattr(os, "sched_setaffinity") and len(allowed := os.sched_getaffinity(0)) > 1:
        for group in groups:
            for node in group.nodes:
                os.sched_setaffinity(node.server.pid, {sorted(allowed)[1]})
    yield


def one_by_one(
    runner: asyncio.Runner, label: str, operation: Callable[[str], Awaitable[object]]
) -> Row:
    def measured(records: int) -> dict[str, float]:
        records = max(1, records // TASKS) * TASKS
        return took(runner, from_tasks(operation, TASKS, records), records)

    return Row(label, measured)


def in_bulk(
    runner: asyncio.Runner, label: str, operation: Callable[[Sequence[str]], Awaitable[object]]
) -> Row:
    def measured(records: int) -> dict[str, float]:
        times = max(1, round(records / RECORDS))
        return took(runner, repeatedly(operation, times), times * RECORDS)

    return Row(label, measured)


def took(
    runner: asyncio.Runner, work: Coroutine[None, None, None], records: int
) -> dict[str, float]:
    began = time.perf_counter()
    runner.run(work)
    return {"records": records, "seconds": time.perf_counter() - began}


def run(three: ClusterGroup, one: ClusterGroup, server: EmbeddedServer, pace: Pace) -> list[Group]:
    plain = {"host": server.host, "port": server.port, "keyLayout": "hashtag"}
    on_three = Dscache("dscache, 3 primaries", three.options)
    on_one = Dscache("dscache, 1 primary", one.options)
    batched = Dscache("dscache, one server", plain)
    single = OneRecordACommand("dscache, one server, 1 record a command", plain)
    peer = RedisPyCluster(three.nodes[0].port)
    clients: list[Dscache | RedisPyCluster] = [on_three, on_one, batched, single, peer]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for client in clients:
            runner.run(client.connect())
        get = Group(
            f"await get, {TASKS} tasks",
            [
                one_by_one(runner, client.label, client.get)
                for client in (batched, single, on_one, on_three, peer)
            ],
        )
        bulk = Group(
            f"{RECORDS} names in bulk, raw",
            [
                in_bulk(runner, client.label, client.get_bulk)
                for client in (batched, on_three, on_one, single)
            ],
        )
        measure([get, bulk], pace)
        for client in clients:
            runner.run(client.close())
    return [get, bulk]


def goals_as_text(get: Group, bulk: Group) -> list[str]:
    return [
        goal(f"{get.title}, three primaries, to redis-py", get.rows[3], get.rows[4], 10),
        goal(f"{bulk.title}, one primary, to 1 record a command", bulk.rows[2], bulk.rows[3], 0.55),
    ]


def main() -> None:
    options = arguments(__doc__, rounds=7, seconds=0.3).parse_args()
    with EmbeddedServer() as server, contextlib.ExitStack() as stack:
        three = stack.enter_context(ClusterGroup(server.binary, primaries=3, replicas=0))
        one = stack.enter_context(ClusterGroup(server.binary, primaries=1, replicas=0))
        stack.enter_context(pinned([three, one]))
        placing = stack.enter_context(apart(server))
        groups = run(three, one, server, Pace(options.rounds, options.seconds))
        header = facts(server, f"{placing}, nodes beside it", options.rounds)
    print(*header, *as_text(groups), "", *goals_as_text(*groups), sep="\n")


if __name__ == "__main__":
    main()
