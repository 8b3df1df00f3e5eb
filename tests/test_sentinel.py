"""A cache behind Sentinels: it finds the primary, and finds the next one when that fails."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

import dscache
from conftest import SERVERS
from dscache.embedded import ServerBinary, find_servers
from sentinels import GROUP, SentinelGroup

# Sentinels of every server found would take long, and they differ little: the oldest and the
# newest kind of server stand for the others.
BINARIES = [one for one in SERVERS if isinstance(one, ServerBinary)] or find_servers()
SOME = list(dict.fromkeys((BINARIES[0], BINARIES[-1])))


PASSWORD = "the-sentinels-own"


@pytest.fixture(scope="module", params=SOME, ids=lambda binary: binary.name)
def shared_group(request: pytest.FixtureRequest) -> Iterator[SentinelGroup]:
    """A primary, two replicas and three Sentinels with a password."""
    with SentinelGroup(request.param, password=PASSWORD) as started:
        yield started


@pytest.fixture
def group(shared_group: SentinelGroup) -> SentinelGroup:
    """The shared group, whole again after what the last test did to it."""
    shared_group.heal()
    return shared_group


def open_cache(group: SentinelGroup, **options: Any) -> dscache.AsyncCache:
    return dscache.AsyncCache.from_config({"name": "redis", "options": group.options | options})


async def _replicated(group: SentinelGroup) -> None:
    """Wait until all replicas hold what was written so far: replication is asynchronous."""
    replicas = len(group.servers) - 1
    with group.ask(group.primary().port) as client:
        # WAIT is for the writes of its own connection, and so for all before them.
        client.set("marker", "1")
        while await asyncio.to_thread(client.wait, replicas, 1000) < replicas:
            await asyncio.sleep(0.05)


async def test_replicas_are_read_and_refuse_writes(group: SentinelGroup, backend: str) -> None:
    async with asyncio.timeout(30):
        async with open_cache(group) as cache:
            await cache.set("a", 1, {"b": 2})
            assert GROUP in cache.description
            await _replicated(group)
        async with open_cache(group, role="slave") as cache:
            record = await cache.get("a")
            assert record is not None
            assert (record.version, record.data) == (1, {"b": 2})
            with pytest.raises(dscache.ReplyError) as refusal:
                await cache.set("a", 2, {})
            assert refusal.value.code == "READONLY"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "others"}, 'names a primary of "others": .*knows of none that is up'),
        ({"sentinelPassword": "wrong"}, 'names a primary of "records": .*password'),
        ({"sentinels": [{"port": 1}]}, r'a primary of "records": 127\.0\.0\.1:1: '),
        ({"name": "others", "role": "slave"}, 'names a replica of "others": .*No such master'),
    ],
)
async def test_nobody_knows_a_primary(
    options: dict[str, Any], message: str, group: SentinelGroup
) -> None:
    cache = open_cache(group, connectTimeout=1000, **options)
    with pytest.raises(dscache.ConnectError, match=message) as refusal:
        await cache.when_ready()
    await cache.close()
    assert PASSWORD not in str(refusal.value)
    assert "wrong" not in str(refusal.value)


async def test_the_first_sentinels_may_be_down(group: SentinelGroup, backend: str) -> None:
    nodes = [{"host": "127.0.0.1", "port": port} for port in (1, *group.ports)]
    async with asyncio.timeout(30), open_cache(group, sentinels=nodes) as cache:
        assert await cache.set("a", 1, 1)


# -- what changes the roles comes last: a group takes its time to be whole again


async def test_a_demoted_primary_is_left() -> None:
    """A connection that outlives the change of roles ends with the first READONLY."""
    with SentinelGroup(SOME[0], replicas=1, sentinels=1) as group:
        await _demote_and_write(group)


async def _demote_and_write(group: SentinelGroup) -> None:
    async with asyncio.timeout(30), open_cache(group) as cache:
        await cache.set("a", 1, 1)
        await _replicated(group)
        old = group.primary()
        # Without the Sentinels, which would close the clients' connections themselves.
        other = next(server for server in group.servers if server is not old)
        with group.ask(old.port) as client:
            client.replicaof(other.host, str(other.port))
        with pytest.raises(dscache.ReplyError, match="READONLY"):
            await cache.set("a", 2, 2)
        connects = cache.stats()["connects"]
        while cache.stats()["connects"] == connects and cache.is_ready:
            await asyncio.sleep(0.01)
        assert "replica" in cache.stats()["last_loss"]


async def test_failover_under_load(group: SentinelGroup, backend: str) -> None:
    """Guarded writes go on after a failover, and none that was acknowledged goes backwards."""
    old = group.primary()
    async with asyncio.timeout(60), open_cache(group) as cache:
        acknowledged = dict.fromkeys((f"{backend}/{i}" for i in range(8)), 0)
        stop = asyncio.Event()
        failures: list[Exception] = []

        async def write(name: str) -> None:
            for version in itertools.count(1):
                if stop.is_set():
                    return
                try:
                    if await cache.set(name, version, {"version": version}, if_newer=True):
                        acknowledged[name] = version
                except dscache.DscacheError as error:
                    failures.append(error)
                await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as tasks:
            for name in acknowledged:
                tasks.create_task(write(name))
            await asyncio.sleep(0.5)
            await _replicated(group)
            before = dict(acknowledged)
            old.kill()
            await asyncio.to_thread(group.wait_for_primary, old)
            at_failover = dict(acknowledged)
            while any(acknowledged[name] <= at_failover[name] for name in acknowledged):
                await asyncio.sleep(0.01)
            stop.set()

        stored = await cache.head_bulk(acknowledged)
        assert stored == acknowledged
        assert all(acknowledged[name] > before[name] > 0 for name in acknowledged)
        assert cache.stats()["connects"] >= 2
        assert str(group.primary().port) in str(cache._topology.node.address)
        # None of them was told a wrong thing: they were refused, or told of the lost connection.
        assert {type(error) for error in failures} <= {
            dscache.ConnectionLost,
            dscache.ConnectError,
            dscache.DeadlineExceeded,
            dscache.ReplyError,
        }
