"""The blocking Cache on real clusters: the scenarios of ``test_cluster.py``, in threads.

Load tests use the same load, through ``ThreadedCache``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from redis.credentials import CredentialProvider

import dscache
from dscache.embedded import TLSFiles
from tests.aio.test_topology import FakeCluster
from tests.conftest import BY_AGE, OWN, PATIENT, SHARED
from tests.soak import cluster_rows
from tests.soak.cluster_rows import CURIOUS, KINDS, a_name_each, prefix_on, slot_of
from tests.soak.figures import Figures
from tests.support.blocking import (
    PATIENCE,
    LoopThread,
    Model,
    ProxyThread,
    ThreadedCache,
    in_threads,
    run_child,
    until,
)
from tests.support.blocking_checks import (
    assert_a_lost_connection_frees_its_place,
    assert_each_size_is_read,
    assert_interrupted,
    assert_large_bulks_work,
    assert_no_counter_falls,
    assert_struck_at_each_line,
)
from tests.support.clusters import ClusterGroup, ClusterNode, Failover
from tests.support.faults import FakeServer

THREADS = 8
# Tests that take long, or concern the cache more than the server, run on one kind of server.
on_newest = pytest.mark.parametrize(
    "binary", BY_AGE[-1:], indirect=True, ids=lambda binary: binary.name
)


def cache_on(group: ClusterGroup, **options: Any) -> dscache.Cache:
    return dscache.Cache.from_config({"name": "redis", "options": group.options | options})


def assert_drained(cache: dscache.Cache) -> None:
    stats = cache.stats()
    counters = ("pending", "pending_bytes", "in_flight", "queued", "connections")
    assert not any(stats.get(name, 0) for name in counters), stats


@contextlib.contextmanager
def opened(group: ClusterGroup, **options: Any) -> Iterator[dscache.Cache]:
    """Open a cache that is drained at the end and leaves nothing behind."""
    with cache_on(group, **options) as cache:
        yield cache
    assert_drained(cache)


@contextlib.asynccontextmanager
async def threaded(group: ClusterGroup, threads: int = THREADS, **options: Any) -> Any:
    """Open a cache in threads, for loads that drive an asyncio one."""
    async with asyncio.timeout(PATIENCE):
        async with ThreadedCache(cache_on(group, **options), threads) as cache:
            yield cache
        assert_drained(cache.cache)


def ports_of(nodes: list[ClusterNode]) -> set[str]:
    return {f"127.0.0.1:{node.port}" for node in nodes}


def connect_all(cache: dscache.Cache, count: int, names: Iterable[str]) -> None:
    """Let the cache open that many connections to the nodes of these names."""
    together = threading.Barrier(count)

    def each() -> Iterator[str]:
        together.wait(PATIENCE)
        yield from names

    in_threads(count, lambda _: cache.get_bulk(each()))


@contextlib.contextmanager
def behind_proxies(
    nodes: list[ClusterNode], **proxy_options: Any
) -> Iterator[tuple[dict[ClusterNode, ProxyThread], dict[str, Any]]]:
    """Put a proxy before each node; yields them, and the options that lead through them."""
    with contextlib.ExitStack() as stack:
        proxies = {
            node: stack.enter_context(ProxyThread(node.host, node.port, **proxy_options))
            for node in nodes
        }
        ports = {node: proxy.proxy.port for node, proxy in proxies.items()}
        yield (
            proxies,
            {
                "nodes": [{"port": port} for port in ports.values()],
                "natMap": {
                    f"{node.host}:{node.port}": {"host": "127.0.0.1", "port": port}
                    for node, port in ports.items()
                },
            },
        )


# -- records


@pytest.mark.parametrize("layout", ["hashtag", "deepstream"])
async def test_records_are_on_the_nodes_of_their_slots(
    layout: str, group: ClusterGroup, backend: str
) -> None:
    figures = Figures("sync-cluster")
    async with threaded(group, keyLayout=layout, **PATIENT) as cache:
        for single in (False, True):
            await cluster_rows.keep_records(figures, group, cache, layout, 300, single)
        assert figures.problems == []
        stats = cache.stats()
        assert stats["redirections"] == 0
        assert (stats["hits"], stats["halves"], stats["damaged"]) == (1200, 0, 0)
        assert (stats["writes"], stats["deletes"]) == (600, 600)
        # A bulk is one operation, on any number of nodes.
        assert (stats["operations"], stats["records"]) == (4 + 4 * 300, 8 * 300)


@on_newest
async def test_records_are_never_torn(group: ClusterGroup, backend: str) -> None:
    figures = Figures("sync-cluster")
    async with threaded(group, **PATIENT) as cache:
        await cluster_rows.tear_none(figures, cache, 2000)
    assert figures.problems == []


def test_a_cluster_behaves_like_a_server(group: ClusterGroup, backend: str) -> None:
    """The default layout, a prefix, TTLs, guarded writes, and the description of the cache."""
    with opened(group, keyPrefix="app/", **PATIENT, **CURIOUS) as cache:
        assert cache.is_ready
        server = group.nodes[0].server.binary.name.replace("-", " ")
        assert f"cluster of {server}" in cache.description
        assert str(group.nodes[0].port) in cache.description
        assert cache.set("a", 3, {"b": 1}, ttl=100) is True
        assert cache.set("a", 3, {"b": 2}, if_newer=True) is False
        owner = group.owner("app/{a}_v")
        assert owner.ask("MGET", "app/{a}_v", "app/{a}_d") == ["3", '{"b":1}']
        assert 0 < owner.ask("TTL", "app/{a}_d") <= 100
        names = [f"n/{i}" for i in range(300)]
        assert cache.set_bulk({n: (5, n) for n in names}, ttl=100, if_newer=True) == set()
        older = {n: (i % 10, [n]) for i, n in enumerate(names)}
        not_newer = cache.set_bulk(older, if_newer=True)
        assert not_newer == {n for n, (version, _) in older.items() if version <= 5}
        found = cache.get_bulk(names)
        assert list(found) == names
        assert found == {n: cache.get(n) for n in names}
        heads = {n: max(5, version) for n, (version, _) in older.items()}
        assert cache.head_bulk([*names, "none"]) == heads
        assert cache.delete_bulk([*names, "none"]) == 300
        assert cache.get_bulk([]) == {}
        assert cache.set_bulk({}) == set()
        # Configured nodes include a replica, but reads don't need it.
        until(lambda: cache.get("a") and set(cache.stats()["nodes"]) == ports_of(group.primaries()))
        stats = cache.stats()
        assert (stats["not_newer"], stats["last_loss"]) == (181, "")
        assert stats["connects"] >= 3
        for counter in ("reads", "writes", "commands", "bytes_in", "bytes_out"):
            assert stats[counter] >= sum(one[counter] for one in stats["nodes"].values()) > 0


def test_split_records_on_a_cluster(group: ClusterGroup, backend: str) -> None:
    """deepstream's own layout: each key is on the node of its own slot, and a half is a miss."""
    with opened(group, keyLayout="deepstream", **PATIENT) as cache:
        assert cache.set("a", 1, {"b": 1}, ttl=100) is True
        for key, value in (("a_v", "1"), ("a_d", '{"b":1}')):
            owner = group.owner(key)
            assert owner.ask("GET", key) == value
            assert 0 < owner.ask("TTL", key) <= 100
        assert group.owner("a_v").ask("DEL", "a_v") == 1
        assert cache.get("a") is None
        assert cache.head("a") is None
        assert cache.stats()["halves"] == 2
        assert cache.delete("a") is False
        for call in (
            lambda: cache.set("a", 1, {}, if_newer=True),
            lambda: cache.set_bulk({"{a}/1": (1, 1), "a": (1, 1)}, if_newer=True),
        ):
            with pytest.raises(dscache.RecordError, match="different nodes"):
                call()
        assert cache.set("{a}/1", 1, 1, if_newer=True) is True
        assert cache.get_bulk(["a", "{a}/1"]) == {"{a}/1": cache.get("{a}/1")}


