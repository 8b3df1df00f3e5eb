"""Failures of records, permissions, servers and networks.

Each operation gets one result, its own, and no call outlasts its deadline.
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.clusters import hold_port
from tests.support.faults import HELLO_REPLY, FakeServer, FaultProxy
from tests.support.waiting import PATIENCE, until

MakeCache = Callable[..., Awaitable[dscache.AsyncCache]]
MakeServer = Callable[..., EmbeddedServer]
Call = Callable[[dscache.AsyncCache, str], Any]

# Timeouts for operations that must not end by a deadline, and for those that can only end by one.
PATIENT = {"connectTimeout": 600_000, "commandTimeout": 600_000}
IMPATIENT = {"connectTimeout": 200, "commandTimeout": 200}
# For tests that cut the connection so often that waiting takes most of the time.
AT_ONCE = {"first": 1, "cap": 2}
SECRET = "pa55-w0rd"

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

SINGLE_READS: dict[str, Call] = {
    "get": lambda cache, name: cache.get(name),
    "head": lambda cache, name: cache.head(name),
}
SINGLE_WRITES: dict[str, Call] = {
    "set": lambda cache, name: cache.set(name, 2, "new"),
    "set ttl": lambda cache, name: cache.set(name, 2, "new", ttl=1000),
    "set if_newer": lambda cache, name: cache.set(name, 2, "new", if_newer=True),
    "set ttl if_newer": lambda cache, name: cache.set(name, 2, "new", ttl=1000, if_newer=True),
    "delete": lambda cache, name: cache.delete(name),
}
BULK_READS: dict[str, Call] = {
    "get_bulk": lambda cache, name: cache.get_bulk([name]),
    "head_bulk": lambda cache, name: cache.head_bulk([name]),
}
BULK_WRITES: dict[str, Call] = {
    "set_bulk": lambda cache, name: cache.set_bulk({name: (2, "new")}),
    "set_bulk ttl": lambda cache, name: cache.set_bulk({name: (2, "new")}, ttl=1000),
    "set_bulk if_newer": lambda cache, name: cache.set_bulk({name: (2, "new")}, if_newer=True),
    "delete_bulk": lambda cache, name: cache.delete_bulk([name]),
}
SINGLES = SINGLE_READS | SINGLE_WRITES
READS = SINGLE_READS | BULK_READS
WRITES = SINGLE_WRITES | BULK_WRITES
# Commands that Redis refuses when out of memory; removals are not among them.
SETS = {name: call for name, call in WRITES.items() if "delete" not in name}
OPERATIONS = READS | WRITES


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No task fails unseen, every error is retrieved, and no password is logged."""
    caplog.set_level(logging.DEBUG, "dscache")
    yield
    for record in caplog.get_records("call"):
        assert record.name != "asyncio", record.getMessage()
        assert SECRET not in record.getMessage()


def lazy_cache(url: str = "", **options: Any) -> dscache.AsyncCache:
    """Return a cache that connects when it is first used, and has a password."""
    if url:
        options["url"] = url
    return dscache.AsyncCache.from_config({"name": "redis", "options": options})


async def results_of(*issued: Awaitable[Any]) -> list[Any]:
    """Return the results and errors of operations, none of which may hang."""
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*issued, return_exceptions=True)


async def error_of(issued: Awaitable[Any]) -> dscache.DscacheError:
    (error,) = await results_of(issued)
    assert isinstance(error, dscache.DscacheError), error
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.args)
    assert SECRET not in shown
    return error


async def code_of(issued: Awaitable[Any]) -> str:
    error = await error_of(issued)
    assert isinstance(error, dscache.ReplyError), error
    return error.code


def put(redis: redis_py.Redis, name: str, version: object, data: object) -> None:
    redis.mset({f"{name}_v": version, f"{name}_d": data})


def pairs(found: dict[str, Any]) -> dict[str, tuple[int, Any]]:
    return {name: tuple(record) for name, record in found.items()}


# -- refusals of all commands


