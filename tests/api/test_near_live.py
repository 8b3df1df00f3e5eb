"""The near cache on real servers: other writers, failing connections, clusters, loops and forks."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import uvloop

import dscache
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE, PATIENT, SERVERS, MakeCache, MakeServer, _server_id
from tests.soak.cluster_rows import CURIOUS, open_cache, prefix_on, slot_of
from tests.support.clusters import ClusterGroup
from tests.support.faults import HELLO_REPLY, FakeServer, FaultProxy
from tests.support.sentinels import SentinelGroup
from tests.support.waiting import PATIENCE, assert_drained

# A busy machine may be silent for a while, which must not look like a dead connection.
NEAR = {"idleLimit": 30_000}

# These tests don't depend on the server's version.
ON_ONE_SERVER = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)


async def until(condition: Callable[[], Awaitable[object]], what: str = "") -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.002)


def counters(cache: dscache.AsyncCache) -> dict[str, Any]:
    """Return the counters of a cache's near cache."""
    found: dict[str, Any] = cache.stats()["near_cache"]
    return found


async def is_at_hand(cache: dscache.AsyncCache, name: str) -> bool:
    """Read a record; return whether that was a hit."""
    before = counters(cache)["hits"]
    call = cache.get(name)
    was_hit = bool(counters(cache)["hits"] > before)
    await call
    return was_hit


async def version_of(cache: dscache.AsyncCache, name: str) -> int | None:
    record = await cache.get(name)
    return None if record is None else record.version


def put(redis: redis_py.Redis, name: str, version: int, data: str = "1", prefix: str = "") -> None:
    redis.mset({f"{prefix}{name}_v": version, f"{prefix}{name}_d": data})


# -- types


async def test_two_types_of_one_cached_record(make_cache: MakeCache) -> None:
    cache = await make_cache(nearCache=NEAR)
    await cache.set("a", 1, {"x": 1})
    await cache.set("b", 1, {"x": "1"})
    await until(lambda: is_at_hand(cache, "a"))
    await until(lambda: is_at_hand(cache, "b"))
    for _ in range(2):
        hits = counters(cache)["hits"]
        typed = cache.get("a", type=dict[str, int])
        other = cache.get("a", type=dict[str, float])
        untyped = cache.get("a")
        misfit = cache.get("b", type=dict[str, int])
        bulk = cache.get_bulk(["a", "b"], type=dict[str, float | str])
        assert all(isinstance(one, asyncio.Future) for one in (typed, other, misfit, bulk))
        records = await typed, await other, await untyped
        assert records[0] == records[1] == records[2]
        assert [type(record.data["x"]) for record in records] == [int, float, int]
        with pytest.raises(dscache.RecordError, match=r"^record 'b', version 1: Expected `int`"):
            await misfit
        data = {name: record.data for name, record in (await bulk).items()}
        assert data == {"a": {"x": 1.0}, "b": {"x": "1"}}
        assert counters(cache)["hits"] == hits + 6


# -- other writers

CHANGES: dict[str, tuple[Callable[[redis_py.Redis], object], int | None]] = {
    "both keys": (lambda redis: put(redis, "a", 2), 2),
    "the version": (lambda redis: redis.set("a_v", 2), 2),
    "a count": (lambda redis: redis.incr("a_v"), 2),
    "in a transaction": (
        lambda redis: redis.pipeline(transaction=True).set("a_v", 2).set("a_d", "[]").execute(),
        2,
    ),
    "by a script": (lambda redis: redis.eval("return redis.call('SET', KEYS[1], 2)", 1, "a_v"), 2),
    "by a name": (lambda redis: redis.rename("other_v", "a_v"), 2),
    "another type": (lambda redis: (redis.delete("a_d"), redis.lpush("a_d", 1)), None),
    "removed": (lambda redis: redis.delete("a_v", "a_d"), None),
    "unlinked": (lambda redis: redis.unlink("a_v", "a_d"), None),
    "half": (lambda redis: redis.delete("a_d"), None),
    "expired": (lambda redis: redis.pexpire("a_v", 1), None),
    "moved away": (lambda redis: redis.move("a_v", 9), None),
    "everything gone": (lambda redis: redis.flushdb(), None),
    "everything gone everywhere": (lambda redis: redis.flushall(), None),
}


