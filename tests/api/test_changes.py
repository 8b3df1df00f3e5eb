"""``update`` and ``patch`` on every kind of cache: results, races, queues, deadlines, crashes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.aio import changes as changes_of_tasks
from dscache.blocking import changes as changes_of_threads
from dscache.core import changes
from dscache.core.changes import Timing
from dscache.core.holder import Holder
from dscache.embedded import EmbeddedServer
from tests.conftest import BY_AGE, PATIENT, SERVERS, MakeCache, MakeServer, _server_id
from tests.soak.cluster_rows import CURIOUS
from tests.support.blocking import PATIENCE, ThreadedCache, run_child
from tests.support.clusters import ClusterGroup
from tests.support.either import Either
from tests.support.faults import FakeServer
from tests.support.sentinels import SentinelGroup
from tests.support.waiting import until

THREADS = 8
PROCESSES = 8
TIMES = 150
LAST = 2**63 - 1

# These tests don't depend on the server's version.
ON_ONE_SERVER = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
on_newest = pytest.mark.parametrize(
    "binary", BY_AGE[-1:], indirect=True, ids=lambda binary: binary.name
)


@pytest.fixture(params=["async", "blocking"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def opened(kind: str, *, connector: str = "redis", **options: Any) -> AsyncIterator[Any]:
    """Open an AsyncCache, or a Cache driven by several threads."""
    config = {"name": connector, "options": PATIENT | options}
    if kind == "async":
        async with dscache.AsyncCache.from_config(config) as cache:
            yield cache
    else:
        async with ThreadedCache(dscache.Cache.from_config(config), THREADS) as threaded:
            yield threaded


def add(number: int, data: Any) -> Any:
    data["n"] += number
    return data


def spoil(data: Any) -> Any:
    data["spoilt"] = True
    raise ZeroDivisionError


async def assert_changes_records(cache: Any) -> None:
    """Assert the results of each kind of change, and of many at once."""
    with pytest.raises(dscache.RecordMissing, match="there is no such record") as missing:
        await cache.update("a", partial(add, 1))
    assert isinstance(missing.value, KeyError)
    record = await cache.update("a", partial(add, 1), default={"n": 0})
    assert (record.name, record.version, record.data) == ("a", 1, {"n": 1})
    assert await cache.get("a") == record
    assert (await cache.update("a", partial(add, 2), ttl=1000)).raw == b'{"n":3}'
    assert tuple(await cache.update("a", lambda data: dscache.KEEP)) == (2, {"n": 3})
    assert tuple(await cache.patch("a", {"n": None, "m": {"k": [1]}})) == (3, {"m": {"k": [1]}})
    assert tuple(await cache.patch("a", path="m.k[2]", value=3)) == (4, {"m": {"k": [1, None, 3]}})
    assert tuple(await cache.patch("a", path="m.k[2]", value=3)) == (4, {"m": {"k": [1, None, 3]}})
    assert (await cache.patch("a", path="m.k[2]", value=3, ttl=9)).version == 5
    assert tuple(await cache.patch("a", path="m")) == (6, {})
    assert tuple(await cache.get("a")) == (6, {})
    assert tuple(await cache.patch("new", path="x", value=1, default={})) == (1, {"x": 1})
    with pytest.raises(dscache.RecordMissing):
        await cache.patch("missing", {})
    with pytest.raises(ZeroDivisionError):
        await cache.update("a", spoil)
    assert tuple(await cache.get("a")) == (6, {})
    assert await cache.update("a", lambda data: dscache.DELETE) is None
    assert await cache.get("a") is None
    await cache.set("a", LAST, 1)
    with pytest.raises(dscache.RecordError, match="no version is above"):
        await cache.update("a", lambda data: 2)
    changes = [cache.update(f"r{i % 3}", partial(add, i), default={"n": 0}) for i in range(60)]
    await asyncio.gather(*changes)
    for i in range(3):
        assert tuple(await cache.get(f"r{i}")) == (20, {"n": sum(range(i, 60, 3))})


async def test_a_server(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    async with opened(kind, url=server.url) as cache:
        await assert_changes_records(cache)
        # No other client wrote, so no write was refused.
        assert cache.stats()["not_newer"] == 0
        assert await cache.set("ttl", 1, 0)
        assert await cache.update("ttl", lambda data: 1, ttl=1000)
        assert 0 < redis.pttl("ttl_v") <= 1_000_000


async def test_memory(kind: str, backend: str) -> None:
    async with opened(kind, connector="memory") as cache:
        await assert_changes_records(cache)


@ON_ONE_SERVER
async def test_a_near_cache(make_cache: MakeCache, redis: redis_py.Redis) -> None:
    cache = await make_cache(nearCache={"idleLimit": 30_000})
    await assert_changes_records(cache)
    # It doesn't believe a copy, neither to keep the record nor to miss it.
    assert await cache.get("other") is None
    await cache.get("r0")
    redis.mset({"other_v": 4, "other_d": b"5", "r0_v": 90, "r0_d": b"9"})
    assert tuple(await cache.update("other", lambda data: data + 1)) == (5, 6)
    assert tuple(await cache.update("r0", lambda data: dscache.KEEP)) == (90, 9)
    assert tuple(await cache.get("other")) == (5, 6)


@on_newest
async def test_a_cluster(kind: str, group: ClusterGroup, backend: str) -> None:
    async with opened(kind, **group.options | CURIOUS) as cache:
        await assert_changes_records(cache)


@on_newest
async def test_replicas_that_are_behind(kind: str, group: ClusterGroup, backend: str) -> None:
    async with opened(kind, **group.options | CURIOUS, scaleReads="slave") as cache:
        for i in range(50):
            # A replica may not have the record yet, which then isn't created a second time.
            assert (await cache.update("a", partial(add, 1), default={"n": 0})).version == i + 1
    async with opened(kind, **group.options | CURIOUS) as cache:
        assert tuple(await cache.get("a")) == (50, {"n": 50})


@on_newest
async def test_a_record_on_two_nodes_of_a_cluster(
    kind: str, group: ClusterGroup, backend: str
) -> None:
    async with opened(kind, **group.options | CURIOUS, keyLayout="deepstream") as cache:
        assert await cache.set("a", 1, 1)
        with pytest.raises(dscache.RecordError, match="use keyLayout hashtag"):
            await cache.update("a", lambda data: data + 1)
        assert tuple(await cache.update("{t}a", lambda data: data + 1, default=0)) == (1, 1)


async def test_sentinels(kind: str, backend: str) -> None:
    with SentinelGroup(BY_AGE[0], replicas=1, sentinels=1) as sentinels:
        async with opened(kind, **sentinels.options) as cache:
            await assert_changes_records(cache)


async def test_a_half_is_no_record(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    async with opened(kind, url=server.url) as cache:
        redis.set("a_v", 7)
        with pytest.raises(dscache.RecordMissing):
            await cache.update("a", lambda data: 1)
        assert tuple(await cache.update("a", lambda data: data + 1, default=1)) == (1, 2)


@ON_ONE_SERVER
async def test_another_writer_is_first(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    seen = []

    def change(data: int) -> int:
        seen.append(data)
        if len(seen) < 4:
            redis.mset({"a_v": 10 * len(seen), "a_d": f"{len(seen)}"})
        return data + 100

    async with opened(kind, url=server.url) as cache:
        await cache.set("a", 1, 0)
        assert tuple(await cache.update("a", change)) == (31, 103)
        assert seen == [0, 1, 2, 3]
        assert cache.stats()["not_newer"] == 3


@pytest.mark.parametrize("module", [changes_of_tasks, changes_of_threads])
def test_pauses_have_full_jitter(module: Any) -> None:
    for conflicts, longest in ((0, 0.001), (3, 0.008), (20, 0.064)):
        pauses = [module._pause_after(conflicts) for _ in range(500)]
        assert 0 <= min(pauses) < longest / 4
        assert longest * 3 / 4 < max(pauses) <= longest


@ON_ONE_SERVER
async def test_another_writer_is_always_first(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    def change(data: int) -> int:
        redis.incr("a_v")
        return 5

    async with opened(kind, url=server.url, commandTimeout=1500) as cache:
        await cache.set("a", 1, 0)
        with pytest.raises(dscache.DeadlineExceeded, match=r"another writer was first, .* times"):
            await cache.update("a", change)
        assert (await cache.get("a")).data == 0


@ON_ONE_SERVER
async def test_a_slow_change_ends_its_update_and_those_that_wait(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def change_in_thread(data: int) -> int:
        begun.set()
        assert ended.wait(PATIENCE)
        return 5

    async def change(data: int) -> int:
        begun.set()
        while not ended.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue  # it doesn't end at the deadline
        return 5

    async with opened(kind, url=server.url, commandTimeout=1500) as cache:
        await cache.set("a", 1, 0)
        chosen: Any = change if kind == "async" else change_in_thread
        first = asyncio.ensure_future(cache.update("a", chosen))
        await until(begun.is_set)
        with pytest.raises(dscache.DeadlineExceeded, match="earlier updates of this record"):
            await cache.update("a", lambda data: 1)
        ended.set()
        with pytest.raises(dscache.DeadlineExceeded, match="changing its data took longer"):
            await first
        assert tuple(await cache.get("a")) == (1, 0)
    async with opened(kind, url=server.url) as cache:
        assert (await cache.update("a", lambda data: 1)).version == 2


async def test_a_write_of_unknown_outcome_is_told(kind: str, backend: str) -> None:
    record = b"*2\r\n$1\r\n5\r\n$1\r\n5\r\n"
    async with (
        FakeServer({"MGET": record, "EVALSHA": b"", "EVAL": b""}) as fake,
        opened(kind, url=fake.url, commandTimeout=1500) as cache,
    ):
        with pytest.raises(dscache.DeadlineExceeded, match="may have happened"):
            await cache.update("a", lambda data: data + 1)


# -- on an event loop


@ON_ONE_SERVER
async def test_an_async_change(make_cache: MakeCache) -> None:
    cache = await make_cache()

    async def change(data: int) -> int:
        await asyncio.sleep(0)
        await cache.set("seen", 1, data)
        return data + 1

    results = await asyncio.gather(*(cache.update("a", change, default=0) for _ in range(5)))
    assert [tuple(record) for record in results] == [(i, i) for i in range(1, 6)]
    assert (await cache.get("seen")).data == 4

    async def wait(data: int) -> int:
        await asyncio.sleep(PATIENCE)
        return 5

    impatient = await make_cache(commandTimeout=1500)
    with pytest.raises(dscache.DeadlineExceeded, match="changing its data took longer"):
        await impatient.update("a", wait)

    async def fail(data: int) -> int:
        raise TimeoutError("of the change")

    with pytest.raises(TimeoutError, match="of the change"):
        await cache.update("a", fail)
    assert len(cache._changes._queues) == 0


@ON_ONE_SERVER
async def test_cancelled_updates_leave_the_queue(make_cache: MakeCache) -> None:
    cache = await make_cache()
    going = asyncio.Event()

    async def change(data: int) -> int:
        await going.wait()
        return data + 1

    async with asyncio.timeout(PATIENCE):
        tasks = [asyncio.create_task(cache.update("a", change, default=0)) for _ in range(5)]
        await until(lambda: cache.stats()["reads"] == 1)
        for task in (tasks[0], tasks[2]):
            task.cancel()
        going.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in results] == [
            *(True, False, True, False, False)
        ]
        assert tuple(await cache.get("a")) == (3, 3)
        assert len(cache._changes._queues) == 0


@ON_ONE_SERVER
async def test_queues_that_struck_updates_have_left_behind_are_removed(
    make_cache: MakeCache,
) -> None:
    cache = await make_cache()
    queues = cache._changes._queues
    queues.update({f"struck/{i}": [] for i in range(2000)})
    assert tuple(await cache.update("struck/1", lambda data: data, default=1)) == (1, 1)
    assert "struck/1" not in queues
    assert tuple(await cache.update("a", lambda data: data, default=1)) == (1, 1)
    assert queues == {}


@ON_ONE_SERVER
async def forget(data: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("kind", "change", "default"),
    [
        ("AsyncCache", lambda data: None, None),
        ("AsyncCache", forget, None),
        ("AsyncCache", lambda data: data.append(2), [1]),
        ("Cache", lambda data: None, None),
        ("Cache", lambda data: data.append(2), [1]),
    ],
)
async def test_a_forgotten_return_is_told_once(
    kind: str,
    change: Any,
    default: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(changes, "_told_of_null", [])
    async with Either(kind, name="memory") as either:
        if default is None:
            await either.do("set", "a", 1, {"n": 1})
            assert tuple(await either.do("update", "a", change)) == (2, None)
        else:
            assert tuple(await either.do("update", "a", change, default=default)) == (1, None)
        await either.do("update", "a", lambda data: None)
        await either.do("set", "a", 9, [1])
        await either.do("update", "a", lambda data: None)
    said = [one.getMessage() for one in caplog.records if one.name == "dscache"]
    assert said == [
        "update: record 'a': the function returned None, so null replaces the data; end the "
        "function with return and the new data (logged once)"
    ]


@pytest.mark.parametrize(("operation", "change"), [("update", dict), ("patch", {})])
async def test_python_names_a_change_that_nobody_awaits(operation: str, change: Any) -> None:
    async with dscache.AsyncCache.from_config({"name": "memory"}) as cache:
        changing = getattr(cache, operation)("a", change)
        with pytest.warns(RuntimeWarning, match=rf"'AsyncCache.{operation}' was never awaited"):
            del changing


async def test_errors_at_the_call(make_cache: MakeCache) -> None:
    cache = await make_cache()
    with pytest.raises(dscache.RecordError):
        cache.update("", lambda data: data)
    with pytest.raises(dscache.RecordError):
        cache.patch("a")
    await cache.close()
    with pytest.raises(dscache.UsageError):
        cache.update("a", lambda data: data)


# -- in threads


def test_a_blocking_cache_awaits_nothing(backend: str) -> None:
    async def change(data: int) -> int:
        return data

    with dscache.Cache.from_config({"name": "memory"}) as cache:
        with pytest.raises(dscache.UsageError, match="use a plain function, or an AsyncCache"):
            cache.update("a", change, default=0)
        assert cache.get("a") is None
        assert cache.update("a", lambda data: 1, default=0)


async def test_an_update_within_an_update_of_the_same_record(kind: str, backend: str) -> None:
    async with opened(kind, connector="memory") as cache:

        async def change(data: int) -> int:
            assert await cache.update("b", lambda data: 1, default=0)
            await cache.update("a", lambda data: 1, default=0)
            return 5

        def change_in_thread(data: int) -> int:
            assert cache.cache.update("b", lambda data: 1, default=0)
            cache.cache.update("a", lambda data: 1, default=0)
            return 5

        chosen: Any = change if kind == "async" else change_in_thread
        with pytest.raises(dscache.UsageError, match="called by the change of an update"):
            await cache.update("a", chosen, default=0)
        assert await cache.get("a") is None
        assert (await cache.update("a", lambda data: 1, default=0)).version == 1


def test_an_interrupted_change_frees_its_turn(backend: str) -> None:
    def interrupt(data: int) -> int:
        raise KeyboardInterrupt

    with dscache.Cache.from_config({"name": "memory"}) as cache:
        with pytest.raises(KeyboardInterrupt):
            cache.update("a", interrupt, default=0)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(cache.update, "a", lambda data: 1, default=0).result(PATIENCE)
        assert cache._changes._turns == {}


def test_a_turn_ends_with_its_holder(backend: str) -> None:
    """An exception may strike a thread before it can give its turn back."""
    with dscache.Cache.from_config({"name": "memory"}) as cache:
        changes = cache._changes
        changes._take_turn("update", "a", Holder(), Timing(1, time.monotonic, lambda _: 0))
        assert "a" in changes._turns
        with ThreadPoolExecutor(1) as other:
            assert other.submit(cache.update, "a", lambda data: 1, default=0).result(PATIENCE)
        assert changes._turns == {}


def test_a_forked_child_waits_for_no_thread_of_its_parent(backend: str) -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow(data: int) -> int:
        begun.set()
        assert ended.wait(PATIENCE)
        return 5

    with dscache.Cache.from_config({"name": "memory"}) as cache, ThreadPoolExecutor(1) as other:
        first = other.submit(cache.update, "a", slow, default=0)
        assert begun.wait(PATIENCE)
        child = os.fork()
        if child == 0:
            os._exit(cache.update("a", lambda data: 7, default=0).data)
        status = os.waitpid(child, 0)[1]
        ended.set()
        assert os.waitstatus_to_exitcode(status) == 7
        assert first.result(PATIENCE)


# -- many processes


def writers_of(kind: str, backend: str, url: str, times: int) -> list[dict[str, Any]]:
    """Let processes increment one record; return their outcomes."""
    options = f'{{"name": "redis", "options": {{"url": "{url}", "commandTimeout": 20000}}}}'

    def run(writer: int) -> dict[str, Any]:
        arguments = (kind, options, "counter", str(writer), str(times))
        return run_child("increments.py", *arguments, backend=backend)

    with ThreadPoolExecutor(PROCESSES) as threads:
        return list(threads.map(run, range(PROCESSES)))


@ON_ONE_SERVER
@pytest.mark.parametrize("kind", ["async"])
def test_processes_lose_no_increment(
    kind: str, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    outcomes = writers_of(kind, backend, server.url, TIMES)
    assert outcomes == [{"acknowledged": TIMES, "unknown": 0}] * PROCESSES
    with dscache.Cache.from_config(server.url) as cache:
        record = cache.get("counter")
    assert record is not None
    assert record.version == record.data["total"] == PROCESSES * TIMES


@ON_ONE_SERVER
@pytest.mark.parametrize("backend", ["fast"], indirect=True)
def test_increments_survive_the_death_of_the_server(
    kind: str, make_server: MakeServer, backend: str
) -> None:
    """None that was acknowledged is lost, and each of the others was reported as unknown."""
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    with ThreadPoolExecutor(1) as threads:
        going = threads.submit(writers_of, kind, backend, server.url, TIMES)
        with redis_py.Redis.from_url(server.url) as client:
            while int(client.get("counter_v") or 0) < PROCESSES * TIMES // 3:
                assert not going.done()
        server.kill()
        server.start()
        outcomes = going.result(5 * PATIENCE)
    with dscache.Cache.from_config(server.url) as cache:
        record = cache.get("counter")
    assert record is not None
    assert record.version == record.data["total"] == sum(record.data["of"].values())
    for writer, outcome in enumerate(outcomes):
        acknowledged, unknown = outcome["acknowledged"], outcome["unknown"]
        assert acknowledged + unknown == TIMES
        done = record.data["of"][str(writer)]
        assert acknowledged <= done <= acknowledged + unknown, (writer, outcome, done)
