"""A cache on real clusters: records in their slots, resharding, failover, lost nodes, passwords."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import dscache
from tests.conftest import BY_AGE, OWN, PATIENT, SHARED
from tests.soak import cluster_rows
from tests.soak.cluster_rows import CURIOUS, KINDS, a_name_each, open_cache, slot_of
from tests.soak.figures import Figures
from tests.support.clusters import ClusterGroup, Failover
from tests.support.faults import FaultProxy
from tests.support.waiting import PATIENCE, assert_drained, own_tasks, until


@asynccontextmanager
async def opened(group: ClusterGroup, **options: Any) -> AsyncIterator[dscache.AsyncCache]:
    """Open a cache that is drained at the end and leaves nothing behind."""
    async with asyncio.timeout(PATIENCE):
        async with open_cache(group, **options) as cache:
            yield cache
        assert_drained(cache)
        assert own_tasks() == []


# -- records


@pytest.mark.parametrize("single", [False, True], ids=["bulk", "single"])
@pytest.mark.parametrize("layout", ["hashtag", "deepstream"])
async def test_records_are_on_the_nodes_of_their_slots(
    layout: str, single: bool, group: ClusterGroup, backend: str
) -> None:
    figures = Figures("cluster-records")
    async with opened(group, keyLayout=layout, **PATIENT) as cache:
        await cluster_rows.keep_records(figures, group, cache, layout, 1000, single)
        assert figures.problems == []
        stats = cache.stats()
        assert stats["redirections"] == 0
        assert (stats["hits"], stats["halves"], stats["damaged"]) == (2000, 0, 0)
        assert (stats["writes"], stats["deletes"]) == (1000, 1000)
        # A bulk is one operation, on any number of nodes.
        assert stats["operations"] == (4000 if single else 4)
        assert stats["records"] == 4000


async def test_records_are_never_torn(group: ClusterGroup, backend: str) -> None:
    figures = Figures("cluster-records")
    async with opened(group, **PATIENT) as cache:
        await cluster_rows.tear_none(figures, cache, 10_000)
    assert figures.problems == []
    assert figures.operations >= 10_000


async def test_a_cluster_behaves_like_a_server(group: ClusterGroup, backend: str) -> None:
    """The default layout, a prefix, TTLs, guarded writes, and the description of the cache."""
    primaries = {f"127.0.0.1:{one.port}" for one in group.primaries()}
    async with opened(group, keyPrefix="app/", **PATIENT, **CURIOUS) as cache:
        assert cache.is_ready
        server = group.nodes[0].server.binary.name.replace("-", " ")
        assert f"cluster of {server}" in cache.description
        assert str(group.nodes[0].port) in cache.description
        assert await cache.set("a", 3, {"b": 1}, ttl=100) is True
        assert await cache.set("a", 3, {"b": 2}, if_newer=True) is False
        owner = await asyncio.to_thread(group.owner, "app/{a}_v")
        assert owner.ask("MGET", "app/{a}_v", "app/{a}_d") == ["3", '{"b":1}']
        assert 0 < owner.ask("TTL", "app/{a}_d") <= 100
        names = [f"n/{i}" for i in range(300)]
        assert await cache.set_bulk({n: (5, n) for n in names}, ttl=100, if_newer=True) == set()
        older = {n: (i % 10, [n]) for i, n in enumerate(names)}
        not_newer = await cache.set_bulk(older, if_newer=True)
        assert not_newer == {n for n, (version, _) in older.items() if version <= 5}
        assert await cache.get_bulk(names) | {} == {n: (await cache.get(n)) for n in names}
        assert await cache.head_bulk([*names, "none"]) == {
            n: max(5, version) for n, (version, _) in older.items()
        }
        assert await cache.delete_bulk([*names, "none"]) == 300
        assert await cache.get_bulk([]) == {}
        # Configured nodes include a replica, but reads don't need it.
        await until(lambda: set(cache.stats()["nodes"]) == primaries)
        stats = cache.stats()
        assert (stats["not_newer"], stats["last_loss"]) == (181, "")
        assert stats["connects"] >= 3
        for counter in ("reads", "writes", "commands", "bytes_in", "bytes_out"):
            assert stats[counter] >= sum(one[counter] for one in stats["nodes"].values()) > 0


async def test_split_records_on_a_cluster(group: ClusterGroup, backend: str) -> None:
    """deepstream's own layout: each key is on the node of its own slot, and a half is a miss."""
    async with opened(group, keyLayout="deepstream", **PATIENT) as cache:
        assert await cache.set("a", 1, {"b": 1}, ttl=100) is True
        for key, value in (("a_v", "1"), ("a_d", '{"b":1}')):
            owner = await asyncio.to_thread(group.owner, key)
            assert owner.ask("GET", key) == value
            assert 0 < owner.ask("TTL", key) <= 100
        assert (await asyncio.to_thread(group.owner, "a_v")).ask("DEL", "a_v") == 1
        assert await cache.get("a") is None
        assert await cache.head("a") is None
        assert cache.stats()["halves"] == 2
        assert await cache.delete("a") is False
        with pytest.raises(dscache.RecordError, match="hashtag"):
            cache.set("a", 1, {}, if_newer=True)
        with pytest.raises(dscache.RecordError, match="different nodes"):
            cache.set_bulk({"{a}/1": (1, 1), "a": (1, 1)}, if_newer=True)
        assert await cache.set("{a}/1", 1, 1, if_newer=True) is True
        assert await cache.get_bulk(["a", "{a}/1"]) == {"{a}/1": await cache.get("{a}/1")}


