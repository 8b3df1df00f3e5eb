"""Servers that refuse for now: a replica behind a name that moves, a long script, a load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.support.blocking import BlockingCache
from tests.support.faults import HELLO_REPLY, FakeServer, ProxyProcess
from tests.support.waiting import PATIENCE, until

MakeCache = Callable[..., Awaitable[Any]]
MakeServer = Callable[..., EmbeddedServer]

# A deadline that nothing here comes near to.
PATIENT = {"connectTimeout": 60_000, "commandTimeout": 60_000}
WRITES: dict[str, tuple[Callable[[Any], Any], object]] = {
    "set": (lambda cache: cache.set("a", 2, "new"), True),
    "set ttl": (lambda cache: cache.set("a", 2, "new", ttl=100), True),
    "set if_newer": (lambda cache: cache.set("a", 2, "new", if_newer=True), True),
    "delete": (lambda cache: cache.delete("a"), True),
    "set_bulk": (lambda cache: cache.set_bulk({"a": (2, "new"), "b": (2, "new")}), set()),
    "delete_bulk": (lambda cache: cache.delete_bulk(["a", "c"]), 1),
}


@pytest.fixture(params=[dscache.AsyncCache, BlockingCache], ids=["async", "blocking"])
def cache_class(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def pair(make_server: MakeServer) -> tuple[EmbeddedServer, EmbeddedServer]:
    """Two servers that don't know each other yet."""
    return make_server(), make_server()


@contextmanager
def busy(server: EmbeddedServer) -> Iterator[Callable[[], None]]:
    """Keep a server busy with a script; it ends at the call of what this yields, or behind it."""
    with redis_py.Redis.from_url(server.url) as control:
        control.config_set("lua-time-limit", 1)

        def work() -> None:
            other = redis_py.Redis.from_url(server.url)
            with other, pytest.raises(redis_py.ResponseError):
                other.eval("while true do end", 0)

        def is_busy() -> bool:
            try:
                control.get("x")
            except redis_py.ResponseError:
                return True
            return False

        def end() -> None:
            if is_busy():
                control.execute_command("SCRIPT KILL")

        thread = threading.Thread(target=work)
        thread.start()
        try:
            while not is_busy():
                time.sleep(0.001)
            yield end
        finally:
            end()
            thread.join()


async def refusal_of(operation: Callable[[], Any]) -> dscache.ReplyError:
    """Return the refusal with which an operation ends at its deadline.

    The last repeat may be under way at the deadline, and then its outcome is unknown: such an
    operation is issued again.
    """
    for _ in range(20):
        try:
            with pytest.raises(dscache.ReplyError) as caught:
                await operation()
        except dscache.DeadlineExceeded:
            continue
        return caught.value
    raise AssertionError("no operation has ended with a refusal")


# -- a name that leads elsewhere by now


@pytest.mark.parametrize("kind", WRITES)
async def test_a_write_follows_the_name(
    make_cache: MakeCache, pair: tuple[EmbeddedServer, EmbeddedServer], kind: str
) -> None:
    old, new = pair
    write, outcome = WRITES[kind]
    async with ProxyProcess(old.host, old.port) as name:
        cache = await make_cache(host=name.host, port=name.port, **PATIENT)
        await cache.set("a", 1, "old")
        with redis_py.Redis.from_url(new.url) as other:
            other.mset({"a_v": "1", "a_d": '"old"'})
        with redis_py.Redis.from_url(old.url) as redis:
            redis.replicaof("127.0.0.1", 1)
        await name.do("retarget", new.host, new.port)
        async with asyncio.timeout(PATIENCE):
            assert await write(cache) == outcome
            assert await cache.set("z", 1, 1) is True
        assert cache.stats()["connects"] <= 3
        assert "READONLY" in cache.stats()["last_loss"]
    with redis_py.Redis.from_url(new.url) as redis:
        assert redis.get("z_v") == b"1"
        assert redis.get("a_d") == (None if "delete" in kind else b'"new"')
    with redis_py.Redis.from_url(old.url) as redis:
        assert redis.get("a_d") == b'"old"'


