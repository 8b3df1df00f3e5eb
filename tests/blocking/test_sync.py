"""The blocking Cache: threads, bounded connections, interruptions, forks, and faults.

``test_cache.py`` tests the results of its operations together with those of the asyncio one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_py
from redis.credentials import CredentialProvider

import dscache
from dscache.blocking.connection import Connection
from dscache.embedded import EmbeddedServer, TLSFiles
from dscache.net.sockets import SocketConnect
from dscache.pubsub.subscribers import Messages
from tests.conftest import SERVERS, _server_id
from tests.support.blocking import (
    PATIENCE,
    LoopThread,
    Model,
    ProxyThread,
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
from tests.support.faults import FakeServer
from tests.support.sentinels import SentinelGroup

MakeServer = Callable[..., EmbeddedServer]
Call = Callable[[dscache.Cache], Any]

# Timeouts for operations that must not end by a deadline, and for those that can only end by one.
PATIENT = {"connectTimeout": 600_000, "commandTimeout": 600_000}
IMPATIENT = {"connectTimeout": 200, "commandTimeout": 200}
SECRET = "pa55-w0rd"

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

READS: list[Call] = [
    lambda cache: cache.get("a"),
    lambda cache: cache.head("a"),
    lambda cache: cache.get_bulk(["a"]),
    lambda cache: cache.head_bulk(["a"]),
]
GUARDED: list[Call] = [
    lambda cache: cache.set("a", 5, "new", if_newer=True),
    lambda cache: cache.set_bulk({"a": (6, "new")}, if_newer=True),
]
PLAIN_WRITES: list[Call] = [
    lambda cache: cache.set("a", 1, "new"),
    lambda cache: cache.set("a", 1, "new", ttl=1000),
    lambda cache: cache.set_bulk({"a": (1, "new")}),
    lambda cache: cache.delete("a"),
    lambda cache: cache.delete_bulk(["a"]),
]

OpenCache = Callable[..., dscache.Cache]


@pytest.fixture
def open_cache(server: EmbeddedServer, backend: str, redis: redis_py.Redis) -> Iterator[OpenCache]:
    """Open caches on ``server`` or, with ``url``, elsewhere; closed at the end, and drained."""
    opened: list[dscache.Cache] = []

    def open_one(**options: Any) -> dscache.Cache:
        if not options.keys() & {"url", "path", "sentinels"}:
            options["url"] = server.url
        cache = dscache.Cache.from_config({"name": "redis", "options": options})
        opened.append(cache)
        return cache

    yield open_one
    for cache in opened:
        cache.close()
    for cache in opened:
        stats = cache.stats()
        left = {name: stats.get(name, 0) for name in ("pending", "in_flight", "queued")}
        assert not any(left.values()), f"{cache.description}: not drained: {left}"
        assert stats.get("connections", 0) == 0


@pytest.fixture
def proxy(server: EmbeddedServer) -> Iterator[ProxyThread]:
    """A proxy in front of ``server`` that fails on command, in its own thread."""
    with ProxyThread(server.host, server.port) as started:
        yield started


# -- threads


@on_one_server
def test_threads_share_a_cache(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    threads = 32
    steps = int(os.environ.get("DSCACHE_TEST_OPERATIONS", "20000")) // threads
    cache = open_cache(maxConnections=8, commandTimeout=PATIENCE * 1000, connectionName="pool")
    peak = 0

    def work(number: int) -> None:
        nonlocal peak
        model = Model(number)
        for step in range(steps):
            model.step(cache)
            if step % 100 == 0:
                peak = max(peak, sum(one["name"] == "pool" for one in redis.client_list()))

    in_threads(threads, work)
    stats = cache.stats()
    assert 1 < peak <= 8
    assert stats["connects"] == stats["connections"] <= 8
    assert stats["last_loss"] == ""


@on_one_server
def test_one_thread_needs_one_connection(open_cache: OpenCache) -> None:
    cache = open_cache()
    for version in range(100):
        cache.set("a", version, version)
        assert cache.head("a") == version
    assert cache.stats()["connects"] == 1


def test_threads_share_a_cache_in_memory(backend: str) -> None:
    cache = dscache.Cache.from_config({"name": "memory"})

    def work(number: int) -> None:
        model = Model(number)
        for _ in range(200):
            model.step(cache)

    in_threads(8, work)
    cache.close()


# -- all connections in use


def connect_all(cache: dscache.Cache, count: int) -> None:
    """Let the cache open that many connections."""
    together = threading.Barrier(count)

    def names() -> Iterator[str]:
        together.wait(PATIENCE)
        yield "a"

    in_threads(count, lambda _: cache.get_bulk(names()))


@contextlib.contextmanager
def used_up(proxy: ProxyThread, cache: dscache.Cache, count: int) -> Iterator[list[Any]]:
    """Keep that many threads waiting for a reply in this block; yields a list of their results."""
    connect_all(cache, count)
    results: list[Any] = []
    proxy.do("stall")
    threads = [
        threading.Thread(target=lambda: results.append(cache.get("a"))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    until(lambda: cache.stats()["in_flight"] == count)
    try:
        yield results
    finally:
        proxy.do("resume")
        for thread in threads:
            thread.join(PATIENCE)


@on_one_server
def test_without_a_free_connection_the_call_fails_at_once(
    open_cache: OpenCache, proxy: ProxyThread
) -> None:
    cache = open_cache(url=proxy.url, maxConnections=3, whenFull="error", **PATIENT)
    cache.set("a", 1, [1])
    calls = [*READS, *GUARDED, *PLAIN_WRITES]
    with used_up(proxy, cache, 3) as results:
        for call in calls:
            with pytest.raises(dscache.Overloaded, match=r"all 3 connections.*maxConnections"):
                call(cache)
        with pytest.raises(dscache.RecordError):
            cache.get("")
        assert cache.get_bulk([]) == {}
    assert [tuple(record) for record in results] == [(1, [1])] * 3
    assert tuple(cache.get("a")) == (1, [1])
    assert proxy.connections == 3


@on_one_server
def test_without_a_free_connection_the_call_waits_for_one(
    open_cache: OpenCache, proxy: ProxyThread
) -> None:
    cache = open_cache(url=proxy.url, maxConnections=2, **PATIENT)
    cache.set("a", 1, [1])
    with ThreadPoolExecutor(20) as threads:
        with used_up(proxy, cache, 2):
            waiting = [threads.submit(cache.set, f"r{n}", n, n) for n in range(20)]
            until(lambda: len(cache._topology._waiters) == 20)  # type: ignore[union-attr]
            assert not any(one.done() for one in waiting)
        assert all(one.result(PATIENCE) for one in waiting)
    assert cache.head_bulk(f"r{n}" for n in range(20)) == {f"r{n}": n for n in range(20)}
    assert cache.stats()["connects"] == 2


@on_one_server
def test_a_call_that_gets_no_connection_says_why(
    open_cache: OpenCache, proxy: ProxyThread, redis: redis_py.Redis
) -> None:
    cache = open_cache(url=proxy.url, maxConnections=1, **PATIENT)
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    with used_up(proxy, cache, 1):
        # From here on other threads wait for less time than the one in flight.
        impatient = {"timeout": 0.2}
        pool._new_pipeline.keywords.update(impatient)
        for call in (READS[0], PLAIN_WRITES[0]):
            with pytest.raises(dscache.DeadlineExceeded, match=r"none of the 1 .*maxConnections"):
                call(cache)
        assert not pool._waiters
    assert tuple(cache.get("a")) == (1, [1])


@on_one_server
def test_an_interrupted_thread_frees_its_place(open_cache: OpenCache) -> None:
    cache = open_cache(maxConnections=1, whenFull="error")
    cache.set("a", 1, [1])
    for _ in range(3):
        assert_a_lost_connection_frees_its_place(cache)
        assert tuple(cache.get("a")) == (1, [1])
    assert cache.stats()["connections"] == 1


@on_one_server
def test_a_connection_that_is_out_for_a_moment_is_no_overload(open_cache: OpenCache) -> None:
    """Another thread has it in its hands, but for no operation."""
    cache = open_cache(maxConnections=1, whenFull="error")
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    looks: list[object] = []

    class Late(type(pool._idle)):  # type: ignore[misc] # whatever it is
        def pop(self) -> Any:
            looks.append(self)
            if len(looks) == 1:
                raise IndexError
            return super().pop()

    pool._idle = Late(pool._idle)
    assert tuple(cache.get("a")) == (1, [1])
    assert len(looks) == 2
    assert (cache.stats()["overloaded"], cache.stats()["connects"]) == (0, 1)


@on_one_server
def test_a_waiting_call_gets_the_place_of_a_lost_connection(open_cache: OpenCache) -> None:
    cache = open_cache(maxConnections=1, **PATIENT)
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    taken = [pool._idle.pop()]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(cache.get, "a")
        until(lambda: pool._waiters)
        taken.clear()
        assert tuple(waiting.result(PATIENCE)) == (1, [1])


@on_one_server
def test_waiting_until_it_is_ready_loses_no_counters(open_cache: OpenCache) -> None:
    cache = open_cache(maxConnections=1, **PATIENT)
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    pool._new_pipeline.keywords.update(timeout=0.2)
    connection = pool._idle.pop()
    with pytest.raises(dscache.DeadlineExceeded, match="none of the 1"):
        cache.get("a")
    with ThreadPoolExecutor(1) as threads:
        ready = threads.submit(cache.when_ready)
        until(lambda: pool._waiters)
        pool._put_back(connection)
        ready.result(PATIENCE)
    assert cache.stats()["operations"] == 2


@on_one_server
def test_no_counter_falls(open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_no_counter_falls(open_cache(maxConnections=1, **PATIENT), monkeypatch)


@on_one_server
def test_a_connection_is_not_given_to_a_thread_that_has_left(
    open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline of a waiting thread passes between its turn and the connection."""
    cache = open_cache(maxConnections=1, **PATIENT)
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    call_next = pool._call_next

    def call_next_slowly() -> Any:
        turn = call_next()
        with pytest.raises(dscache.DeadlineExceeded, match="none of the 1"):
            waiting.result(PATIENCE)
        return turn

    pool._new_pipeline.keywords.update(timeout=2)  # of the thread that waits
    connection = pool._idle.pop()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(cache.get, "a")
        until(lambda: pool._waiters)
        with monkeypatch.context() as patch:
            patch.setattr(pool, "_call_next", call_next_slowly)
            pool._put_back(connection)
    del connection
    assert tuple(cache.get("a")) == (1, [1])
    stats = cache.stats()
    assert (stats["connects"], stats["operations"], stats["waiting"]) == (1, 3, 0)


