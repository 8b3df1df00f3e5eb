"""The near cache of a blocking Cache on real servers: other writers, threads, losses and forks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_py
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.credentials import CredentialProvider

import dscache
from dscache import otel
from dscache.blocking import near_cache
from dscache.embedded import EmbeddedServer
from tests.conftest import PATIENT, SERVERS, MakeServer, _server_id
from tests.support.blocking import (
    PATIENCE,
    LoopThread,
    ProxyThread,
    in_threads,
    run_child,
    strike,
    until,
)
from tests.support.blocking_checks import assert_interrupted, assert_struck_at_each_line
from tests.support.faults import HELLO_REPLY, FakeServer
from tests.support.near_truth import counters, is_at_hand, opened_caches, version_of
from tests.support.near_truth import links as links_of

# A busy machine may be silent for a while, which must not look like a dead link.
NEAR = {"idleLimit": 30_000}

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

OpenCache = Callable[..., dscache.Cache]

# How operations fail without a server, or with a silent one.
AWAY = (dscache.ConnectError, dscache.ConnectionLost, dscache.DeadlineExceeded)


@pytest.fixture
def open_cache(server: EmbeddedServer, backend: str, redis: redis_py.Redis) -> Iterator[OpenCache]:
    """Open caches with a near cache, on ``server`` or, with ``url``, elsewhere."""
    with opened_caches(NEAR, url=server.url) as open_one:
        yield open_one
    assert not links()


def links() -> list[threading.Thread]:
    """Return the threads of near caches."""
    return [one for one in threading.enumerate() if one.name.startswith("dscache hears")]


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


@on_one_server
def test_a_write_that_was_lost_hides_the_record(
    open_cache: OpenCache, proxy: ProxyThread, redis: redis_py.Redis
) -> None:
    """Whether it has happened or not, and until the server tells."""
    cache = open_cache({"idleLimit": 30_000, "serveStale": True}, url=proxy.url, commandTimeout=500)
    put(redis, "a", 1)
    until(lambda: is_at_hand(cache, "a"))
    proxy.do("stall")
    with pytest.raises(AWAY):
        cache.set("a", 2, 2)
    with pytest.raises(AWAY):
        cache.get("a")
    proxy.do("resume")
    until(lambda: is_at_hand(cache, "a"))
    put(redis, "a", 7)
    until(lambda: version_of(cache) == 7)


# -- servers that can't


OLD = HELLO_REPLY.replace(b"7.0.0", b"6.2.7")
UNABLE = {
    "redis 6": ({"HELLO": OLD}, r"it is Redis 6\.2\.7, which may announce a change in the middle"),
    "resp2": ({"HELLO": b"-ERR unknown command 'HELLO'\r\n"}, r"does not speak RESP3"),
    "no tracking": (
        {"CLIENT": b"-ERR unknown subcommand 'TRACKING'\r\n"},
        r"it says \"ERR unknown subcommand 'TRACKING'\" to CLIENT TRACKING ON",
    ),
}


@pytest.mark.parametrize("server_kind", UNABLE)
def test_a_server_without_tracking(server_kind: str, backend: str) -> None:
    answers, expected = UNABLE[server_kind]
    found = {"MGET": b"*2\r\n$1\r\n1\r\n$3\r\n[1]\r\n", "MSET": b"+OK\r\n"}
    with FakeThread({**answers, **found}) as url:
        options = {"url": url, "nearCache": True, **PATIENT}
        cache = dscache.Cache.from_config({"name": "redis", "options": options})
        for call in (
            cache.when_ready,
            lambda: cache.get("a"),
            lambda: cache.get_bulk(["a"]),
            lambda: cache.set("a", 1, 1),
        ):
            with pytest.raises(dscache.ConnectError, match=expected):
                call()
        cache.close()
        options["nearCache"] = {"required": False}
        with dscache.Cache.from_config({"name": "redis", "options": options}) as without:
            assert works_without(without)


def works_without(cache: dscache.Cache) -> bool:
    """Read and write on a server without tracking: nothing is kept."""
    assert cache.set("a", 1, [1]) is True
    for _ in range(3):
        assert version_of(cache) == 1
    assert (counters(cache)["hits"], counters(cache)["records"]) == (0, 0)
    return bool(cache.stats()["reads"] == 3)


@on_one_server
def test_a_user_who_may_not_track(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    port = redis.connection_pool.connection_kwargs["port"]
    redis.acl_setuser(
        "near", enabled=True, passwords=["+secret"], keys="*", commands=["+@all", "-client"]
    )
    try:
        login = {"username": "near", "password": "secret", "port": port, **PATIENT}
        cache = dscache.Cache.from_config(
            {"name": "redis", "options": {**login, "nearCache": True}}
        )
        for call in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, 1)):
            with pytest.raises(dscache.ConnectError, match=r"NOPERM.*CLIENT TRACKING ON") as caught:
                call()
            assert "required: false" in str(caught.value)
            assert "secret" not in str(caught.value)
        cache.close()
        config = {"name": "redis", "options": {**login, "nearCache": {"required": False}}}
        with dscache.Cache.from_config(config) as without:
            assert works_without(without)
    finally:
        redis.acl_deluser("near")


@on_one_server
def test_a_user_who_may_not_ask_for_the_identity(
    open_cache: OpenCache, redis: redis_py.Redis
) -> None:
    port = redis.connection_pool.connection_kwargs["port"]
    redis.acl_setuser(
        "near", enabled=True, passwords=["+secret"], keys="*", commands=["+@all", "-info"]
    )
    try:
        login = {"username": "near", "password": "secret", "port": port, **PATIENT}
        config = {"name": "redis", "options": {**login, "nearCache": NEAR}}
        with dscache.Cache.from_config(config) as cache:
            put(redis, "a", 1)
            until(lambda: is_at_hand(cache, "a"))
    finally:
        redis.acl_deluser("near")


# -- credentials


class Provider(CredentialProvider):
    """Gives one login after the other; like redis-py's own class, it keeps the last callback."""

    def __init__(self) -> None:
        self.login = ("first", "secret-first")
        self.tell: Callable[[object], object]

    def get_credentials(self) -> tuple[str, str]:
        return self.login

    def on_next(self, callback: Callable[[object], object]) -> None:
        self.tell = callback


