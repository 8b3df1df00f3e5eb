"""The near cache of a blocking Cache on real servers: other writers, threads, losses and forks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.blocking import until

# A busy machine may be silent for a while, which must not look like a dead link.
NEAR = {"idleLimit": 30_000}

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

OpenCache = Callable[..., dscache.Cache]


@pytest.fixture
def open_cache(server: EmbeddedServer, backend: str, redis: redis_py.Redis) -> Iterator[OpenCache]:
    """Open caches with a near cache, on ``server`` or, with ``url``, elsewhere."""
    opened: list[dscache.Cache] = []

    def open_one(near: Any = NEAR, **options: Any) -> dscache.Cache:
        if not options.keys() & {"url", "path", "sentinels"}:
            options["url"] = server.url
        if near is not None:
            options["nearCache"] = near
        cache = dscache.Cache.from_config({"name": "redis", "options": options})
        opened.append(cache)
        return cache

    yield open_one
    for cache in opened:
        cache.close()
    assert not links()


def links() -> list[threading.Thread]:
    """Return the threads of near caches."""
    return [one for one in threading.enumerate() if one.name.startswith("dscache hears")]


def counters(cache: dscache.Cache) -> dict[str, Any]:
    """Return the counters of a cache's near cache."""
    found: dict[str, Any] = cache.stats().get("near_cache", {"hits": 0})
    return found


def is_at_hand(cache: dscache.Cache, name: str) -> bool:
    """Read a record; return whether that was a hit."""
    before = counters(cache)["hits"]
    cache.get(name)
    return bool(counters(cache)["hits"] > before)


def version_of(cache: dscache.Cache, name: str = "a") -> int | None:
    record = cache.get(name)
    return None if record is None else record.version


def put(redis: redis_py.Redis, name: str, version: int, data: str = "1", prefix: str = "") -> None:
    redis.mset({f"{prefix}{name}_v": version, f"{prefix}{name}_d": data})


# -- hits


