"""Slots that move at one moment with all their keys, on servers that can do that, under load."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis as redis_py

import dscache
from tests.conftest import BINARIES, PATIENT
from tests.soak import cluster_rows
from tests.soak.cluster_rows import CURIOUS, prefix_on, slot_of
from tests.soak.figures import Figures
from tests.support.blocking import ThreadedCache, until
from tests.support.clusters import ClusterGroup
from tests.support.near_truth import Readers, Truth, assert_serves, has_last

# A record that moved is outdated until the move is known, which a busy machine delays.
BOUND_SECONDS = 15.0
ROUNDS = 3
ATOMIC = [one for one in BINARIES if ClusterGroup(one).moves_atomically]
assert ATOMIC, "no server here moves slots atomically: Valkey 9 is in the extra embedded"


@pytest.fixture(scope="module", params=ATOMIC, ids=lambda one: one.name)
def moving(request: pytest.FixtureRequest) -> Iterator[ClusterGroup]:
    # A primary without slots stays a primary.
    args = ("--cluster-allow-replica-migration", "no")
    with ClusterGroup(request.param, replicas=3, args=args) as group:
        yield group


@pytest.fixture(autouse=True)
def empty(moving: ClusterGroup) -> None:
    moving.wait_until_ok()
    for primary in moving.primaries():
        primary.ask("FLUSHALL")


class LoopedCache:
    """An AsyncCache on a loop in a thread of its own, for callers that block."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._cache: dscache.AsyncCache = self._run("_open", options)

    def _run(self, operation: str, *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(self._do(operation, *arguments), self._loop).result(
            60
        )

    async def _do(self, operation: str, *arguments: Any) -> Any:
        if operation == "_open":
            cache = dscache.AsyncCache.from_config({"name": "redis", "options": arguments[0]})
            await cache.when_ready()
            return cache
        return await getattr(self._cache, operation)(*arguments)

    def get(self, name: str) -> dscache.Record | None:
        found: dscache.Record | None = self._run("get", name)
        return found

    def head(self, name: str) -> int | None:
        found: int | None = self._run("head", name)
        return found

    def get_bulk(self, names: list[str]) -> dict[str, dscache.Record]:
        found: dict[str, dscache.Record] = self._run("get_bulk", names)
        return found

    def stats(self) -> dict[str, Any]:
        return self._cache.stats()

    def close(self) -> None:
        self._run("close")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_no_operation_fails(moving: ClusterGroup, backend: str, kind: str) -> None:
    figures = Figures("atomic reshard")
    config = {"name": "redis", "options": moving.options | PATIENT}
    if kind == "async":
        async with dscache.AsyncCache.from_config(config) as cache:
            await cluster_rows.move_slots(figures, moving, cache, 80, atomically=True)
    else:
        async with ThreadedCache(dscache.Cache.from_config(config), 4) as threaded:
            await cluster_rows.move_slots(figures, moving, threaded, 80, atomically=True)
    assert figures.problems == []
    assert figures.operations > 0


@pytest.mark.parametrize("mode", ["default", "broadcast", "blocking"])
def test_a_near_cache_serves_nothing_outdated(
    moving: ClusterGroup, backend: str, mode: str
) -> None:
    """Reads never go back and are outdated for a short time only, however often the slot moves."""
    source, target = moving.primaries()[:2]
    room = prefix_on(moving, source)
    slots = [slot_of(room)]
    names = [f"{room}/{mode}/{backend}/{number}" for number in range(6)]
    truth = Truth(names, BOUND_SECONDS)
    options = moving.options | PATIENT | CURIOUS
    near = {"maxAge": 60_000} if mode == "blocking" else {"maxAge": 60_000, "mode": mode}
    with ExitStack() as stack:
        cache: Any
        if mode == "blocking":
            config = {"name": "redis", "options": {**options, "nearCache": near}}
            cache = dscache.Cache.from_config(config)
        else:
            cache = LoopedCache({**options, "nearCache": near})
        stack.callback(cache.close)
        other = redis_py.RedisCluster("127.0.0.1", moving.nodes[0].port)
        stack.callback(other.close)

        def put(name: str, version: int) -> None:
            data = json.dumps([name, version])
            other.mset({f"{{{name}}}_v": version, f"{{{name}}}_d": data})

        readers = stack.enter_context(Readers(cache, truth))
        assert_serves(cache, truth, put, *names[:2])
        for _ in range(ROUNDS):
            for old, new in ((source, target), (target, source)):
                moved = threading.Thread(target=moving.migrate_atomically, args=(slots, old, new))
                moved.start()
                while moved.is_alive():
                    truth.write(put)
                    time.sleep(0.002)
                moved.join()
                assert slots[0] in moving.slots_of(new)
                truth.write(put)
                for name in names:
                    until(lambda n=name: has_last(cache, truth, n), f"the last step of {name}")
        assert_serves(cache, truth, put)
        assert cache.stats()["near_cache"]["hits"] > len(names)
    assert readers.reads > len(names)
    assert not readers.errors
