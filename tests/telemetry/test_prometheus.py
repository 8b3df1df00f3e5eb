"""The metrics for Prometheus, as its own client and parser see them, and over HTTP."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import redis as redis_py
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import dscache
from dscache import _metrics
from dscache.config import Options
from dscache.embedded import EmbeddedServer
from dscache.net.maintenance import Announcements
from dscache.prometheus import CacheCollector, register
from tests.aio.test_topology import FakeCluster, names_of, opened
from tests.conftest import PATIENT, SERVERS, MakeCache, MakeServer, _server_id
from tests.support.announcer import Announcer
from tests.support.blocking import until
from tests.support.documents import PROJECT, table
from tests.support.near_truth import links

NODES = {"node": "10.0.0.1:7000"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def samples(registry: CollectorRegistry) -> list[Sample]:
    """Return the samples that Prometheus would read."""
    text = generate_latest(registry).decode()
    return [one for family in text_string_to_metric_families(text) for one in family.samples]


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    named = [one for one in samples(registry) if one.name == name]
    found = [one.value for one in named if one.labels.items() >= labels.items()]
    assert len(found) < 2, name
    return found[0] if found else None


async def test_operations_are_measured(make_cache: MakeCache, registry: CollectorRegistry) -> None:
    cache = await make_cache()
    register(cache, "main", registry)
    await cache.set_bulk({"a": (1, 1), "b": (1, 1), "c": (1, 1)})
    await cache.set("a", 1, 1, if_newer=True)
    assert await cache.get("a") is not None
    assert await cache.get("no") is None
    of_main = {"cache": "main"}
    for name, labels, expected in (
        ("dscache_ready", {}, 1),
        ("dscache_operations_total", {}, 4),
        ("dscache_reads_total", {"result": "hit"}, 1),
        ("dscache_reads_total", {"result": "miss"}, 1),
        ("dscache_writes_total", {"result": "written"}, 3),
        ("dscache_writes_total", {"result": "not_newer"}, 1),
        ("dscache_failed_records_total", {}, 0),
        ("dscache_batches_total", {}, 4),
        ("dscache_sent_records_total", {}, 6),
        ("dscache_connections", {}, 1),
        ("dscache_pending_operations", {}, 0),
        ("dscache_operation_duration_seconds_count", {"operation": "get"}, 2),
        ("dscache_operation_duration_seconds_count", {"operation": "set_bulk"}, 1),
        ("dscache_operation_duration_seconds_bucket", {"operation": "get", "le": "+Inf"}, 2),
    ):
        assert value(registry, name, **of_main, **labels) == expected, (name, labels)
    took = value(registry, "dscache_operation_duration_seconds_sum", operation="get")
    assert took == pytest.approx(cache.stats()["latency"]["operations"]["get"]["sum"])
    assert value(registry, "dscache_sent_bytes_total") == cache.stats()["bytes_out"] > 0


async def test_buckets_are_cumulative(make_cache: MakeCache, registry: CollectorRegistry) -> None:
    cache = await make_cache()
    register(cache, registry=registry)
    for _ in range(20):
        await cache.get("a")
    buckets = [one for one in samples(registry) if one.name.endswith("_bucket")]
    assert [one.value for one in buckets] == sorted(one.value for one in buckets)
    assert buckets[-1].value == 20
    bounds = [one.labels["le"] for one in buckets]
    assert bounds[:2] == ["0.00005", "0.0001"]
    assert bounds[-2:] == ["10.0", "+Inf"]


def test_the_build(backend: str, registry: CollectorRegistry) -> None:
    """A process that runs the slow core by mistake is seen."""
    registry.register(CacheCollector())
    (one,) = samples(registry)
    assert (one.name, one.value) == ("dscache_build_info", 1)
    assert one.labels == {"version": dscache.__version__, "core": backend}


async def test_several_caches(make_cache: MakeCache, registry: CollectorRegistry) -> None:
    caches = {name: await make_cache(name="memory") for name in ("one", "two")}
    for number, (name, cache) in enumerate(caches.items()):
        collector = register(cache, name, registry)
        register(cache, name, registry)  # registering again adds nothing
        for _ in range(number + 1):
            await cache.get("a")
    with pytest.raises(ValueError, match=r'a cache "one" is.*call remove\(\'one\'\)'):
        register(caches["two"], "one", registry)
    with pytest.raises(TypeError, match="needs an AsyncCache or a Cache, not NoneType"):
        register(None, "three", registry)  # type: ignore[arg-type] # as a program may
    assert value(registry, "dscache_operations_total", cache="one") == 1
    assert value(registry, "dscache_operations_total", cache="two") == 2
    collector.remove("two")
    collector.remove("two")
    assert value(registry, "dscache_operations_total", cache="two") is None


async def test_an_unregistered_collector_is_replaced(
    make_cache: MakeCache, registry: CollectorRegistry
) -> None:
    """As between two tests of a program that empty the registry."""
    for _ in range(2):
        cache = await make_cache(name="memory")
        collector = register(cache, "one", registry)
        assert register(cache, "one", registry) is collector
        await cache.get("a")
        assert value(registry, "dscache_operations_total", cache="one") == 1
        registry.unregister(collector)
        assert samples(registry) == []


async def test_before_opening_and_after_closing(registry: CollectorRegistry) -> None:
    cache = dscache.AsyncCache.from_config({"name": "memory"})
    register(cache, registry=registry)
    assert [(one.name, one.value) for one in samples(registry)] == [
        ("dscache_build_info", 1),
        ("dscache_ready", 0),
    ]
    async with cache:
        await cache.get("a")
        assert value(registry, "dscache_ready") == 1
    assert value(registry, "dscache_ready") == 0
    assert value(registry, "dscache_operations_total") == 1


async def test_nodes_of_a_cluster(backend: str, registry: CollectorRegistry) -> None:
    async with FakeCluster() as fakes, opened(fakes) as cache:
        registry.register(CacheCollector({"of nodes": cache}))
        for node in fakes.nodes:
            (name,) = names_of(node, 1)
            await cache.set(name, 1, 1)
        for node in fakes.nodes:
            assert value(registry, "dscache_node_operations_total", node=node.address) == 1
            assert value(registry, "dscache_node_connections", node=node.address) == 1
        assert value(registry, "dscache_operations_total") == len(fakes.nodes)
        assert value(registry, "dscache_topology_refreshes_total", cache="of nodes") >= 1


async def test_a_near_cache(make_cache: MakeCache, registry: CollectorRegistry) -> None:
    cache = await make_cache(nearCache={})
    register(cache, registry=registry)
    await cache.set("a", 1, 1)
    for _ in range(3):
        await cache.get("a")
    assert value(registry, "dscache_near_reads_total", result="hit") == 2
    assert value(registry, "dscache_near_records") == 1
    topology: Any = cache._topology
    topology.pipeline.forget("login")
    assert value(registry, "dscache_near_flushes_total", reason="login") == 1


def test_a_near_cache_of_threads(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, registry: CollectorRegistry
) -> None:
    """Each counter, beside threads that read all the time: no export is torn or fails."""
    near = {"idleLimit": 60_000, "maxRecords": 8}
    options = {"url": server.url, "connectionName": "exported", "nearCache": near, **PATIENT}
    redis.mset({f"m/{number}_{part}": 1 for number in range(8) for part in "vd"})
    over = threading.Event()

    def read() -> None:
        number = 0
        while not over.is_set():
            cache.get(f"m/{number % 8}")
            number += 1

    def has_heard(version: int) -> bool:
        """Whether a write was reported, which a link that is about to begin may miss."""
        redis.set("m/3_v", version)
        return bool(value(registry, "dscache_near_invalidations_total"))

    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        register(cache, "main", registry)
        assert value(registry, "dscache_near_records", cache="main") == 0
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: value(registry, "dscache_near_reads_total", result="hit"), "a hit")
            until(lambda: value(registry, "dscache_near_records") == 8, "all records")
            (link,), _ = links(redis, "exported")
            redis.client_kill_filter(_id=link["id"])
            until(lambda: flushes(registry, "connection") == 1, "a lost link")
            until(lambda: has_heard(2), "a change")
            cache.get_bulk(f"more/{number}" for number in range(30))
            until(lambda: value(registry, "dscache_near_evictions_total"), "an eviction")
            redis.flushdb()
            until(lambda: flushes(registry, "flushall") == 1, "the removal of all")
        finally:
            over.set()
            for thread in threads:
                thread.join()
        near = cache.stats()["near_cache"]
        for key, name, labels in (
            ("hits", "near_reads_total", {"result": "hit"}),
            ("misses", "near_reads_total", {"result": "miss"}),
            ("joins", "near_reads_total", {"result": "join"}),
            ("stale", "near_stale_reads_total", {}),
            ("invalidations", "near_invalidations_total", {}),
            ("evictions", "near_evictions_total", {}),
            ("dropped_fills", "near_dropped_fills_total", {}),
            ("records", "near_records", {}),
            ("bytes", "near_bytes", {}),
        ):
            assert value(registry, f"dscache_{name}", cache="main", **labels) == near[key], key
        told = {
            one.labels["reason"]: one.value for one in samples(registry) if "reason" in one.labels
        }
        # Reasons that there weren't are exported too, or their first time would be no increase.
        assert told == dict.fromkeys(_metrics.FLUSH_REASONS, 0) | near["flushes"]
        # A hit is no operation that Redis has seen.
        assert value(registry, "dscache_operations_total") == cache.stats()["operations"]
        assert near["hits"] > 0
    assert value(registry, "dscache_near_records") == value(registry, "dscache_near_bytes") == 0


def flushes(registry: CollectorRegistry, reason: str) -> float | None:
    return value(registry, "dscache_near_flushes_total", reason=reason)


@pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
def test_stale_records_of_a_near_cache_of_threads(
    make_server: MakeServer, backend: str, registry: CollectorRegistry
) -> None:
    server = make_server()
    near = {"idleLimit": 60_000, "serveStale": True}
    options = {"url": server.url, "nearCache": near, "commandTimeout": 3000}
    # By another cache, or the report of the write could drop the record after it was read.
    with dscache.Cache.from_config(server.url) as writer:
        writer.set("a", 1, 1)
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        register(cache, registry=registry)
        until(lambda: cache.get("a") and cache.stats()["near_cache"]["hits"], "a hit")
        server.kill()
        until(lambda: flushes(registry, "connection"), "the loss of the link")
        until(lambda: getattr(cache.get("a"), "stale", False), "the last known record")
        assert (
            value(registry, "dscache_near_stale_reads_total")
            == (cache.stats()["near_cache"]["stale"])
        )
        assert value(registry, "dscache_near_stale_reads_total") >= 1  # type: ignore[operator]


def test_every_counter_has_its_metric() -> None:
    """The exceptions are derivable from the others, or not numbers."""
    told = {metric.key for metric in (*_metrics.COUNTERS, *_metrics.GAUGES)}
    with dscache.Cache.from_config({"name": "memory"}) as cache:
        derived = {"records", "reads", "mean_batch", "latency", "last_loss"}
        assert cache.stats().keys() - derived == told - {"refreshes"}
    announced = {metric.key for metric in _metrics.MAINTENANCE_COUNTERS}
    assert Announcements(Options()).stats().keys() == announced


async def test_maintenance(server: Any, backend: str, registry: CollectorRegistry) -> None:
    """Announcements count by kind, and the moves that they cause."""
    async with (
        Announcer(server.host, server.port) as before,
        Announcer(server.host, server.port) as behind,
    ):
        where = {"host": "127.0.0.1", "port": before.port, "maintNotifications": "on"}
        async with dscache.AsyncCache.from_config(where) as cache:
            await cache.when_ready()
            register(cache, registry=registry)
            name = "dscache_maintenance_notifications_total"
            assert value(registry, name, kind="SMIGRATED") == 0
            before.push(b"MIGRATING", 1, 10)
            before.push(b"MOVING", 2, 10, behind.address)
            async with asyncio.timeout(20):
                while not value(registry, "dscache_maintenance_moves_total"):
                    await asyncio.sleep(0.01)
            assert value(registry, name, kind="MIGRATING") == 1
            assert value(registry, name, kind="MOVING") == 1
            assert value(registry, "dscache_maintenance_relaxed_total") == 1
            assert value(registry, "dscache_maintenance_moved_slots_total") == 0


def test_every_reason_of_a_flush_is_known() -> None:
    """A reason is the text of some calls, so that the sources and the docs have the same list."""
    (row,) = [
        row
        for row in table(PROJECT / "docs" / "near-cache.md", "Counters")
        if row[0] == "`flushes`"
    ]
    assert tuple(re.findall("`([a-z]+)`", row[1])) == _metrics.FLUSH_REASONS
    call = r'\b(?:forget|disconnected|count_flush|_?flush)\((?:self, )?"([a-z]+)"'
    package = Path(dscache.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in package.glob("**/*.py")]
    assert {name for text in sources for name in re.findall(call, text)} < {*_metrics.FLUSH_REASONS}


def test_names_follow_the_rules_of_prometheus() -> None:
    every = (*_metrics.COUNTERS, *_metrics.NEAR_COUNTERS, *_metrics.MAINTENANCE_COUNTERS)
    for metric in (*every, *_metrics.GAUGES):
        assert metric.name.replace("_", "").isalpha()
        assert metric.name == metric.name.lower()
        assert not metric.name.endswith("_total")
        assert metric.text.endswith(".")
        assert ("bytes" in metric.name) == (metric.unit == "By")


def test_over_http(registry: CollectorRegistry) -> None:
    """The server's own thread reads them while the cache is in use in others."""
    with dscache.Cache.from_config({"name": "memory"}) as cache:
        register(cache, "web", registry)
        server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
        try:
            cache.set("a", 1, 1)
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain")
                text = answer.read().decode()
        finally:
            server.shutdown()
            server.server_close()
            thread.join(30)
    assert 'dscache_writes_total{cache="web",result="written"} 1.0' in text
    assert "# TYPE dscache_operation_duration_seconds histogram" in text
    assert "# HELP dscache_operations_total Calls of get" in text