@pytest.fixture
def accounts(redis: redis_py.Redis) -> Iterator[Callable[[str], None]]:
    """Two users of a server, and a function that admits one, whose rights are whole then."""

    def admit(name: str) -> None:
        redis.acl_setuser(
            name, enabled=True, reset=True, passwords=[f"+secret-{name}"], keys="*",
            channels="*", commands=["+@all"],
        )  # fmt: skip

    for name in ("first", "second"):
        admit(name)
    yield admit
    redis.acl_deluser("first", "second")


def logins(redis: redis_py.Redis, cache_name: str = "renewed") -> tuple[set[str], set[str]]:
    """Return the users of the connections that hear of changes, and of the others."""
    listening, pooled = links_of(redis, cache_name)
    return {one["user"] for one in listening}, {one["user"] for one in pooled}


@on_one_server
@pytest.mark.usefixtures("accounts")
def test_new_credentials_are_those_of_the_link_too(
    redis: redis_py.Redis, server: EmbeddedServer, backend: str
) -> None:
    """Records read with the earlier credentials are dropped at once; then all works as before."""
    provider = Provider()
    options = {"url": server.url, "connectionName": "renewed", "nearCache": NEAR, **PATIENT}
    config = {"name": "redis", "options": options}
    put(redis, "a", 1)
    with dscache.Cache.from_config(config, credentials=provider) as cache:
        until(lambda: is_at_hand(cache, "a"))
        for turn, user in enumerate(("second", "first"), start=1):
            provider.login = (user, f"secret-{user}")
            provider.tell(object())
            assert not is_at_hand(cache, "a")
            assert counters(cache)["flushes"] == {"login": turn}
            until(lambda: is_at_hand(cache, "a"), "a hit")
            until(lambda user=user: logins(redis) == ({user}, {user}), "new logins of all")
            put(redis, "a", turn + 1)
            until(lambda turn=turn: version_of(cache) == turn + 1, "the change")