def test_one_of_several_nodes_is_enough(group: ClusterGroup, backend: str) -> None:
    nodes = [{"port": 1}, {"port": group.nodes[-1].port}, {"host": "nowhere.invalid", "port": 1}]
    with opened(group, nodes=nodes, **PATIENT, **CURIOUS) as cache:
        names = [f"n/{i}" for i in range(100)]
        cache.set_bulk({name: (1, name) for name in names})
        assert len(cache.get_bulk(names)) == 100
        # Unused nodes are forgotten eventually.
        primaries = ports_of(group.primaries())
        until(lambda: cache.get("n/1") and set(cache.stats()["nodes"]) == primaries)


@pytest.mark.parametrize("host", [None, b"", b"?"])
def test_a_node_without_an_announced_address(host: bytes | None, backend: str) -> None:
    """A cluster of one announces no host, which means the host that was asked."""
    with fakes(1) as cluster:
        (node,) = cluster.nodes
        node.announced = host, node.port
        options = {"nodes": [{"host": "localhost", "port": node.port}], **PATIENT}
        with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
            assert cache.set("a", 1, [1]) is True
            # The node is at the configured name: a second connection would be one too many.
            assert set(cache.stats()["nodes"]) == {f"localhost:{node.port}"}


# -- threads


@on_newest
def test_threads_share_a_cache(group: ClusterGroup, backend: str) -> None:
    with opened(group, maxConnections=4, **PATIENT) as cache:

        def work(number: int) -> None:
            model = Model(number)
            for _ in range(100):
                model.step(cache)

        in_threads(16, work)
        stats = cache.stats()
        for node in stats["nodes"].values():
            assert 1 < node["connections"] <= 4
            # One that connected when it was no longer needed is not among them.
            assert node["connects"] >= node["connections"]
        assert (stats["redirections"], stats["last_loss"]) == (0, "")


@on_newest
def test_all_connections_in_use(group: ClusterGroup, backend: str) -> None:
    """Connections are limited, and a waiting call gets one with its connections to the nodes."""
    with behind_proxies(group.primaries()) as (proxies, through):
        names = a_name_each(group)
        name, busy = next(iter(names.items()))
        refusing = cache_on(group, maxConnections=2, whenFull="error", **through, **PATIENT)
        waiting = cache_on(group, maxConnections=2, **through, **PATIENT)
        for cache in (refusing, waiting):
            with cache, ThreadPoolExecutor(6) as threads:
                for each in names:
                    cache.set(each, 1, each)
                connect_all(cache, 2, names)
                pool: Any = cache._topology
                proxies[busy].do("stall")
                reads = [threads.submit(cache.get, name) for _ in range(2)]
                until(lambda stats=cache.stats: stats()["in_flight"] == 2)
                if cache is refusing:
                    for call in (cache.get, cache.delete):
                        with pytest.raises(dscache.Overloaded, match="all 2 connections"):
                            call(name)
                    with pytest.raises(dscache.RecordError):
                        cache.get("")
                else:
                    reads += [threads.submit(cache.get, each) for each in (*names, name)]
                    until(lambda pool=pool: len(pool._waiters) == 4)
                proxies[busy].do("resume")
                assert all(read.result(PATIENCE) is not None for read in reads)
                connections = [one["connections"] for one in cache.stats()["nodes"].values()]
                assert max(connections) <= 2
            assert_drained(cache)


