"""Metrics and spans for OpenTelemetry, as the SDK's own readers and exporters see them."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv.attributes import db_attributes, error_attributes, server_attributes
from opentelemetry.semconv.metrics import db_metrics
from opentelemetry.trace import SpanKind, StatusCode

import dscache
from dscache import otel
from dscache.config import load
from dscache.embedded import EmbeddedServer
from tests.aio.test_topology import FakeCluster, names_of, opened
from tests.conftest import PATIENT, MakeCache
from tests.support.blocking import until
from tests.support.near_truth import links

SECRET = "user/of-nobody's-business"


# -- metrics


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def meters(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader])
    yield provider
    provider.shutdown()


def points(reader: InMemoryMetricReader, name: str, **wanted: Any) -> list[Any]:
    """Return the data points of a metric that have some attributes."""
    data = reader.get_metrics_data()
    if data is None:
        return []
    metrics = [
        metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    ]
    attributes = {key.replace("_", "."): value for key, value in wanted.items()}
    return [
        point
        for metric in metrics
        if metric.name == name
        for point in metric.data.data_points
        if (point.attributes or {}).items() >= attributes.items()
    ]


async def test_operations_are_measured(
    make_cache: MakeCache, meters: MeterProvider, reader: InMemoryMetricReader
) -> None:
    cache = await make_cache()
    otel.observe(cache, "main", meters)
    await cache.set_bulk({"a": (1, 1), "b": (1, 1)})
    await cache.get("a")
    await cache.get("no")
    (point,) = points(reader, "dscache.operations")
    assert point.value == 3
    assert point.attributes["dscache.cache"] == "main"
    assert point.attributes["db.system.name"] == "redis"
    assert point.attributes["server.port"] == cache.config.options.port
    for result in ("hit", "miss"):
        (point,) = points(reader, "dscache.reads", dscache_result=result)
        assert point.value == 1
    (point,) = points(reader, "dscache.connections")
    assert point.value == 1
    (point,) = points(reader, "dscache.ready")
    assert point.value == 1
    (point,) = points(reader, "dscache.operation.duration.count", db_operation_name="get")
    assert point.value == 2
    (point,) = points(reader, "dscache.operation.duration.count", db_operation_name="BATCH set")
    assert point.value == 1
    (point,) = points(reader, "dscache.operation.duration.sum", db_operation_name="get")
    assert point.value > 0
    buckets = points(reader, "dscache.operation.duration.bucket", db_operation_name="get")
    assert [one.value for one in buckets] == sorted(one.value for one in buckets)
    assert (buckets[-1].attributes["le"], buckets[-1].value) == ("+Inf", 2)


async def test_several_caches_until_they_are_gone(
    meters: MeterProvider, reader: InMemoryMetricReader, caplog: pytest.LogCaptureFixture
) -> None:
    one = dscache.AsyncCache.from_config({"name": "memory"})
    two = dscache.Cache.from_config({"name": "memory"})
    otel.observe(one, "one", meters)
    otel.observe(two, "two", meters)
    otel.observe(two, "two", meters)
    with pytest.raises(ValueError, match='a cache "one" already'):
        otel.observe(two, "one", meters)
    await one.get("a")
    two.get("a")
    told = points(reader, "dscache.operations")
    assert {(point.attributes["dscache.cache"], point.value) for point in told} == {
        ("one", 1),
        ("two", 1),
    }
    await one.close()
    del one
    gc.collect()
    (point,) = points(reader, "dscache.operations")
    assert point.attributes["dscache.cache"] == "two"
    # The SDK warns about instruments that are made twice.
    assert [
        one for one in caplog.records if one.name.startswith(("opentelemetry", "dscache"))
    ] == []


def test_caches_from_before_and_after_the_global_provider_was_set() -> None:
    program = (
        "import dscache\n"
        "from dscache import otel\n"
        "from opentelemetry import metrics\n"
        "from opentelemetry.sdk.metrics import MeterProvider\n"
        "from opentelemetry.sdk.metrics.export import InMemoryMetricReader\n"
        "from tests.telemetry.test_otel import points\n"
        "one, two = dscache.Cache({'name': 'memory'}), dscache.Cache({'name': 'memory'})\n"
        "otel.observe(one, 'one')\n"
        "reader = InMemoryMetricReader()\n"
        "metrics.set_meter_provider(MeterProvider([reader]))\n"
        "otel.observe(two, 'two')\n"
        "try: otel.observe(two, 'one')\n"
        "except ValueError as error: print(error)\n"
        "print([one.attributes['dscache.cache'] for one in points(reader, 'dscache.ready')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        'a cache "one" already exists; give each cache its own name',
        "['one', 'two']",
    ]


async def test_nodes_of_a_cluster(
    backend: str, meters: MeterProvider, reader: InMemoryMetricReader
) -> None:
    async with FakeCluster() as fakes, opened(fakes) as cache:
        otel.observe(cache, meter_provider=meters)
        for node in fakes.nodes:
            (name,) = names_of(node, 1)
            await cache.set(name, 1, 1)
        for node in fakes.nodes:
            (point,) = points(reader, "dscache.node.operations", dscache_node=node.address)
            assert point.value == 1
        (point,) = points(reader, "dscache.topology_refreshes")
        assert point.value >= 1
        found = points(reader, "dscache.maintenance.notifications", dscache_kind="SMIGRATED")
        assert [point.value for point in found] == [0]


async def test_a_near_cache(
    make_cache: MakeCache, meters: MeterProvider, reader: InMemoryMetricReader
) -> None:
    cache = await make_cache(nearCache={})
    otel.observe(cache, meter_provider=meters)
    await cache.get("a")
    await cache.get("a")
    (point,) = points(reader, "dscache.near.reads", dscache_result="hit")
    assert point.value == 1
    assert points(reader, "dscache.near.records")
    topology: Any = cache._topology
    topology.pipeline.forget("login")
    (point,) = points(reader, "dscache.near.flushes", dscache_reason="login")
    assert point.value == 1


def test_a_near_cache_of_threads(
    server: EmbeddedServer,
    redis: redis_py.Redis,
    backend: str,
    meters: MeterProvider,
    reader: InMemoryMetricReader,
) -> None:
    near = {"idleLimit": 60_000, "maxRecords": 4}
    options = {"url": server.url, "connectionName": "exported", "nearCache": near, **PATIENT}
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        otel.observe(cache, "main", meters)
        for number in range(8):
            cache.get(f"a/{number}")
        for _ in range(3):
            cache.get("a/7")
        (link,), _ = links(redis, "exported")
        redis.client_kill_filter(_id=link["id"])
        until(lambda: points(reader, "dscache.near.flushes", dscache_reason="connection"))

        def has_heard() -> bool:
            cache.get("a/7")
            redis.set("a/7_v", 1)
            (point,) = points(reader, "dscache.near.invalidations")
            return bool(point.value)

        until(has_heard, "a change")

        def agrees() -> bool:
            """A report of the last change may still come between the two looks."""
            near = cache.stats()["near_cache"]
            for key, name, labels in (
                ("hits", "reads", {"dscache_result": "hit"}),
                ("misses", "reads", {"dscache_result": "miss"}),
                ("joins", "reads", {"dscache_result": "join"}),
                ("stale", "stale_reads", {}),
                ("invalidations", "invalidations", {}),
                ("evictions", "evictions", {}),
                ("dropped_fills", "dropped_fills", {}),
                ("records", "records", {}),
                ("bytes", "bytes", {}),
            ):
                (point,) = points(reader, f"dscache.near.{name}", **labels)
                assert point.attributes["dscache.cache"] == "main"
                if point.value != near[key]:
                    return False
            return True

        until(agrees, "the same numbers")
        near = cache.stats()["near_cache"]
        assert near["hits"] >= 3
        assert near["evictions"] >= 4


# -- spans


class Spans:
    """An exporter of spans, and a tracer of the application."""

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("application")

    def __call__(self) -> list[ReadableSpan]:
        """Return the spans of caches that have ended since the last call."""
        found = [one for one in self._exporter.get_finished_spans() if one.kind is SpanKind.CLIENT]
        self._exporter.clear()
        return found


@pytest.fixture
def spans() -> Spans:
    return Spans()


async def test_a_span_of_each_operation(make_cache: MakeCache, spans: Spans) -> None:
    cache = await make_cache(db=0)
    otel.trace(cache, tracer_provider=spans.provider)
    names = [SECRET, "no", "never"]
    with spans.tracer.start_as_current_span("request") as request:
        await cache.set(SECRET, 1, {"a": 1})
        assert (await cache.get(SECRET)).version == 1
        assert await cache.head("no") is None
        assert await cache.set_bulk(dict.fromkeys(names[:2], (2, 2))) == set()
        assert len(await cache.get_bulk(name for name in names)) == 2
        assert len(await cache.head_bulk(names[:1])) == 1
        assert await cache.delete(SECRET) is True
        assert await cache.delete_bulk([]) == 0
        await asyncio.sleep(0)  # when callbacks of the last future have run
    found = spans()
    options = cache.config.options
    place = f"{options.host}:{options.port}"
    told = []
    for span in found:
        attributes = dict(span.attributes or {})
        assert attributes.pop(db_attributes.DB_SYSTEM_NAME) == "redis"
        assert attributes.pop(db_attributes.DB_NAMESPACE) == "0"
        assert attributes.pop(server_attributes.SERVER_ADDRESS) == options.host
        assert attributes.pop(server_attributes.SERVER_PORT) == options.port
        operation = attributes.pop(db_attributes.DB_OPERATION_NAME)
        assert span.name == f"{operation} {place}"
        assert span.parent is not None
        assert span.parent.span_id == request.get_span_context().span_id
        assert span.status.status_code is StatusCode.UNSET
        assert SECRET not in span.to_json()
        size = attributes.pop(db_attributes.DB_OPERATION_BATCH_SIZE, None)
        told.append((operation, size, attributes.pop("db.response.returned_rows", None)))
        assert attributes == {}
    assert told == [
        ("set", None, None),
        ("get", None, 1),
        ("head", None, 0),
        ("BATCH set", 2, None),
        ("BATCH get", 3, 2),
        ("head", None, 1),
        ("delete", None, None),
        ("BATCH delete", 0, None),
    ]


@pytest.mark.parametrize("near", [False, True])
async def test_spans_of_typed_reads(make_cache: MakeCache, spans: Spans, near: bool) -> None:
    cache = await make_cache(**({"nearCache": {"idleLimit": 30_000}} if near else {}))
    otel.trace(cache, tracer_provider=spans.provider)
    await cache.set("a", 1, {"x": 1})
    with spans.tracer.start_as_current_span("request"):
        for _ in range(2):
            record = await cache.get("a", type=dict[str, float])
            assert repr(record.data) == "{'x': 1.0}"
        assert len(await cache.get_bulk(["a", "b"], type=dict[str, float])) == 1
        with pytest.raises(dscache.RecordDamaged):
            await cache.get("a", type=list[int])
        await asyncio.sleep(0)  # when callbacks of done futures have run
        with pytest.raises(TypeError):
            cache.get("a", type=5)
    told = []
    for span in spans():
        attributes = dict(span.attributes or {})
        told.append([attributes.get(key) for key in ("db.response.returned_rows", "error.type")])
    assert told == [[1, None], [1, None], [1, None], [None, "RecordDamaged"], [None, "TypeError"]]


async def test_errors(make_cache: MakeCache, spans: Spans, redis: Any) -> None:
    cache = await make_cache()
    otel.trace(cache, tracer_provider=spans.provider, roots=True)
    redis.set("bad_v", "none")
    redis.set("bad_d", "1")
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(dscache.ReplyError):
            await cache.set(SECRET, 1, 1)
    finally:
        redis.config_set("maxmemory", 0)
    with pytest.raises(dscache.RecordDamaged):
        await cache.get("bad")
    with pytest.raises(dscache.RecordError):
        await cache.get("")
    with pytest.raises(dscache.BulkError):
        await cache.get_bulk(["bad", SECRET])
    await asyncio.sleep(0)
    told = []
    for span in spans():
        attributes = span.attributes or {}
        assert span.status.status_code is StatusCode.ERROR
        assert SECRET not in span.to_json()
        code = attributes.get(db_attributes.DB_RESPONSE_STATUS_CODE)
        told.append((attributes[error_attributes.ERROR_TYPE], code))
    assert told == [
        ("OOM", "OOM"),
        ("RecordDamaged", None),
        ("RecordError", None),
        ("BulkError", None),
    ]


@pytest.mark.parametrize("is_traced", [False, True])
async def test_asyncio_reports_an_error_that_nobody_looks_at(
    make_cache: MakeCache, spans: Spans, redis: Any, is_traced: bool
) -> None:
    cache = await make_cache()
    if is_traced:
        otel.trace(cache, tracer_provider=spans.provider, roots=True)
    redis.mset({"bad_v": "none", "bad_d": "1"})
    reported: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["message"]))
    cache.get("bad")
    await cache.get("good")
    await asyncio.sleep(0)
    gc.collect()
    assert reported == ["Future exception was never retrieved"]
    assert len(spans()) == 2 * is_traced


async def test_a_bulk_by_keyword_and_one_that_is_refused(
    make_cache: MakeCache, spans: Spans
) -> None:
    cache = await make_cache(name="memory")
    otel.trace(cache, tracer_provider=spans.provider, roots=True)
    await cache.get_bulk(names=["a"])
    await cache.head_bulk(names=iter(["a", "b"]))
    await cache.set_bulk(records={"a": (1, 1), "b": (1, 1)})
    with pytest.raises(dscache.RecordError, match="takes an iterable of names, not 5"):
        await cache.get_bulk(5)  # type: ignore[arg-type] # as a program may
    await asyncio.sleep(0)
    told = []
    for span in spans():
        attributes = span.attributes or {}
        size = attributes.get(db_attributes.DB_OPERATION_BATCH_SIZE)
        told.append((attributes[db_attributes.DB_OPERATION_NAME], size))
    assert told == [("get", None), ("BATCH head", 2), ("BATCH set", 2), ("BATCH get", None)]


async def test_an_update_has_one_span(make_cache: MakeCache, spans: Spans) -> None:
    cache = await make_cache()
    otel.trace(cache, tracer_provider=spans.provider, roots=True)
    await cache.update("a", lambda data: data + 1, default=0)
    await cache.patch("a", 5)
    with pytest.raises(dscache.RecordMissing):
        await cache.update(SECRET, lambda data: data)
    told = []
    for span in spans():
        attributes = span.attributes or {}
        assert SECRET not in span.to_json()
        name = attributes[db_attributes.DB_OPERATION_NAME]
        told.append((name, attributes.get(error_attributes.ERROR_TYPE)))
    assert told == [("update", None), ("patch", None), ("update", "RecordMissing")]


async def test_cancelled_operations(make_cache: MakeCache, spans: Spans) -> None:
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": {"port": 1}})
    otel.trace(cache, tracer_provider=spans.provider, roots=True)
    waiting = cache.get("a")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0)
    (span,) = spans()
    assert (span.attributes or {})[error_attributes.ERROR_TYPE] == "CancelledError"
    await cache.close()


async def test_the_sampler_of_the_application_decides(make_cache: MakeCache, spans: Spans) -> None:
    cache = await make_cache(name="memory")
    unsampled = Spans(sampler=ALWAYS_OFF)
    tracing = otel.trace(cache, tracer_provider=spans.provider)
    await cache.get("a")
    with unsampled.tracer.start_as_current_span("request"):
        await cache.get("a")
    await asyncio.sleep(0)
    assert spans() == []
    with spans.tracer.start_as_current_span("request"):
        await cache.get("a")
        await asyncio.sleep(0)
        (span,) = spans()
        assert (span.name, (span.attributes or {})["db.system.name"]) == ("get", "memory")
        tracing.stop()
        tracing.stop()
        await cache.get("a")
    await asyncio.sleep(0)
    assert spans() == []


async def test_a_share_of_the_spans_is_sampled(make_cache: MakeCache, spans: Spans) -> None:
    cache = await make_cache(name="memory")
    for sample, low, high in ((0.0, 0, 0), (0.5, 400, 600), (1.0, 1000, 1000)):
        tracing = otel.trace(cache, sample=sample, roots=True, tracer_provider=spans.provider)
        for _ in range(1000):
            await cache.get("a")
        await asyncio.sleep(0)
        tracing.stop()
        assert low <= len(spans()) <= high
    for sample in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            otel.trace(cache, sample=sample)


@pytest.mark.parametrize("opened_before", [True, False], ids=["opened", "not opened"])
async def test_with_a_near_cache(
    opened_before: bool, make_cache: MakeCache, server: Any, spans: Spans
) -> None:
    options = {"url": server.url, "nearCache": {}}
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
    if opened_before:
        await cache.get("a")
    tracing = otel.trace(cache, tracer_provider=spans.provider, roots=True)
    for _ in range(3):
        assert await cache.get("a") is None
    assert [span.name.split()[0] for span in spans()] == ["get"] * 3
    assert cache.stats()["near_cache"]["hits"] >= 2
    tracing.stop()
    await cache.get("a")
    assert spans() == []
    await cache.close()
    with pytest.raises(dscache.UsageError):
        await cache.get("a")


def test_spans_of_a_near_cache_of_threads(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, spans: Spans
) -> None:
    """A hit has a span too, until tracing stops; then the core's own methods are called again."""
    options = {"url": server.url, "nearCache": {"idleLimit": 60_000}, **PATIENT}
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        tracing = otel.trace(cache, tracer_provider=spans.provider, roots=True)
        for _ in range(4):
            cache.get("a")
            cache.head("a")
            assert cache.get_bulk(["a", "b"]) == {}
        names = Counter(span.name.split()[0] for span in spans())
        assert names == {"get": 4, "head": 4, "BATCH": 4}
        hits = cache.stats()["near_cache"]["hits"]
        assert hits >= 9
        tracing.stop()
        cache.get("a")
        assert spans() == []
        assert cache.stats()["near_cache"]["hits"] == hits + 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"host": "db", "port": 1, "db": 3}, {"server.address": "db", "server.port": 1}),
        ({"path": "/run/redis.sock"}, {"server.address": "/run/redis.sock"}),
        ({"nodes": [{"host": "a", "port": 7}]}, {"server.address": "a", "server.port": 7}),
        ({"sentinels": [{"host": "s"}], "name": "group"}, {"server.address": "group"}),
        ({"url": "redis://:secret@db:1/2"}, {"server.address": "db", "server.port": 1}),
    ],
)
def test_the_address_of_a_database(options: dict[str, Any], expected: dict[str, Any]) -> None:
    found = otel.attributes_of(load({"name": "redis", "options": options}))
    assert found.pop("db.system.name") == "redis"
    assert found.pop("db.namespace") in ("0", "2", "3")
    assert found == expected


