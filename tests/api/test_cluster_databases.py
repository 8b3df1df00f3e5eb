"""The numbered databases of a Valkey cluster, on a real one, and clusters that have none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import dscache
from tests.conftest import BINARIES, WITHOUT_DATABASES
from tests.soak.cluster_rows import CURIOUS
from tests.support.blocking import ThreadedCache
from tests.support.clusters import ClusterGroup
from tests.support.either import Either
from tests.support.waiting import PATIENCE

DATABASES = 4
NAMES = [f"user/{number}" for number in range(60)]
WITH_DATABASES = [one for one in BINARIES if one.name.startswith("valkey") and one.version >= (9,)]
NONE_WITHOUT = pytest.param(
    None, id="none", marks=pytest.mark.skip("each server here has databases in a cluster")
)


@pytest.fixture(scope="module")
def group() -> Iterator[ClusterGroup]:
    args = ("--cluster-databases", str(DATABASES))
    with ClusterGroup(WITH_DATABASES[0], replicas=0, args=args) as group:
        yield group


@pytest.fixture(params=["async", "blocking"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def opened(kind: str, group: ClusterGroup, shared: dict[str, Any]) -> AsyncIterator[Any]:
    node = group.nodes[0]
    options = {"nodes": [{"host": node.host, "port": node.port}], "redisOptions": shared, **CURIOUS}
    config = {"name": "redis", "options": {**options, "commandTimeout": PATIENCE * 1000}}
    if kind == "async":
        async with dscache.AsyncCache.from_config(config) as cache:
            yield cache
    else:
        async with ThreadedCache(dscache.Cache.from_config(config), 2) as threaded:
            yield threaded


def sizes(group: ClusterGroup) -> list[int]:
    """Return the number of keys in each database."""
    found = [0] * DATABASES
    for node in group.nodes:
        for name, facts in node.ask("INFO", "keyspace").items():
            found[int(name.removeprefix("db"))] += facts["keys"]
    return found


@pytest.fixture(autouse=True)
def empty(group: ClusterGroup) -> None:
    for node in group.nodes:
        node.ask("FLUSHALL")


async def test_records_are_in_the_configured_database(
    kind: str, group: ClusterGroup, backend: str
) -> None:
    async with opened(kind, group, {"db": 2}) as cache:
        assert await cache.set_bulk({name: (1, {"n": name}) for name in NAMES}) == set()
        assert sizes(group) == [0, 0, 2 * len(NAMES), 0]
        found = await cache.get_bulk(NAMES)
        assert {name: record.data for name, record in found.items()} == {
            name: {"n": name} for name in NAMES
        }
        assert await cache.set(NAMES[0], 2, 0, if_newer=True) is True
        assert await cache.head(NAMES[0]) == 2
    async with opened(kind, group, {}) as cache:
        assert await cache.get_bulk(NAMES) == {}
        assert await cache.set(NAMES[0], 7, 0) is True
        assert sizes(group) == [2, 0, 2 * len(NAMES), 0]
    async with opened(kind, group, {"db": 2}) as cache:
        assert await cache.delete_bulk(NAMES) == len(NAMES)
        assert sizes(group) == [2, 0, 0, 0]


async def test_a_new_connection_selects_the_database_too(
    kind: str, group: ClusterGroup, backend: str
) -> None:
    async with opened(kind, group, {"db": 1}) as cache:
        assert await cache.set_bulk(dict.fromkeys(NAMES, (1, 0))) == set()
        for node in group.nodes:
            node.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert await cache.set_bulk(dict.fromkeys(NAMES, (2, 0)), if_newer=True) == set()
        assert sizes(group) == [0, 2 * len(NAMES), 0, 0]


@pytest.mark.parametrize("kind", ["AsyncCache", "Cache"])
async def test_every_feature_uses_the_database(
    kind: str, group: ClusterGroup, backend: str
) -> None:
    """Also over the connections of the near cache, of scans and of watches."""
    node = group.nodes[0]
    shared: dict[str, Any] = {"nodes": [{"host": node.host, "port": node.port}], **CURIOUS}
    own = {**shared, "redisOptions": {"db": 2}, "nearCache": {"idleLimit": 30_000}}
    async with (
        asyncio.timeout(PATIENCE),
        Either(kind, **shared) as zero,
        Either(kind, **own) as other,
        Either(kind, **own) as cache,
    ):
        await zero.do("set_bulk", dict.fromkeys([*NAMES, "user/of zero"], (9, "zero")))
        await cache.do("set_bulk", {name: (1, {"n": name}) for name in NAMES})
        assert {*await cache.all("user/")} == {*NAMES}
        assert {one.version for one in await cache.all("user/", records=True)} == {1}
        assert (await cache.do("update", NAMES[0], lambda data: 2)).version == 2
        assert (await cache.do("patch", NAMES[1], {"n": None})).data == {}
        assert (await cache.do("fetch", "loaded", lambda name: name, ttl=60)).data == "loaded"
        assert await zero.do("get_bulk", ["loaded"]) == {}

        def hits() -> int:
            count: int = cache.cache.stats()["near_cache"]["hits"]
            return count

        before = hits()
        while hits() == before:
            assert (await cache.do("get", NAMES[2])).version == 1
        await other.do("set", NAMES[2], 7, "new")
        while (await cache.do("get", NAMES[2])).version != 7:
            await asyncio.sleep(0.002)
        watch = cache.cache.watch("user/", records=True)
        if kind == "AsyncCache":
            await watch.__aenter__()
        else:
            await asyncio.to_thread(watch.__enter__)
        try:
            await zero.do("set", "user/of zero", 10, "zero")
            await other.do("set", "user/last", 4, "last")
            changes = [await cache.next(watch)]
            while changes[-1].name != "user/last":
                changes.append(await cache.next(watch))
            # Redis also reports keys of other databases, where there is no such record.
            assert {(one.name, one.version) for one in changes} <= {
                ("user/of zero", None),
                ("user/last", 4),
            }
            assert changes[-1].record.data == "last"
        finally:
            await watch.close() if kind == "AsyncCache" else await asyncio.to_thread(watch.close)
    # Each record is two keys, and a load has left none of its lease.
    assert sizes(group) == [2 * len(NAMES) + 2, 0, 2 * len(NAMES) + 4, 0]


async def test_a_database_that_the_cluster_lacks(
    kind: str, group: ClusterGroup, backend: str
) -> None:
    expected = f"redisOptions.db: the cluster has no database {DATABASES}"
    with pytest.raises(dscache.ConfigError, match=expected):
        async with opened(kind, group, {"db": DATABASES}) as cache:
            await cache.set(NAMES[0], 1, 0)
    assert sizes(group) == [0] * DATABASES


@pytest.mark.parametrize(
    "binary", WITHOUT_DATABASES[-1:] or [NONE_WITHOUT], ids=lambda binary: binary.name
)
async def test_a_cluster_without_databases(kind: str, binary: Any, backend: str) -> None:
    with ClusterGroup(binary, primaries=1, replicas=0) as single:
        with pytest.raises(dscache.ConfigError, match="set cluster-databases on Valkey 9"):
            async with opened(kind, single, {"db": 1}) as cache:
                await cache.set(NAMES[0], 1, 0)
        assert single.nodes[0].ask("DBSIZE") == 0