async def test_a_single_node_without_an_announced_address(backend: str) -> None:
    """A cluster of one announces no host, which means the host that was asked."""
    with ClusterGroup(BY_AGE[0], primaries=1, replicas=0) as group:
        async with opened(group, nodes=[{"host": "localhost", "port": group.nodes[0].port}]) as one:
            await one.set_bulk({f"n/{i}": (i, i) for i in range(100)})
            assert len(await one.get_bulk(f"n/{i}" for i in range(100))) == 100
            # The node is at the configured name: a second connection would be one too many.
            assert set(one.stats()["nodes"]) == {f"localhost:{group.nodes[0].port}"}


async def test_one_of_several_nodes_is_enough(group: ClusterGroup, backend: str) -> None:
    nodes = [{"port": 1}, {"port": group.nodes[-1].port}, {"host": "nowhere.invalid", "port": 1}]
    async with opened(group, nodes=nodes, **PATIENT, **CURIOUS) as cache:
        await cache.set_bulk({f"n/{i}": (i, i) for i in range(100)})
        assert len(await cache.get_bulk(f"n/{i}" for i in range(100))) == 100
        # Unused connections are closed eventually.
        primaries = {f"127.0.0.1:{one.port}" for one in group.primaries()}
        await until(lambda: set(cache.stats()["nodes"]) == primaries)
        assert await cache.get("n/1") is not None


# -- moving slots


async def test_resharding_under_load(group: ClusterGroup, backend: str) -> None:
    figures = Figures("reshard")
    async with opened(group, **PATIENT) as cache:
        await cluster_rows.move_slots(figures, group, cache, 80)
    assert figures.problems == []
    assert figures.operations > 0


async def test_records_of_a_migrating_slot(group: ClusterGroup, backend: str) -> None:
    """Moved, unmoved, half moved and new records of a migrating slot are all found."""
    source, target = group.primaries()[:2]
    room = cluster_rows.prefix_on(group, source)
    slot = slot_of(room)
    names = [f"{room}/{i}" for i in range(50)]
    others = [f"other/{i}" for i in range(450)]
    group.begin_migration(slot, source, target)
    try:
        async with opened(group, maxRedirections=1000, **PATIENT) as cache:
            await _use_migrating_records(group, cache, slot, names, others)
    finally:
        if slot in group.slots_of(source):
            group.move_keys(slot, source, target)
            group.end_migration(slot, source, target)
        group.migrate([slot], target, source)