# -- durations


DURATION = "db.client.operation.duration"
# By the semantic conventions of databases.
ADVISED_BOUNDS = {0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10}


async def test_durations_are_a_histogram(
    make_cache: MakeCache, meters: MeterProvider, reader: InMemoryMetricReader, redis: Any
) -> None:
    cache = await make_cache()
    measuring = otel.measure(cache, "main", meters)
    await cache.set(SECRET, 1, {"a": 1})
    await cache.get(SECRET)
    await cache.get("no")
    await cache.get_bulk(["a", "b"])
    await cache.get_bulk(iter(["a"]))
    await cache.update("a", lambda data: data + 1, default=0)
    with pytest.raises(dscache.RecordError):
        await cache.get("")
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(dscache.ReplyError):
            await cache.set("a", 1, 1)
    finally:
        redis.config_set("maxmemory", 0)
    await asyncio.sleep(0)  # when callbacks of done futures have run
    told = {}
    for point in points(reader, DURATION):
        attributes = dict(point.attributes)
        assert attributes.pop("db.system.name") == "redis"
        assert attributes.pop("db.namespace") == str(cache.config.options.db)
        assert attributes.pop("server.address") == cache.config.options.host
        assert attributes.pop("server.port") == cache.config.options.port
        assert attributes.pop("dscache.cache") == "main"
        assert {*point.explicit_bounds} > ADVISED_BOUNDS
        assert 0 < point.min <= point.max < 60
        assert SECRET not in str(point)
        told[tuple(attributes.values())] = point.count
    assert told == {
        ("set",): 1,
        ("get",): 3,
        ("BATCH get",): 1,
        ("update",): 1,
        ("get", "RecordError"): 1,
        ("set", "OOM", "OOM"): 1,
    }
    measuring.stop()
    measuring.stop()
    await cache.get("a")
    assert sum(point.count for point in points(reader, DURATION)) == 8