@pytest.mark.parametrize("mode", ["default", "broadcast"])
async def test_changes_by_other_clients_arrive(
    make_cache: MakeCache, redis: redis_py.Redis, mode: str
) -> None:
    cache = await make_cache(nearCache={**NEAR, "mode": mode})
    for what, (change, version) in CHANGES.items():
        redis.flushdb()
        put(redis, "other", 2)
        put(redis, "a", 1)
        await until(lambda: one_has(cache, 1), what)
        await until(lambda: is_at_hand(cache, "a"), what)
        change(redis)
        await until(lambda wanted=version: one_has(cache, wanted), what)
    # Misses are cached as well.
    assert await cache.get("new") is None
    await until(lambda: is_at_hand(cache, "new"))
    put(redis, "new", 3)
    await until(lambda: one_has(cache, 3, "new"))
    redis.delete("a_v")


async def one_has(cache: dscache.AsyncCache, version: int | None, name: str = "a") -> bool:
    return await version_of(cache, name) == version


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
@pytest.mark.parametrize("mode", ["default", "broadcast"])
async def test_two_caches_see_what_the_other_writes(
    make_cache: MakeCache, options: dict[str, Any], mode: str
) -> None:
    names = ["a", "}b", "{c}/d", "ä/名", "x y"]
    near = {**NEAR, "mode": mode, "prefixes": ["a", "}", "{", "ä", "x"]}
    one, other = [await make_cache(nearCache=near, **options) for _ in range(2)]
    for version in range(1, 4):
        await one.set_bulk({name: (version, [name]) for name in names[:3]})
        for name in names[3:]:
            await other.set(name, version, [name])
        for cache in (one, other):
            for name in names:
                await until(lambda c=cache, n=name, v=version: one_has(c, v, n))
                await until(lambda c=cache, n=name: is_at_hand(c, n))
    await one.delete_bulk(names)
    for name in names:
        await until(lambda n=name: one_has(other, None, n))
    # Its own writes had dropped the record already.
    assert counters(other)["invalidations"] >= 3 * 3 + 2


async def test_a_cache_reads_its_own_writes(make_cache: MakeCache) -> None:
    """Before the reply, after it, and whatever Redis announces in between."""
    cache = await make_cache(nearCache=NEAR)
    for version in range(1, 300):
        write = cache.set("a", version, version)
        if version % 3 == 0:
            assert await write is True
        record = await cache.get("a")
        assert record is not None
        assert (record.version, record.data) == (version, version)
        assert (await cache.get("a")) == record
        await write
        assert (await cache.get("a")) == record
        if version % 10 == 0:
            gone = cache.delete("a")
            assert await cache.get("a") is None
            assert await gone is True


