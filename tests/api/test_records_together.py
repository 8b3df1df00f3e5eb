"""``if_version`` and ``fetch`` over a failover of Sentinels, and each feature with a near cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import BY_AGE, SERVERS, _server_id
from tests.support.either import Either
from tests.support.near_truth import counters
from tests.support.sentinels import SentinelGroup
from tests.support.waiting import PATIENCE, until

ON_NEWEST = pytest.mark.parametrize("server", SERVERS[-1:], indirect=True, ids=_server_id)
NEAR = {"nearCache": {"idleLimit": 30_000}}


@pytest.fixture(params=["AsyncCache", "Cache"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sentinel_group() -> Iterator[SentinelGroup]:
    with SentinelGroup(BY_AGE[-1]) as started:
        yield started


# -- failovers


async def test_fetch_over_a_failover(
    kind: str, backend: str, sentinel_group: SentinelGroup
) -> None:
    """The load begins before the failover, and its record is written behind it."""
    await asyncio.to_thread(sentinel_group.heal)
    name = f"fetch-{kind}-{backend}"
    begun, done = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loads: list[str] = []

    async def load(name: str) -> dscache.Loaded:
        loads.append(name)
        begun.set()
        await done.wait()
        return dscache.Loaded(7, "loaded")

    def load_blocking(name: str) -> dscache.Loaded:
        return asyncio.run_coroutine_threadsafe(load(name), loop).result(PATIENCE)

    async with Either(kind, **sentinel_group.options) as cache:
        function = load if kind == "AsyncCache" else load_blocking
        calls = [
            asyncio.ensure_future(cache.do("fetch", name, function, ttl=600)) for _ in range(5)
        ]
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
            old = await asyncio.to_thread(sentinel_group.fail_over)
            await asyncio.to_thread(sentinel_group.wait_for_primary, old)
            await until_at(cache, sentinel_group.primary(), f"{name}-probe")
            done.set()
            records = await asyncio.gather(*calls)
        assert {(one.version, one.data) for one in records} == {(7, "loaded")}
        assert loads == [name]
        with sentinel_group.ask(sentinel_group.primary().port) as client:
            assert client.get(f"{name}_v") == "7"
        assert await cache.do("fetch", name, function, ttl=600) == records[0]
        assert loads == [name]


async def until_at(cache: Either, primary: EmbeddedServer, name: str) -> None:
    """Write until a primary has got a write."""
    with redis_py.Redis(port=primary.port) as client:
        while not client.exists(f"{name}_v"):
            try:
                await cache.do("set", name, 1, 1)
            except dscache.DscacheError:  # the old primary was lost
                await asyncio.sleep(0.01)


async def test_if_version_over_a_failover(
    kind: str, backend: str, sentinel_group: SentinelGroup
) -> None:
    """Each write counts on the one before it, whichever server has that; none is done twice."""
    await asyncio.to_thread(sentinel_group.heal)
    name = f"count-{kind}-{backend}"
    ended = False
    done = [0, 0]

    async def count(writer: int) -> None:
        while not ended:
            try:
                record = await cache.do("get", name)
                version = 0 if record is None else record.version
                if record is not None:
                    assert record.data == version, "a write was done on another record"
                expected = version if record is not None else None
                done[writer] += await cache.do(
                    "set", name, version + 1, version + 1, if_version=expected
                )
            except dscache.DscacheError:
                await asyncio.sleep(0.01)

    async with Either(kind, **sentinel_group.options) as cache:
        writers = [asyncio.ensure_future(count(number)) for number in range(2)]
        async with asyncio.timeout(PATIENCE):
            await until(lambda: sum(done) > 50)
            old = await asyncio.to_thread(sentinel_group.fail_over)
            await asyncio.to_thread(sentinel_group.wait_for_primary, old)
            await until_at(cache, sentinel_group.primary(), f"{name}-probe")
            before = sum(done)
            await until(lambda: sum(done) > before + 50)
            ended = True
            await asyncio.gather(*writers)
        record = await cache.do("get", name)
        assert record.data == record.version
        # Writes that the old primary alone has acknowledged are lost with it.
        assert 50 < record.version <= sum(done) + 1
        assert await cache.do("set", name, 9, 9, if_version=record.version - 1) is False
        assert await cache.do("delete", name, if_version=record.version) is True


# -- near caches


@pytest.fixture
async def near(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> AsyncIterator[Either]:
    async with Either(kind, url=server.url, **NEAR) as cache:
        yield cache


def hits_of(cache: Either) -> int:
    hits: int = counters(cache.cache)["hits"]
    return hits


async def ready_to_serve(cache: Either, name: str) -> dscache.Record:
    """Return a record that the near cache serves; it keeps none while an invalidation is due."""
    async with asyncio.timeout(PATIENCE):
        while True:
            hits = hits_of(cache)
            record: dscache.Record = await cache.do("get", name)
            if hits_of(cache) > hits:
                return record


@ON_NEWEST
async def test_own_writes_of_each_kind_are_seen_at_once(near: Either) -> None:
    async def seen() -> Any:
        record = await near.do("get", "n")
        return record and (record.version, record.data)

    await near.do("set", "n", 1, {"a": 1})
    assert await seen() == (1, {"a": 1})
    assert await near.do("set", "n", 2, {"a": 2}, if_version=1)
    assert await seen() == (2, {"a": 2})
    await near.do("update", "n", lambda data: {"a": 3})
    assert await seen() == (3, {"a": 3})
    await near.do("patch", "n", {"b": 4})
    assert await seen() == (4, {"a": 3, "b": 4})
    assert await near.do("delete", "n", if_version=4)
    assert await seen() is None
    assert await near.do("set_bulk", {"n": (1, "bulk")}, if_version={"n": None}) == set()
    assert await seen() == (1, "bulk")
    assert await near.do("delete_bulk", ["n"], if_version={"n": 1}) == 1
    assert await seen() is None
    await near.do("fetch", "n", lambda _: dscache.Loaded(5, "loaded"), ttl=60)
    assert await seen() == (5, "loaded")
    load = {"ttl": 60, "refresh_after": 30}
    await near.do("fetch", "n", lambda _: dscache.Loaded(6, "anew"), **load)
    if near.kind == "AsyncCache":
        await until(lambda: not near.cache._loads._tasks)
    assert await seen() == (6, "anew")
    await near.do("update", "n", lambda _: dscache.DELETE)
    assert await seen() is None
    await near.do("fetch_bulk", ["n"], lambda _: {"n": dscache.Loaded(7, "bulk")}, ttl=60)
    assert await seen() == (7, "bulk")


@ON_NEWEST
async def test_if_version_on_what_the_near_cache_served(
    near: Either, redis: redis_py.Redis
) -> None:
    redis.mset({"n_v": 1, "n_d": '"first"'})
    served = await ready_to_serve(near, "n")
    assert await near.do("set", "n", 2, "second", if_version=served.version)
    served = await ready_to_serve(near, "n")
    # Another writer is first, and the copy doesn't count.
    redis.mset({"n_v": 3, "n_d": '"of the other"'})
    assert await near.do("set", "n", 3, "mine", if_version=served.version) is False
    assert tuple(await near.do("get", "n")) == (3, "of the other")
    served = await ready_to_serve(near, "n")
    redis.mset({"n_v": 4, "n_d": '"of the other"'})
    assert await near.do("delete", "n", if_version=served.version) is False
    assert (await near.do("get", "n")).version == 4


@ON_NEWEST
async def test_updates_read_past_the_near_cache(near: Either, redis: redis_py.Redis) -> None:
    assert await near.do("get", "missing") is None
    redis.mset({"n_v": 1, "n_d": "1"})
    await ready_to_serve(near, "n")
    redis.mset({"n_v": 70, "n_d": "7", "missing_v": 4, "missing_d": "5"})
    assert tuple(await near.do("update", "n", lambda data: dscache.KEEP)) == (70, 7)
    assert tuple(await near.do("update", "missing", lambda data: data + 1)) == (5, 6)
    redis.mset({"n_v": 80, "n_d": "{}"})
    assert tuple(await near.do("patch", "n", {})) == (80, {})


@ON_NEWEST
@pytest.mark.parametrize("refresh_after", [None, 600])
async def test_fetch_is_served_by_the_near_cache(
    near: Either, redis: redis_py.Redis, refresh_after: int | None
) -> None:
    options: dict[str, Any] = {"ttl": 3600, "refresh_after": refresh_after}
    first = await near.do("fetch", "n", lambda _: {"a": 1}, **options)
    async with asyncio.timeout(PATIENCE):
        while True:
            assert await ready_to_serve(near, "n") == first
            hits, sent = hits_of(near), near.cache.stats()["commands"]
            for _ in range(50):
                assert await near.do("fetch", "n", len, **options) == first
            if hits_of(near) == hits + 50:
                break  # otherwise the report of the own write came only now
    assert near.cache.stats()["commands"] == sent
    redis.mset({"n_v": 10**15, "n_d": '"of another program"'})
    async with asyncio.timeout(PATIENCE):
        while (record := await near.do("fetch", "n", len, **options)) == first:
            await asyncio.sleep(0.001)
    assert record.data == "of another program"


@ON_NEWEST
async def test_scans_and_watches_read_past_the_near_cache(
    near: Either, redis: redis_py.Redis
) -> None:
    await near.do("set", "n", 1, "first")
    await ready_to_serve(near, "n")
    watch = near.cache.watch(records=True)
    if near.kind == "AsyncCache":
        await watch.__aenter__()
    else:
        await asyncio.to_thread(watch.__enter__)
    try:
        redis.mset({"n_v": 2, "n_d": '"second"'})
        async with asyncio.timeout(PATIENCE):
            change = await near.next(watch)
        assert (change.version, change.record.data) == (2, "second")
        assert [one.version for one in await near.all(records=True)] == [2]
    finally:
        await watch.close() if near.kind == "AsyncCache" else await asyncio.to_thread(watch.close)