@on_newest
def test_a_bulk_is_sent_to_all_nodes_before_the_first_reply(
    group: ClusterGroup, backend: str
) -> None:
    primaries = group.primaries()
    names = [f"n/{i}" for i in range(300)]
    with (
        behind_proxies(primaries) as (proxies, through),
        opened(group, **through, **PATIENT) as cache,
    ):
        cache.set_bulk({name: (1, name) for name in names})
        before = {node: node.reads() for node in primaries}
        for proxy in proxies.values():
            proxy.do("stall", "replies")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(cache.get_bulk, names)
            until(lambda: all(node.reads() > before[node] for node in primaries))
            assert not waiting.done()
            for proxy in proxies.values():
                proxy.do("resume")
            assert list(waiting.result(PATIENCE)) == names


@on_newest
def test_large_bulks(group: ClusterGroup, backend: str) -> None:
    """More than the buffers hold, to all nodes at once."""
    with opened(group, maxPending=1000, **PATIENT) as cache:
        assert_large_bulks_work(cache, 5000)


# -- moving slots


async def test_resharding_under_load(group: ClusterGroup, backend: str) -> None:
    figures = Figures("sync-reshard")
    async with threaded(group, **PATIENT) as cache:
        await cluster_rows.move_slots(figures, group, cache, 80)
    assert figures.problems == []
    assert figures.operations > 0


def test_records_of_a_migrating_slot(group: ClusterGroup, backend: str) -> None:
    """Moved, unmoved, half moved and new records of a migrating slot are all found."""
    source, target = group.primaries()[:2]
    room = prefix_on(group, source)
    slot = slot_of(room)
    names = [f"{room}/{i}" for i in range(50)]
    others = [f"other/{i}" for i in range(450)]
    try:
        with opened(group, maxRedirections=1000, **PATIENT) as cache:
            cache.set_bulk({name: (i, name) for i, name in enumerate((*names, *others))})
            group.begin_migration(slot, source, target)
            # An odd number of keys: one record is on two nodes and has to wait.
            assert group.move_keys(slot, source, target, 41) == 41
            with ThreadPoolExecutor(60) as threads:
                waiting = threads.submit(cache.get_bulk, names)
                heads = threads.submit(cache.head_bulk, names)
                single = [threads.submit(cache.get, name) for name in names]
                until(lambda: cache.stats()["redirections"] > 50)
                assert [record.data for record in cache.get_bulk(others).values()] == others
                group.move_keys(slot, source, target)
                found = waiting.result(PATIENCE)
                assert [found[name].data for name in names] == names
                assert heads.result(PATIENCE) == {name: i for i, name in enumerate(names)}
                assert [one.result(PATIENCE).data for one in single] == names  # type: ignore[union-attr]
                assert cache.set(names[0], 100, "new") is True
                assert cache.set(names[1], 0, "older", if_newer=True) is False
                # A new record must wait until the slot has moved.
                new = threads.submit(cache.set, f"{names[0]}/new", 1, "new")
                assert cache.get(names[0]).version == 100  # type: ignore[union-attr]
                assert not new.done()
                group.end_migration(slot, source, target)
                assert new.result(PATIENCE) is True
            assert len(cache.get_bulk(names)) == 50
            # From then on nothing is redirected.
            redirections = cache.stats()["redirections"]
            assert len(cache.get_bulk(names)) == 50
            assert cache.stats()["redirections"] == redirections
    finally:
        if slot in group.slots_of(source):
            group.move_keys(slot, source, target)
            group.end_migration(slot, source, target)
        group.migrate([slot], target, source)


def test_a_node_that_leaves_is_closed(backend: str) -> None:
    """A node without slots is removed from the cluster while it has operations in flight."""
    with cluster_rows.leaving_soon(BY_AGE[0]) as (group, leaving, heir):
        names = [f"n/{i}" for i in range(500)]
        with opened(group, **PATIENT, **CURIOUS) as cache, ThreadPoolExecutor(4) as threads:
            cache.set_bulk({name: (1, name) for name in names})
            stop = threading.Event()

            def read() -> None:
                while not stop.is_set():
                    assert len(cache.get_bulk(names)) == 500

            readers = [threads.submit(read) for _ in range(3)]
            group.migrate(group.slots_of(leaving), leaving, heir, at_once=64)
            group.forget(leaving)
            left = f"127.0.0.1:{leaving.port}"
            until(lambda: cache.get("n/1") and left not in cache.stats()["nodes"])
            # Including the connections that have been idle since.
            present: Any = cache._topology._present  # type: ignore[union-attr]
            until(
                lambda: cache.get("n/1") and not any(left in one.connected() for one in present())
            )
            stop.set()
            for reader in readers:
                reader.result(PATIENCE)
            assert len(cache.stats()["nodes"]) == 2
            # It is still a configured node, in a cluster of its own that has no slots.
            assert cache.set_bulk({name: (2, name) for name in names}) == set()


# -- lost and replaced primaries


@pytest.mark.parametrize("kind", KINDS, ids=["orderly", "force", "takeover"])
async def test_failover_under_load(kind: Failover, group: ClusterGroup, backend: str) -> None:
    figures = Figures("sync-failover")
    async with threaded(group, **PATIENT) as cache:
        await cluster_rows.fail_over(figures, group, cache, kind, KINDS.index(kind), 20.0)
    assert figures.problems == []