async def _use_migrating_records(
    group: ClusterGroup, cache: dscache.AsyncCache, slot: int, names: list[str], others: list[str]
) -> None:
    source, target = group.primaries()[:2]
    await cache.set_bulk({name: (i, name) for i, name in enumerate(others)})
    group.cancel_migration(slot, source, target)
    await cache.set_bulk({name: (i, name) for i, name in enumerate(names)})
    group.begin_migration(slot, source, target)
    # An odd number of keys: one record is on two nodes and has to wait.
    assert group.move_keys(slot, source, target, 41) == 41
    waiting = cache.get_bulk(names)
    single = [cache.get(name) for name in names]
    heads = cache.head_bulk(names)
    rewritten = cache.set(names[0], 100, "new")
    new = cache.set(f"{names[0]}/new", 1, "new")
    newer = cache.set(names[1], 0, "older", if_newer=True)
    found = await cache.get_bulk(others)
    assert [found[name].data for name in others] == others
    await until(lambda: cache.stats()["redirections"] > 0)
    group.move_keys(slot, source, target)
    assert {name: record.data for name, record in (await waiting).items()} == {
        name: name for name in names
    }
    assert [record and record.data for record in await asyncio.gather(*single)] == names
    assert await heads == {name: i for i, name in enumerate(names)}
    # These don't wait for the new record, which must wait until the slot has moved.
    assert await rewritten is True
    assert await newer is False
    assert (await cache.get(names[0])).version == 100
    assert not new.done()
    group.end_migration(slot, source, target)
    assert await new is True
    assert [one.version for one in (await cache.get_bulk(names)).values()] == [100, *range(1, 50)]
    await until(lambda: cache._topology._masters[slot].address.endswith(str(target.port)))
    # From then on nothing is redirected.
    redirections = cache.stats()["redirections"]
    assert len(await cache.get_bulk(names)) == 50
    assert cache.stats()["redirections"] == redirections


async def test_a_node_that_leaves_is_closed(backend: str) -> None:
    """A node without slots is removed from the cluster while it has operations in flight."""
    with cluster_rows.leaving_soon(BY_AGE[0]) as (group, leaving, heir):
        async with opened(group, **PATIENT) as cache:
            await cache.set_bulk({f"n/{i}": (i, i) for i in range(500)})
            stop = False

            async def read() -> None:
                while not stop:
                    assert len(await cache.get_bulk(f"n/{i}" for i in range(500))) == 500

            readers = [asyncio.create_task(read()) for _ in range(3)]
            slots = group.slots_of(leaving)
            await asyncio.to_thread(group.migrate, slots, leaving, heir, at_once=64)
            await asyncio.to_thread(group.forget, leaving)
            cache._topology.look_again()
            await until(lambda: f"127.0.0.1:{leaving.port}" not in cache.stats()["nodes"])
            stop = True
            await asyncio.gather(*readers)
            assert len(cache.stats()["nodes"]) == 2
            # It is still a configured node, in a cluster of its own that has no slots.
            assert await cache.set_bulk({f"n/{i}": (i, i) for i in range(500)}) == set()


# -- lost and replaced primaries


@pytest.mark.parametrize("kind", KINDS, ids=["orderly", "force", "takeover"])
async def test_failover_under_load(kind: Failover, group: ClusterGroup, backend: str) -> None:
    figures = Figures("cluster-failover")
    async with opened(group, **PATIENT) as cache:
        await cluster_rows.fail_over(figures, group, cache, kind, KINDS.index(kind), 20.0)
    assert figures.problems == []


async def test_a_killed_primary(group: ClusterGroup, backend: str) -> None:
    figures = Figures("cluster-kill")
    async with opened(group) as cache:
        await cluster_rows.kill_primary(figures, group, cache, 2)
        assert cache.stats()["last_loss"]
    print(figures.line())
    assert figures.problems == []


async def test_a_bulk_over_a_lost_shard(group: ClusterGroup, backend: str) -> None:
    names = a_name_each(group)
    lost, node = next(iter(names.items()))
    async with opened(group, commandTimeout=300) as cache:
        await cache.set_bulk({name: (1, name) for name in names})
        group.pause(node)
        for bulk in (
            cache.get_bulk(names),
            cache.head_bulk(names),
            cache.set_bulk({name: (2, name) for name in names}),
            cache.delete_bulk(names),
        ):
            with pytest.raises(dscache.BulkError) as error:
                await bulk
            assert list(error.value.errors) == [lost]
            assert str(node.port) in str(error.value.errors[lost])
        assert error.value.result == 2
        for name in names:
            if name != lost:
                assert await cache.set(name, 3, name) is True
        group.resume(node)
        async with asyncio.timeout(PATIENCE):
            while True:  # until its connection is back
                try:
                    assert await cache.set(lost, 3, lost) is True
                    break
                except dscache.DscacheError:
                    pass


