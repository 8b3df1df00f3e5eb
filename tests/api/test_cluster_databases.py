"""The numbered databases of a Valkey cluster, on a real one, and clusters that have none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import dscache
from tests.conftest import BINARIES, WITHOUT_DATABASES
from tests.soak.cluster_rows import CURIOUS
from tests.support.blocking import ThreadedCache
from tests.support.clusters import ClusterGroup
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