def test_the_histogram_is_that_of_the_conventions(
    meters: MeterProvider, reader: InMemoryMetricReader
) -> None:
    with dscache.Cache({"name": "memory"}) as cache:
        otel.measure(cache, meter_provider=meters)
        cache.get("a")
        data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == (db_metrics.DB_CLIENT_OPERATION_DURATION, "s")
    (point,) = metric.data.data_points
    assert point.attributes == {
        "db.system.name": "memory",
        "db.operation.name": "get",
        "dscache.cache": "default",
    }


def test_scopes_name_the_versions(
    meters: MeterProvider, reader: InMemoryMetricReader, spans: Spans
) -> None:
    """A back end finds out what wrote them, and by which version of the conventions."""
    with dscache.Cache({"name": "memory"}) as cache:
        otel.observe(cache, meter_provider=meters)
        otel.measure(cache, meter_provider=meters)
        otel.trace(cache, roots=True, tracer_provider=spans.provider)
        cache.get("a")
        data = reader.get_metrics_data()
    assert data is not None
    scopes = [one.scope for one in data.resource_metrics[0].scope_metrics]
    scopes += [span.instrumentation_scope for span in spans()]
    assert len(scopes) == 2
    for scope in scopes:
        assert (scope.name, scope.version) == ("dscache", dscache.__version__)
        assert scope.schema_url == "https://opentelemetry.io/schemas/1.33.0"


@pytest.mark.parametrize("outer_first", [True, False])
@pytest.mark.parametrize("near", [False, True])
async def test_spans_and_durations_of_one_cache(
    outer_first: bool,
    near: bool,
    make_cache: MakeCache,
    meters: MeterProvider,
    reader: InMemoryMetricReader,
    spans: Spans,
) -> None:
    cache = await make_cache(**({"nearCache": {"idleLimit": 30_000}} if near else {}))

    async def told() -> tuple[int, int]:
        await cache.get("a")
        await cache.get_bulk(["a", "b"])
        await asyncio.sleep(0)
        return len(spans()), sum(point.count for point in points(reader, DURATION))

    measuring = otel.measure(cache, meter_provider=meters)
    tracing = otel.trace(cache, roots=True, tracer_provider=spans.provider)
    assert await told() == (2, 2)
    if outer_first:
        tracing.stop()
        assert await told() == (0, 4)
        measuring.stop()
    else:
        measuring.stop()
        assert await told() == (2, 2)
        tracing.stop()
    # Nothing is left that a call would have to pass.
    assert not [name for name, value in vars(cache).items() if hasattr(value, "owner")]
    assert (await told())[0] == 0