@on_newest
async def test_a_killed_primary(group: ClusterGroup, backend: str) -> None:
    figures = Figures("sync-cluster-kill")
    # Threads that wait for the lost shard must not hold up the others.
    async with threaded(group, threads=40) as cache:
        await cluster_rows.kill_primary(figures, group, cache, 2)
        assert cache.stats()["last_loss"]
    print(figures.line())
    assert figures.problems == []


def test_a_bulk_over_a_lost_shard(group: ClusterGroup, backend: str) -> None:
    names = a_name_each(group)
    lost, node = next(iter(names.items()))
    with opened(group, commandTimeout=300) as cache:
        cache.set_bulk({name: (1, name) for name in names})
        group.pause(node)
        for call in (
            lambda: cache.get_bulk(names),
            lambda: cache.head_bulk(names),
            lambda: cache.set_bulk({name: (2, name) for name in names}),
            lambda: cache.delete_bulk(names),
        ):
            with pytest.raises(dscache.BulkError) as error:
                call()
            assert list(error.value.errors) == [lost]
            assert str(node.port) in str(error.value.errors[lost])
        assert error.value.result == 2
        for name in names:
            if name != lost:
                assert cache.set(name, 3, name) is True
        group.resume(node)

        def is_back() -> bool:
            with contextlib.suppress(dscache.DscacheError):
                return cache.set(lost, 3, lost)
            return False

        until(is_back)


@on_newest
def test_an_unreachable_node_delays_no_other(group: ClusterGroup, backend: str) -> None:
    """It accepts and stays silent: other nodes are connected to, and answer, meanwhile."""
    names = a_name_each(group)
    lost, node = next(iter(names.items()))
    with behind_proxies(group.primaries()) as (proxies, through):
        proxies[node].do("deaf")
        cache = cache_on(group, **through, commandTimeout=500, connectTimeout=10_000)
        with pytest.raises(dscache.BulkError) as error:
            cache.set_bulk({name: (1, name) for name in names})
        assert list(error.value.errors) == [lost]
        assert not cache.is_ready
        cache.close()
        cache = cache_on(group, **through, commandTimeout=500, connectTimeout=500)
        cache.when_ready()  # with a shard that is only logged
        assert not cache.is_ready
        proxies[node].do("heal")
        until(lambda: cache.set_bulk({name: (2, name) for name in names}) == set())
        assert cache.is_ready
        cache.close()


@pytest.mark.parametrize("due", [False, True], ids=["", "refresh-is-due"])
@on_newest
def test_connections_closed_between_operations_fail_none(
    group: ClusterGroup, backend: str, due: bool
) -> None:
    names = [f"n/{i}" for i in range(100)]
    with opened(group, slotsRefreshInterval=0, **PATIENT) as cache:
        cache.set_bulk({name: (1, name) for name in names})
        for node in group.nodes:
            for client in ("normal", "replica"):
                node.ask("CLIENT", "KILL", "TYPE", client, "SKIPME", "yes")
        pool: Any = cache._topology
        for connection in pool._present():
            for node in connection.routes.nodes.values():
                until(lambda node=node: not node.ready or node.is_readable(0))
        if due:
            pool.state.record_stale()
            until(lambda: time.monotonic() >= pool.state.refresh_at)
        assert cache.set_bulk({name: (2, name) for name in names}) == set()
        assert set(cache.head_bulk(names).values()) == {2}
        assert "closed" in cache.stats()["last_loss"]
        assert cache.stats()["refreshes"] >= 1 + due


@on_newest
def test_a_write_that_may_have_happened_says_so(group: ClusterGroup, backend: str) -> None:
    with (
        behind_proxies(group.primaries()) as (proxies, through),
        opened(group, **through, **PATIENT) as cache,
    ):
        name, node = next(iter(a_name_each(group).items()))
        cache.set(name, 1, name)
        proxies[node].do("cut_after", 3, "replies")
        with pytest.raises(dscache.ConnectionLost, match="the write may have happened"):
            cache.set(name, 2, name)
        proxies[node].do("heal")
        for call in (cache.get, cache.head, lambda name: cache.set(name, 3, 3, if_newer=True)):
            proxies[node].do("cut_after", 3, "replies")
            assert call(name)
            proxies[node].do("heal")


@on_newest
def test_all_nodes_restart_at_other_addresses(group: ClusterGroup, backend: str) -> None:
    """Behind names that lead to the new addresses, the cache recovers by itself."""
    first, second = group.nodes[:2]
    with ProxyThread(first.host, first.port) as one, ProxyThread(second.host, second.port) as other:
        nodes = [{"host": "localhost", "port": way.proxy.port} for way in (one, other)]
        quick = {"first": 5, "cap": 50}
        options = {"retryStrategy": quick, "clusterRetryStrategy": quick, **CURIOUS}
        with opened(group, nodes=nodes, **options) as cache:
            records = {f"n/{i}": (i, {"n": i}) for i in range(200)}
            cache.set_bulk(records)
            before = {node.port for node in group.nodes}
            group.stop_all()
            with pytest.raises(dscache.DscacheError):
                cache.get("a")
            assert not cache.is_ready
            group.start_all(on_new_ports=True)
            assert not before & {node.port for node in group.nodes}
            one.proxy.retarget(first.host, first.port)
            other.proxy.retarget(second.host, second.port)

            def is_back() -> bool:
                with contextlib.suppress(dscache.DscacheError):
                    return cache.head_bulk(records) == {n: v for n, (v, _) in records.items()}
                return False

            until(is_back)
            assert cache.is_ready
            assert cache.set_bulk(records) == set()
            addresses = ports_of(group.primaries())
            until(lambda: cache.get("n/1") and set(cache.stats()["nodes"]) == addresses)