async def test_a_hundred_names_are_read_a_hundred_times(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache(nearCache=NEAR)
    names = [f"user/{number}" for number in range(100)]
    await cache.set_bulk({name: (1, {"name": name}) for name in names})
    redis.config_resetstat()

    async def read(number: int) -> None:
        own = random.Random(number)
        for i in range(1000):
            name = own.choice(names) if i >= 100 else names[(number + i) % 100]
            record = await cache.get(name)
            assert record is not None
            assert record.name == name
            if i % 100 == 0:
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(100):
            group.create_task(read(number))
    stats = cache.stats()
    assert stats["reads"] == stats["near_cache"]["misses"] == 100
    assert stats["near_cache"]["hits"] + stats["near_cache"]["joins"] == 100_000 - 100
    asked = redis.info("commandstats")
    assert set(asked) & {"cmdstat_mget", "cmdstat_get", "cmdstat_type"} == {"cmdstat_mget"}
    assert asked["cmdstat_mget"]["calls"] <= 100


# -- in event loops

LOOPS = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


def run(new_loop: Callable[[], asyncio.AbstractEventLoop], main: Any) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[dscache.AsyncCache]:
    options = {"url": url, "nearCache": NEAR, **PATIENT, **options}
    async with dscache.AsyncCache.from_config({"name": "redis", "options": options}) as cache:
        yield cache


@LOOPS
@ON_ONE_SERVER
def test_every_way_to_await(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, new_loop: Any
) -> None:
    put(redis, "a", 1)

    async def awaited(future: asyncio.Future[Any]) -> Any:
        return await future

    async def use() -> None:
        known: set[str] = set()
        async with opened(server.url) as cache:
            for name, version in (("a", 1), ("missing", None)) * 2:  # a miss each, then a hit
                is_hit = cache.stats()["reads"] > 0 and name in known
                futures = [cache.get(name) for _ in range(3)]
                heads = [cache.head(name) for _ in range(2)]
                for one in (*futures, *heads):
                    assert type(one) is asyncio.Future
                    assert one.done() == is_hit
                called: list[Any] = []
                futures[0].add_done_callback(called.append)
                await asyncio.wait(futures, timeout=PATIENCE)
                async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
                    tasks = [group.create_task(awaited(cache.get(name))) for _ in range(2)]
                found = [task.result() for task in tasks]
                found += [future.result() for future in futures]
                assert called == futures[:1]
                # It may be awaited again.
                assert await futures[0] is await futures[0] is found[2]
                known.add(name)
                found += [await asyncio.ensure_future(cache.get(name))]
                found += await asyncio.gather(cache.get(name), cache.get(name))
                found += [await asyncio.wait_for(cache.get(name), PATIENCE)]
                found += [await asyncio.shield(cache.get(name))]
                found += [await each for each in asyncio.as_completed([cache.get(name)])]
                found += [await cache.get(name)]
                assert [record and record.version for record in found] == [version] * len(found)
                assert len({id(record) for record in found if record}) in (0, len(found))
                assert {await task for task in heads} == {version}
            assert cache.stats()["reads"] <= 2 + 2 * 2
            assert await asyncio.gather(*map(cache.get, "bcbc")) == [None] * 4

    run(new_loop, use())


@LOOPS
@ON_ONE_SERVER
def test_a_hit_does_not_yield_to_the_loop(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, new_loop: Any
) -> None:
    put(redis, "a", 1)

    async def use() -> None:
        async with opened(server.url) as cache:
            await cache.get("a")
            turns = 0

            def turn() -> None:
                nonlocal turns
                turns += 1

            asyncio.get_running_loop().call_soon(turn)
            for _ in range(100):
                assert await version_of(cache, "a") == await cache.head("a") == 1
            assert turns == 0
            hit = cache.get("a")
            assert hit.done()
            assert hit.result() == await hit
            # One that isn't awaited leaves no warning.
            cache.get("a")
            cache.head("a")
            assert turns == 0

    run(new_loop, use())


@LOOPS
@ON_ONE_SERVER
def test_a_cancelled_or_expired_caller_keeps_the_shared_read(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str, new_loop: Any
) -> None:
    put(redis, "a", 1)

    async def use() -> None:
        async with FaultProxy(server.host, server.port) as proxy, opened(proxy.url) as cache:
            await cache.when_ready()
            proxy.stall("replies")
            tasks = [cache.get("a") for _ in range(5)]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(cache.get("a"), 0.01)
            tasks[0].cancel()
            tasks[4].cancel()
            proxy.resume()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(one, asyncio.CancelledError) for one in done] == [
                *(True, False, False, False, True)
            ]
            assert await is_at_hand(cache, "a")
            assert cache.stats()["reads"] == 1

    run(new_loop, use())


if sys.version_info >= (3, 12):

    @ON_ONE_SERVER
    async def test_eager_tasks(make_cache: MakeCache, redis: redis_py.Redis) -> None:
        """A task that reads a cached record has ended when it is made."""
        put(redis, "a", 1)
        cache = await make_cache(nearCache=NEAR)
        loop = asyncio.get_running_loop()

        async def read() -> Any:
            return await cache.get("a")

        loop.set_task_factory(asyncio.eager_task_factory)
        try:
            async with asyncio.TaskGroup() as group:
                missing = [group.create_task(read()) for _ in range(3)]
                assert not any(task.done() for task in missing)
            assert {task.result().version for task in missing} == {1}
            task = asyncio.create_task(read())
            assert task.done()
            assert task.result().version == 1
            assert [one.version for one in await asyncio.gather(*map(cache.get, "aaa"))] == [1] * 3
            assert cache.stats()["reads"] == 1
        finally:
            loop.set_task_factory(None)


# -- abandoned operations


