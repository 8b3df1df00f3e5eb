"""The types of exporters, private servers and fixtures. Type checkers read it; nothing runs it."""

from __future__ import annotations

from typing import Any, assert_type

from dscache import AsyncCache, Cache, django, otel, prometheus
from dscache.embedded import EmbeddedServer, ServerBinary, find_server, find_servers


def exporters(cache: AsyncCache, blocking: Cache) -> None:
    assert_type(prometheus.register(cache), prometheus.CacheCollector)
    assert_type(prometheus.register(blocking, "name"), prometheus.CacheCollector)
    otel.observe(cache, "name")
    tracing = otel.trace(blocking, sample=0.1, roots=True)
    tracing.stop()


def django_caches(cache: django.RecordCache) -> None:
    assert_type(cache.records, Cache)
    assert_type(cache.touch("name"), bool)
    assert_type(cache.get_many(["name"]), dict[str, Any])


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
