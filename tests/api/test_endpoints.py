"""The ways in which the nodes of a cluster may name each other to clients, on real clusters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import dscache
from dscache.embedded import ServerBinary
from tests.conftest import OLDEST_AND_NEWEST, PATIENT
from tests.soak.cluster_rows import CURIOUS, a_name_each, prefix_on, slot_of
from tests.support.blocking import ThreadedCache
from tests.support.clusters import ClusterGroup
from tests.support.waiting import PATIENCE

PREFERRED = "--cluster-preferred-endpoint-type"
HOSTNAME = "--cluster-announce-hostname"
# The options of the servers, and the host at which a cache then finds the nodes that it wasn't
# given. A node that names no host is at the host of the node that named it.
ENDPOINTS = {
    "hostname": ((PREFERRED, "hostname", HOSTNAME, "localhost"), "localhost"),
    "hostname, and none announced": ((PREFERRED, "hostname"), "127.0.0.1"),
    "unknown-endpoint": ((PREFERRED, "unknown-endpoint"), "127.0.0.1"),
    "address, and a hostname beside it": ((HOSTNAME, "nowhere.invalid"), "127.0.0.1"),
}
NEAR = {"maxAge": 60_000}


@pytest.fixture(scope="module", params=OLDEST_AND_NEWEST, ids=lambda binary: binary.name)
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    found: ServerBinary = request.param
    return found


@pytest.fixture(scope="module", params=ENDPOINTS)
def named(request: pytest.FixtureRequest, binary: ServerBinary) -> Iterator[tuple[Any, str]]:
    args, host = ENDPOINTS[request.param]
    with ClusterGroup(binary, replicas=0, args=args) as group:
        yield group, host


@asynccontextmanager
async def opened(kind: str, group: ClusterGroup, **options: Any) -> AsyncIterator[Any]:
    """Open a cache that was given one node only."""
    [seed, *_] = group.options["nodes"]  # type: ignore[misc]  # a list, as of every group
    config = {"name": "redis", "options": {"nodes": [seed], **PATIENT, **options}}
    async with asyncio.timeout(PATIENCE):
        if kind == "async":
            async with dscache.AsyncCache.from_config(config) as cache:
                yield cache
        else:
            async with ThreadedCache(dscache.Cache.from_config(config), 2) as threaded:
                yield threaded


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_all_nodes_are_reached(named: tuple[ClusterGroup, str], kind: str) -> None:
    group, host = named
    names = list(a_name_each(group))
    async with opened(kind, group) as cache:
        await cache.set_bulk({name: (1, name) for name in names})
        found = await cache.get_bulk(names)
        assert {name: record.data for name, record in found.items()} == dict(
            zip(names, names, strict=True)
        )
        addresses = set(cache.stats()["nodes"])
    # The configured node has a second address for a while, if it is announced by another.
    others = {f"{host}:{node.port}" for node in group.nodes[1:]}
    assert addresses - others <= {f"{one}:{group.nodes[0].port}" for one in (host, "127.0.0.1")}
    assert addresses > others


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_redirections_are_followed(named: tuple[ClusterGroup, str], kind: str) -> None:
    """MOVED and ASK name the other node in the same way as CLUSTER SLOTS."""
    group, _ = named
    source, target = group.primaries()[:2]
    room = prefix_on(group, source)
    slot = slot_of(room)
    name, other = f"{room}/{kind}", f"{room}/{kind} too"
    # So that the cache doesn't hear of the move by itself.
    async with opened(kind, group, slotsRefreshInterval=600_000) as cache:
        await cache.set_bulk({name: (1, name), other: (1, other)})
        try:
            await asyncio.to_thread(group.begin_migration, slot, source, target)
            await asyncio.to_thread(group.move_keys, slot, source, target)
            assert (await cache.get(name)).data == name
            await asyncio.to_thread(group.end_migration, slot, source, target)
            assert (await cache.get(other)).data == other
            await cache.set(name, 2, name)
            assert await cache.head(name) == 2
            assert cache.stats()["redirections"] >= 2
        finally:
            if slot in group.slots_of(source):
                await asyncio.to_thread(group.move_keys, slot, source, target)
                await asyncio.to_thread(group.end_migration, slot, source, target)
            await asyncio.to_thread(group.migrate, [slot], target, source)


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_a_near_cache_hears_of_all_nodes(named: tuple[ClusterGroup, str], kind: str) -> None:
    group, _ = named
    names = list(a_name_each(group))
    async with opened(kind, group, nearCache=NEAR, **CURIOUS) as cache:
        for name in names:
            await cache.set(name, 1, 1)
        for name in names:
            while not await is_at_hand(cache, name):
                await asyncio.sleep(0.002)
            owner = group.owner(f"{{{name}}}_v")
            await asyncio.to_thread(owner.ask, "MSET", f"{{{name}}}_v", 7, f"{{{name}}}_d", "1")
            while await cache.head(name) != 7:
                await asyncio.sleep(0.002)
        assert cache.stats()["near_cache"]["hits"] >= len(names)


async def is_at_hand(cache: Any, name: str) -> bool:
    """Read a record; return whether that was a hit of the near cache."""
    before = cache.stats()["near_cache"]["hits"]
    await cache.get(name)
    return bool(cache.stats()["near_cache"]["hits"] > before)
