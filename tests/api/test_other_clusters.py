"""Addresses that pass from one cluster to another, as those of pods do, on two real clusters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

import dscache
from tests.conftest import BY_AGE
from tests.soak.cluster_rows import CURIOUS
from tests.support.blocking import ThreadedCache
from tests.support.clusters import ClusterGroup, ClusterNode
from tests.support.waiting import PATIENCE

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
async def opened(kind: str, nodes: list[ClusterNode], **options: Any) -> Any:
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
