"""``scaleReads: zone``: replicas in the program's own zone, on servers that tell theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import BY_AGE
from tests.soak.cluster_rows import CURIOUS
from tests.support.clusters import ClusterGroup, ClusterNode
from tests.support.either import Either
from tests.support.waiting import PATIENCE

NAMES = [f"n/{i}" for i in range(100)]


NEWEST = BY_AGE[-1]
HAS_ZONES = NEWEST.name.startswith("valkey") and NEWEST.version >= (8, 1)


@pytest.fixture(scope="module")
def zoned() -> Iterator[ClusterGroup]:
    """A primary with two replicas, in the zones a, b and c where the server has zones."""
    with ClusterGroup(NEWEST, primaries=1, replicas=2) as group:
        if HAS_ZONES:
            set_zones(group)
        yield group


def set_zones(group: ClusterGroup) -> None:
    for node, zone in zip((*group.primaries(), *group.replicas()), "abc", strict=True):
        node.ask("CONFIG", "SET", "availability-zone", zone)


async def nodes_read(cache: Either, group: ClusterGroup) -> set[ClusterNode]:
    alive = [node for node in group.nodes if node.is_alive]
    before = {node: node.reads() for node in alive}
    assert len(await cache.do("get_bulk", NAMES)) == len(NAMES)
    return {node for node in alive if node.reads() > before[node]}


async def until_read(cache: Either, group: ClusterGroup, expected: set[ClusterNode]) -> None:
    """Wait until these nodes are read, and no others, for a while.

    Replicas are read once they are connected, also in other zones until their zone is known.
    """
    in_a_row = 0
    async with asyncio.timeout(PATIENCE):
        while in_a_row < 5:
            is_expected = await nodes_read(cache, group) == expected
            in_a_row = in_a_row + 1 if is_expected else 0
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", ["AsyncCache", "Cache"])
async def test_replicas_are_read_by_zone(zoned: ClusterGroup, kind: str, backend: str) -> None:
    first, second = replicas = zoned.replicas()
    by_zone = {"a": replicas, "b": [first], "c": [second], "elsewhere": replicas}
    for zone, expected in by_zone.items():
        options: dict[str, Any] = {**zoned.options, "scaleReads": "zone", "zone": zone}
        async with Either(kind, **options) as cache:
            await cache.do("set_bulk", {name: (1, name) for name in NAMES})
            # Of servers without zones, every replica is read.
            await until_read(cache, zoned, set(expected if HAS_ZONES else replicas))


@pytest.mark.parametrize("kind", ["AsyncCache", "Cache"])
async def test_others_are_read_when_the_nearest_is_lost(
    zoned: ClusterGroup, kind: str, backend: str
) -> None:
    first, second = replicas = zoned.replicas()
    options: dict[str, Any] = {**zoned.options, **CURIOUS, "scaleReads": "zone", "zone": "b"}
    async with Either(kind, **options) as cache:
        await cache.do("set_bulk", {name: (1, name) for name in NAMES})
        await until_read(cache, zoned, {first} if HAS_ZONES else set(replicas))
        await asyncio.to_thread(zoned.kill, first)
        await until_read(cache, zoned, {second})
        await asyncio.to_thread(zoned.kill, second)
        await until_read(cache, zoned, set(zoned.primaries()))
        await asyncio.to_thread(zoned.start, first)
        await asyncio.to_thread(zoned.start, second)
        await asyncio.to_thread(zoned.wait_until_ok)
        if HAS_ZONES:
            await asyncio.to_thread(set_zones, zoned)
        await until_read(cache, zoned, {first} if HAS_ZONES else set(replicas))