def test_a_record_is_read_once(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = open_cache()
    put(redis, "a", 3, '{"x":1}')
    until(lambda: is_at_hand(cache, "a"))
    redis.config_resetstat()
    first, second = cache.get("a"), cache.get("a")
    assert first is not None
    assert second is not None
    assert first == second
    assert (first.name, first.version, first.raw) == ("a", 3, b'{"x":1}')
    first.data["x"] = 2
    assert second.data == {"x": 1}
    assert cache.head("a") == 3
    assert cache.get_bulk(["a"]) == {"a": first}
    assert cache.head_bulk(["a", "a"]) == {"a": 3}
    assert cache.get("a", type=dict[str, float]).data == {"x": 1.0}  # type: ignore[union-attr]
    assert cache.get_bulk(["a"], type=dict[str, int])["a"].data == {"x": 1}
    assert "cmdstat_mget" not in redis.info("commandstats")


def test_that_a_record_is_missing_is_kept(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = open_cache()
    until(lambda: is_at_hand(cache, "a"))
    assert cache.get("a") is None
    assert cache.head("a") is None
    assert cache.get_bulk(["a"]) == cache.head_bulk(["a"]) == {}
    put(redis, "a", 1)
    until(lambda: version_of(cache) == 1)


def test_bulks_read_what_is_missing(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = open_cache()
    for name in "abc":
        put(redis, name, 1)
    until(lambda: is_at_hand(cache, "a"))
    before = counters(cache)
    assert list(cache.get_bulk(iter(["c", "x", "a", "b", "a"]))) == ["c", "a", "b"]
    after = counters(cache)
    assert after["misses"] - before["misses"] == 3
    assert after["hits"] - before["hits"] == 1
    until(lambda: cache.get_bulk(["a", "b", "c"]) and is_at_hand(cache, "c"))
    assert list(cache.head_bulk(["b", "x", "a"])) == ["b", "a"]
    assert cache.get_bulk([]) == cache.head_bulk([]) == {}


def test_bad_names(open_cache: OpenCache) -> None:
    cache = open_cache()
    for bad in ("", 1, None, b"a", "\ud800"):
        with pytest.raises(dscache.RecordError):
            cache.get(bad)  # type: ignore[call-overload]
        with pytest.raises(dscache.RecordError):
            cache.head(bad)  # type: ignore[arg-type]
        with pytest.raises(dscache.RecordError):
            cache.set(bad, 1, 1)  # type: ignore[arg-type]
        with pytest.raises(dscache.RecordError):
            cache.get_bulk(["a", bad])  # type: ignore[list-item]
        with pytest.raises(dscache.RecordError):
            cache.set_bulk({bad: (1, 1)})  # type: ignore[dict-item]
    for names in ("abc", b"abc"):
        with pytest.raises(dscache.RecordError):
            cache.get_bulk(names)  # type: ignore[call-overload]
        with pytest.raises(dscache.RecordError):
            cache.delete_bulk(names)  # type: ignore[arg-type]


# -- writers

CHANGES: dict[str, tuple[Callable[[redis_py.Redis], object], int | None]] = {
    "both keys": (lambda redis: put(redis, "a", 2), 2),
    "the version": (lambda redis: redis.set("a_v", 2), 2),
    "in a transaction": (
        lambda redis: redis.pipeline(transaction=True).set("a_v", 2).set("a_d", "[]").execute(),
        2,
    ),
    "by a script": (lambda redis: redis.eval("return redis.call('SET', KEYS[1], 2)", 1, "a_v"), 2),
    "by a name": (lambda redis: redis.rename("other_v", "a_v"), 2),
    "removed": (lambda redis: redis.delete("a_v", "a_d"), None),
    "half": (lambda redis: redis.delete("a_d"), None),
    "expired": (lambda redis: redis.pexpire("a_v", 1), None),
    "everything gone": (lambda redis: redis.flushdb(), None),
    "everything gone everywhere": (lambda redis: redis.flushall(), None),
}


def test_changes_by_other_clients_arrive(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = open_cache()
    for what, (change, version) in CHANGES.items():
        redis.flushdb()
        put(redis, "other", 2)
        put(redis, "a", 1)
        until(lambda: version_of(cache) == 1, what)
        until(lambda: is_at_hand(cache, "a"), what)
        change(redis)
        until(lambda wanted=version: version_of(cache) == wanted, what)
    assert counters(cache)["flushes"]["flushall"] >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"keyLayout": "hashtag"},
        {"keyPrefix": "app:"},
        {"keyPrefix": "{app}", "keyLayout": "hashtag"},
        {"ttl": 1000},
    ],
    ids=str,
)
def test_two_caches_see_what_the_other_writes(
    open_cache: OpenCache, options: dict[str, Any]
) -> None:
    names = ["a", "}b", "{c}/d", "ä/名", "x y"]
    near = {**NEAR, "prefixes": ["a", "}", "{", "{c", "ä", "x", "x "]}
    one, other = [open_cache(near, **options) for _ in range(2)]
    for version in range(1, 4):
        one.set_bulk({name: (version, [name]) for name in names[:3]})
        for name in names[3:]:
            other.set(name, version, [name])
        for cache in (one, other):
            for name in names:
                until(lambda c=cache, n=name, v=version: version_of(c, n) == v)
                until(lambda c=cache, n=name: is_at_hand(c, n))
    one.delete_bulk(names)
    for name in names:
        until(lambda n=name: version_of(other, n) is None)
    assert counters(other)["invalidations"] >= 3 * 3 + 2


def test_only_names_under_the_prefixes_are_kept(
    open_cache: OpenCache, redis: redis_py.Redis
) -> None:
    cache = open_cache({**NEAR, "prefixes": ["a/"]})
    put(redis, "a/1", 1)
    put(redis, "b/1", 1)
    until(lambda: is_at_hand(cache, "a/1"))
    assert not is_at_hand(cache, "b/1")
    assert not is_at_hand(cache, "b/1")


def test_a_cache_reads_its_own_writes(open_cache: OpenCache) -> None:
    cache = open_cache()
    for version in range(1, 200):
        assert cache.set("a", version, version) is True
        assert version_of(cache) == version
        assert version_of(cache) == version
        if version % 10 == 0:
            assert cache.delete("a") is True
            assert cache.get("a") is None
    written = cache.update("a", lambda data: data + 1)
    assert cache.get("a") == written
    assert cache.set_bulk({"a": (500, 5)}) == set()
    assert version_of(cache) == 500
    assert cache.delete_bulk(["a"]) == 1
    assert cache.get("a") is None