@pytest.mark.parametrize("near", [None, NEAR], ids=["plain", "near"])
@ON_ONE_SERVER
async def test_an_abandoned_operation_logs_nothing(
    near: dict[str, int] | None,
    server: EmbeddedServer,
    backend: str,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Its error is no news: the caller has cancelled it, or has stopped waiting."""
    logged: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: logged.append(context))
    options = {"nearCache": near} if near else {}
    async with FaultProxy(server.host, server.port) as proxy:
        config = {"url": proxy.url, "commandTimeout": 300, **options}
        cache = dscache.AsyncCache.from_config({"name": "redis", "options": config})
        await cache.when_ready()
        proxy.stall("replies")
        issued: list[Awaitable[Any]] = []

        def issue() -> list[Awaitable[Any]]:
            issued[:] = [
                *(cache.get("a"), cache.get("a"), cache.get("b"), cache.head("a")),
                *(cache.get_bulk(["a", "c"]), cache.head_bulk(["a", "d"])),
                *(cache.set("w", 1, 1), cache.set("w", 1, 1, if_newer=True)),
                *(cache.delete("x"), cache.set_bulk({"y": (1, 1)}), cache.delete_bulk(["z"])),
            ]
            return issued

        # A machine may be so busy that an operation fails before it is abandoned.
        for ticks in range(4):
            whole = asyncio.gather(*issue())
            for _ in range(ticks):
                await asyncio.sleep(0)
            whole.cancel()
            with pytest.raises((asyncio.CancelledError, dscache.DscacheError)):
                await whole
            for future in issue():
                with pytest.raises((TimeoutError, dscache.DscacheError)):
                    await asyncio.wait_for(future, 0.001 * ticks)
        with pytest.raises(dscache.DscacheError):
            await asyncio.gather(*issue())  # the others fail later
        failures = [await error_of(one) for one in issue()]
        assert all(isinstance(error, dscache.DscacheError) for error in failures)
        issued.clear()
        proxy.resume()
        await cache.close()
    gc.collect()
    await asyncio.sleep(0)
    assert logged == []
    assert [str(one.message) for one in recwarn] == []


DROPPED: dict[str, Callable[[dscache.AsyncCache], Awaitable[Any]]] = {
    "get": lambda cache: cache.get("a"),
    "get with a type": lambda cache: cache.get("a", type=int),
    "head": lambda cache: cache.head("a"),
    "get_bulk": lambda cache: cache.get_bulk(["a", "b"]),
    "head_bulk": lambda cache: cache.head_bulk(["a", "b"]),
    "set": lambda cache: cache.set("a", 1, 1),
}


@pytest.mark.parametrize("operation", DROPPED)
@pytest.mark.parametrize("near", [None, NEAR], ids=["plain", "near"])
@ON_ONE_SERVER
async def test_the_failure_of_a_dropped_future_is_logged(
    near: dict[str, int] | None, operation: str, server: EmbeddedServer, backend: str
) -> None:
    """A caller that looks at its own future keeps no other caller's failure quiet."""
    logged: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: logged.append(context["message"]))
    options = {"nearCache": near} if near else {}
    async with FaultProxy(server.host, server.port) as proxy:
        config = {"url": proxy.url, "commandTimeout": 100, **options}
        async with dscache.AsyncCache.from_config({"name": "redis", "options": config}) as cache:
            proxy.stall("replies")
            calls = [DROPPED[operation](cache) for _ in range(3)]
            seen = calls.pop()
            await asyncio.wait([*calls, seen])
            assert isinstance(seen.exception(), dscache.DscacheError)
            calls.clear()
            proxy.resume()
    gc.collect()
    await asyncio.sleep(0)
    assert logged == ["Future exception was never retrieved"] * 2


async def error_of(operation: Awaitable[Any]) -> BaseException | None:
    """Return the error of an operation, once it has ended."""
    future = asyncio.ensure_future(operation)
    await asyncio.wait([future])
    return future.exception()


# -- modes, and servers without tracking


async def test_broadcasts_cover_only_the_prefixes(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    near = {**NEAR, "mode": "broadcast", "prefixes": ["user/", "room/"]}
    cache = await make_cache(nearCache=near, keyPrefix="app:", connectionName="broadcast")
    [client] = [one for one in redis.client_list() if one["name"] == "broadcast"]
    assert {"t", "B"} <= set(client["flags"])
    assert redis.info("stats")["tracking_total_prefixes"] == 2
    for name in ("user/1", "room/1", "x/1"):
        put(redis, name, 1, prefix="app:")
        await until(lambda n=name: one_has(cache, 1, n))
    # Writes from before the first read may still be announced.
    await until(lambda: is_at_hand(cache, "user/1"))
    assert not await is_at_hand(cache, "x/1")
    told = counters(cache)["invalidations"]
    received = cache.stats()["bytes_in"]
    for number in range(50):
        put(redis, f"x/{number}", 2, prefix="app:")
        put(redis, f"user/{number}", 2)
    put(redis, "user/1", 2, prefix="app:")
    await until(lambda: one_has(cache, 2, "user/1"))
    assert counters(cache)["invalidations"] == told + 1
    assert cache.stats()["bytes_in"] < received + 300
    # Redis holds no tracking entries for its reads.
    assert redis.info("stats")["tracking_total_keys"] == 0


async def test_a_user_who_may_not_track(make_cache: MakeCache, redis: redis_py.Redis) -> None:
    server = redis.connection_pool.connection_kwargs
    redis.acl_setuser(
        "near", enabled=True, passwords=["+secret"], keys="*", commands=["+@all", "-client"]
    )
    try:
        login = {"username": "near", "password": "secret", "port": server["port"], **PATIENT}
        config = {"name": "redis", "options": {**login, "nearCache": True}}
        cache = dscache.AsyncCache.from_config(config)
        for issue in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, 1)):
            with pytest.raises(dscache.ConnectError, match=r"NOPERM.*CLIENT TRACKING ON") as caught:
                await issue()
            assert "required: false" in str(caught.value)
            assert "secret" not in str(caught.value)
        await cache.close()
        without = await make_cache(nearCache={"required": False}, **login)
        await works_without(without)
    finally:
        redis.acl_deluser("near")