# -- passwords and TLS


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_node_with_another_password(host: str, guarded_group: ClusterGroup, backend: str) -> None:
    """It is used only for that node, also when the node is discovered by its address."""
    first, _, third = guarded_group.nodes
    nodes = [
        {"host": host, "port": first.port, "password": OWN},
        {"host": host, "port": third.port, "password": None},
    ]
    options = {"nodes": nodes, "redisOptions": {"password": SHARED}}
    with opened(guarded_group, **options, **PATIENT, **CURIOUS) as cache:
        for name in a_name_each(guarded_group):
            assert cache.set(name, 1, name) is True
        addresses = ports_of(guarded_group.nodes)
        until(lambda: cache.head("a") is None and set(cache.stats()["nodes"]) == addresses)
        for name in a_name_each(guarded_group):
            assert cache.get(name).data == name  # type: ignore[union-attr]


def test_a_wrong_password_fails_only_its_node(guarded_group: ClusterGroup, backend: str) -> None:
    first, _, third = guarded_group.nodes
    wrong = "not-the-right-one"
    nodes = [{"port": first.port, "password": wrong}, {"port": third.port, "password": None}]
    options = {"nodes": nodes, "redisOptions": {"password": SHARED}}
    with opened(guarded_group, **options, **PATIENT) as cache:
        for name, node in a_name_each(guarded_group).items():
            if node is not first:
                assert cache.set(name, 1, name) is True
                continue
            with pytest.raises(dscache.ReplyError) as error:
                cache.set(name, 1, name)
            assert error.value.code == "WRONGPASS"
            assert str(first.port) in str(error.value)
            assert not any(secret in str(error.value) for secret in (OWN, SHARED, wrong))


@pytest.mark.parametrize("password", ["wrong-for-all", None])
def test_wrong_passwords(password: str | None, guarded_group: ClusterGroup, backend: str) -> None:
    nodes = [{"port": node.port} for node in guarded_group.nodes[:2]]
    cache = cache_on(guarded_group, nodes=nodes, redisOptions={"password": password}, **PATIENT)
    code = "WRONGPASS" if password else "NOAUTH"
    for call in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set_bulk({"a": (1, 1)})):
        with pytest.raises(dscache.DscacheError, match=code) as error:
            call()
        assert "wrong-for-all" not in str(error.value)
    with pytest.raises(dscache.ReplyError):
        cache.when_ready()
    cache.close()


def test_a_refusal_need_not_be_permanent(backend: str) -> None:
    quick = {"first": 1, "cap": 1}
    with fakes() as cluster:
        refusing: Any = cluster.nodes
        for node in refusing:
            node.answers["HELLO"] = b"-WRONGPASS invalid username-password pair\r\n"
        with contextlib.ExitStack() as stack:
            options = {"clusterRetryStrategy": quick, **PATIENT}
            cache = cache_on_fakes(cluster, **options)
            stack.callback(cache.close)
            for _ in range(2):
                with pytest.raises(dscache.ReplyError, match="WRONGPASS"):
                    cache.when_ready()
                with pytest.raises(dscache.ConnectError, match="WRONGPASS"):
                    cache.get("a")
            del refusing[0].answers["HELLO"]
            until(lambda: _opens(cache))
            assert not cache.is_ready
            names = [f"n/{i}" for i in range(20)]
            with pytest.raises(dscache.BulkError, match="WRONGPASS") as error:
                cache.get_bulk(names)
            assert 0 < len(error.value.errors) < 20
            del refusing[1].answers["HELLO"]
            cache.when_ready()
            assert cache.is_ready
            assert cache.get_bulk(names) == {}


def _opens(cache: dscache.Cache) -> bool:
    try:
        cache.when_ready()
    except dscache.ReplyError:
        return False
    return True


class Provider(CredentialProvider):
    """Returns given credentials, and counts the requests for them."""

    def __init__(self) -> None:
        self.asked = 0
        self.tell: Callable[[object], object] = lambda token: None

    def get_credentials(self) -> tuple[str]:
        self.asked += 1
        return (SHARED,)

    def on_next(self, callback: Callable[[object], object]) -> None:
        self.tell = callback


def test_renewed_credentials(backend: str) -> None:
    with fakes() as cluster:
        provider = Provider()
        nodes = [{"host": node.host, "port": node.port} for node in cluster.nodes]
        options = {"nodes": nodes, "slotsRefreshInterval": 0, **PATIENT}
        config = {"name": "redis", "options": options}
        with dscache.Cache.from_config(config, credentials=provider) as cache:
            asked = provider.asked
            assert asked >= 2
            assert cache.set_bulk({f"n/{i}": (1, i) for i in range(20)}) == set()
            assert provider.asked == asked
            provider.tell(object())
            assert len(cache.get_bulk(f"n/{i}" for i in range(20))) == 20
            assert provider.asked == asked + 2
            assert cache.stats()["connections"] == 2