async def test_out_of_memory_refuses_only_writes(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server("--maxmemory-policy", "noeviction")
    cache = await make_cache(url=server.url)
    await cache.set_bulk({"a": (1, "old"), "b": (1, "old")})
    with redis_py.Redis.from_url(server.url) as redis:
        redis.config_set("maxmemory", 1)
        reads = [call(cache, "a") for call in READS.values()]
        writes = [call(cache, name) for name, call in SETS.items()]
        removed = cache.delete("b")
        for write in writes:
            assert await code_of(write) == "OOM"
        got, head, bulk, heads = await results_of(*reads)
        assert (tuple(got), head, pairs(bulk), heads) == (
            (1, "old"),
            1,
            {"a": (1, "old")},
            {"a": 1},
        )
        assert await removed is True
        redis.config_set("maxmemory", 0)
        assert redis.dbsize() == 2
    for call in SETS.values():
        assert await call(cache, "c") in (True, False, set(), {"c"})
    assert tuple(await cache.get("c")) == (2, "new")


async def test_a_replica_accepts_reads_and_refuses_writes(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    replica = make_server()
    cache = await make_cache(url=replica.url, commandTimeout=2000)
    await cache.set("a", 1, "old")
    with redis_py.Redis.from_url(replica.url) as redis:
        redis.replicaof("127.0.0.1", 1)  # an unused address: it keeps its data
    issued = {name: call(cache, "a") for name, call in OPERATIONS.items()}
    for name, call in WRITES.items():
        error = await error_of(issued.pop(name))
        while isinstance(error, dscache.DeadlineExceeded):  # a repeat was under way at the deadline
            error = await error_of(call(cache, "a"))
        assert isinstance(error, dscache.ReplyError)
        assert error.code == "READONLY"
    got, head, bulk, heads = await results_of(*issued.values())
    assert (tuple(got), head, pairs(bulk), heads) == ((1, "old"), 1, {"a": (1, "old")}, {"a": 1})
    # It looked for the primary behind the same name again and again, but not all the time.
    assert 1 < cache.stats()["connects"] < 400
    await cache.close()


async def test_a_replica_may_be_meant(make_cache: MakeCache, make_server: MakeServer) -> None:
    replica = make_server()
    cache = await make_cache(url=replica.url, reconnectOnError=False, **PATIENT)
    await cache.set("a", 1, "old")
    with redis_py.Redis.from_url(replica.url) as redis:
        redis.replicaof("127.0.0.1", 1)
    async with asyncio.timeout(PATIENCE):
        for call in SETS.values():
            assert await code_of(call(cache, "a")) == "READONLY"
    assert tuple(await cache.get("a")) == (1, "old")
    assert cache.stats()["connects"] == 1


@on_one_server
@pytest.mark.parametrize(
    ("password", "code"), [(None, "NOAUTH"), (SECRET, "WRONGPASS")], ids=["none", "wrong"]
)
async def test_a_refused_login_fails_at_once(
    backend: str, make_server: MakeServer, password: str | None, code: str
) -> None:
    server = make_server("--requirepass", "another")
    cache = lazy_cache(server.url, password=password, **PATIENT)
    assert await code_of(cache.when_ready()) == code
    assert not cache.is_ready
    for call in OPERATIONS.values():
        assert await code_of(call(cache, "a")) == code
    issued = [call(cache, "a") for call in OPERATIONS.values()]
    assert {await code_of(operation) for operation in issued} == {code}
    assert SECRET not in repr(cache) + cache.description + repr(cache.stats())
    async with asyncio.timeout(PATIENCE):
        await cache.close()
    assert cache.stats()["pending"] == 0


@on_one_server
async def test_a_corrected_password_is_noticed_under_load(
    backend: str, make_server: MakeServer
) -> None:
    server = make_server("--requirepass", "another")
    # Slow, so that operations are in flight during each attempt.
    async with FaultProxy(server.host, server.port) as proxy:
        proxy.delay(0.01)
        cache = lazy_cache(proxy.url, password=SECRET, **PATIENT)
        assert await code_of(cache.when_ready()) == "WRONGPASS"
        outcome: list[str] = []

        async def work() -> None:
            while "done" not in outcome:
                try:
                    await cache.set("a", 1, [1])
                except dscache.ReplyError as error:
                    outcome.append(error.code)
                    await asyncio.sleep(0)
                else:
                    outcome.append("done")

        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(work())
            await until(lambda: outcome)
            with redis_py.Redis(host=server.host, port=server.port, password="another") as redis:
                redis.config_set("requirepass", SECRET)
        assert set(outcome) == {"WRONGPASS", "done"}
        await cache.close()


# -- refusals of some commands


MakeUser = Callable[..., dict[str, str]]


@pytest.fixture
def make_user(redis: redis_py.Redis) -> Iterator[MakeUser]:
    """Add users with certain permissions to the server; return a cache's options for each."""
    names: list[str] = []

    def make(*permissions: str) -> dict[str, str]:
        names.append(f"user{len(names)}")
        redis.execute_command("ACL", "SETUSER", names[-1], "on", f">{SECRET}", *permissions)
        return {"username": names[-1], "password": SECRET}

    yield make
    for name in names:
        redis.acl_deluser(name)


@pytest.fixture
async def limited(
    make_cache: MakeCache, make_user: MakeUser, redis: redis_py.Redis
) -> AsyncIterator[dscache.AsyncCache]:
    """A cache whose user may only access ``ok:*``, with some records in place."""
    for name in ("ok:1", "ok:2", "no:1", "no:2"):
        put(redis, name, 1, '"old"')
    cache = await make_cache(**make_user("+@all", "~ok:*"))
    yield cache
    await cache.close()


NAMES = ["ok:1", "no:1", "ok:2", "no:2", "ok:3", "no:3"]
ALLOWED = [name for name in NAMES if name.startswith("ok:")]
FORBIDDEN = [name for name in NAMES if name.startswith("no:")]


@pytest.mark.parametrize("operation", SINGLES)
async def test_only_forbidden_operations_of_a_tick_fail(
    limited: dscache.AsyncCache, operation: str
) -> None:
    issued = {name: SINGLES[operation](limited, name) for name in NAMES}
    for name in FORBIDDEN:
        error = await error_of(issued[name])
        assert isinstance(error, dscache.ReplyError)
        assert error.code == "NOPERM"
        assert repr(name) in str(error)
    results = dict(zip(ALLOWED, await results_of(*map(issued.get, ALLOWED)), strict=True))
    if operation == "get":
        assert results.pop("ok:3") is None
        assert pairs(results) == {"ok:1": (1, "old"), "ok:2": (1, "old")}
    elif operation == "head":
        assert results == {"ok:1": 1, "ok:2": 1, "ok:3": None}
    elif operation == "delete":
        assert results == {"ok:1": True, "ok:2": True, "ok:3": False}
        assert await limited.head_bulk(ALLOWED) == {}
    else:
        assert results == dict.fromkeys(ALLOWED, True)
        assert pairs(await limited.get_bulk(ALLOWED)) == dict.fromkeys(ALLOWED, (2, "new"))
    assert limited.stats()["connects"] == 1


async def test_only_forbidden_operations_of_a_mixed_tick_fail(
    limited: dscache.AsyncCache,
) -> None:
    issued = [
        (name, operation, SINGLES[operation](limited, f"{name}/{operation}"))
        for operation in SINGLES
        for name in NAMES
    ]
    for name, operation, future in issued:
        if name in FORBIDDEN:
            assert await code_of(future) == "NOPERM"
        else:
            expected = None if operation in SINGLE_READS else operation != "delete"
            assert await results_of(future) == [expected]


@pytest.mark.parametrize("options", [{}, {"ttl": 1000}, {"if_newer": True}])
async def test_only_forbidden_records_of_a_bulk_write_fail(
    limited: dscache.AsyncCache, options: dict[str, Any]
) -> None:
    error = await error_of(limited.set_bulk(dict.fromkeys(NAMES, (2, "new")), **options))
    assert isinstance(error, dscache.BulkError)
    assert sorted(error.errors) == FORBIDDEN
    assert all(
        isinstance(one, dscache.ReplyError) and one.code == "NOPERM" and repr(name) in str(one)
        for name, one in error.errors.items()
    )
    assert error.result == set()
    assert await limited.head_bulk(ALLOWED) == dict.fromkeys(ALLOWED, 2)
    if "if_newer" in options:
        error = await error_of(limited.set_bulk(dict.fromkeys(NAMES, (2, "new")), **options))
        assert isinstance(error, dscache.BulkError)
        assert error.result == set(ALLOWED)


async def test_only_forbidden_records_of_the_other_bulks_fail(limited: dscache.AsyncCache) -> None:
    results = []
    for call in (limited.get_bulk, limited.head_bulk, limited.delete_bulk):
        error = await error_of(call(NAMES))
        assert isinstance(error, dscache.BulkError)
        assert sorted(error.errors) == FORBIDDEN
        results.append(error.result)
    assert pairs(results[0]) == {"ok:1": (1, "old"), "ok:2": (1, "old")}
    assert results[1:] == [{"ok:1": 1, "ok:2": 1}, 2]


async def test_a_bulk_of_only_forbidden_records_is_refused_as_a_whole(
    limited: dscache.AsyncCache,
) -> None:
    for call in (BULK_READS | BULK_WRITES).values():
        assert await code_of(call(limited, "no:1")) == "NOPERM"
    assert await code_of(limited.get_bulk(FORBIDDEN)) == "NOPERM"
    assert await code_of(limited.set_bulk(dict.fromkeys(FORBIDDEN, (2, 2)))) == "NOPERM"


@pytest.mark.parametrize(
    "options", [{"ttl": 1000}, {"if_newer": True}, {"ttl": 1000, "if_newer": True}]
)
async def test_a_refusal_undoes_no_allowed_write(
    limited: dscache.AsyncCache, options: dict[str, Any]
) -> None:
    # The first write shares a command with the forbidden one, and is retried alone.
    issued = [
        limited.set("ok:1", 2, "second"),
        limited.set("no:1", 2, "second"),
        limited.set("ok:1", 3, "third", **options),
    ]
    results = await results_of(*issued)
    assert (results[0], results[2]) == (True, True)
    assert tuple(await limited.get("ok:1")) == (3, "third")


async def test_a_user_without_a_command(
    make_cache: MakeCache, make_user: MakeUser, redis: redis_py.Redis
) -> None:
    put(redis, "a", 1, '"old"')
    cache = await make_cache(**make_user("+@read", "+@connection", "~*"))
    issued = {name: call(cache, "a") for name, call in OPERATIONS.items()}
    for name in WRITES:
        assert await code_of(issued.pop(name)) == "NOPERM"
    got, head, bulk, heads = await results_of(*issued.values())
    assert (tuple(got), head) == ((1, "old"), 1)
    assert (pairs(bulk), heads) == ({"a": (1, "old")}, {"a": 1})
    assert redis.mget("a_v", "a_d") == [b"1", b'"old"']
    await cache.close()


async def test_a_permission_that_is_revoked_and_restored(
    make_cache: MakeCache, make_user: MakeUser, redis: redis_py.Redis
) -> None:
    user = make_user("+@all", "~*")
    cache = await make_cache(**user)
    await cache.set("a", 1, [1])
    redis.execute_command("ACL", "SETUSER", user["username"], "-@write")
    assert await code_of(cache.set("a", 2, [2])) == "NOPERM"
    assert await cache.head("a") == 1
    redis.execute_command("ACL", "SETUSER", user["username"], "+@write")
    assert await cache.set("a", 2, [2]) is True
    await cache.close()


async def test_a_wrong_type_fails_only_its_guarded_write(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache()
    redis.rpush("bad_v", "x")
    redis.set("bad_d", "[]")
    names = ["a", "bad", "b"]
    results = await results_of(*(cache.set(name, 1, [], if_newer=True) for name in names))
    assert (results[0], results[2]) == (True, True)
    assert isinstance(results[1], dscache.ReplyError)
    assert results[1].code == "WRONGTYPE"
    assert "'bad'" in str(results[1])
    error = await error_of(cache.set_bulk(dict.fromkeys(names, (1, [])), ttl=10, if_newer=True))
    assert isinstance(error, dscache.BulkError)
    assert list(error.errors) == ["bad"]
    assert error.result == {"a", "b"}
    assert await cache.set("bad", 1, [1]) is True
    assert tuple(await cache.get("bad")) == (1, [1])


@pytest.mark.parametrize("options", [{"ttl": 1000}, {"if_newer": True}])
async def test_a_flushed_script_is_loaded_again(
    make_cache: MakeCache, redis: redis_py.Redis, options: dict[str, Any]
) -> None:
    cache = await make_cache()
    for version in (1, 2):
        redis.script_flush()
        results = await results_of(
            cache.set("a", version, "single", **options),
            cache.set("b", version, "plain"),
            cache.head("a"),
            cache.set_bulk({f"r{n}": (version, n) for n in range(1000)}, **options),
            cache.set("c", version, "single", **options),
        )
        assert results == [True, True, version, set(), True]
        assert await cache.head_bulk(["a", "b", "c", "r999"]) == dict.fromkeys(
            ["a", "b", "c", "r999"], version
        )
    assert cache.stats()["connects"] == 1


async def test_after_a_flush_writes_keep_their_order(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache()
    redis.script_flush()
    await results_of(
        cache.set("a", 1, "first", ttl=1000, if_newer=True),
        cache.set("a", 2, "second"),
        cache.set("b", 1, "first", if_newer=True),
        cache.delete("b"),
        cache.set("c", 1, "first", if_newer=True),
        cache.set("c", 2, "second", if_newer=True),
    )
    assert pairs(await cache.get_bulk("abc"[n] for n in range(3))) == {
        "a": (2, "second"),
        "c": (2, "second"),
    }
    assert redis.ttl("a_v") == -1


@on_one_server
@pytest.mark.parametrize("how", ["option", "URL"])
async def test_a_missing_database(backend: str, make_server: MakeServer, how: str) -> None:
    server = make_server()
    options = {"url": server.url, "db": 99} if how == "option" else {"url": f"{server.url}/99"}
    cache = lazy_cache(**options, **PATIENT)
    for issued in (cache.when_ready(), cache.set("a", 1, []), cache.get_bulk(["a"])):
        error = await error_of(issued)
        assert isinstance(error, dscache.ReplyError)
        assert "DB index" in str(error)
    await cache.close()
    with redis_py.Redis.from_url(server.url) as redis:
        assert redis.info("keyspace") == {}


async def test_a_loading_server_is_waited_for(backend: str) -> None:
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    answers = {"HELLO": loading, "MGET": b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n"}
    async with FakeServer(answers) as fake:
        cache = lazy_cache(fake.url, **IMPATIENT)
        error = await error_of(cache.when_ready())
        assert isinstance(error, dscache.ConnectError)
        assert "LOADING" in str(error)
        assert await code_of(cache.get("a")) == "LOADING"
        await cache.close()

        patient = lazy_cache(fake.url, **PATIENT)
        waiting = patient.get("a")
        await until(lambda: fake.accepted >= 3)
        fake.answers["HELLO"] = HELLO_REPLY
        async with asyncio.timeout(PATIENCE):
            assert tuple(await waiting) == (5, [5])
            await patient.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"-NOREPLICAS Not enough good replicas to write.\r\n",
        b"-ERR\r\n",
        b"-\r\n",
        b"-\xff\xfe not UTF-8\r\n",
        b"-NOSCRIPT that is no answer to this\r\n",
    ],
    ids=lambda reply: repr(reply[:10]),
)
async def test_a_refusal_fails_only_its_operations(backend: str, reply: bytes) -> None:
    answers = {"MGET": reply, "MSET": b"+OK\r\n", "DEL": b":2\r\n"}
    async with FakeServer(answers) as fake:
        cache = lazy_cache(fake.url, **PATIENT)
        issued = [cache.get("a"), cache.set("a", 1, []), cache.get("b"), cache.delete("a")]
        results = await results_of(*issued, cache.get_bulk(["a", "b"]))
        assert (results[1], results[3]) == (True, True)
        for index in (0, 2, 4):
            assert isinstance(results[index], dscache.ReplyError)
        assert len({id(results[index]) for index in (0, 2, 4)}) == 3
        assert cache.stats()["connects"] == 1
        await cache.close()


# -- no server


async def refused_everything(cache: dscache.AsyncCache) -> None:
    """Whether every operation is refused in time, separately and together, with a ConnectError."""
    for _ in range(2):
        issued = [cache.when_ready(), *(call(cache, "a") for call in OPERATIONS.values())]
        for error in await results_of(*issued):
            assert isinstance(error, dscache.ConnectError), error
            assert cache.description.split(" at ")[1].split(",")[0] in str(error)
    assert isinstance(await error_of(cache.head("a")), dscache.ConnectError)
    assert not cache.is_ready
    assert cache.stats()["last_loss"]
    async with asyncio.timeout(PATIENCE):
        await cache.close()
    assert cache.stats()["pending"] == 0


async def test_no_listener(backend: str) -> None:
    with hold_port() as held:
        host, port = held.getsockname()
        await refused_everything(lazy_cache(host=host, port=port, password=SECRET, **IMPATIENT))


async def test_a_missing_socket(backend: str, tmp_path: Path) -> None:
    await refused_everything(lazy_cache(path=str(tmp_path / "redis.sock"), **IMPATIENT))


@pytest.mark.parametrize("host", ["nosuch.invalid", "a" * 64 + ".invalid"])
async def test_an_unknown_host(backend: str, host: str) -> None:
    await refused_everything(lazy_cache(host=host, **IMPATIENT))


@on_one_server
async def test_a_silent_server(backend: str, proxy: FaultProxy) -> None:
    proxy.deaf()
    await refused_everything(lazy_cache(proxy.url, password=SECRET, **IMPATIENT))


async def test_a_server_that_closes_every_connection(backend: str) -> None:
    async with FakeServer({"HELLO": None, "PING": None}) as fake:
        await refused_everything(lazy_cache(fake.url, password=SECRET, **IMPATIENT))


@on_one_server
async def test_too_many_clients(backend: str, make_server: MakeServer) -> None:
    server = make_server("--maxclients", "1")
    with redis_py.Redis.from_url(server.url) as redis:
        redis.ping()
        cache = lazy_cache(server.url, **IMPATIENT)
        error = await error_of(cache.when_ready())
        assert isinstance(error, dscache.ConnectError)
        assert "max number of clients" in str(error)
        redis.config_set("maxclients", 100)
        async with asyncio.timeout(PATIENCE):
            while not cache.is_ready:
                await results_of(cache.get("a"))
        assert await cache.set("a", 1, [1]) is True
        await cache.close()


@on_one_server
async def test_a_late_server_is_waited_for(backend: str, proxy: FaultProxy) -> None:
    await proxy.refuse()
    cache = lazy_cache(proxy.url, **PATIENT)
    ready = asyncio.ensure_future(cache.when_ready())
    issued = [cache.set("a", 1, [1]), cache.get("a"), cache.set_bulk({"b": (2, [2])}), ready]
    await until(lambda: cache.stats()["last_loss"])
    assert not any(future.done() for future in issued)
    await proxy.listen()
    results = await results_of(*issued)
    assert results[0] is True
    assert tuple(results[1]) == (1, [1])
    assert results[2:] == [set(), None]
    await cache.close()


# -- another server

GARBAGE = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "zeros": b"\0" * 100,
    "ones": b"\xff" * 100,
    "blank line": b"\r\n",
    "simple string": b"+OK\r\n",
    "integer": b":1\r\n",
    "string": b"$3\r\nabc\r\n",
    "null": b"_\r\n",
    "null of RESP2": b"$-1\r\n",
    "no array": b"*-1\r\n",
    "empty array": b"*0\r\n",
    "short array": b"*1\r\n$1\r\n5\r\n",
    "long array": b"*3\r\n$1\r\n5\r\n$1\r\n5\r\n$1\r\n5\r\n",
    "array of integers": b"*2\r\n:5\r\n:5\r\n",
    "array of arrays": b"*2\r\n*0\r\n*0\r\n",
    "array with an error": b"*2\r\n$1\r\n5\r\n-ERR inside\r\n",
    "map": b"%1\r\n$1\r\n5\r\n$1\r\n5\r\n",
    "double": b",1.5\r\n",
    "boolean": b"#t\r\n",
    "big number": b"(12345678901234567890\r\n",
    "verbatim text": b"=7\r\ntxt:abc\r\n",
    "negative length": b"$-5\r\n",
    "no length": b"$\r\n",
    "length of nonsense": b"*2x\r\n",
    "immense string": b"$99999999999999999999\r\n",
    "immense array": b"*99999999999999999999\r\n",
    "string of another length": b"*2\r\n$1\r\n555\r\n$1\r\n5\r\n",
    "second answer": b"*2\r\n$1\r\n5\r\n$1\r\n5\r\n:7\r\n",
    "nesting": b"*1\r\n" * 100_000 + b":1\r\n",
}
FIVE = b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n"


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_ends_the_connection_and_its_operations(backend: str, garbage: str) -> None:
    async with FakeServer({"MGET": GARBAGE[garbage], "MSET": b"", "DEL": b""}) as fake:
        cache = lazy_cache(fake.url, password=SECRET, **PATIENT)
        await cache.when_ready()
        issued = [cache.get("a"), cache.set("a", 1, []), cache.delete("b"), cache.get_bulk(["c"])]
        if garbage == "second answer":
            got, *others = await results_of(*issued)
            assert (got.version, got.raw) == (5, b"5")
        else:
            others = await results_of(*issued)
        for error in others:
            assert isinstance(error, dscache.ProtocolError), error
            assert fake.url.removeprefix("redis://") in str(error)
        assert "the write may have happened" in str(others[-3])
        assert "the write may have happened" not in str(others[-1])
        fake.answers["MGET"] = FIVE
        (again,) = await results_of(cache.get("a"))
        assert tuple(again) == (5, [5])
        assert cache.stats()["connects"] == 2
        await cache.close()


@pytest.mark.parametrize(
    ("command", "operation"),
    [
        ("MSET", "set"), ("DEL", "delete"), ("EVALSHA", "set if_newer"), ("EVALSHA", "set ttl"),
        ("MGET", "get"), ("MSET", "set_bulk"), ("DEL", "delete_bulk"), ("MGET", "get_bulk"),
        ("EVALSHA", "set_bulk if_newer"), ("*", "head"), ("*", "head_bulk"),
    ],
)  # fmt: skip
async def test_every_operation_survives_garbage(backend: str, command: str, operation: str) -> None:
    for garbage in (b":-7\r\n", b"*1\r\n:9\r\n", b"*1\r\n+x\r\n", b"%0\r\n", b"?", b"+OKAY\r\n"):
        async with FakeServer() as fake:
            cache = lazy_cache(fake.url, **PATIENT)
            await cache.when_ready()
            fake.answers[command] = garbage
            error = await error_of(OPERATIONS[operation](cache, "a"))
            assert isinstance(error, dscache.ProtocolError)
            await cache.close()


HANDSHAKES = {
    "no role": b"%0\r\n",
    "no UTF-8": b"%1\r\n$6\r\nserver\r\n$2\r\n\xff\xfe\r\n",
    "NOSCRIPT": b"-NOSCRIPT as a greeting\r\n",
}
# All other garbage is RESP; a connection is usable whatever the server says of itself.
UNPARSABLE = {
    *("HTTP", "TLS alert", "zeros", "ones", "blank line", "negative length", "no length"),
    *("length of nonsense", "immense string", "immense array", "string of another length"),
    "nesting",
}


@pytest.mark.parametrize("garbage", [*GARBAGE, *HANDSHAKES])
async def test_garbage_as_a_handshake(backend: str, garbage: str) -> None:
    second = garbage == "second answer"
    timeouts = IMPATIENT if second else PATIENT
    async with FakeServer({"HELLO": (GARBAGE | HANDSHAKES)[garbage], "MGET": FIVE}) as fake:
        cache = lazy_cache(fake.url, password=SECRET, **timeouts)
        (ready,) = await results_of(cache.when_ready())
        (got,) = await results_of(cache.get("a"))
        if garbage in UNPARSABLE:
            assert (type(ready), type(got)) == (dscache.ProtocolError, dscache.ProtocolError)
        elif second:  # each connection is lost again, as soon as it is there
            assert isinstance(got, (dscache.ConnectError, dscache.ProtocolError)), got
            assert "a reply that no operation waits for" in str(got)
        else:
            assert (ready, tuple(got)) == (None, (5, [5]))
        fake.answers["HELLO"] = HELLO_REPLY
        async with asyncio.timeout(PATIENCE):
            while not cache.is_ready:
                await asyncio.sleep(0.01)
        assert tuple(await cache.get("a")) == (5, [5])
        assert "\n" not in cache.description
        await cache.close()


@pytest.mark.parametrize("silence", [b"", b"*2\r\n$1\r\n5\r\n", b"*2\r\n$1\r\n5\r\n$100\r\nabc"])
async def test_an_incomplete_reply_is_dropped(backend: str, silence: bytes) -> None:
    async with FakeServer({"MGET": silence, "MSET": b""}) as fake:
        cache = lazy_cache(fake.url, **IMPATIENT)
        await cache.when_ready()
        issued = [cache.get("a"), cache.get_bulk(["a", "b"]), cache.set("a", 1, [])]
        results = await results_of(*issued)
        assert all(isinstance(error, dscache.DeadlineExceeded) for error in results), results
        assert "may have happened" in str(results[2])
        fake.answers["MGET"] = FIVE
        async with asyncio.timeout(PATIENCE):
            while True:
                (got,) = await results_of(cache.get("a"))
                if not isinstance(got, dscache.DscacheError):
                    break
        assert tuple(got) == (5, [5])
        await cache.close()


async def test_unsolicited_replies_end_the_connection(backend: str) -> None:
    async with FakeServer({"MGET": FIVE}) as fake:
        cache = lazy_cache(fake.url, **PATIENT)
        await cache.when_ready()
        # A push is allowed at any time in RESP3.
        fake.push(b">2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n")
        assert tuple((await results_of(cache.get("a")))[0]) == (5, [5])
        assert cache.stats()["connects"] == 1
        fake.push(b"+surprise\r\n")
        await until(lambda: cache.stats()["connects"] == 2)
        assert cache.stats()["last_loss"].endswith(
            "sent a reply that no operation waits for: a text of 8 bytes"
        )
        assert tuple((await results_of(cache.get("a")))[0]) == (5, [5])
        await cache.close()


# -- the connection ends


@on_one_server
@pytest.mark.parametrize("ending", ["fin", "rst"])
async def test_a_connection_cut_within_the_replies(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy, ending: Any
) -> None:
    cache = await make_cache(url=proxy.url, retryStrategy=AT_ONCE, **PATIENT)
    uncertain = 0
    for count in range(0, 210, 3):
        redis.flushdb()
        for n in range(4):
            put(redis, f"r{n}", n, f'"{n}"')
        # Not exact to the byte, since the proxy stands between: where the replies end nothing is
        # cut, and the rest of the count is for the next round.
        proxy.cut_after(count, "replies", ending)
        reads = [cache.get(f"r{n}") for n in range(4)]
        reads.append(cache.get_bulk([f"r{n}" for n in range(4)]))
        writes = [
            cache.set("plain", count, count),
            cache.set("ttl", count, count, ttl=1000),
            cache.delete("plain"),
            cache.set_bulk({"bulk": (count, count)}),
        ]
        guarded = cache.set("guarded", count, count, if_newer=True)
        *got, bulk = await results_of(*reads)
        assert [tuple(record) for record in got] == [(n, str(n)) for n in range(4)]
        assert pairs(bulk) == {f"r{n}": (n, str(n)) for n in range(4)}
        assert await results_of(guarded) == [True]
        for outcome in await results_of(*writes):
            if isinstance(outcome, dscache.ConnectionLost):
                assert "the write may have happened" in str(outcome)
                uncertain += 1
            else:
                assert outcome in (True, set())
        assert tuple(await cache.get("guarded")) == (count, count)
        proxy.heal()
    assert uncertain > 0
    assert cache.stats()["connects"] > 5


@on_one_server
async def test_a_connection_cut_within_the_commands(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy
) -> None:
    cache = await make_cache(url=proxy.url, retryStrategy=AT_ONCE, **PATIENT)
    lost = 0
    for count in range(0, 400, 7):
        proxy.cut_after(count, "requests")
        written, read, guarded = await results_of(
            cache.set("a", count, count),
            cache.get("a"),
            cache.set("b", count, count, if_newer=True),
        )
        if isinstance(written, dscache.ConnectionLost):
            assert "may have happened" in str(written)
            lost += 1
        else:
            assert written is True
            assert tuple(read) == (count, count)
        assert guarded is True
        assert tuple(await cache.get("b")) == (count, count)
        proxy.heal()
    assert lost


@on_one_server
async def test_operations_in_flight_when_the_server_dies(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server()
    cache = await make_cache(url=server.url, **PATIENT)
    await cache.set("a", 1, [1])
    server.pause()
    issued = {name: call(cache, "a") for name, call in OPERATIONS.items()}
    await until(lambda: cache.stats()["in_flight"])
    server.kill()
    await until(lambda: not cache.is_ready)
    meanwhile = [cache.set("b", 3, [3]), cache.get("b"), cache.head("b"), cache.delete("b")]
    assert not any(future.done() for future in meanwhile)
    await asyncio.to_thread(server.start)
    results = dict(zip(issued, await results_of(*issued.values()), strict=True))
    # Reads and guarded writes are retried in their order; the server is empty by now.
    assert results["get"] is None
    assert results["head"] is None
    assert results["set if_newer"] is True
    # The others find the value they would write, which may be their own first attempt.
    assert results["set ttl if_newer"] is True
    assert results["set_bulk if_newer"] == set()
    assert (results["get_bulk"], results["head_bulk"]) == ({}, {})
    for name in ("set", "set ttl", "delete", "set_bulk", "set_bulk ttl", "delete_bulk"):
        assert isinstance(results[name], dscache.ConnectionLost), name
        assert "the write may have happened" in str(results[name])
    # Operations that were never sent are sent now, reads and writes alike.
    written, got, head, deleted = await results_of(*meanwhile)
    assert (written, tuple(got), head, deleted) == (True, (3, [3]), 3, True)
    assert cache.stats()["connects"] == 2
    assert cache.stats()["last_loss"]


@on_one_server
async def test_a_server_that_comes_and_goes_under_load(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server()
    cache = await make_cache(url=server.url, **PATIENT)
    acknowledged: dict[str, int] = {}
    lost: list[str] = []
    stop = False

    async def work(worker: int) -> None:
        version = 0
        while not stop:
            version += 1
            name = f"w{worker}/{version % 5}"
            try:
                await cache.set(name, version, [name, version])
            except dscache.ConnectionLost as error:
                lost.append(str(error))
            else:
                acknowledged[name] = version
            record = await cache.get(name)
            if record is not None:
                assert record.data == [name, record.version]

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for worker in range(20):
            group.create_task(work(worker))
        for connects in range(1, 5):
            await until(lambda connects=connects: cache.stats()["connects"] == connects)
            # Writes acknowledged before then are gone with the server that had them.
            acknowledged.clear()
            if connects < 4:
                await until(lambda: acknowledged)
                await asyncio.sleep(0.05)
                server.kill()
                await asyncio.to_thread(server.start)
        await until(lambda: len(acknowledged) == 100)
        stop = True
    assert cache.stats()["connects"] == 4
    assert all("may have happened" in message for message in lost)
    heads = await cache.head_bulk(acknowledged)
    assert all(heads[name] >= version for name, version in acknowledged.items())


# -- late replies


@on_one_server
async def test_a_stall_ends_at_the_deadline_and_late_replies_are_dropped(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy
) -> None:
    put(redis, "a", 1, '"a"')
    put(redis, "b", 2, '"b"')
    cache = await make_cache(url=proxy.url, commandTimeout=200)
    for _ in range(3):
        assert await cache.head("a") == 1
        proxy.stall("replies")
        reads = [call(cache, "a") for call in READS.values()]
        writes = [call(cache, "w") for call in WRITES.values()]
        # On a busy machine, the later ones of a tick may outlive the silent connection.
        for error in await results_of(*reads):
            assert isinstance(error, (dscache.DeadlineExceeded, dscache.ConnectError))
            assert "200 ms" in str(error)
            assert "may have happened" not in str(error)
        for error in await results_of(*writes):
            assert isinstance(error, (dscache.DeadlineExceeded, dscache.ConnectionLost))
            assert "may have happened" in str(error)
        # Operations that can't be sent now expire without being sent.
        assert isinstance(await error_of(cache.set("never", 1, 1)), dscache.DscacheError)
        proxy.resume()
        async with asyncio.timeout(PATIENCE):
            while True:
                got = await results_of(*(cache.get("b") for _ in range(10)))
                if not any(isinstance(one, dscache.DscacheError) for one in got):
                    break
        assert all(tuple(record) == (2, "b") for record in got)
    assert cache.stats()["pending"] == 0


@on_one_server
async def test_operations_that_expire_unsent_are_never_sent(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy
) -> None:
    cache = await make_cache(url=proxy.url, commandTimeout=200, retryStrategy=AT_ONCE)
    proxy.cut()
    await proxy.refuse()
    await until(lambda: not cache.is_ready)
    for error in await results_of(*(call(cache, "never") for call in WRITES.values())):
        assert isinstance(error, (dscache.ConnectError, dscache.DeadlineExceeded))
        assert "may have happened" not in str(error)
    await proxy.listen()
    async with asyncio.timeout(PATIENCE):
        while not cache.is_ready:
            await asyncio.sleep(0.01)
    assert await cache.get("never") is None
    assert redis.dbsize() == 0


@on_one_server
@pytest.mark.parametrize("delay", [0, 0.02])
async def test_a_storm_of_cancellations(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy, delay: float
) -> None:
    cache = await make_cache(url=proxy.url, commandTimeout=PATIENCE * 1000)
    names = [f"r{n}" for n in range(100)]
    await cache.set_bulk({name: (0, [name, 0]) for name in names})
    choose = random.Random(5)
    proxy.delay(delay)
    if delay:
        proxy.split(1000)

    async def one(name: str, version: int) -> None:
        match choose.randrange(6):
            case 0:
                assert await cache.set(name, version, [name, version]) is True
            case 1:
                await cache.set(name, version, [name, version], if_newer=True)
            case 2:
                assert 0 <= await cache.head(name) < 10_000
            case 3:
                some = choose.sample(names, 5)
                records = await cache.get_bulk(some)
                assert list(records) == some
                for found, record in records.items():
                    assert record.name == found
                    assert record.data == [found, record.version]
            case _:
                record = await cache.get(name)
                assert record.name == name
                assert record.data == [name, record.version]

    tasks: list[asyncio.Task[None]] = []
    async with asyncio.timeout(PATIENCE):
        for version in range(10_000):
            tasks.append(asyncio.create_task(one(choose.choice(names), version)))
            if choose.random() < 0.4:
                choose.choice(tasks[-50:]).cancel()
            if choose.random() < 0.1:
                await asyncio.sleep(0)
    for result in await results_of(*tasks):
        assert result is None or isinstance(result, asyncio.CancelledError), result
    assert any(task.cancelled() for task in tasks)
    assert not all(task.cancelled() for task in tasks)
    # Cancellation is no reason to lose a connection.
    assert (cache.stats()["connects"], cache.stats()["last_loss"]) == (1, "")
    proxy.heal()
    assert sorted(await cache.head_bulk(names)) == sorted(names)


# -- damaged records


async def test_a_damaged_record_fails_only_its_own_reads(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache()
    put(redis, "version", "abc", "[]")
    put(redis, "data", 3, '{"a":')
    put(redis, "good", 4, "[4]")
    redis.set("half_v", 5)
    names = ["version", "data", "good", "half", "missing"]
    *got, bulk, heads = await results_of(
        *map(cache.get, names), cache.get_bulk(names), cache.head_bulk(names)
    )
    assert isinstance(got[0], dscache.RecordError)
    assert got[0].name == "version"
    assert tuple(got[2]) == (4, [4])
    assert got[3:] == [None, None]
    for error in (bulk, heads):
        assert isinstance(error, dscache.BulkError)
        assert list(error.errors) == ["version"]
        assert list(error.result) == ["data", "good"]
    for record in (got[1], bulk.result["data"]):
        with pytest.raises(
            dscache.RecordError, match="'data', version 3: the stored data isn't JSON"
        ):
            _ = record.data
        with pytest.raises(dscache.RecordError, match="'data', version 3"):
            record.decode(dict[str, int])
        with pytest.raises(dscache.RecordError):
            tuple(record)
        assert (record.version, record.raw) == (3, b'{"a":')
    stats = cache.stats()
    assert (stats["damaged"], stats["halves"]) == (3, 3)