@on_one_server
def test_no_counter_goes_back_while_threads_wait(open_cache: OpenCache) -> None:
    """Waiting threads have connections without a place, over which others have waited before."""
    cache = open_cache(maxConnections=1, **PATIENT)
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    pool._new_pipeline.keywords.update(timeout=0.2)
    connection = pool._idle.pop()
    with pytest.raises(dscache.DeadlineExceeded, match="none of the 1"):
        cache.get_bulk(["a", "b"])
    before = cache.stats()
    assert (before["operations"], before["failed"], before["pending"]) == (2, 2, 0)
    spare: Any = pool._spare()  # as a thread that waits again
    spare.pipeline.get("a")
    now = cache.stats()
    assert (now["operations"], now["failed"], now["pending"]) == (3, 2, 0)  # it is "waiting"
    pool.drop(spare)
    pool._put_back(connection)


@on_one_server
def test_no_counter_goes_back_while_a_connection_ends(
    open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    operations = []
    disconnect = Connection.disconnect

    def disconnect_slowly(connection: Connection) -> None:
        operations.append(cache.stats()["operations"])
        disconnect(connection)

    monkeypatch.setattr(Connection, "disconnect", disconnect_slowly)
    pool._renew()
    assert operations == [1]
    assert tuple(cache.get("a")) == (1, [1])
    assert cache.stats()["operations"] == 2


# -- interruptions


@on_one_server
def test_a_signal_handler_that_raises(server: EmbeddedServer, backend: str) -> None:
    count = int(os.environ.get("DSCACHE_TEST_INTERRUPTIONS", "500"))
    assert_interrupted(server.url, count, backend)


@on_one_server
def test_a_signal_handler_that_raises_over_tls(
    tls_proxy: ProxyThread, certificates: TLSFiles, backend: str
) -> None:
    options = {"url": tls_proxy.url, "tls": {"ca": certificates.authority}}
    count = int(os.environ.get("DSCACHE_TEST_INTERRUPTIONS", "200"))
    assert_interrupted(json.dumps(options), count, backend)


@on_one_server
def test_an_exception_at_each_line(server: EmbeddedServer, backend: str) -> None:
    assert_struck_at_each_line({"url": server.url}, backend)


@on_one_server
def test_a_foreign_refusal_withdraws_the_operation(
    open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may raise a RecordError when the operation is queued already."""
    cache = open_cache(maxConnections=1)
    cache.set("a", 1, "a's")
    pipeline: Any = cache._topology._idle[-1].pipeline  # type: ignore[union-attr]

    class Struck:
        def set(self, *arguments: Any) -> Any:
            pipeline.set(*arguments)
            raise dscache.RecordError("struck")

        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline, name)

    connection: Any = cache._topology._idle[-1]  # type: ignore[union-attr]
    connection.pipeline = Struck()
    with pytest.raises(dscache.RecordError, match="struck"):
        cache.set("a", 2, "never written")
    connection.pipeline = pipeline
    assert tuple(cache.get("a")) == (1, "a's")  # type: ignore[arg-type]
    assert cache.stats()["connects"] == 1


def test_an_interrupted_constructor_ends_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    attempt = SocketConnect.__new__(SocketConnect)
    del attempt
    with pytest.raises(RuntimeError, match="no running event loop"):
        Messages(1, lambda: None, max_pending=1, overflow="disconnect")
    messages = Messages.__new__(Messages)
    del messages
    gc.collect()
    assert raised == []


@on_one_server
def test_a_connection_interrupted_in_its_handshake_is_not_kept(
    open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that interrupts a connecting thread may be of the cache's own error classes."""
    cache = open_cache(maxConnections=1, db=5)
    take = Connection._take
    for kind in (dscache.RecordError, dscache.ConnectError, dscache.ConnectionLost):

        def strike(*_: object, kind: type[Exception] = kind) -> None:
            raise kind("struck")

        monkeypatch.setattr(Connection, "_take", strike)
        for call in (cache.when_ready, lambda: cache.get("a")):
            with pytest.raises(kind, match=r"^struck$"):
                call()
            assert not cache._topology._idle  # type: ignore[union-attr]
        monkeypatch.setattr(Connection, "_take", take)
    assert cache.set("a", 1, "in database 5") is True
    other = open_cache()
    assert other.get("a") is None


@on_one_server
def test_an_interrupted_connection_is_closed(open_cache: OpenCache, proxy: ProxyThread) -> None:
    cache = open_cache(url=proxy.url, maxConnections=1, **PATIENT)
    cache.set("a", 1, "a's")
    cache.set("b", 1, "b's")
    pool: Any = cache._topology
    for error in (KeyboardInterrupt, SystemExit, TimeoutError, OSError, ValueError):
        connection = pool._idle[-1]

        def strike(*_: object, error: type[BaseException] = error) -> None:
            raise error("struck")

        connection._poller = type("Poller", (), {"poll": strike})()
        with pytest.raises(error, match="struck"):
            cache.get("a")
        assert cache.get("b").data == "b's"  # type: ignore[union-attr]
        assert pool._idle[-1] is not connection
    assert cache.stats()["connections"] == 1


@on_one_server
@pytest.mark.parametrize("event", ["_renew", "close"])
@pytest.mark.parametrize("call", [READS[0], dscache.Cache.when_ready], ids=["get", "ready"])
def test_a_connection_retired_while_it_is_put_back_is_ended(
    open_cache: OpenCache, call: Call, event: str
) -> None:
    """Its thread has seen no reason to end it, and the other thread hasn't found it idle."""
    cache = open_cache(maxConnections=1, closeTimeout=1)
    cache.set("a", 1, [1])
    pool: Any = cache._topology
    connection = pool._idle[-1]
    sock = connection.sock

    class Late(type(pool._idle)):  # type: ignore[misc] # whatever it is
        def append(self, given: Any) -> None:
            getattr(pool, event)()
            super().append(given)

    pool._idle = Late(pool._idle)
    call(cache)
    assert connection.retired
    assert connection not in pool._idle
    assert sock.fileno() == -1
    assert cache.stats()["connections"] == 0


@on_one_server
def test_arguments_may_raise(open_cache: OpenCache) -> None:
    cache = open_cache(maxConnections=1)

    def names() -> Iterator[str]:
        yield "a"
        raise LookupError("the caller's own")

    for _ in range(3):
        with pytest.raises(LookupError, match="the caller's own"):
            cache.get_bulk(names())
        assert cache.set("a", 1, [1]) is True


@on_one_server
def test_arguments_may_use_the_cache(open_cache: OpenCache) -> None:
    cache = open_cache()

    def names() -> Iterator[str]:
        for name in ("a", "b"):
            cache.set(name, 1, [name])
            yield name

    assert {name: record.data for name, record in cache.get_bulk(names()).items()} == {
        "a": ["a"],
        "b": ["b"],
    }


@on_one_server
def test_an_error_keeps_nothing_alive(open_cache: OpenCache, redis: redis_py.Redis) -> None:
    cache = open_cache()
    redis.mset({"bad_v": "no number", "bad_d": "1"})
    gc.collect()
    gc.disable()
    try:
        for call in (lambda: cache.get("bad"), lambda: cache.get("")):
            with pytest.raises(dscache.RecordError) as caught:
                call()
            error = weakref.ref(caught.value)
            del caught
            assert error() is None
    finally:
        gc.enable()


# -- processes and greenlets


@on_one_server
def test_a_fork_with_connections_open(server: EmbeddedServer, backend: str) -> None:
    result = run_child("forks.py", server.url, "3", backend=backend)
    assert result["wrong"] == []
    assert [one["wrong"] for one in result["children"]] == [[], [], []]
    assert [one["shared"] for one in result["children"]] == [0, 0, 0]
    assert all(1 <= one["connections"] <= 4 for one in result["children"])
    assert result["connects"] == result["again"], "the parent's connections were disturbed"


@on_one_server
def test_greenlets(server: EmbeddedServer, backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        silent_url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        result = run_child("greenlets.py", server.url, silent_url, "100", backend=backend)
    assert result["wrong"] == []
    assert result["finished"]
    assert result["connections"] == 8
    assert result["killed"] > 0
    assert result["limited"] == "gevent.Timeout ConnectError"
    assert result["waited"]
    assert result["others_ran"]
    assert result["pending"] == 0


# -- a lost server


@on_one_server
def test_a_restart_between_operations_fails_none(
    open_cache: OpenCache, make_server: MakeServer
) -> None:
    own = make_server()
    cache = open_cache(url=own.url, maxConnections=4, **PATIENT)
    connect_all(cache, 4)
    own.restart()
    for call in (*PLAIN_WRITES, *READS, *GUARDED):
        call(cache)
    assert cache.stats()["last_loss"]
    assert cache.is_ready


@on_one_server
@pytest.mark.parametrize("ending", ["fin", "rst"])
def test_idempotent_operations_are_retried(
    open_cache: OpenCache, proxy: ProxyThread, ending: str
) -> None:
    cache = open_cache(url=proxy.url, **PATIENT)
    for call in (*READS, *GUARDED):
        cache.set("a", 1, [1])
        before = cache.stats()["connects"]
        proxy.do("cut_after", 3, "replies", ending)
        assert call(cache) is not None
        assert cache.stats()["connects"] == before + 1
        proxy.do("heal")


@on_one_server
def test_a_write_that_may_have_happened_says_so(open_cache: OpenCache, proxy: ProxyThread) -> None:
    cache = open_cache(url=proxy.url, **PATIENT)
    for call in PLAIN_WRITES:
        cache.set("a", 1, [1])
        proxy.do("cut_after", 3)
        with pytest.raises(dscache.ConnectionLost, match="the write may have happened"):
            call(cache)
        proxy.do("heal")
    assert cache.set("a", 1, [1]) is True


@on_one_server
def test_no_call_outlasts_its_deadline(open_cache: OpenCache, proxy: ProxyThread) -> None:
    cache = open_cache(url=proxy.url, connectTimeout=60_000, commandTimeout=200)
    cache.set("a", 1, [1])
    proxy.do("stall")
    for call in (*READS, *PLAIN_WRITES):
        with pytest.raises((dscache.DeadlineExceeded, dscache.ConnectError)):
            call(cache)
    proxy.do("resume")
    assert cache.set("a", 2, [2]) is True
    assert tuple(cache.get("a")) == (2, [2])


@on_one_server
def test_a_late_reply_is_dropped(open_cache: OpenCache, proxy: ProxyThread) -> None:
    cache = open_cache(url=proxy.url, maxConnections=1, commandTimeout=300)
    cache.set("a", 1, "a's")
    cache.set("b", 1, "b's")
    for _ in range(3):
        proxy.do("stall", "replies")
        with pytest.raises(dscache.DeadlineExceeded, match="no answer"):
            cache.get("a")
        with pytest.raises(dscache.DscacheError):
            cache.get("a")
        proxy.do("resume")
        until(lambda: cache.get("b").data == "b's")  # type: ignore[union-attr]


@on_one_server
def test_a_server_that_is_stopped_and_resumed(
    open_cache: OpenCache, make_server: MakeServer
) -> None:
    own = make_server()
    cache = open_cache(url=own.url, **IMPATIENT)
    cache.set("a", 1, [1])
    own.pause()
    try:
        for call in (*READS, *PLAIN_WRITES):
            with pytest.raises((dscache.DeadlineExceeded, dscache.ConnectError)):
                call(cache)
    finally:
        own.resume()
    assert cache.set("a", 2, [2], if_newer=True) in (True, False)
    assert cache.get("a") is not None


@on_one_server
def test_a_server_that_is_killed_and_started(
    open_cache: OpenCache, make_server: MakeServer
) -> None:
    own = make_server()
    cache = open_cache(url=own.url, **PATIENT)
    cache.set("a", 1, [1])
    own.kill()
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(cache.set, f"r{n}", n, n) for n in range(8)]
        until(lambda: cache.stats()["queued"] == 8)
        own.start()
        assert [one.result(PATIENCE) for one in waiting] == [True] * 8
    assert cache.head_bulk(f"r{n}" for n in range(8)) == {f"r{n}": n for n in range(8)}


@on_one_server
def test_no_server_at_all(open_cache: OpenCache, proxy: ProxyThread) -> None:
    proxy.do("refuse")
    cache = open_cache(url=proxy.url, **IMPATIENT)
    address = proxy.url.removeprefix("redis://")
    for call in (*READS, *GUARDED, *PLAIN_WRITES):
        with pytest.raises(dscache.ConnectError, match=f"no connection to {address} within 200"):
            call(cache)
    with pytest.raises(dscache.ConnectError, match=f"no connection to {address} within 200"):
        cache.when_ready()
    with pytest.raises(dscache.RecordError):
        cache.get("")
    assert cache.get_bulk([]) == {}
    assert not cache.is_ready
    proxy.do("listen")
    cache.when_ready()
    assert cache.is_ready


@on_one_server
def test_a_server_that_accepts_and_says_nothing(open_cache: OpenCache, proxy: ProxyThread) -> None:
    proxy.do("deaf")
    cache = open_cache(url=proxy.url, **IMPATIENT)
    with pytest.raises(dscache.ConnectError):
        cache.get("a")
    # The attempt has what the deadline of when_ready() leaves it, and says how much that was.
    with pytest.raises(dscache.ConnectError, match=r" within 200 ms: no answer within \d+ ms$"):
        cache.when_ready()
    proxy.do("heal")
    assert cache.get("a") is None


@on_one_server
def test_replies_in_pieces(open_cache: OpenCache, proxy: ProxyThread) -> None:
    cache = open_cache(url=proxy.url, **PATIENT)
    proxy.do("split", 7)
    records = {f"r{n}": (n, f"{n}" * 20) for n in range(60)}
    assert cache.set_bulk(records) == set()
    found = cache.get_bulk(records)
    assert {name: tuple(record) for name, record in found.items()} == records
    assert cache.stats()["connects"] == 1


@on_one_server
def test_full_buffers_on_both_sides(
    open_cache: OpenCache, proxy: ProxyThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the server stops reading until its replies are read, a client that only sends hangs."""
    cache = open_cache(url=proxy.url, **PATIENT)
    assert_large_bulks_work(cache, 10_000)


def test_unsolicited_bytes_answer_nothing(backend: str) -> None:
    stray = b'*2\r\n$1\r\n7\r\n$7\r\n"stray"\r\n'
    nothing = b"*2\r\n$-1\r\n$-1\r\n"
    thread = LoopThread()

    async def begin() -> FakeServer:
        return await FakeServer({"MGET": nothing}).__aenter__()

    fake = thread.run(begin())
    try:
        with dscache.Cache.from_config(fake.url) as cache:
            assert cache.get("a") is None
            for accepted in (2, 3):
                thread.call(fake.push, stray)
                connection = cache._topology._idle[-1]  # type: ignore[union-attr]
                until(lambda connection=connection: connection.is_readable(0))
                assert cache.get("a") is None
                assert fake.accepted == accepted
            assert "no command had asked for" in cache.stats()["last_loss"]
            fake.answers["MGET"] = nothing + stray
            cache.get("a")
            assert cache.get("a") is None
            fake.answers["MGET"] = b"+no array\r\n"
            with pytest.raises(dscache.ProtocolError, match="MGET"):
                cache.get("a")
            fake.answers["MGET"] = nothing
            assert cache.get("a") is None
    finally:
        thread.run(fake.__aexit__())
        thread.close()


# -- refusals by the server


@on_one_server
def test_a_wrong_password(open_cache: OpenCache, make_server: MakeServer) -> None:
    own = make_server("--requirepass", SECRET)
    for password, code in (("wrong-" + SECRET, "WRONGPASS"), (None, "NOAUTH")):
        options = {"password": password} if password else {}
        cache = open_cache(url=own.url, **options, **PATIENT)
        for call in (lambda cache: cache.when_ready(), READS[0], PLAIN_WRITES[0]):
            with pytest.raises(dscache.ReplyError) as caught:
                call(cache)
            assert caught.value.code == code
            assert SECRET not in str(caught.value)
        with pytest.raises(dscache.ReplyError), cache:
            pytest.fail("it was entered")
    cache = open_cache(url=own.url, password="to come", **PATIENT)
    with pytest.raises(dscache.ReplyError):
        cache.get("a")
    with redis_py.Redis(host=own.host, port=own.port, password=SECRET) as admin:
        admin.config_set("requirepass", "to come")
    assert cache.get("a") is None


class Provider(CredentialProvider):
    """Returns given credentials, and counts the requests for them."""

    def __init__(self, *given: str) -> None:
        self.given = given
        self.asked = 0
        self.tell: Callable[[object], object] = lambda token: None

    def get_credentials(self) -> Any:
        self.asked += 1
        if not self.given:
            raise LookupError(SECRET)
        return self.given

    def on_next(self, callback: Callable[[object], object]) -> None:
        self.tell = callback


@on_one_server
def test_credentials_are_asked_for_before_each_connection(
    server: EmbeddedServer, backend: str, make_server: MakeServer
) -> None:
    own = make_server("--requirepass", SECRET)
    provider = Provider(SECRET)
    options = {"url": own.url, **IMPATIENT}
    config = {"name": "redis", "options": options}
    with dscache.Cache.from_config(config, credentials=provider) as cache:
        assert cache.set("a", 1, [1]) is True
        assert provider.asked == 1
        # A streaming provider has a new token: the next connection logs in with it.
        provider.tell(object())
        assert tuple(cache.get("a")) == (1, [1])
        assert provider.asked == 2
        assert cache.stats()["connections"] == 1
        provider.given = ()
        provider.tell(object())
        with pytest.raises(dscache.ConnectError, match="provider failed: LookupError") as caught:
            cache.get("a")
        assert SECRET not in str(caught.value)
        provider.given = ("default", SECRET)
        assert tuple(cache.get("a")) == (1, [1])


# -- TLS


@pytest.fixture
def tls_proxy(server: EmbeddedServer, certificates: TLSFiles) -> Iterator[ProxyThread]:
    """A proxy that speaks TLS and fails on command, in its own thread."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.key)
    with ProxyThread(server.host, server.port, tls=context) as started:
        yield started


@on_one_server
def test_tls(open_cache: OpenCache, tls_proxy: ProxyThread, certificates: TLSFiles) -> None:
    trusting = {"url": tls_proxy.url, "tls": {"ca": certificates.authority}}
    cache = open_cache(**trusting, **PATIENT)
    records = {f"r{n}": (n, "x" * 2000) for n in range(2000)}
    assert cache.set_bulk(records) == set()
    for _ in range(2):
        found = cache.get_bulk(records)
        assert {name: tuple(record) for name, record in found.items()} == records
        assert cache.get("absent") is None
    assert cache.stats()["connects"] == 1
    tls_proxy.do("cut")
    assert cache.head("r7") == 7
    assert cache.stats()["connects"] == 2


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@on_one_server
def test_a_reply_that_ends_inside_a_tls_record_is_read(
    version: str, open_cache: OpenCache, server: EmbeddedServer, certificates: TLSFiles
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.load_cert_chain(certificates.certificate, certificates.key)
    with ProxyThread(server.host, server.port, tls=context) as proxy:
        cache = open_cache(
            url=proxy.url, tls={"ca": certificates.authority}, commandTimeout=PATIENCE * 1000
        )
        assert_each_size_is_read(cache)
        assert cache.stats()["connects"] == 1


@on_one_server
def test_unsolicited_bytes_over_tls_end_the_connection(
    open_cache: OpenCache, tls_proxy: ProxyThread, certificates: TLSFiles
) -> None:
    """Bytes that the socket no longer reports must not be taken for the next reply."""
    cache = open_cache(url=tls_proxy.url, tls={"ca": certificates.authority}, **PATIENT)
    cache.set("a", 1, "a's")
    connection: Any = cache._topology._idle[-1]  # type: ignore[union-attr]
    # The server's next replies come in one TLS record, of which one byte is read.
    connection.sock.setblocking(True)
    connection.sock.sendall(b"*2\r\n$3\r\nGET\r\n$3\r\na_d\r\n")
    assert connection.sock.recv(1) == b"$"
    connection.sock.setblocking(False)
    assert connection.sock.pending()
    assert cache.get("absent") is None
    assert cache.get("a").data == "a's"  # type: ignore[union-attr]
    assert cache.stats()["last_loss"] == "the server sent data that no command had asked for"


@on_one_server
def test_certificates_and_names(
    open_cache: OpenCache, tls_proxy: ProxyThread, certificates: TLSFiles
) -> None:
    for tls in ({}, {"ca": certificates.authority, "servername": "elsewhere.example"}):
        cache = open_cache(url=tls_proxy.url, tls=tls, **PATIENT)
        for call in (lambda cache: cache.when_ready(), READS[0], PLAIN_WRITES[0]):
            with pytest.raises(dscache.ConnectError, match="certificate"):
                call(cache)
    for tls in (
        {"ca": certificates.authority, "servername": "localhost"},
        {"ca": certificates.authority, "servername": "x.example", "checkHostname": False},
        {"rejectUnauthorized": False},
    ):
        assert open_cache(url=tls_proxy.url, tls=tls).get("a") is None


@on_one_server
def test_a_silent_handshake_ends_by_its_deadline(
    open_cache: OpenCache, tls_proxy: ProxyThread
) -> None:
    tls_proxy.do("stall")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rediss://127.0.0.1:{silent.getsockname()[1]}"
        cache = open_cache(url=url, **IMPATIENT)
        begin = time.monotonic()
        # The attempt has what the deadline of when_ready() leaves it, and says how much that was.
        expected = r" within 200 ms: no answer within \d+ ms; if it speaks no TLS on this port, "
        with pytest.raises(dscache.ConnectError, match=expected):
            cache.when_ready()
        assert time.monotonic() - begin >= 0.2


# -- Sentinels


@on_one_server
def test_a_failover(open_cache: OpenCache, server: EmbeddedServer) -> None:
    with SentinelGroup(server.binary) as group:
        cache = open_cache(**group.options, connectTimeout=2000, commandTimeout=PATIENCE * 1000)
        in_threads(3, lambda n: cache.set(f"r{n}", n, n))
        old = group.primary()
        assert f":{old.port}" in cache._topology.address  # type: ignore[union-attr]
        with redis_py.Redis(port=old.port) as client:
            # WAIT covers the writes of its own connection, and thereby all before them.
            client.set("marker", "1")
            replicas = len(group.servers) - 1
            assert client.wait(replicas, PATIENCE * 1000) == replicas
        old.kill()
        assert cache.head("r2") == 2
        assert cache.set("a", 1, [1]) is True
        group.wait_for_primary(old)
        new = group.primary()
        assert new.port != old.port
        assert f":{new.port}" in cache._topology.address  # type: ignore[union-attr]


@on_one_server
def test_a_failover_whose_old_primary_stays_one(
    open_cache: OpenCache, server: EmbeddedServer
) -> None:
    """The old primary goes on confirming writes; the Sentinels alone know better."""
    with SentinelGroup(server.binary) as group:
        cache = open_cache(**group.options, connectTimeout=2000, commandTimeout=PATIENCE * 1000)
        in_threads(3, lambda n: cache.set(f"r{n}", n, n))
        old = group.fail_over()
        named = group.wait_for_primary(old)
        lost = time.monotonic()
        version = 1
        while f":{old.port}" in cache._topology.address:  # type: ignore[union-attr]
            assert time.monotonic() < named + PATIENCE
            version += 1
            assert cache.set("a", version, version) is True
            time.sleep(0.01)
        # A second, and some for a busy machine; without another look it would last for ever.
        assert time.monotonic() - lost < 8
        new = group.primary()
        assert f":{new.port}" in cache._topology.address  # type: ignore[union-attr]
        assert cache.set("b", 1, 1) is True
        with redis_py.Redis(port=new.port) as client:
            assert client.get("b_v") == b"1"
            # The write that found the new primary went there, and not to the old one.
            assert client.get("a_v") == b"%d" % version
        with redis_py.Redis(port=old.port) as client:
            assert client.get("b_v") is None
            assert client.get("a_v") != b"%d" % version


@on_one_server
def test_a_primary_without_replicas_is_doubted(
    open_cache: OpenCache, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One write is refused with NOREPLICAS, and the next one goes to the new primary."""
    monkeypatch.setattr("dscache.blocking.sentinel_pool._LOOK_AFTER", 10_000)
    with SentinelGroup(server.binary) as group:
        cache = open_cache(**group.options, connectTimeout=2000, commandTimeout=PATIENCE * 1000)
        cache.set("a", 1, 1)
        old = group.fail_over()
        group.wait_for_primary(old)
        with redis_py.Redis(port=old.port) as client:
            client.config_set("min-replicas-to-write", len(group.servers))
        with pytest.raises(dscache.ReplyError, match="NOREPLICAS"):
            cache.set("a", 2, 2)
        assert cache.set("a", 3, 3) is True
        assert f":{group.primary().port}" in cache._topology.address  # type: ignore[union-attr]


@pytest.mark.parametrize(("connecting", "command"), [(2000, PATIENCE * 1000), (6000, 6000)])
@on_one_server
def test_silent_sentinels_delay_nothing_for_long(
    open_cache: OpenCache,
    server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    connecting: int,
    command: int,
) -> None:
    """Without an answer the connections stay, and the next look comes later."""
    with SentinelGroup(server.binary) as group:
        cache = open_cache(**group.options, connectTimeout=connecting, commandTimeout=command)
        cache.set("a", 1, 1)
        for number in range(len(group.ports)):
            group.pause_sentinel(number)
        monkeypatch.setattr(cache._topology, "_look_at", 0.0)
        for version in range(2, 50):
            assert cache.set("a", version, version) is True
        assert cache.stats()["connects"] == 1
        assert cache._topology._failures >= 1  # type: ignore[union-attr]
        group.heal()


# -- closing


@pytest.mark.parametrize("kind", ["redis", "memory"])
@on_one_server
def test_from_creation_to_close(server: EmbeddedServer, kind: str, backend: str) -> None:
    options = {"url": server.url} if kind == "redis" else {}
    cache = dscache.Cache.from_config({"name": kind, "options": options})
    assert not cache.is_ready
    assert cache.stats() == {}
    with cache as entered:
        assert entered is cache
        assert cache.is_ready
        cache.set("a", 1, [1])
        assert kind in cache.description
        assert f"{backend} core" in cache.description
    assert not cache.is_ready
    assert cache.stats()["writes"] == 1
    cache.close()
    empty: list[Call] = [lambda cache: cache.get_bulk([]), lambda cache: cache.when_ready()]
    for call in (*READS, *GUARDED, *PLAIN_WRITES, *empty):
        with pytest.raises(dscache.UsageError, match="the cache is closed"):
            call(cache)
    with pytest.raises(dscache.UsageError, match="the cache is closed"), cache:
        pytest.fail("a closed cache was entered")


@on_one_server
def test_close_lets_other_threads_finish(open_cache: OpenCache, proxy: ProxyThread) -> None:
    cache = open_cache(url=proxy.url, maxConnections=2, closeTimeout=600_000, **PATIENT)
    cache.set("a", 1, [1])
    connect_all(cache, 2)
    with ThreadPoolExecutor(6) as threads:
        proxy.do("stall")
        waiting = [threads.submit(cache.get, "a") for _ in range(4)]
        until(lambda: len(cache._topology._waiters) == 2)  # type: ignore[union-attr]
        closing = [threads.submit(cache.close) for _ in range(2)]
        until(lambda: closing[0].done() or closing[1].done())
        with pytest.raises(dscache.UsageError, match="the cache is closed"):
            cache.get("a")
        assert not all(one.done() for one in closing)
        proxy.do("resume")
        assert [tuple(one.result(PATIENCE)) for one in waiting] == [(1, [1])] * 4
        for one in closing:
            one.result(PATIENCE)
    until(lambda: proxy.connections == 0)


@on_one_server
def test_close_does_not_wait_for_ever(open_cache: OpenCache, proxy: ProxyThread) -> None:
    cache = open_cache(url=proxy.url, maxConnections=2, closeTimeout=50, **PATIENT)
    cache.set("a", 1, [1])
    connect_all(cache, 2)
    with ThreadPoolExecutor(3) as threads:
        proxy.do("stall")
        read = threads.submit(cache.get, "a")
        write = threads.submit(cache.set, "a", 2, [2])
        until(lambda: cache.stats()["in_flight"] == 2)
        queued = threads.submit(cache.get, "a")
        until(lambda: cache._topology._waiters)  # type: ignore[union-attr]
        cache.close()
        for one in (read, queued):
            with pytest.raises(dscache.ConnectionLost, match="the cache was closed"):
                one.result(PATIENCE)
        with pytest.raises(dscache.ConnectionLost, match=r"closed.*the write may have happened"):
            write.result(PATIENCE)


def test_close_does_not_blame_the_server_for_an_attempt_to_connect(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as threads:
        options = {"host": "127.0.0.1", "port": silent.getsockname()[1], "closeTimeout": 10}
        cache = dscache.Cache(options, **PATIENT)
        waiting = threads.submit(cache.get, "a")
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(1)
            cache.close()
            with pytest.raises(dscache.ConnectionLost, match="the cache was closed"):
                waiting.result(PATIENCE)
    assert cache.stats()["last_loss"] == "the cache was closed"
    assert not [one.getMessage() for one in caplog.records if one.name == "dscache"]


@on_one_server
def test_a_dropped_cache_is_closed(server: EmbeddedServer, backend: str) -> None:
    cache = dscache.Cache.from_config(f"{server.url}?client_name=dropped")
    cache.set("a", 1, [1])
    pool = weakref.ref(cache._topology)  # type: ignore[arg-type]
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del cache
    gc.collect()
    assert pool() is None
    with redis_py.Redis.from_url(server.url) as redis:
        until(lambda: not [one for one in redis.client_list() if one["name"] == "dropped"])


def test_a_subclass_opens_instances_of_itself(backend: str) -> None:
    class Sessions(dscache.Cache):
        pass

    with Sessions.from_config({"name": "memory"}) as cache:
        assert type(cache) is Sessions


def test_redis_is_imported_on_demand() -> None:
    program = (
        "import sys, dscache\n"
        "assert 'dscache.sync' not in sys.modules\n"
        "assert {*dscache.__all__} <= {*dir(dscache)}\n"
        "assert 'dscache.sync' not in sys.modules\n"
        "assert 'Cache' in dscache.__all__\n"
        "from dscache import Cache\n"
        "assert 'dscache.sync' in sys.modules\n"
        "assert dscache.Cache is Cache\n"
        "nowhere = {'host': '127.0.0.1', 'port': 1}\n"
        "def connect(**options):\n"
        "    options['connectTimeout'] = 100\n"
        "    try: Cache.from_config({'name': 'redis', 'options': options}).when_ready()\n"
        "    except dscache.ConnectError: return\n"
        "    raise AssertionError(options)\n"
        "connect(**nowhere)\n"
        "assert 'redis' not in sys.modules\n"
        "connect(sentinels=[nowhere], name='records')\n"
        "assert 'redis' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)