@on_newest
def test_tls(group: ClusterGroup, certificates: TLSFiles, backend: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    names = [f"n/{i}" for i in range(500)]
    with behind_proxies(group.primaries(), tls=context) as (proxies, through):
        trusting = {"redisOptions": {"tls": {"ca": certificates.authority}}}
        with opened(group, **through, **trusting, **PATIENT) as cache:
            assert cache.set_bulk(dict.fromkeys(names, (1, "x" * 2000))) == set()
            assert len(cache.get_bulk(names)) == 500
            for proxy in proxies.values():
                proxy.do("cut")
            assert len(cache.get_bulk(names)) == 500
        with opened(group, **through, **trusting, **PATIENT) as cache:
            assert_each_size_is_read(cache)
            assert not cache.stats()["reconnections"], cache.stats()["last_loss"]
        suspicious = cache_on(group, **through, **PATIENT, redisOptions={"tls": {}})
        for call in (suspicious.when_ready, lambda: suspicious.get("a")):
            with pytest.raises(dscache.ConnectError, match="certificate"):
                call()
        suspicious.close()


# -- reads from replicas


@pytest.mark.parametrize("scale", ["master", "slave", "all"])
def test_reads_are_spread_over_replicas(scale: str, group: ClusterGroup, backend: str) -> None:
    names = [f"n/{i}" for i in range(300)]
    with opened(group, scaleReads=scale, **PATIENT) as cache:
        cache.set_bulk({name: (1, name) for name in names})
        cluster_rows.replicate(group)

        def asked() -> set[ClusterNode]:
            before = {node: node.reads() for node in group.nodes}
            assert len(cache.get_bulk(names)) == 300
            assert len(cache.head_bulk(names)) == 300
            return {node for node in group.nodes if node.reads() > before[node]}

        expected = {"master": group.primaries(), "slave": group.replicas(), "all": group.nodes}
        # Replicas are read as soon as they are connected.
        until(lambda: asked() == set(expected[scale]))
        assert cache.stats()["redirections"] == 0


def test_a_lost_replica_is_not_read(group: ClusterGroup, backend: str) -> None:
    """Its reads go to the primary at once, without an error."""
    names = [f"n/{i}" for i in range(300)]
    with opened(group, scaleReads="slave", **PATIENT, **CURIOUS) as cache:
        cache.set_bulk({name: (1, name) for name in names})
        until(lambda: len(cache.get_bulk(names)) == 300)  # replicas connect later
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                assert len(cache.get_bulk(names)) == 300
                assert cache.get(random.choice(names)) is not None

        with ThreadPoolExecutor(4) as threads:
            readers = [threads.submit(read) for _ in range(4)]
            gone = group.replicas()[0]
            group.kill(gone)
            before = cache.stats()["hits"]
            until(lambda: cache.stats()["hits"] > before + 3000 or any(r.done() for r in readers))
            group.start(gone)
            shown = f"127.0.0.1:{gone.port}"

            def is_read_again() -> bool:
                connections = cache.stats()["nodes"].get(shown, {}).get("connections", 0)
                return connections > 0 or any(reader.done() for reader in readers)

            until(is_read_again)
            stop.set()
            for reader in readers:
                reader.result(PATIENCE)


# -- behaviour that no real cluster shows


@contextlib.contextmanager
def fakes(primaries: int = 2, replicas: int = 0) -> Iterator[FakeCluster]:
    """Fake nodes on a loop in its own thread."""
    thread = LoopThread()

    async def begin() -> FakeCluster:
        return await FakeCluster(primaries, replicas).__aenter__()

    started = thread.run(begin())
    try:
        yield started
    finally:
        thread.run(started.__aexit__())
        thread.close()


def cache_on_fakes(cluster: FakeCluster, **options: Any) -> dscache.Cache:
    nodes = [{"host": node.host, "port": node.port} for node in cluster.nodes]
    return dscache.Cache.from_config({"name": "redis", "options": {"nodes": nodes, **options}})


OPERATIONS: dict[str, Callable[[dscache.Cache], Any]] = {
    "get": lambda cache: cache.get("a"),
    "head": lambda cache: cache.head("a"),
    "set": lambda cache: cache.set("a", 1, {"b": 2}),
    "set with ttl": lambda cache: cache.set("a", 1, {"b": 2}, ttl=60),
    "set if newer": lambda cache: cache.set("a", 1, {"b": 2}, if_newer=True),
    "delete": lambda cache: cache.delete("a"),
    "get_bulk": lambda cache: cache.get_bulk(["a"]),
    "head_bulk": lambda cache: cache.head_bulk(["a"]),
    "set_bulk": lambda cache: cache.set_bulk({"a": (1, {"b": 2})}),
    "delete_bulk": lambda cache: cache.delete_bulk(["a"]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_circular_redirections_end(operation: str, backend: str) -> None:
    """Two nodes that redirect everything to each other: the error names the path."""
    with fakes() as cluster:
        one, other = cluster.nodes
        one.say = lambda command, slot: f"-MOVED {slot} {other.address}\r\n".encode()
        other.say = lambda command, slot: f"-MOVED {slot} {one.address}\r\n".encode()
        with cache_on_fakes(cluster, maxRedirections=5, **PATIENT) as cache:
            with pytest.raises(dscache.ReplyError) as error:
                OPERATIONS[operation](cache)
            assert error.value.code == "MOVED"
            assert "maxRedirections is 5" in str(error.value)
            assert one.address in str(error.value)
            assert other.address in str(error.value)
            one.say = other.say = None
            OPERATIONS[operation](cache)


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        *((operation, "TRYAGAIN") for operation in OPERATIONS),
        *(("set", code) for code in ("CLUSTERDOWN", "READONLY", "MASTERDOWN", "LOADING")),
    ],
)
def test_temporary_refusals_are_retried(operation: str, code: str, backend: str) -> None:
    with fakes() as cluster:
        left = 3

        def say(command: list[bytes], slot: int) -> bytes | None:
            nonlocal left
            left -= 1
            return f"-{code} not now\r\n".encode() if left >= 0 else None

        for node in cluster.nodes:
            node.say = say
        with cache_on_fakes(cluster, **PATIENT) as cache:
            OPERATIONS[operation](cache)
            assert left < 0
            assert cache.stats()["redirections"] >= 1
        assert_drained(cache)


@pytest.mark.parametrize("code", ["BUSY", "LOADING", "CLUSTERDOWN", "TRYAGAIN", "READONLY"])
def test_what_passes_is_no_redirection(code: str, backend: str) -> None:
    """A node that refuses for long uses up no maxRedirections."""
    with fakes() as cluster:
        left = 9

        def say(command: list[bytes], slot: int) -> bytes | None:
            nonlocal left
            left -= 1
            return f"-{code} not now\r\n".encode() if left >= 0 else None

        for node in cluster.nodes:
            node.say = say
        with cache_on_fakes(cluster, maxRedirections=2, **PATIENT) as cache:
            assert cache.set("a", 1, 1) is True
            assert left == -1
            assert cache.stats()["redirections"] == 9


@pytest.mark.parametrize("words", ["MOVED", "MOVED x y", "ASK 1 nonsense", "MOVED 77 1.2.3.4:5"])
def test_a_redirection_to_an_unreachable_node_is_retried(words: str, backend: str) -> None:
    with fakes() as cluster:
        for node in cluster.nodes:
            node.say = lambda command, slot: f"-{words}\r\n".encode()
        cache = cache_on_fakes(cluster, maxRedirections=2, **PATIENT)
        with pytest.raises(dscache.ReplyError, match="maxRedirections is 2"):
            cache.get("a")
        cache.close()
        assert_drained(cache)


def test_a_slot_without_an_owner(backend: str) -> None:
    with fakes() as cluster:
        for node in cluster.nodes:
            node.knows = [None] * 8192 + node.knows[8192:]
        unserved = next(name for n in range(100) if slot_of(name := f"n/{n}") < 8192)
        served = next(name for n in range(100) if slot_of(name := f"n/{n}") >= 8192)
        with cache_on_fakes(cluster, commandTimeout=300) as cache:
            with pytest.raises(dscache.BulkError) as error:
                cache.set_bulk({unserved: (1, 1), served: (1, 1)})
            assert list(error.value.errors) == [unserved]
            assert "no node of the cluster serves this slot" in str(error.value.errors[unserved])
            with ThreadPoolExecutor(1) as threads:
                waiting: Future[bool] = threads.submit(cache.set, unserved, 1, 1)
                for node in cluster.nodes:
                    node.knows[:8192] = [cluster.nodes[0]] * 8192
                with contextlib.suppress(dscache.ConnectError):
                    waiting.result(PATIENCE)
            until(lambda: cache.set(unserved, 2, 2))
        assert_drained(cache)


def test_a_single_server_is_no_cluster(server: Any, backend: str) -> None:
    nodes = [{"host": server.host, "port": server.port}]
    cache = dscache.Cache.from_config({"name": "redis", "options": {"nodes": nodes, **PATIENT}})
    with pytest.raises(
        dscache.ConfigError, match=r"nodes: .* isn't a node of a cluster.*give host"
    ):
        cache.when_ready()
    with pytest.raises(dscache.ConnectError, match="isn't a node of a cluster"):
        cache.get("a")
    with pytest.raises(dscache.ConfigError), cache:
        pytest.fail("it was entered")


def test_no_node_is_reachable(backend: str) -> None:
    nodes = [{"port": 1}, {"port": 2}]
    options = {"nodes": nodes, "commandTimeout": 200, "connectTimeout": 200}
    cache = dscache.Cache.from_config({"name": "redis", "options": options})
    for call in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, 1)):
        with pytest.raises(dscache.ConnectError, match="refused"):
            call()
    with pytest.raises(dscache.RecordError):
        cache.get("")
    assert cache.get_bulk([]) == {}
    assert not cache.is_ready
    cache.close()