async def test_collection_from_another_thread_while_nodes_change(
    backend: str, registry: CollectorRegistry
) -> None:
    async with FakeCluster() as fakes, opened(fakes) as cache:
        register(cache, registry=registry)
        over = threading.Event()
        failures: list[Exception] = []

        def ask() -> None:
            try:
                while not over.is_set():
                    generate_latest(registry)
            except Exception as error:
                failures.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            topology: Any = cache._topology
            for number in range(100):
                node = topology.nodes.open(topology.state.node(("127.0.0.1", 60_000 + number)))
                await asyncio.gather(*(cache.get(f"n{i}") for i in range(20)))
                topology._leave(node)
        finally:
            over.set()
            await asyncio.to_thread(asking.join, 30)
        assert failures == []


async def test_a_node_that_leaves_during_a_collection_counts_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeCluster() as fakes, opened(fakes) as cache:
        await asyncio.gather(*(cache.get(f"n{i}") for i in range(20)))
        topology: Any = cache._topology
        operations = cache.stats()["operations"]
        first, *_, last = topology.nodes.by_address.values()
        count = first.stats

        def leave_meanwhile() -> dict[str, Any]:
            monkeypatch.undo()
            topology.nodes.leave(last)
            counts: dict[str, Any] = count()
            return counts

        monkeypatch.setattr(first, "stats", leave_meanwhile)
        for _ in range(2):
            assert cache.stats()["operations"] == operations
        await asyncio.wait(topology.nodes.leaving.values())
        assert cache.stats()["operations"] == operations


def test_exporters_are_imported_on_demand() -> None:
    """redis-py imports OpenTelemetry by itself where it is installed."""
    program = (
        "import sys; sys.modules |= dict.fromkeys(('prometheus_client', 'opentelemetry'))\n"
        "import dscache, dscache.sync, dscache.aio.cluster, dscache.blocking.cluster_pool\n"
        "print([name for name in ('prometheus', 'otel') if f'dscache.{name}' in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("module", ["prometheus", "otel"])
def test_without_its_client_library(module: str) -> None:
    wanted = {"prometheus": "prometheus_client", "otel": "opentelemetry"}[module]
    program = f"import sys; sys.modules['{wanted}'] = None; import dscache.{module}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"install dscache[{module}]" in done.stderr.splitlines()[-1]
