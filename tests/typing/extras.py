"""The types of exporters, private servers and fixtures. Type checkers read it; nothing runs it."""

from __future__ import annotations

from typing import Any, assert_type

from key_value.aio.protocols import AsyncKeyValue

from dscache import AsyncCache, Cache, django, key_value, otel, prometheus
from dscache.embedded import EmbeddedServer, ServerBinary, find_server, find_servers


def exporters(cache: AsyncCache, blocking: Cache) -> None:
    assert_type(prometheus.register(cache), prometheus.CacheCollector)
    assert_type(prometheus.register(blocking, "name"), prometheus.CacheCollector)
    otel.observe(cache, "name")
    tracing = otel.trace(blocking, sample=0.1, roots=True)
    tracing.stop()
    assert_type(otel.measure(cache, "name"), otel.Measuring)


def django_caches(cache: django.RecordCache) -> None:
    assert_type(cache.records, Cache)
    assert_type(cache.touch("name"), bool)
    assert_type(cache.get_many(["name"]), dict[str, Any])


async def stores(store: key_value.RecordStore) -> None:
    as_any: AsyncKeyValue = store
    await as_any.put("key", {"a": 1}, ttl=60)
    assert_type(await store.get("key"), dict[str, Any] | None)
    assert_type(await store.keys("collection", limit=5), list[str])
    assert_type(store.records, AsyncCache)


def servers() -> None:
    assert_type(find_servers(), list[ServerBinary])
    assert_type(find_server(), ServerBinary)
    with EmbeddedServer(port=0, args=["--appendonly", "yes"]) as server:
        assert_type(server, EmbeddedServer)
        assert_type(server.url, str)
        assert_type(server.port, int)
        assert_type(server.is_running, bool)


def test_of_a_user(dscache_memory: AsyncCache, dscache_server: EmbeddedServer) -> None:
    assert_type(AsyncCache.from_config(dscache_server.url), AsyncCache)
    assert_type(dscache_memory.is_ready, bool)


def refused() -> None:
    prometheus.register("host")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    EmbeddedServer(6379)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