# -- interruptions, processes, greenlets, and closing


@on_newest
def test_a_signal_handler_that_raises(group: ClusterGroup, backend: str) -> None:
    count = int(os.environ.get("DSCACHE_TEST_INTERRUPTIONS", "300"))
    assert_interrupted(json.dumps(group.options), count, backend)


@on_newest
def test_an_exception_at_each_line(group: ClusterGroup, backend: str) -> None:
    assert_struck_at_each_line(group.options, backend)


@on_newest
def test_a_fork_with_connections_open(group: ClusterGroup, backend: str) -> None:
    result = run_child("forks.py", json.dumps(group.options), "3", backend=backend)
    assert result["wrong"] == []
    assert [one["wrong"] for one in result["children"]] == [[], [], []]
    assert [one["shared"] for one in result["children"]] == [0, 0, 0]
    assert [one["pending"] for one in result["children"]] == [0, 0, 0]
    assert result["last_loss"] == "", "the parent's connections were disturbed"


@on_newest
def test_greenlets(group: ClusterGroup, backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        port = silent.getsockname()[1]
        nobody = json.dumps({"nodes": [{"port": port}]})
        where = json.dumps(group.options)
        result = run_child("greenlets.py", where, nobody, "20", backend=backend)
    assert result["wrong"] == []
    assert result["finished"]
    assert 1 < result["connections"] <= 8
    assert result["killed"] > 0
    assert result["limited"] == "gevent.Timeout ConnectError"
    assert result["waited"]
    assert result["others_ran"]
    assert result["pending"] == 0


@on_newest
def test_close_does_not_wait_for_ever(group: ClusterGroup, backend: str) -> None:
    names = a_name_each(group)
    name, node = next(iter(names.items()))
    with behind_proxies(group.primaries()) as (proxies, through):
        cache = cache_on(group, maxConnections=2, closeTimeout=50, **through, **PATIENT)
        cache.set_bulk({each: (1, each) for each in names})
        connect_all(cache, 2, names)
        with ThreadPoolExecutor(4) as threads:
            proxies[node].do("stall")
            read = threads.submit(cache.get, name)
            write = threads.submit(cache.set, name, 2, [2])
            until(lambda: cache.stats()["in_flight"] == 2)
            queued = threads.submit(cache.get_bulk, names)
            until(lambda: cache._topology._waiters)  # type: ignore[union-attr]
            cache.close()
            with pytest.raises(dscache.UsageError, match="the cache is closed"):
                cache.get(name)
            with pytest.raises(dscache.ConnectionLost, match="the cache was closed"):
                read.result(PATIENCE)
            with pytest.raises(dscache.ConnectionLost, match=r"closed.*the write may have hap"):
                write.result(PATIENCE)
            with pytest.raises(dscache.BulkError, match="get_bulk") as error:
                queued.result(PATIENCE)
            assert "the cache was closed" in str(error.value.errors[name])
        proxies[node].do("resume")
        until(lambda: not any(proxy.connections for proxy in proxies.values()))
        assert_drained(cache)


def test_close_while_no_node_is_reachable(backend: str) -> None:
    """A thread that waits for an unreachable node gets an error at once."""
    options = {"nodes": [{"port": 1}], "closeTimeout": 10, **PATIENT}
    cache = dscache.Cache.from_config({"name": "redis", "options": options})
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(cache.get, "a")
        until(lambda: cache.stats().get("queued"))
        cache.close()
        with pytest.raises(dscache.ConnectionLost, match="the cache was closed"):
            waiting.result(PATIENCE)


@on_newest
def test_from_creation_to_close(group: ClusterGroup, backend: str) -> None:
    cache = cache_on(group, **PATIENT)
    assert not cache.is_ready
    assert cache.stats() == {}
    with cache as entered:
        assert entered is cache
        assert cache.is_ready
        assert cache.stats()["refreshes"] == 1
        cache.set("a", 1, [1])
        assert f"{backend} core" in cache.description
    assert not cache.is_ready
    assert cache.stats()["writes"] == 1
    cache.close()
    for call in (*OPERATIONS.values(), lambda cache: cache.when_ready()):
        with pytest.raises(dscache.UsageError, match="the cache is closed"):
            call(cache)


@pytest.mark.parametrize("layout", ["hashtag", "deepstream"])
@on_newest
def test_a_dropped_cache_is_closed(group: ClusterGroup, backend: str, layout: str) -> None:
    redis_options = {"connectionName": "dropped"}
    cache = cache_on(group, keyLayout=layout, redisOptions=redis_options, **PATIENT)
    cache.set_bulk({f"n/{i}": (1, i) for i in range(50)})
    pool = weakref.ref(cache._topology)  # type: ignore[arg-type]
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del cache
    gc.collect()
    assert pool() is None
    for node in group.primaries():
        until(lambda node=node: "name=dropped" not in str(node.ask("CLIENT", "LIST")))


@on_newest
def test_no_counter_falls(
    group: ClusterGroup, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(group, maxConnections=1, **PATIENT) as cache:
        assert_no_counter_falls(cache, monkeypatch)


@on_newest
def test_an_interrupted_thread_frees_its_place(group: ClusterGroup, backend: str) -> None:
    with opened(group, maxConnections=1, whenFull="error", **PATIENT) as cache:
        names = a_name_each(group)
        assert cache.set_bulk({name: (1, name) for name in names}) == set()
        for _ in range(3):
            assert_a_lost_connection_frees_its_place(cache)
            assert len(cache.get_bulk(names)) == 3
        assert cache.stats()["connections"] == 3


def test_the_claim_of_a_refresh_expires(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that had claimed the refresh was interrupted without leaving a trace."""
    with fakes() as cluster, cache_on_fakes(cluster, slotsRefreshTimeout=50, **PATIENT) as cache:
        pool: Any = cache._topology
        one, other = cluster.nodes
        pool.state.record_stale()
        until(lambda: pool.state.start_refresh(time.monotonic()))
        for node in cluster.nodes:
            node.knows = [one] * 16384
        views = one.views + other.views
        until(lambda: cache.set("a", 1, 1) and one.views + other.views > views)


def test_a_server_with_invalid_views(backend: str) -> None:
    """Nonsense in place of a view changes nothing; the next reply may be a view."""
    thread = LoopThread()

    async def begin() -> FakeServer:
        return await FakeServer({"CLUSTER": b"+nonsense\r\n"}).__aenter__()

    fake = thread.run(begin())
    try:
        options = {"nodes": [{"host": fake.host, "port": fake.port}], "commandTimeout": 300}
        cache = dscache.Cache.from_config({"name": "redis", "options": options})
        with pytest.raises(dscache.ConnectError, match="CLUSTER SLOTS was answered with"):
            cache.get("a")
        cache.close()
    finally:
        thread.run(fake.__aexit__())
        thread.close()