@on_one_server
def test_new_credentials_that_are_refused_at_first(
    redis: redis_py.Redis,
    server: EmbeddedServer,
    backend: str,
    accounts: Callable[[str], None],
) -> None:
    """Operations tell of the refusal, serve nothing, and work again once the server agrees."""
    provider = Provider()
    options = {"url": server.url, "connectionName": "renewed", "nearCache": NEAR, **PATIENT}
    config = {"name": "redis", "options": options}
    put(redis, "a", 1)
    with dscache.Cache.from_config(config, credentials=provider) as cache:
        until(lambda: is_at_hand(cache, "a"))
        redis.acl_setuser("second", enabled=False)
        provider.login = ("second", "secret-second")
        provider.tell(object())
        for _ in range(3):
            with pytest.raises(dscache.DscacheError, match="WRONGPASS") as caught:
                cache.get("a")
            assert "secret" not in str(caught.value)
        put(redis, "a", 2)
        accounts("second")
        until(lambda: works(cache) and is_at_hand(cache, "a"), "a hit")
        assert version_of(cache) == 2
        assert logins(redis) == ({"second"}, {"second"})


def works(cache: dscache.Cache) -> bool:
    try:
        cache.get("a")
    except dscache.DscacheError:
        return False
    return True


@on_one_server
@pytest.mark.usefixtures("accounts")
def test_a_lost_right_is_noticed_when_the_connections_end(
    redis: redis_py.Redis, server: EmbeddedServer, backend: str
) -> None:
    """Redis tells nobody of a right: hits go on, until the connections of the user are ended."""
    login = {"username": "first", "password": "secret-first"}
    options = {"url": server.url, "nearCache": NEAR, **login, **PATIENT}
    put(redis, "a", 1)
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        until(lambda: is_at_hand(cache, "a"))
        redis.acl_setuser("first", enabled=True, reset_keys=True)
        assert is_at_hand(cache, "a")
        with pytest.raises(dscache.ReplyError, match="NOPERM"):
            cache.get("another")
        redis.execute_command("CLIENT", "KILL", "USER", "first")
        until(lambda: not works(cache), "an error")
        with pytest.raises(dscache.ReplyError, match="NOPERM"):
            cache.get("a")


@on_one_server
@pytest.mark.usefixtures("accounts")
def test_a_link_that_ends_asks_for_the_credentials_of_now(
    redis: redis_py.Redis, server: EmbeddedServer, backend: str
) -> None:
    """Some providers announce nothing."""
    provider = Provider()
    options = {"url": server.url, "connectionName": "renewed", "nearCache": NEAR, **PATIENT}
    config = {"name": "redis", "options": options}
    put(redis, "a", 1)
    with dscache.Cache.from_config(config, credentials=provider) as cache:
        until(lambda: is_at_hand(cache, "a"))
        provider.login = ("second", "secret-second")
        (link,), _ = links_of(redis, "renewed")
        redis.client_kill_filter(_id=link["id"])
        until(lambda: logins(redis)[0] == {"second"}, "a new link")
        put(redis, "a", 2)
        until(lambda: version_of(cache) == 2, "the change")
        until(lambda: is_at_hand(cache, "a"), "a hit")


# -- losses


def one_at_hand(open_cache: OpenCache, redis: redis_py.Redis, **options: Any) -> dscache.Cache:
    """Open a cache that has the record a, in version 1."""
    put(redis, "a", 1)
    cache = open_cache(**options)
    until(lambda: is_at_hand(cache, "a"))
    return cache


@pytest.fixture
def proxy(server: EmbeddedServer) -> Iterator[ProxyThread]:
    """A proxy in front of ``server`` that fails on command, in its own thread."""
    with ProxyThread(server.host, server.port) as started:
        yield started


@on_one_server
def test_a_silent_server_is_not_believed(
    open_cache: OpenCache, proxy: ProxyThread, redis: redis_py.Redis
) -> None:
    cache = one_at_hand(
        open_cache, redis, url=proxy.url, near={"idleLimit": 300}, commandTimeout=200
    )
    proxy.do("stall")
    put(redis, "a", 2)
    with pytest.raises(AWAY):
        until(lambda: version_of(cache) != 1)
    hits = counters(cache)["hits"]
    with pytest.raises(AWAY):
        cache.get("a")
    assert counters(cache)["hits"] == hits
    proxy.do("resume")
    until(lambda: answered_version(cache) == 2)
    until(lambda: is_at_hand(cache, "a"))