# -- other addresses


async def test_all_nodes_restart_at_other_addresses(group: ClusterGroup, backend: str) -> None:
    """Behind names that lead to the new addresses, the cache recovers by itself."""
    first, second = group.nodes[:2]
    async with (
        asyncio.timeout(PATIENCE),
        FaultProxy(first.host, first.port) as one,
        FaultProxy(second.host, second.port) as other,
    ):
        nodes = [{"host": "localhost", "port": way.port} for way in (one, other)]
        quick = {"first": 5, "cap": 50}
        options = {"retryStrategy": quick, "clusterRetryStrategy": quick, **CURIOUS}
        async with opened(group, nodes=nodes, **options) as cache:
            records = {f"n/{i}": (i, {"n": i}) for i in range(200)}
            await cache.set_bulk(records)
            before = {node.port for node in group.nodes}
            await asyncio.to_thread(group.stop_all)
            await until(lambda: not cache.is_ready)
            await asyncio.to_thread(group.start_all, on_new_ports=True)
            assert not before & {node.port for node in group.nodes}
            one.retarget(first.host, first.port)
            other.retarget(second.host, second.port)
            await until(lambda: cache.is_ready)
            assert await cache.head_bulk(records) == {n: v for n, (v, _) in records.items()}
            assert await cache.set_bulk(records) == set()
            addresses = {f"127.0.0.1:{node.port}" for node in group.primaries()}
            await until(lambda: set(cache.stats()["nodes"]) == addresses)


# -- passwords


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_node_with_another_password(
    host: str, guarded_group: ClusterGroup, backend: str
) -> None:
    """It is used only for that node, also when the node is discovered by its address."""
    first, second, third = guarded_group.nodes
    nodes = [
        {"host": host, "port": first.port, "password": OWN},
        {"host": host, "port": third.port, "password": None},
    ]
    options = {"nodes": nodes, "redisOptions": {"password": SHARED}}
    async with opened(guarded_group, **options, **PATIENT, **CURIOUS) as cache:
        for name in a_name_each(guarded_group):
            assert await cache.set(name, 1, name) is True
        # By the addresses that they announce; the name is no longer used.
        ports = (first.port, second.port, third.port)
        addresses = {f"127.0.0.1:{port}" for port in ports}
        await until(lambda: set(cache.stats()["nodes"]) == addresses)
        for name in a_name_each(guarded_group):
            assert (await cache.get(name)).data == name


async def test_a_wrong_password_fails_only_its_node(
    guarded_group: ClusterGroup, backend: str
) -> None:
    first, _, third = guarded_group.nodes
    wrong = "not-the-right-one"
    nodes = [{"port": first.port, "password": wrong}, {"port": third.port, "password": None}]
    options = {"nodes": nodes, "redisOptions": {"password": SHARED}}
    async with opened(guarded_group, **options) as cache:
        for name, node in a_name_each(guarded_group).items():
            if node is not first:
                assert await cache.set(name, 1, name) is True
                continue
            with pytest.raises(dscache.ReplyError) as error:
                await cache.set(name, 1, name)
            assert error.value.code == "WRONGPASS"
            assert str(first.port) in str(error.value)
            assert not any(secret in str(error.value) for secret in (OWN, SHARED, wrong))


@pytest.mark.parametrize("password", ["wrong-for-all", None])
async def test_wrong_passwords(
    password: str | None, guarded_group: ClusterGroup, backend: str
) -> None:
    nodes = [{"port": node.port} for node in guarded_group.nodes[:2]]
    cache = open_cache(guarded_group, nodes=nodes, redisOptions={"password": password})
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(dscache.ReplyError) as error:
            await cache.when_ready()
        with pytest.raises(dscache.DscacheError) as second:
            await cache.get("a")
        await cache.close()
    assert error.value.code == ("WRONGPASS" if password else "NOAUTH")
    assert error.value.code in str(second.value)
    assert "wrong-for-all" not in str(error.value) + str(second.value)