async def test_a_replica_that_stays_one_is_named_at_the_deadline(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server()
    cache = await make_cache(url=server.url, commandTimeout=700)
    await cache.set("a", 1, "old")
    with redis_py.Redis.from_url(server.url) as redis:
        redis.replicaof("127.0.0.1", 1)
    for write, _ in WRITES.values():
        before = time.monotonic()
        refusal = await refusal_of(lambda write=write: write(cache))
        assert refusal.code == "READONLY"
        assert time.monotonic() - before > 0.5
    # Reads go on, and the server isn't connected to all the time.
    assert tuple(await cache.get("a")) == (1, "old")
    assert 6 <= cache.stats()["connects"] < 400


async def test_writes_under_way_are_not_in_doubt(make_server: MakeServer, backend: str) -> None:
    """A refusal doesn't end the connection before the replies to the commands behind it."""
    server = make_server()
    config = {"name": "redis", "options": {"url": server.url, **PATIENT}}
    async with dscache.AsyncCache.from_config(config) as cache:
        await cache.set_bulk({f"n{i}": (1, i) for i in range(100)})
        with redis_py.Redis.from_url(server.url) as redis:
            redis.replicaof("127.0.0.1", 1)
            writes = []
            for i in range(100):  # each in a command of its own
                writes += [cache.set(f"n{i}", 2, i), cache.get(f"n{i}")]
                await asyncio.sleep(0)
            await until(lambda: cache.stats()["connects"] > 2)
            redis.replicaof("NO", "ONE")
        async with asyncio.timeout(PATIENCE):
            results = await asyncio.gather(*writes)
        assert results[::2] == [True] * 100
        with redis_py.Redis.from_url(server.url) as redis:
            assert redis.mget([f"n{i}_v" for i in range(100)]) == [b"2"] * 100


# -- a server that is busy or loading


@pytest.mark.parametrize(
    "operation",
    [
        *(write for write, _ in WRITES.values()),
        lambda cache: cache.get("a"),
        lambda cache: cache.head("a"),
        lambda cache: cache.get_bulk(["a", "b"]),
        lambda cache: cache.head_bulk(["a", "b"]),
    ],
)
async def test_a_busy_server_is_waited_for(
    make_cache: MakeCache, make_server: MakeServer, operation: Callable[[Any], Any]
) -> None:
    server = make_server()
    cache = await make_cache(url=server.url, **PATIENT)
    await cache.set("a", 1, "old")
    with busy(server) as end:
        began = time.monotonic()
        timer = threading.Timer(0.3, end)
        timer.start()
        async with asyncio.timeout(PATIENCE):
            await operation(cache)
            assert time.monotonic() - began > 0.2
        timer.join()
    assert cache.stats()["connects"] == 1


async def test_a_server_that_stays_busy_is_named_at_the_deadline(
    make_cache: MakeCache, make_server: MakeServer
) -> None:
    server = make_server()
    cache = await make_cache(url=server.url, commandTimeout=500)
    with busy(server):
        for operation in (lambda: cache.get("a"), lambda: cache.set_bulk({"a": (1, 1)})):
            assert (await refusal_of(operation)).code == "BUSY"
        # A connection that is opened now has the same reason for its failure.
        other = type(cache).from_config(
            {"name": "redis", "options": {"url": server.url, "commandTimeout": 500}}
        )
        assert (await refusal_of(lambda: other.get("a"))).code == "BUSY"
        await other.close()
    assert await cache.get("a") is None
    assert cache.stats()["connects"] == 1


async def test_the_order_of_writes_holds_while_a_server_is_busy(
    make_server: MakeServer, backend: str
) -> None:
    server = make_server()
    config = {"name": "redis", "options": {"url": server.url, **PATIENT}}
    async with dscache.AsyncCache.from_config(config) as cache:
        with busy(server) as end:
            writes = []
            for version in range(1, 200):
                writes.append(cache.set("a", version, version))
                await asyncio.sleep(0.001)
                if version == 100:
                    end()
            async with asyncio.timeout(PATIENCE):
                assert await asyncio.gather(*writes) == [True] * 199
        assert tuple(await cache.get("a")) == (199, 199)
        # The pauses between attempts grow: there are far fewer commands than moments.
        assert cache.stats()["connects"] == 1


@pytest.mark.parametrize("words", ["LOADING Redis is loading", "BUSY Redis is busy"])
async def test_what_passes_is_repeated_on_the_same_connection(backend: str, words: str) -> None:
    refusal = f"-{words}\r\n".encode()
    answers = {"MGET": refusal, "MSET": b"+OK\r\n", "GET": refusal, "TYPE": b"+string\r\n"}
    async with FakeServer(answers) as fake:
        config = {"name": "redis", "options": {"url": fake.url, **PATIENT}}
        async with dscache.AsyncCache.from_config(config) as cache:
            issued = [cache.get("a"), cache.head("b"), cache.set("c", 1, 1)]
            assert await issued[2] is True
            mget = [b"MGET", b"a_v", b"a_d"]
            began = time.monotonic()
            await until(lambda: fake.commands.count(mget) >= 6)
            assert time.monotonic() - began > 0.2
            fake.answers["MGET"] = b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n"
            fake.answers["GET"] = b"$1\r\n7\r\n"
            async with asyncio.timeout(PATIENCE):
                assert tuple(await issued[0]) == (5, [5])
                assert await issued[1] == 7
            assert cache.stats()["connects"] == 1


@pytest.mark.parametrize("words", ["BUSY Redis is busy", "NOPERM no PING", "ERR unknown command"])
async def test_a_refused_ping_is_an_answer(
    backend: str, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr("dscache.aio.heartbeat._PING_AFTER", 0.01)
    answers = {"PING": f"-{words}\r\n".encode()}
    async with FakeServer(answers) as fake:
        config = {"name": "redis", "options": {"url": fake.url, **PATIENT}}
        async with dscache.AsyncCache.from_config(config) as cache:
            await cache.when_ready()
            await until(lambda: fake.commands.count([b"PING"]) >= 5)
            assert (cache.is_ready, cache.stats()["connects"]) == (True, 1)


@pytest.mark.parametrize("required", [True, False])
async def test_tracking_is_tried_again(backend: str, required: bool) -> None:
    tracked = 0

    def client(command: list[bytes]) -> bytes:
        nonlocal tracked
        if command[1] != b"TRACKING":
            return b"+OK\r\n"
        tracked += 1
        return b"+OK\r\n" if tracked > 2 else b"-BUSY Redis is busy running a script\r\n"

    answers = {
        "CLIENT": client,
        "HELLO": HELLO_REPLY,
        "MGET": b"*2\r\n$1\r\n5\r\n$3\r\n[5]\r\n",
    }
    async with FakeServer(answers) as fake:
        options = {"url": fake.url, **PATIENT, "nearCache": {"required": required}}
        async with dscache.AsyncCache.from_config({"name": "redis", "options": options}) as cache:
            async with asyncio.timeout(PATIENCE):
                for _ in range(3):
                    assert tuple(await cache.get("a")) == (5, [5])
            assert tracked == 3
            assert sum(command[0] == b"MGET" for command in fake.commands) == 1
