"""Limits: pending operations, the size of a flush, and the replies of a hostile server."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import pytest

import dscache
from dscache.core import constants as c
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.soak.figures import resident
from tests.support.faults import FakeServer, FaultProxy
from tests.support.waiting import PATIENCE, assert_drained, until

MakeCache = Callable[..., Awaitable[dscache.AsyncCache]]

# These limits don't depend on the server's version.
on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

LONG = PATIENCE * 1000
MIB = 1024 * 1024
# A Python object and its slot in a dict or list take this at most.
PER_NAME = 600


def text_of(size: int) -> msgspec.Raw:
    """Return JSON text of that many bytes."""
    return msgspec.Raw(b'"' + b"x" * (size - 2) + b'"')


async def results_of(issued: Iterable[Awaitable[Any]]) -> list[Any]:
    """Return the results and errors of operations, none of which may hang."""
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*issued, return_exceptions=True)


@pytest.fixture
def peak() -> Any:
    """Measure the peak memory of Python objects since the last call."""
    gc.collect()
    tracemalloc.start()
    base = tracemalloc.get_traced_memory()[0]

    def measure() -> int:
        return tracemalloc.get_traced_memory()[1] - base

    yield measure
    tracemalloc.stop()


# -- pending operations


@on_one_server
async def test_a_full_cache_refuses_at_the_call_and_sends_nothing(
    make_cache: MakeCache, proxy: FaultProxy
) -> None:
    cache = await make_cache(
        url=proxy.url, maxPending=5, whenFull="error", commandTimeout=LONG, connectTimeout=LONG
    )
    proxy.stall()
    reads = [cache.get(f"r{n}") for n in range(3)]
    bulk = cache.set_bulk({f"b{n}": (n, n) for n in range(100)})  # one operation
    last = cache.set("w", 1, [1])
    before = cache.stats()
    for call in (
        lambda: cache.get("one more"),
        lambda: cache.head("one more"),
        lambda: cache.set("one more", 1, 1),
        lambda: cache.set("one more", 1, 1, if_newer=True),
        lambda: cache.delete("one more"),
        lambda: cache.get_bulk(["one more"]),
        lambda: cache.head_bulk(["one more"]),
        lambda: cache.set_bulk({"one more": (1, 1)}),
        lambda: cache.delete_bulk(["one more"]),
    ):
        with pytest.raises(dscache.Overloaded, match=r"5 operations .*maxPending.*not sent") as no:
            call()
        assert str(proxy.port) in str(no.value)
    assert cache.stats() == {**before, "overloaded": 9}
    proxy.resume()
    assert await results_of([*reads, bulk, last]) == [None, None, None, set(), True]
    # There is room again.
    assert await results_of(cache.get(f"b{n}") for n in range(5)) != []
    assert await cache.head("one more") is None
    assert_drained(cache)


@on_one_server
async def test_beyond_the_window_operations_wait_and_all_are_served(
    make_cache: MakeCache, proxy: FaultProxy
) -> None:
    cache = await make_cache(url=proxy.url, maxPending=50, commandTimeout=LONG, connectTimeout=LONG)
    proxy.stall("replies")
    writes = []
    for n in range(2000):
        writes.append(cache.set(f"w{n}", n, {"n": n}))
        if n % 7 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    stats = cache.stats()
    # The command that reached the limit is sent whole.
    assert 50 <= stats["in_flight"] < 50 + c.COMMAND_RECORDS
    assert stats["queued"] == 2000 - stats["in_flight"]
    proxy.resume()
    assert set(await results_of(writes)) == {True}
    assert await cache.head_bulk(f"w{n}" for n in range(2000)) == {f"w{n}": n for n in range(2000)}
    assert_drained(cache)


@on_one_server
async def test_every_end_of_an_operation_makes_room(
    make_cache: MakeCache, proxy: FaultProxy
) -> None:
    """A reply, a deadline or a lost connection; a cancelled operation stays in flight."""
    cache = await make_cache(url=proxy.url, maxPending=3, whenFull="error", commandTimeout=300)

    def fill() -> list[asyncio.Future[Any]]:
        issued = [cache.set(f"w{n}", 1, "x" * 100) for n in range(3)]
        with pytest.raises(dscache.Overloaded):
            cache.get("w")
        return issued

    assert await results_of(fill()) == [True] * 3
    assert_drained(cache)
    proxy.stall()
    late = await results_of(fill())
    assert {type(error) for error in late} <= {dscache.DeadlineExceeded, dscache.ConnectionLost}
    proxy.resume()
    await until(lambda: not cache.stats()["pending"])
    await until(lambda: cache.is_ready)
    proxy.stall()
    lost = fill()
    await asyncio.sleep(0.01)
    proxy.cut("rst")
    assert {type(error) for error in await results_of(lost)} == {dscache.ConnectionLost}
    proxy.resume()
    await until(lambda: cache.is_ready)
    for waiter in fill():
        waiter.cancel()
    await until(lambda: not cache.stats()["pending"])
    assert await results_of(fill()) == [True] * 3
    assert_drained(cache)


# -- pending bytes


@on_one_server
async def test_pending_text_is_limited(make_cache: MakeCache, proxy: FaultProxy) -> None:
    cache = await make_cache(
        url=proxy.url, maxPendingBytes=MIB, whenFull="error", commandTimeout=LONG
    )
    proxy.stall()
    part = text_of(MIB // 4)
    writes = [cache.set(f"w{n}", 1, part) for n in range(4)]
    assert cache.stats()["pending_bytes"] == MIB
    for call in (
        lambda: cache.set("w", 1, 1),
        lambda: cache.set_bulk({"w": (1, 1)}),
        lambda: cache.set("w", 1, 1, ttl=10),
    ):
        with pytest.raises(dscache.Overloaded, match=rf"{MIB} bytes .*maxPendingBytes.*not sent"):
            call()
    # Operations that write no text need no room for it.
    others = [cache.get("w0"), cache.head("w0"), cache.delete("d"), cache.delete_bulk(["d"])]
    assert cache.stats()["pending_bytes"] == MIB
    proxy.resume()
    assert await results_of(writes) == [True] * 4
    assert (await results_of(others))[2:] == [False, 0]
    assert_drained(cache)
    assert await cache.set("w", 1, part) is True
    assert await cache.head("w") == 1


@on_one_server
@pytest.mark.parametrize("bulk", [False, True], ids=["set", "bulk"])
async def test_a_write_beyond_the_limit_is_sent_alone(
    make_cache: MakeCache, proxy: FaultProxy, bulk: bool
) -> None:
    cache = await make_cache(
        url=proxy.url, maxPendingBytes=1000, whenFull="error", commandTimeout=LONG
    )
    proxy.stall()
    huge = text_of(3 * MIB)
    issued = cache.set_bulk({"huge": (1, huge)}) if bulk else cache.set("huge", 1, huge)
    assert cache.stats()["pending_bytes"] == 3 * MIB
    with pytest.raises(dscache.Overloaded):
        cache.set("w", 1, 1)
    proxy.resume()
    assert await results_of([issued]) == [set() if bulk else True]
    assert_drained(cache)
    # Behind a small one it must wait its turn.
    proxy.stall()
    small = cache.set("w", 1, 1)
    with pytest.raises(dscache.Overloaded):
        cache.set("huge", 2, huge)
    proxy.resume()
    assert await results_of([small]) == [True]
    assert await cache.head("huge") == 1
    assert_drained(cache)


@on_one_server
async def test_collapsed_writes_are_counted_once(make_cache: MakeCache, proxy: FaultProxy) -> None:
    cache = await make_cache(url=proxy.url, commandTimeout=LONG)
    proxy.stall()
    sizes = (5000, 10, 70_000, 300)
    writes = [cache.set("w", n, text_of(size)) for n, size in enumerate(sizes)]
    assert cache.stats()["pending_bytes"] == sizes[-1]
    assert cache.stats()["pending"] == 1
    await asyncio.sleep(0.01)
    later = cache.set("w", 9, text_of(40))  # of another tick
    assert cache.stats()["pending_bytes"] == sizes[-1] + 40
    proxy.resume()
    assert await results_of([*writes, later]) == [True] * 5
    assert_drained(cache)
    assert await cache.head("w") == 9


@on_one_server
@pytest.mark.parametrize("options", [{}, {"ttl": 100}, {"if_newer": True}], ids=str)
@pytest.mark.parametrize("end", ["expiry", "loss", "expiry while away", "close"])
async def test_writes_are_counted_out_however_they_end(
    make_cache: MakeCache, proxy: FaultProxy, end: str, options: dict[str, Any]
) -> None:
    timeout = LONG if end == "loss" else 200
    cache = await make_cache(url=proxy.url, commandTimeout=timeout, closeTimeout=100)
    if end == "expiry while away":
        await proxy.refuse()
        proxy.cut()
        await until(lambda: not cache.is_ready)
    proxy.stall()
    writes: list[Awaitable[Any]] = [
        cache.set(f"w{n}", n + 1, text_of(1000), **options) for n in range(10)
    ]
    writes += [cache.set("w0", 9, text_of(500), **options)]
    writes += [cache.set_bulk({f"b{n}": (1, text_of(20)) for n in range(10)}, **options)]
    expected = 10 * 1000 + 10 * 20 + (500 if "if_newer" in options else -500)
    assert cache.stats()["pending_bytes"] == expected
    await asyncio.sleep(0.02)
    if end == "loss":
        proxy.cut("rst")
        proxy.resume()
        results = await results_of(writes)
        if "if_newer" in options:  # these are sent again
            assert results == [*[True] * 11, set()]
        else:
            assert {type(error) for error in results} == {dscache.ConnectionLost}
    elif end == "close":
        async with asyncio.timeout(PATIENCE):
            await cache.close()
        assert all(isinstance(e, dscache.DscacheError) for e in await results_of(writes))
    else:
        errors = await results_of(writes)
        assert all(isinstance(error, dscache.DscacheError) for error in errors)
    proxy.resume()
    await until(lambda: not cache.stats()["pending"])
    assert_drained(cache)


@on_one_server
async def test_refused_writes_are_counted_out(
    make_cache: MakeCache, server: EmbeddedServer, redis: Any
) -> None:
    """Also writes that are retried one by one to find the refused one."""
    redis.execute_command("ACL", "SETUSER", "limited", "on", ">secret", "~ok*", "+@all")
    try:
        cache = await make_cache(username="limited", password="secret", commandTimeout=LONG)
        for options in ({}, {"ttl": 100}, {"if_newer": True}):
            writes = [cache.set(f"ok{n}", 1, text_of(99), **options) for n in range(5)]
            writes += [cache.set(f"no{n}", 1, text_of(77), **options) for n in range(5)]
            assert cache.stats()["pending_bytes"] == 5 * 99 + 5 * 77
            results = await results_of(writes)
            assert {error.code for error in results[5:]} == {"NOPERM"}
            assert_drained(cache)
            redis.script_flush()
            await results_of([cache.set_bulk({"ok1": (1, text_of(50)), "no1": (1, 1)}, **options)])
            assert_drained(cache)
        await cache.close()
    finally:
        redis.acl_deluser("limited")


# -- bulks of any size


@on_one_server
async def test_a_bulk_of_any_size_streams_through_a_bounded_window(make_cache: MakeCache) -> None:
    count = 100_000
    cache = await make_cache(commandTimeout=LONG)
    pipeline = cache._topology.pipeline  # type: ignore[union-attr]
    most = 0
    taken = 0
    stop = asyncio.Event()

    async def watch() -> None:
        nonlocal most, taken
        while not stop.is_set():
            most = max(most, pipeline.in_flight)
            taken += 1
            await asyncio.sleep(0)

    gc.collect()
    before = resident()
    watcher = asyncio.create_task(watch())
    async with asyncio.timeout(PATIENCE):
        assert await cache.set_bulk({f"n{n}": (n, n) for n in range(count)}) == set()
        written = resident() - before
        heads = await cache.head_bulk(f"n{n}" for n in range(count))
        assert len(heads) == count
        assert heads["n777"] == 777
        del heads
        records = await cache.get_bulk(f"n{n}" for n in range(count))
        assert sum(record.version for record in records.values()) == sum(range(count))
        del records
        assert await cache.delete_bulk(f"n{n}" for n in range(count)) == count
    stop.set()
    await watcher
    assert taken > 20, "it never yielded to another task"
    assert 0 < most < c.MAX_PENDING + c.COMMAND_RECORDS
    assert written < count * PER_NAME + 16 * MIB
    assert resident() - before < 2 * count * PER_NAME + 16 * MIB
    assert_drained(cache)


@on_one_server
async def test_operations_behind_a_full_window_are_not_encoded(
    make_cache: MakeCache, proxy: FaultProxy, peak: Callable[[], int]
) -> None:
    """A stalled connection stops the flush, not the queueing; and no output is prepared ahead."""
    cache = await make_cache(url=proxy.url, commandTimeout=LONG, connectTimeout=LONG)
    await cache.set("before", 1, 1)
    proxy.stall()
    text = text_of(100_000)
    raw = bytes(text)
    writes = [cache.set(f"w{n}", n, text) for n in range(400)]  # 40 MB
    held = 0
    for n in range(400, 600):
        writes.append(cache.set(f"w{n}", n, text))
        await asyncio.sleep(0)
        held = max(held, cache.stats()["in_flight"])
    link = cache._topology.link  # type: ignore[union-attr]
    assert link.paused
    assert cache.stats()["queued"] > 300
    assert held < 300
    # The texts, of which msgspec leaves up to a third of their room unused, and the transport's
    # share.
    assert peak() < 600 * 150_000 + 16 * MIB
    proxy.resume()
    assert set(await results_of(writes)) == {True}
    records = await cache.get_bulk(f"w{n}" for n in range(600))
    assert all(record.raw == raw for record in records.values())
    assert len(records) == 600
    assert not link.paused
    assert_drained(cache)


# -- server replies

BOMBS = {
    "nested": b"*1\r\n" * 100_000,
    "nested sets": b"~1\r\n" * 100_000,
    "nested maps": b"%1\r\n+k\r\n" * 100_000,
    "array": b"*2147483647\r\n",
    "array beyond 32 bits": b"*4294967296\r\n",
    "array beyond 64 bits": b"*99999999999999999999999\r\n",
    "set": b"~2147483647\r\n",
    "push": b">2147483647\r\n",
    "map": b"%2147483647\r\n",
    "attributes": b"|2147483647\r\n",
    "arrays in arrays": b"*1000000\r\n" * 8 + b"*2147483647\r\n",
    "pushes in a push": b">1\r\n>2147483647\r\n",
    "text": b"$2147483647\r\n",
    "text beyond 64 bits": b"$99999999999999999999999\r\n",
    "verbatim": b"=2147483647\r\n",
    "error text": b"!2147483647\r\n",
    "negative": b"*-2\r\n",
    "a line without end": b"+" + b"x" * 4 * MIB,
    "a number without end": b":" + b"1" * 4 * MIB,
    "a length without end": b"$" + b"1" * 4 * MIB,
    "an array of nothing": b"*1000000\r\n" + b"_\r\n" * 1_100_000,
}


@on_one_server
@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_hostile_reply_takes_no_memory(
    make_cache: MakeCache, backend: str, peak: Callable[[], int], bomb: str
) -> None:
    async with FakeServer({"MGET": BOMBS[bomb], "SCRIPT": b"+0\r\n", "COMMAND": b"*0\r\n"}) as fake:
        cache = await make_cache(
            url=fake.url, maxReplyBytes=2 * MIB, commandTimeout=500, connectTimeout=LONG
        )
        (error,) = await results_of([cache.get("a")])
        kinds = (dscache.ProtocolError, dscache.DeadlineExceeded, dscache.ConnectionLost)
        assert isinstance(error, kinds), error
        assert len(str(error)) < 1000
        # The fake server's own replies are counted, too.
        assert peak() < 48 * MIB + 2 * len(BOMBS[bomb])
        gc.collect()
        # The cache recovers as soon as the server does.
        fake.answers["MGET"] = b"*2\r\n$1\r\n7\r\n$2\r\n{}\r\n"
        async with asyncio.timeout(PATIENCE):
            while True:
                (record,) = await results_of([cache.get("a")])
                if not isinstance(record, dscache.DscacheError):
                    break
        assert (record.version, record.raw) == (7, b"{}")
        await until(lambda: not cache.stats()["pending"])


@pytest.mark.parametrize("bomb", [name for name in BOMBS if name != "a line without end"])
async def test_a_hostile_handshake_takes_no_memory(
    backend: str, peak: Callable[[], int], bomb: str
) -> None:
    async with FakeServer({"HELLO": BOMBS[bomb]}) as fake:
        options = {"url": fake.url, "maxReplyBytes": 2 * MIB, "connectTimeout": 500}
        cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
        with pytest.raises((dscache.ConnectError, dscache.ProtocolError)):
            async with asyncio.timeout(PATIENCE):
                await cache.when_ready()
        await cache.close()
        # Each attempt to connect makes the fake server send everything again.
        assert peak() < 48 * MIB + 8 * len(BOMBS[bomb])


@on_one_server
@pytest.mark.parametrize(
    ("head", "more"),
    [
        (b"$100000000\r\n", b"x" * 65536),
        (b"*1000000\r\n", (b"$100\r\n" + b"x" * 100 + b"\r\n") * 600),
        (b"+", b"x" * 65536),
    ],
    ids=["text", "array", "line"],
)
async def test_an_endless_reply_is_cut_off(
    make_cache: MakeCache, backend: str, peak: Callable[[], int], head: bytes, more: bytes
) -> None:
    answers = {"MGET": head, "SCRIPT": b"+0\r\n", "COMMAND": b"*0\r\n"}
    async with FakeServer(answers) as fake:
        cache = await make_cache(url=fake.url, maxReplyBytes=8 * MIB, commandTimeout=LONG)
        read = cache.get("a")
        async with asyncio.timeout(PATIENCE):
            while [b"MGET", b"a_v", b"a_d"] not in fake.commands:
                await asyncio.sleep(0)
            while not read.done():
                fake.push(more)
                await asyncio.sleep(0)
        with pytest.raises(dscache.ProtocolError, match=r"maxReplyBytes|elements|bytes") as error:
            read.result()
        assert str(fake.port) in str(error.value)
        assert peak() < 96 * MIB
        assert_drained(cache)


@on_one_server
async def test_a_reply_may_be_as_large_as_the_limit(make_cache: MakeCache) -> None:
    """The limit is for one reply: many of them, and texts that look like lengths, don't matter."""
    cache = await make_cache(maxReplyBytes=2 * MIB, commandTimeout=LONG)
    tricky = msgspec.Raw(b'"\\r\\n*2147483647\\r\\n"')
    raw = b'"\r\n>2147483647\r\n$99999999999\r\n"'  # not JSON, but valid in Redis
    for n in range(20):
        await cache.set(f"w{n}", n, text_of(MIB))
    await cache.set("tricky", 1, tricky)
    await cache.set("raw", 1, msgspec.Raw(raw))
    for n in range(20):
        record = await cache.get(f"w{n}")
        assert record is not None
        assert len(record.raw) == MIB
    found = await cache.get_bulk(["tricky", "raw", "w1"])
    assert found["tricky"].data == "\r\n*2147483647\r\n"
    assert found["raw"].raw == raw
    assert len(found["w1"].raw) == MIB
    assert cache.stats()["connects"] == 1