async def works_without(cache: dscache.AsyncCache) -> None:
    """Read and write on a server without tracking: nothing is cached."""
    assert await cache.set("a", 1, [1]) is True
    for _ in range(3):
        assert await version_of(cache, "a") == 1
    assert (counters(cache)["hits"], counters(cache)["records"]) == (0, 0)
    assert cache.stats()["reads"] == 3


OLD = HELLO_REPLY.replace(b"7.0.0", b"6.2.7")
UNABLE = {
    "redis 6": ({"HELLO": OLD}, r"it is Redis 6\.2\.7, which may announce a change in the middle"),
    "resp2": ({"HELLO": b"-ERR unknown command 'HELLO'\r\n"}, r"does not speak RESP3"),
    "no protocol": ({"HELLO": b"-NOPROTO unsupported protocol version\r\n"}, r"not speak RESP3"),
    "no tracking": (
        {"CLIENT": b"-ERR unknown subcommand 'TRACKING'\r\n"},
        r"it says \"ERR unknown subcommand 'TRACKING'\" to CLIENT TRACKING ON",
    ),
}


@pytest.mark.parametrize("server_kind", UNABLE)
async def test_a_server_without_tracking(server_kind: str, backend: str) -> None:
    answers, expected = UNABLE[server_kind]
    found = {"MGET": b"*2\r\n$1\r\n1\r\n$3\r\n[1]\r\n", "MSET": b"+OK\r\n"}
    async with FakeServer({**answers, **found}) as server:
        options = {"url": server.url, "nearCache": True, **PATIENT}
        cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
        for issue in (cache.when_ready, lambda: cache.get("a"), lambda: cache.get_bulk(["a"])):
            with pytest.raises(dscache.ConnectError, match=expected):
                await issue()
        await cache.close()
        options["nearCache"] = {"required": False}
        async with dscache.AsyncCache.from_config({"name": "redis", "options": options}) as without:
            await works_without(without)
            assert without.is_ready


