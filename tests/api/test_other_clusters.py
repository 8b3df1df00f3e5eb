"""Addresses that pass from one cluster to another, as those of pods do, on two real clusters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.aio.test_topology import FakeCluster, FakeNode, names_of
from tests.conftest import BY_AGE
from tests.soak.cluster_rows import CURIOUS
from tests.support.blocking import ThreadedCache
from tests.support.clusters import ClusterGroup, ClusterNode
from tests.support.waiting import PATIENCE
from tests.support.wire import Refusal

NAMES = [f"user/{number}" for number in range(60)]
# Seconds during which a cache sees both clusters; it once went over within the first refreshes.
EXPOSED = 3
Cache = Any


@pytest.fixture
def ours() -> Iterator[ClusterGroup]:
    with start() as group:
        yield group


@pytest.fixture
def theirs() -> Iterator[ClusterGroup]:
    """Another cluster, whose epoch is higher."""
    with start() as group:
        for _ in range(20):
            for node in group.nodes:
                node.ask("CLUSTER", "BUMPEPOCH")
        yield group


def start() -> ClusterGroup:
    return ClusterGroup(BY_AGE[-1], replicas=0, full_coverage=False)


@pytest.fixture(params=["async", "blocking"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def opened(kind: str, nodes: Sequence[ClusterNode | FakeNode], **options: Any) -> Any:
    seeds = [{"host": node.host, "port": node.port} for node in nodes]
    config = {
        "name": "redis",
        "options": {"nodes": seeds, "commandTimeout": 1000, **CURIOUS, **options},
    }
    async with asyncio.timeout(PATIENCE):
        if kind == "async":
            async with dscache.AsyncCache.from_config(config) as cache:
                yield cache
        else:
            async with ThreadedCache(dscache.Cache.from_config(config), 2) as threaded:
                yield threaded


async def fill(group: ClusterGroup, value: str) -> None:
    async with opened("async", group.nodes) as cache:
        await cache.set_bulk(dict.fromkeys(NAMES, (1, value)))


def owned_by(group: ClusterGroup, *nodes: ClusterNode) -> list[str]:
    ports = {node.port for node in nodes}
    return [name for name in NAMES if group.owner(f"{{{name}}}_v").port in ports]


async def values_of(cache: Cache, names: list[str]) -> dict[str, Any]:
    return {name: record.data for name, record in (await cache.get_bulk(names)).items()}


async def test_an_address_that_another_cluster_has_now(
    ours: ClusterGroup, theirs: ClusterGroup, kind: str
) -> None:
    await fill(ours, "ours")
    await fill(theirs, "theirs")
    *alive, lost = ours.nodes
    kept = owned_by(ours, *alive)
    gone = owned_by(ours, lost)
    assert kept
    assert gone
    async with opened(kind, alive) as cache:
        assert await values_of(cache, NAMES) == dict.fromkeys(NAMES, "ours")
        ours.kill(lost)
        theirs.move(theirs.nodes[0], lost.port)
        end = time.monotonic() + EXPOSED
        version = 1
        while time.monotonic() < end:
            version += 1
            assert await values_of(cache, kept) == dict.fromkeys(kept, "ours")
            assert await cache.set(kept[0], version, "ours") is True
            with pytest.raises(dscache.DscacheError):
                await cache.get(gone[version % len(gone)])
            with pytest.raises(dscache.DscacheError):
                await cache.set(gone[0], version, "ours")
        stats = cache.stats()
        assert (
            f"{lost.host}:{lost.port}" not in stats["nodes"]
            or stats["nodes"][f"{lost.host}:{lost.port}"]["connections"] == 0
        )
        # The node comes back at an address of its own.
        ours.move(lost)
        await until_read(cache, "ours")
    async with opened("async", theirs.nodes) as cache:
        assert await values_of(cache, NAMES) == dict.fromkeys(NAMES, "theirs")


@pytest.mark.parametrize("role", ["primary", "replica"])
async def test_an_address_that_a_single_server_has_now(
    ours: ClusterGroup, kind: str, role: str
) -> None:
    await fill(ours, "ours")
    *alive, lost = ours.nodes
    kept, gone = owned_by(ours, *alive), owned_by(ours, lost)
    async with opened(kind, alive) as cache:
        assert await values_of(cache, NAMES) == dict.fromkeys(NAMES, "ours")
        ours.kill(lost)
        with (
            EmbeddedServer(port=lost.port) as single,
            redis_py.Redis(port=lost.port) as redis,
        ):
            redis.mset({f"{{{name}}}_v": "1" for name in gone})
            redis.mset({f"{{{name}}}_d": '"theirs"' for name in gone})
            if role == "replica":
                redis.replicaof("127.0.0.1", 1)
            end = time.monotonic() + EXPOSED / 2
            while time.monotonic() < end:
                assert await values_of(cache, kept) == dict.fromkeys(kept, "ours")
                with pytest.raises(dscache.ConnectError, match="isn't a node of a cluster"):
                    await cache.get(gone[0])
                with pytest.raises(dscache.ConnectError, match="isn't a node of a cluster"):
                    await cache.set(gone[0], 2, "ours")
            assert redis.get(f"{{{gone[0]}}}_v") == b"1"
            assert single.port == lost.port
        ours.start(lost)
        await until_read_or_missing(cache, kept)


async def until_read_or_missing(cache: Cache, kept: list[str]) -> None:
    """Wait until all shards answer; the one that was killed has lost its records."""
    while True:
        with suppress(dscache.DscacheError):
            found = await values_of(cache, NAMES)
            assert found.keys() >= set(kept)
            assert set(found.values()) == {"ours"}
            return
        await asyncio.sleep(0.02)


async def until_read(cache: Cache, value: str) -> None:
    while True:
        with suppress(dscache.DscacheError):
            if await values_of(cache, NAMES) == dict.fromkeys(NAMES, value):
                return
        await asyncio.sleep(0.02)


async def test_a_whole_cluster_that_was_replaced(
    ours: ClusterGroup, theirs: ClusterGroup, kind: str
) -> None:
    await fill(ours, "ours")
    await fill(theirs, "theirs")
    async with opened(kind, ours.nodes[:2]) as cache:
        assert await values_of(cache, NAMES) == dict.fromkeys(NAMES, "ours")
        for node in ours.nodes:
            ours.kill(node)
        theirs.move(theirs.nodes[0], ours.nodes[1].port)
        await until_read(cache, "theirs")


# -- single nodes, on fakes

STRANGE = b"e" * 40
HIDDEN = Refusal("NOPERM this user has no permissions to run the 'cluster|myid' command")


async def restart(node: FakeNode) -> None:
    await node.__aexit__()
    await node.__aenter__()


async def until_set(cache: Cache, name: str, version: int) -> None:
    while True:
        with suppress(dscache.DscacheError):
            if await cache.set(name, version, version):
                return
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("told", [STRANGE, HIDDEN], ids=["told", "hidden"])
async def test_a_strange_node(kind: str, told: bytes | Refusal) -> None:
    """It gets no operation, whether it tells its id or only lists itself among its slots."""
    async with FakeCluster(2) as fakes:
        first, second = fakes.nodes
        for node in fakes.nodes:
            node.told_id = told if told is HIDDEN else b""
        (here,), (there,) = names_of(first, 1), names_of(second, 1)
        async with opened(kind, fakes.nodes, commandTimeout=100) as cache:
            assert await cache.set_bulk({here: (1, 1), there: (1, 1)}) == set()
            second.told_id = told
            alone = [[0, 16383, [second.host.encode(), second.port, STRANGE, []]]]
            second.slots = lambda: alone  # type: ignore[method-assign]
            second.epoch = 9
            await restart(second)
            before = len(second.moved)
            for version in range(2, 12):
                assert await cache.set(here, version, version) is True
                with pytest.raises(dscache.DscacheError):
                    await cache.set(there, version, version)
            assert len(second.moved) == before
            # The cluster's own node is back.
            del second.slots  # type: ignore[method-assign]
            second.told_id = told if told is HIDDEN else b""
            second.epoch = 1
            await restart(second)
            await until_set(cache, there, 20)


async def test_a_node_that_was_replaced_within_the_cluster(kind: str) -> None:
    async with FakeCluster(2) as fakes:
        first, second = fakes.nodes
        (there,) = names_of(second, 1)
        async with opened(kind, fakes.nodes) as cache:
            assert await cache.set(there, 1, 1) is True
            second.told_id = STRANGE  # the others don't know it yet
            await restart(second)
            connected = second.accepted
            while second.accepted < connected + 2:
                with suppress(dscache.DscacheError):
                    await cache.set(there, 2, 2)
            second.id = STRANGE
            await until_set(cache, there, 3)
            assert second.values
            assert first.views > 1


async def test_a_node_that_gets_another_id_while_it_is_connected(kind: str) -> None:
    async with FakeCluster(2) as fakes:
        second = fakes.nodes[1]
        (there,) = names_of(second, 1)
        async with opened(kind, fakes.nodes) as cache:
            assert await cache.set(there, 1, 1) is True
            accepted = second.accepted
            second.id = STRANGE
            version = 1
            while second.accepted == accepted:
                version += 1
                await until_set(cache, there, version)
            await until_set(cache, there, version + 1)


@pytest.mark.parametrize("told", [STRANGE, HIDDEN, b"no id"], ids=["other", "hidden", "no id"])
async def test_nodes_that_tell_no_id_of_their_view(kind: str, told: bytes | Refusal) -> None:
    """Some proxies answer CLUSTER MYID with an id of their own: then ids prove nothing."""
    async with FakeCluster(2) as fakes:
        for node in fakes.nodes:
            node.told_id = told
        names = [name for node in fakes.nodes for name in names_of(node, 1)]
        async with opened(kind, fakes.nodes) as cache:
            for version in (1, 2, 3):
                for name in names:
                    await until_set(cache, name, version)
                for node in fakes.nodes:
                    await restart(node)