def answered_version(cache: dscache.Cache, name: str = "a") -> int | None:
    """Return a record's version, or None if there is no answer, or only the last known one."""
    try:
        record = cache.get(name)
    except dscache.DscacheError:
        return None
    return None if record is None or record.stale else record.version


@on_one_server
def test_a_healthy_idle_link_keeps_serving(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    idle_limit = 0.5
    cache = one_at_hand(open_cache, redis, near={"idleLimit": round(idle_limit * 1000)})
    end = time.monotonic() + 120
    while True:
        until(lambda: is_at_hand(cache, "a"))
        misses, began = counters(cache)["misses"], time.monotonic()
        latest, last = 0.0, began
        while time.monotonic() < began + 3 * idle_limit:
            cache.get("a")
            time.sleep(0.005)
            latest, last = max(latest, time.monotonic() - last), time.monotonic()
        # A process that is late itself hears nothing, which proves nothing about the link.
        if latest < idle_limit / 10 or time.monotonic() > end:
            break
    assert counters(cache)["misses"] == misses
    assert "connection" not in counters(cache)["flushes"]


@on_one_server
def test_a_killed_link(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = one_at_hand(open_cache, redis, connectionName="killed")
    for version in range(2, 8):
        until(lambda: is_at_hand(cache, "a"))
        [link] = [one for one in redis.client_list() if "b" in one["flags"].lower()] or [
            one for one in redis.client_list() if "t" in one["flags"]
        ]
        redis.client_kill_filter(_id=link["id"])
        put(redis, "a", version)  # which nobody reports
        until(lambda wanted=version: counters(cache)["flushes"].get("connection", 0) >= wanted - 1)
        assert version_of(cache) == version
    assert counters(cache)["flushes"] == {"connection": 6}


@on_one_server
def test_a_killed_pooled_connection_ends_nothing(
    open_cache: OpenCache, redis: redis_py.Redis
) -> None:
    cache = one_at_hand(open_cache, redis, connectionName="killed")
    pooled = [
        one
        for one in redis.client_list()
        if one["name"] == "killed" and not set(one["flags"]) & set("tB")
    ]
    assert len(pooled) == 1
    redis.client_kill_filter(_id=pooled[0]["id"])
    assert is_at_hand(cache, "a")
    put(redis, "a", 2)
    until(lambda: version_of(cache) == 2)
    until(lambda: is_at_hand(cache, "a"))


@on_one_server
def test_a_restarted_server(make_server: MakeServer, backend: str) -> None:
    server = make_server()
    options = {"url": server.url, "nearCache": NEAR, **PATIENT}
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        cache.set("a", 1, 1)
        until(lambda: is_at_hand(cache, "a"))
        server.kill()
        server.start()
        until(lambda: cache.get("a") is None)
        assert counters(cache)["flushes"]["connection"] >= 1
        cache.set("a", 2, 2)
        until(lambda: is_at_hand(cache, "a"))


@on_one_server
def test_the_last_known_records_of_a_lost_server(make_server: MakeServer, backend: str) -> None:
    server = make_server()
    near = {**NEAR, "serveStale": True}
    options = {"url": server.url, "nearCache": near, "commandTimeout": 500}
    # By another cache, or the report of the writes could drop the records after they were read.
    with dscache.Cache.from_config(server.url) as writer:
        writer.set_bulk({"a": (1, [1]), "b": (2, [2])})
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        until(lambda: len(cache.get_bulk(["a", "b", "missing"])) == 2 and is_at_hand(cache, "b"))
        until(lambda: is_at_hand(cache, "a"))
        server.kill()
        until(lambda: (record := cache.get("a")) is not None and record.stale)
        found = cache.get_bulk(["b", "a"])
        assert [(one.version, one.data, one.stale) for one in found.values()] == [
            (2, [2], True),
            (1, [1], True),
        ]
        began = time.monotonic()
        for _ in range(1000):
            cache.get("a")
        assert time.monotonic() - began < 250  # at once, and not each after its deadline
        calls: list[Callable[[], object]] = [
            lambda: cache.head("a"),
            lambda: cache.get("missing"),
            lambda: cache.get("c"),
            lambda: cache.set("b", 3, [3]),
            # The write may not have happened, and yet no caller may see the earlier record.
            lambda: cache.get("b"),
        ]
        for call in calls:
            with pytest.raises(AWAY):
                call()
        with pytest.raises(dscache.BulkError) as caught:
            cache.get_bulk(["a", "b"])
        assert list(caught.value.result) == ["a"]
        server.start()
        until(lambda: is_answered(cache, "b"))
        until(lambda: cache.get("a") is None)  # the server has lost it
        cache.set("a", 5, [5])
        record = cache.get("a")
        assert record is not None
        assert (record.version, record.stale) == (5, False)


def is_answered(cache: dscache.Cache, name: str) -> bool:
    try:
        record = cache.get(name)
    except dscache.DscacheError:
        return False
    return record is None or not record.stale


@on_one_server
def test_a_silent_server_and_the_last_known_record(
    open_cache: OpenCache, proxy: ProxyThread, redis: redis_py.Redis
) -> None:
    """The connections are open but silent: after its deadline a read is served all the same."""
    put(redis, "a", 1)
    near = {"idleLimit": 50, "serveStale": True}
    cache = open_cache(near, url=proxy.url, commandTimeout=300)
    until(lambda: is_at_hand(cache, "a"))
    proxy.do("stall")
    until(lambda: (record := cache.get("a")) is not None and record.stale)
    proxy.do("heal")
    until(lambda: answered_version(cache) == 1)
    until(lambda: is_at_hand(cache, "a"))


@on_one_server
def test_an_answer_of_another_server_is_not_kept(make_server: MakeServer, backend: str) -> None:
    """The address leads to another server for new connections, as a balancer's does."""
    old, new = make_server(), make_server()
    with ProxyThread(old.host, old.port) as proxy:
        options = {"url": proxy.url, "nearCache": NEAR, "maxConnections": 1, **PATIENT}
        with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
            # That there is no such record, which no report of a write of ours can end.
            until(lambda: is_at_hand(cache, "a"))
            proxy.do("retarget", new.host, new.port)
            with redis_py.Redis(port=new.port, decode_responses=True) as client:
                put(client, "a", 2)
            with redis_py.Redis(port=old.port, decode_responses=True) as client:
                link = link_of(client)
                for one in client.client_list():
                    if int(one["id"]) not in (link, client.client_id()):
                        client.client_kill_filter(_id=one["id"])
                assert cache.get("a") is None  # the link hears of all changes there
                put(client, "a", 9)
                until(lambda: version_of(cache) == 2)
            with redis_py.Redis(port=new.port, decode_responses=True) as client:
                for version in range(3, 6):
                    until(lambda: is_at_hand(cache, "a"))
                    put(client, "a", version)
                    until(lambda wanted=version: version_of(cache) == wanted)


def link_of(client: redis_py.Redis) -> int:
    """Return the id of the one connection that tracks changes."""
    [found] = [one["id"] for one in client.client_list() if set(one["flags"]) & set("tB")]
    return int(found)


class FakeThread:
    """A FakeServer in a thread of its own."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._thread = LoopThread()
        self._server = FakeServer(answers)

    def __enter__(self) -> str:
        self._thread.run(self._server.__aenter__())
        return self._server.url

    def __exit__(self, *_: object) -> None:
        self._thread.run(self._server.__aexit__())
        self._thread.close()


# -- threads


@on_one_server
def test_threads_and_writers_end_on_the_last_version(
    open_cache: OpenCache, redis: redis_py.Redis
) -> None:
    """Reads never go back in time, and end on what was written last."""
    names = [f"n/{number}" for number in range(8)]
    cache = open_cache(commandTimeout=PATIENCE * 1000)
    foreign = open_cache(None, commandTimeout=PATIENCE * 1000)
    ended = threading.Event()
    known = dict.fromkeys(names, 0)

    def read(number: int) -> int:
        seen = dict.fromkeys(names, 0)
        reads = 0
        while not ended.is_set():
            for name in names:
                version = version_of(cache, name) or 0
                assert version >= seen[name]
                seen[name] = version
                reads += 1
        return reads

    def write(number: int) -> int:
        mine = names[number::2]
        writer = (cache, foreign)[number]
        for version in range(1, 400):
            for name in mine:
                writer.set(name, version, version)
                known[name] = version
                if writer is cache:
                    assert version_of(cache, name) == version
        return 0

    def work(number: int) -> int:
        if number < 4:
            return read(number)
        try:
            return write(number - 4)
        finally:
            done.release()
            if number == 4:
                for _ in range(2):
                    done.acquire()
                ended.set()

    done = threading.Semaphore(0)
    assert all(in_threads(6, work)[:4])
    for name in names:
        until(lambda n=name: version_of(cache, n) == known[n])
    stats = counters(cache)
    assert stats["hits"] > 0
    assert stats["invalidations"] > 0


@on_one_server
def test_a_hit_waits_for_no_miss(
    open_cache: OpenCache, proxy: ProxyThread, redis: redis_py.Redis
) -> None:
    cache = one_at_hand(open_cache, redis, url=proxy.url, commandTimeout=PATIENCE * 1000)
    proxy.do("stall")
    with ThreadPoolExecutor(1) as threads:
        missing = threads.submit(cache.get, "missing")
        until(lambda: counters(cache)["misses"] > 1)
        for _ in range(100):
            assert is_at_hand(cache, "a")
        assert not missing.done()
        proxy.do("resume")
        assert missing.result(PATIENCE) is None


# -- interruptions, greenlets and exits


@on_one_server
def test_a_thread_is_struck_at_each_line(
    open_cache: OpenCache, server: EmbeddedServer, backend: str
) -> None:
    """As Ctrl-C strikes it. However slow the machine, no hit becomes too old meanwhile."""
    options = {"url": server.url, "nearCache": {"idleLimit": 600_000}}
    # A hit is one line of Python.
    assert_struck_at_each_line(options, backend, fewest=1)


@on_one_server
def test_a_first_call_that_is_struck_leaves_no_cache_without_it(
    server: EmbeddedServer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Struck(near_cache.NearFront):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            raise KeyboardInterrupt

    config = {"name": "redis", "options": {"url": server.url, "nearCache": NEAR, **PATIENT}}
    cache = dscache.Cache.from_config(config)
    with monkeypatch.context() as patch:
        patch.setattr(near_cache, "NearFront", Struck)
        with pytest.raises(KeyboardInterrupt):
            cache.get("a")
    with cache:
        cache.get("a")
        assert cache.stats()["near_cache"]["misses"] == 1


@on_one_server
@pytest.mark.parametrize("use", ["get", "close"])
def test_a_signal_handler_in_the_first_call_leaves_one_near_cache(
    server: EmbeddedServer, backend: str, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """It uses the cache, or closes it, while the near cache is made."""
    config = {"name": "redis", "options": {"url": server.url, "nearCache": NEAR, **PATIENT}}
    cache = dscache.Cache.from_config(config)
    uses = {"get": lambda: cache.get("a"), "close": cache.close}

    class Struck(near_cache.NearFront):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            monkeypatch.undo()
            uses[use]()

    monkeypatch.setattr(near_cache, "NearFront", Struck)
    if use == "close":
        for _ in range(2):
            with pytest.raises(dscache.UsageError, match="closed"):
                cache.set("a", 1, [1])
    else:
        cache.set("a", 1, [1])
        for _ in range(3):
            assert tuple(cache.get("a")) == (1, [1])
        assert len(links()) == 1
        cache.close()
        with pytest.raises(dscache.UsageError, match="closed"):
            cache.get("a")
    assert not links()


@on_one_server
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_thread_follows_one_that_is_struck(
    open_cache: OpenCache, redis: redis_py.Redis
) -> None:
    """Under gevent, a KeyboardInterrupt may strike any greenlet."""
    cache = one_at_hand(open_cache, redis)
    [link] = links()
    strike(link, KeyboardInterrupt)
    put(redis, "a", 2)  # its report wakes the thread
    until(lambda: not link.is_alive())
    until(lambda: version_of(cache) == 2 and is_at_hand(cache, "a"))
    assert len(links()) == 1


@on_one_server
def test_a_thread_is_interrupted_at_any_moment(server: EmbeddedServer, backend: str) -> None:
    assert_interrupted(json.dumps({"url": server.url, "nearCache": NEAR}), 150, backend)


@on_one_server
def test_greenlets(server: EmbeddedServer, backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        near = {"nearCache": NEAR}
        served = json.dumps({"url": server.url, **near})
        silent_url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        quiet = json.dumps({"url": silent_url, **near})
        result = run_child("greenlets.py", served, quiet, "20", backend=backend)
    assert result["wrong"] == []
    assert result["finished"]
    assert result["limited"] == "gevent.Timeout ConnectError"
    assert result["others_ran"]
    assert result["pending"] == 0


PROGRAM = """
import sys, threading
import dscache

cache = dscache.Cache.from_config(
    {"name": "redis", "options": {"url": sys.argv[1], "nearCache": True}}
)
cache.set("a", 1, 1)
cache.get("a")
if sys.argv[2] == "hits":
    begun = threading.Event()

    def hit():
        while True:
            cache.get("a")
            begun.set()

    threading.Thread(target=hit, daemon=True).start()
    begun.wait()
elif sys.argv[2] == "an error":
    raise SystemExit(3)
"""


@on_one_server
@pytest.mark.parametrize(("way", "status"), [("nothing", 0), ("hits", 0), ("an error", 3)])
def test_the_end_of_a_program_without_close(
    server: EmbeddedServer, backend: str, way: str, status: int
) -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-W", "ignore::ResourceWarning", "-c", PROGRAM, server.url, way],
            env={**os.environ, "DSCACHE_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stderr) == (status, "")


# -- counters


@on_one_server
def test_a_trace_of_hits(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    cache = one_at_hand(open_cache, redis)
    tracing = otel.trace(cache, tracer_provider=provider, roots=True)
    hits = counters(cache)["hits"]
    for _ in range(3):
        assert version_of(cache) == 1
    assert counters(cache)["hits"] == hits + 3
    assert len(exporter.get_finished_spans()) == 3
    tracing.stop()
    assert is_at_hand(cache, "a")
    cache.close()
    with pytest.raises(dscache.UsageError):
        cache.get("a")


# -- lives


@on_one_server
def test_close_ends_the_link(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = one_at_hand(open_cache, redis, connectionName="closed")
    [link] = links()
    cache.close()
    assert not link.is_alive()
    with pytest.raises(dscache.UsageError):
        cache.get("a")
    with pytest.raises(dscache.UsageError):
        cache.set("a", 1, 1)
    until(lambda: all(one["name"] != "closed" for one in redis.client_list()))


@on_one_server
def test_a_dropped_cache_ends_its_link(open_cache: OpenCache, server: EmbeddedServer) -> None:
    options = {"url": server.url, "nearCache": NEAR}
    cache = dscache.Cache.from_config({"name": "redis", "options": options})
    cache.get("a")
    gone = weakref.ref(cache)
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del cache
    assert gone() is None
    assert not links()


@on_one_server
def test_a_method_that_a_subclass_overrides_is_called(
    open_cache: OpenCache, server: EmbeddedServer
) -> None:
    class Shouting(dscache.Cache):
        def get(self, name: str, type: Any = None) -> Any:
            return super().get(name.upper(), type=type)

    options = {"url": server.url, "nearCache": NEAR}
    with Shouting.from_config({"name": "redis", "options": options}) as cache:
        cache.set("A", 1, 1)
        until(lambda: is_at_hand(cache, "a"))
        assert version_of(cache) == 1


@on_one_server
def test_a_child_has_its_own_link_and_entries(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = one_at_hand(open_cache, redis, commandTimeout=PATIENCE * 1000)
    assert fork(lambda: generation(cache, redis, 5))
    until(lambda: is_at_hand(cache, "a"))
    put(redis, "a", 99)
    until(lambda: version_of(cache) == 99)


def generation(cache: dscache.Cache, redis: redis_py.Redis, depth: int) -> bool:
    """Use an inherited cache, change the record, and let a child do the same."""
    assert counters(cache)["records"] == 0
    assert not [one for one in links() if one.is_alive()]
    with redis_py.Redis(port=redis.connection_pool.connection_kwargs["port"]) as client:
        until(lambda: is_at_hand(cache, "a"))
        version = (version_of(cache) or 0) + 1
        put(client, "a", version)
        until(lambda: version_of(cache) == version)
        until(lambda: is_at_hand(cache, "a"))
        return depth == 0 or fork(lambda: generation(cache, redis, depth - 1))


def fork(work: Callable[[], bool]) -> bool:
    """Return whether ``work`` succeeds in a child."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if work() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return status == 0