# -- reads from replicas


@pytest.mark.parametrize("scale", ["master", "slave", "all"])
async def test_reads_are_spread_over_replicas(
    scale: str, group: ClusterGroup, backend: str
) -> None:
    names = [f"n/{i}" for i in range(300)]
    async with opened(group, scaleReads=scale, **PATIENT) as cache:
        await cache.set_bulk({name: (1, name) for name in names})
        cluster_rows.replicate(group)
        replicas = {f"127.0.0.1:{node.port}" for node in group.replicas()}
        if scale != "master":
            await until(lambda: replicas <= set(cache.stats()["nodes"]))
            topology = cache._topology
            read = {"slave": len(replicas), "all": len(group.nodes)}[scale]
            await until(lambda: sum(map(len, topology._routing.readers.values())) == read)
        before = {node: node.reads() for node in group.nodes}
        assert len(await cache.get_bulk(names)) == 300
        assert len(await cache.head_bulk(names)) == 300
        asked = {node for node in group.nodes if node.reads() > before[node]}
        expected = {"master": group.primaries(), "slave": group.replicas(), "all": group.nodes}
        assert asked == set(expected[scale])
        assert cache.stats()["redirections"] == 0


async def test_a_lost_replica_is_not_read(group: ClusterGroup, backend: str) -> None:
    """Its reads go to the primary at once, without an error."""
    names = [f"n/{i}" for i in range(300)]
    quick = {"first": 5, "cap": 50}
    async with opened(group, scaleReads="slave", retryStrategy=quick, **PATIENT) as cache:
        await cache.set_bulk({name: (1, name) for name in names})
        while len(await cache.get_bulk(names)) < 300:  # replicas connect later
            await asyncio.sleep(0.01)
        topology = cache._topology
        await until(lambda: sum(map(len, topology._routing.readers.values())) == 3)
        stop = False

        async def read() -> None:
            while not stop:
                assert len(await cache.get_bulk(names)) == 300
                assert (await cache.get(random.choice(names))) is not None

        readers = [asyncio.create_task(read()) for _ in range(5)]
        gone = group.replicas()[0]
        await asyncio.to_thread(group.kill, gone)
        await until(lambda: sum(map(len, topology._routing.readers.values())) == 2)
        before = cache.stats()["hits"]
        await until(lambda: cache.stats()["hits"] > before + 3000)
        await asyncio.to_thread(group.start, gone)
        await until(lambda: sum(map(len, topology._routing.readers.values())) == 3)
        stop = True
        await asyncio.gather(*readers)


# -- timers that an exception has lost


@pytest.mark.parametrize("lost", ["deadlines", "release"])
async def test_a_lost_timer_of_held_operations_is_set_again(
    lost: str, group: ClusterGroup, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler has raised at the beginning of each call of a timer."""
    timeout = 50 if lost == "deadlines" else 60_000
    async with opened(group, **PATIENT | {"commandTimeout": timeout}) as cache:
        routing: Any = cache._topology._routing
        slot = slot_of("a")
        node = routing.masters[slot]
        hold = routing.hold(slot, node, set())
        hold.wait(3600 if lost == "deadlines" else 0.01)
        pending = cache.get("a")
        await until(lambda: hold.pipeline.operations == 1)
        routing.release_due()
        if lost == "release":
            node.watched = False  # neither a reply nor a new view releases the hold
            monkeypatch.setattr(cache._topology, "on_refreshed", lambda: None)
            routing._release_timer.cancel()
        else:
            for handle in hold._deadlines.handles:
                handle.cancel()
        node._heartbeat._ping_after = 0.05
        node._heartbeat._beat()
        if lost == "release":
            assert await pending is None
        else:
            with pytest.raises(dscache.DeadlineExceeded):
                await pending
            hold.not_before = 0
            routing.release_due()
        assert not hold.slots