@ON_ONE_SERVER
async def test_records_of_a_replica_are_not_cached(
    make_server: MakeServer, make_cache: MakeCache, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    put(redis, "a", 1)
    redis.config_set("repl-diskless-sync-delay", 0)  # or it would wait for replicas
    replica = make_server("--replicaof", server.host, str(server.port))
    with redis_py.Redis(port=replica.port) as client:
        while client.get("a_v") is None:
            await asyncio.sleep(0.01)
    cache = await make_cache(url=replica.url, nearCache=NEAR)
    assert await version_of(cache, "a") == await version_of(cache, "a") == 1
    assert counters(cache)["records"] == 0


# -- failing connections


async def one_at_hand(
    make_cache: MakeCache, redis: redis_py.Redis, **options: Any
) -> dscache.AsyncCache:
    """Open a cache that has the record a cached, in version 1."""
    put(redis, "a", 1)
    cache = await make_cache(**options)
    await until(lambda: at_hand_twice(cache, "a"))
    return cache


async def at_hand_twice(cache: dscache.AsyncCache, name: str) -> bool:
    return await is_at_hand(cache, name) and await is_at_hand(cache, name)


@ON_ONE_SERVER
async def test_a_silent_connection_serves_nothing(
    make_cache: MakeCache, proxy: FaultProxy, redis: redis_py.Redis
) -> None:
    cache = await one_at_hand(make_cache, redis, url=proxy.url, nearCache={"idleLimit": 300})
    proxy.stall()
    put(redis, "a", 2)
    hits = counters(cache)["hits"]
    waiting = [asyncio.ensure_future(cache.get("a"))]
    async with asyncio.timeout(PATIENCE):
        while waiting[-1].done() or counters(cache)["hits"] > hits:
            hits = counters(cache)["hits"]
            waiting.append(asyncio.ensure_future(cache.get("a")))
            await asyncio.sleep(0.01)
    waiting.append(asyncio.ensure_future(cache.get("a")))
    assert counters(cache)["hits"] == hits
    proxy.resume()
    found = await asyncio.gather(*waiting)
    assert {record.version for record in found[-2:]} == {2}
    assert await version_of(cache, "a") == 2
    await until(lambda: at_hand_twice(cache, "a"))


@ON_ONE_SERVER
async def test_a_healthy_idle_connection_keeps_serving(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    """For three times the limit, only pings are sent to the server."""
    idle_limit = 0.5
    near = {"idleLimit": round(idle_limit * 1000)}
    cache = await one_at_hand(make_cache, redis, nearCache=near)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE):
        while True:
            await until(lambda: at_hand_twice(cache, "a"))
            misses, began, last = counters(cache)["misses"], loop.time(), loop.time()
            latest = 0.0
            while loop.time() < began + 3 * idle_limit:
                await cache.get("a")
                await asyncio.sleep(0.005)
                latest, last = max(latest, loop.time() - last), loop.time()
            # A loop that is late itself receives nothing, which proves nothing about the
            # connection.
            if latest < idle_limit / 5:
                break
    assert counters(cache)["misses"] == misses
    assert cache.stats()["connects"] == 1


@ON_ONE_SERVER
async def test_a_task_that_never_yields_is_served_for_a_limited_time(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    """Nothing arrives while a task only reads cached records."""
    cache = await one_at_hand(make_cache, redis, nearCache={"idleLimit": 100})
    put(redis, "a", 2)
    async with asyncio.timeout(PATIENCE):
        while await version_of(cache, "a") == 1:
            pass


@ON_ONE_SERVER
async def test_a_killed_connection(make_cache: MakeCache, redis: redis_py.Redis) -> None:
    cache = await one_at_hand(make_cache, redis, nearCache=NEAR, connectionName="killed")
    for version in range(2, 8):
        await until(lambda: at_hand_twice(cache, "a"))
        connects = cache.stats()["connects"]
        [client] = [one for one in redis.client_list() if one["name"] == "killed"]
        redis.client_kill_filter(_id=client["id"])
        put(redis, "a", version)  # which no invalidation announces
        async with asyncio.timeout(PATIENCE):
            while cache.stats()["connects"] == connects:
                await asyncio.sleep(0.002)
        assert await version_of(cache, "a") == version
    assert counters(cache)["flushes"] == {"connection": 6}


@ON_ONE_SERVER
async def test_a_restarted_server(make_server: MakeServer, make_cache: MakeCache) -> None:
    server = make_server()
    cache = await make_cache(url=server.url, nearCache=NEAR)
    await cache.set("a", 1, 1)
    await until(lambda: at_hand_twice(cache, "a"))
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    await until(lambda: one_has(cache, None))
    assert counters(cache)["flushes"]["connection"] >= 1


@ON_ONE_SERVER
async def test_the_last_known_records_of_a_lost_server(
    make_server: MakeServer, make_cache: MakeCache
) -> None:
    server = make_server()
    near = {**NEAR, "serveStale": True}
    cache = await make_cache(
        url=server.url, nearCache=near, commandTimeout=500, connectTimeout=30_000
    )
    await cache.set_bulk({"a": (1, [1]), "b": (2, [2])})
    await cache.get_bulk(["a", "b", "missing"])
    await asyncio.to_thread(server.kill)
    await until(lambda: is_stale(cache, "a"))
    found = await cache.get_bulk(["b", "a"])
    assert [(one.version, one.data, one.stale) for one in found.values()] == [
        (2, [2], True),
        (1, [1], True),
    ]
    absent = (dscache.ConnectError, dscache.ConnectionLost, dscache.DeadlineExceeded)
    for call in (cache.head("a"), cache.get("missing"), cache.get("c"), cache.set("b", 3, [3])):
        with pytest.raises(absent):
            await call
    # The write may not have happened, and yet no caller may see the earlier record.
    with pytest.raises(absent):
        await cache.get("b")
    with pytest.raises(dscache.BulkError) as caught:
        await cache.get_bulk(["a", "b"])
    assert list(caught.value.result) == ["a"]
    await asyncio.to_thread(server.start)
    await until(lambda: is_answered(cache, "b"))
    assert await cache.get("a") is None  # the server has lost it
    await cache.set("a", 5, [5])
    record = await cache.get("a")
    assert record is not None
    assert (record.version, record.stale) == (5, False)


async def is_stale(cache: dscache.AsyncCache, name: str) -> bool:
    record = await cache.get(name)
    return record is not None and record.stale


async def is_answered(cache: dscache.AsyncCache, name: str) -> bool:
    try:
        record = await cache.get(name)
    except dscache.DscacheError:
        return False
    return record is None or not record.stale


@ON_ONE_SERVER
async def test_a_silent_server_and_the_last_known_record(
    make_cache: MakeCache, proxy: FaultProxy, redis: redis_py.Redis
) -> None:
    """The connection is open but silent: after its deadline a read is served all the same."""
    put(redis, "a", 1)
    near = {"idleLimit": 50, "serveStale": True}
    cache = await make_cache(
        url=proxy.url, nearCache=near, commandTimeout=300, connectTimeout=30_000
    )
    await until(lambda: is_answered(cache, "a"))
    proxy.stall()
    await until(lambda: is_stale(cache, "a"))
    proxy.heal()
    await until(lambda: is_answered(cache, "a"))


# -- clusters and Sentinels


@pytest.fixture(scope="module")
def binary() -> ServerBinary:
    """The oldest server, which the cluster consists of."""
    return BY_AGE[0]


@asynccontextmanager
async def on_cluster(group: ClusterGroup, **options: Any) -> AsyncIterator[dscache.AsyncCache]:
    async with asyncio.timeout(PATIENCE):
        options = {"nearCache": NEAR, **PATIENT, **CURIOUS, **options}
        async with open_cache(group, **options) as cache:
            yield cache
        assert_drained(cache)


def put_on(group: ClusterGroup, name: str, version: int) -> None:
    """Let another client write a record on its owner."""
    owner = group.primary_of(slot_of(name))
    owner.ask("MSET", f"{{{name}}}_v", version, f"{{{name}}}_d", "1")


async def test_records_of_a_cluster_are_cached(group: ClusterGroup, backend: str) -> None:
    names = [f"n/{number}" for number in range(60)]
    async with on_cluster(group) as cache:
        await cache.set_bulk({name: (1, name) for name in names})
        assert len(await cache.get_bulk([*names, "missing"])) == 60
        for name in (*names, "missing"):
            await until(lambda n=name: is_at_hand(cache, n))
        for name in names[::7]:
            await asyncio.to_thread(put_on, group, name, 2)
            await until(lambda n=name: one_has(cache, 2, n))
        [primary, *_] = group.primaries()
        primary.ask("FLUSHALL")
        gone = [name for name in names if group.primary_of(slot_of(name)) is primary]
        for name in gone:
            await until(lambda n=name: one_has(cache, None, n))
        # Its replica may have announced it too.
        assert counters(cache)["flushes"]["flushall"] >= 1


async def test_a_slot_that_moves(group: ClusterGroup, backend: str) -> None:
    source, target = group.primaries()[:2]
    room = prefix_on(group, source)
    slot = slot_of(room)
    there, missing = f"{room}/there", f"{room}/missing"
    try:
        async with on_cluster(group) as cache:
            await cache.set(there, 1, 1)
            for name in (there, missing):
                await cache.get(name)
                await until(lambda n=name: is_at_hand(cache, n))
            await asyncio.to_thread(group.migrate, [slot], source, target)
            await asyncio.to_thread(put_on, group, there, 2)
            await asyncio.to_thread(put_on, group, missing, 3)
            await until(lambda: one_has(cache, 2, there))
            # A miss is believed until the move is known.
            await until(lambda: one_has(cache, 3, missing))
            for name, version in ((there, 4), (missing, 5)):
                await until(lambda n=name: is_at_hand(cache, n))
                await asyncio.to_thread(put_on, group, name, version)
                await until(lambda n=name, v=version: one_has(cache, v, n))
            assert counters(cache)["flushes"]["slots"] >= 1
    finally:
        if slot in group.slots_of(target):
            await asyncio.to_thread(group.migrate, [slot], target, source)


@pytest.mark.parametrize("scale_reads", ["master", "all"])
async def test_a_replaced_primary(group: ClusterGroup, backend: str, scale_reads: str) -> None:
    """By a replica that was connected before."""
    old = group.primaries()[0]
    heir = group.replica_of(old)
    # The slot decides which of primary and replica is read.
    odd = [slot for slot in group.slots_of(old) if slot % 2]
    names = (name for name in (f"n/{number}" for number in range(10**6)) if slot_of(name) in odd)
    there, missing = next(names), next(names)
    async with on_cluster(group, scaleReads=scale_reads) as cache:
        await cache.set(there, 1, 1)
        await until(lambda: reads_from_replicas(cache, 6 if scale_reads == "all" else 3))
        await cache.get_bulk([there, missing])
        await until(lambda: at_hand_twice(cache, there))
        await asyncio.to_thread(group.failover, heir)
        for version in (2, 3):
            await asyncio.to_thread(put_on, group, there, version)
            await asyncio.to_thread(put_on, group, missing, version)
            await until(lambda v=version: one_has(cache, v, there))
            await until(lambda v=version: one_has(cache, v, missing))
            await until(lambda: at_hand_twice(cache, there))
            await until(lambda: at_hand_twice(cache, missing))


async def test_a_lost_shard(group: ClusterGroup, backend: str) -> None:
    """The other shards' records are current; its own are served stale."""
    victim, other, *_ = group.primaries()
    lost, well = f"{prefix_on(group, victim)}/a", f"{prefix_on(group, other)}/a"
    near = {**NEAR, "serveStale": True}
    async with on_cluster(group, nearCache=near) as cache:
        await cache.set_bulk({lost: (1, 1), well: (1, 1)})
        await cache.get_bulk([lost, well])
        await until(lambda: at_hand_twice(cache, well))
        await until(lambda: at_hand_twice(cache, lost))
        await asyncio.to_thread(group.kill, victim)
        await until(lambda: is_stale_or_moved(cache, lost))
        assert await is_at_hand(cache, well)
        record = await cache.get(well)
        assert record is not None
        assert not record.stale
        await until(lambda: is_answered(cache, lost))
        await asyncio.to_thread(group.start, victim)


async def is_stale_or_moved(cache: dscache.AsyncCache, name: str) -> bool:
    """Whether the loss is noticed: by then another node may serve the record."""
    return await is_stale(cache, name) or "connection" in counters(cache)["flushes"]


async def test_replies_of_replicas_are_not_cached(group: ClusterGroup, backend: str) -> None:
    names = [f"n/{number}" for number in range(60)]
    async with on_cluster(group, scaleReads="all") as cache:
        await cache.set_bulk({name: (1, name) for name in names})
        # Replicas receive it later, and are read from when they are ready.
        await until(lambda: reads_from_replicas(cache, 6))
        await until(lambda: has_all(cache, names))
        kept = [name for name in names if await is_at_hand(cache, name)]
        # As many readers as there are primaries and replicas; the slot decides which one.
        of_primaries = [name for name in names if slot_of(name) % 2]
        assert set(kept) <= set(of_primaries)
        await until(lambda: all_at_hand(cache, of_primaries))
        for name in names:
            await asyncio.to_thread(put_on, group, name, 2)
        for name in names:
            await until(lambda n=name: one_has(cache, 2, n))


async def reads_from_replicas(cache: dscache.AsyncCache, count: int) -> bool:
    """Whether that many nodes have been read from by now."""
    await cache.get_bulk([f"unknown/{random.randrange(10**6)}" for _ in range(50)])
    reading = [one for one in cache.stats()["nodes"].values() if one["reads"]]
    return len(reading) == count


async def has_all(cache: dscache.AsyncCache, names: list[str]) -> bool:
    return len(await cache.get_bulk(names)) == len(names)


async def all_at_hand(cache: dscache.AsyncCache, names: list[str]) -> bool:
    return all([await is_at_hand(cache, name) for name in names])


async def test_a_primary_that_the_sentinels_replace(backend: str) -> None:
    with SentinelGroup(BY_AGE[0], replicas=1, sentinels=1) as sentinels:
        options = {**sentinels.options, "nearCache": NEAR, **PATIENT}
        async with (
            asyncio.timeout(PATIENCE),
            dscache.AsyncCache.from_config({"name": "redis", "options": options}) as cache,
        ):
            await cache.set("a", 1, 1)
            await until(lambda: at_hand_twice(cache, "a"))
            old = await asyncio.to_thread(sentinels.primary)
            await asyncio.to_thread(old.kill)
            await asyncio.to_thread(sentinels.wait_for_primary, old)
            new = await asyncio.to_thread(sentinels.primary)
            with sentinels.ask(new.port) as client:
                for version in (2, 3):
                    put(client, "a", version)
                    await until(lambda v=version: one_has(cache, v))
                    await until(lambda: at_hand_twice(cache, "a"))
            assert counters(cache)["flushes"] == {"connection": 1}


# -- processes


@ON_ONE_SERVER
def test_a_forked_child_is_served_nothing(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    """Neither cached records, nor reads in flight, nor stale records."""
    for name in "ab":
        put(redis, name, 1)
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.near_fork", server.url, backend],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "parent done\n"), done.stdout + done.stderr


@pytest.mark.parametrize("size", [10, 1000, 10_000, 1_000_000])
def test_counted_bytes_match_the_memory_in_use(backend: str, size: int) -> None:
    """Measured in its own process, by the memory that the system has given it."""
    done = subprocess.run(
        # So much that the transient memory of one reply is small beside it.
        [
            sys.executable,
            "-m",
            "tests.programs.near_memory",
            backend,
            str(size),
            str((32 if size < 100 else 64) * 2**20),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counted, held = map(int, done.stdout.split())
    # Python 3.15 takes a tenth less for small records. A free-threaded one takes up to a third
    # more: its objects have longer headers, and its allocator rounds sizes up.
    most = 1.35 if sysconfig.get_config_var("Py_GIL_DISABLED") else 1.1
    assert 0.85 < held / counted < most, (counted, held)
