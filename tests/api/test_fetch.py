"""``fetch`` and ``fetch_bulk``: one load for all callers, of AsyncCache and of Cache."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, cast

import pytest
import redis as redis_py

import dscache
from dscache import Loaded, LoadError, RecordError
from dscache.blocking.loading import _Flight
from dscache.core import loading, notes
from dscache.core.fetch_terms import terms_of
from dscache.core.holder import Holder
from dscache.core.notes import note_of, state_of
from dscache.core.refreshes import MOST_REFRESHES
from dscache.embedded import EmbeddedServer
from tests.conftest import PATIENT, SERVERS, MakeCache, _server_id
from tests.programs.fetching import CALLERS
from tests.support.blocking import in_threads
from tests.support.blocking import until as until_blocking
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.parametrize("server", SERVERS[-1:], indirect=True, ids=_server_id)

KINDS = pytest.mark.parametrize("kind", ["async", "blocking"])
PLACES = pytest.mark.parametrize("place", ["redis", "memory", "near", "hashtag"])
OPTIONS: dict[str, dict[str, Any]] = {
    "redis": {"keyPrefix": "p:"},
    "memory": {},
    "near": {"nearCache": {"idleLimit": 30_000}},
    "hashtag": {"keyLayout": "hashtag"},
}


caller: ContextVar[str] = ContextVar("caller", default="none")


class Source:
    """A source of data: counts its loads, and waits in each while it is shut."""

    def __init__(self, *results: Any) -> None:
        self.results = list(results)
        self.loads = 0
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, name: str) -> Any:
        self.loads += 1
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        await self.open.wait()
        if isinstance(result, BaseException):
            raise result
        return result


async def in_place(make_cache: MakeCache, place: str) -> dscache.AsyncCache:
    name = "memory" if place == "memory" else "redis"
    return await make_cache(name=name, **OPTIONS[place])


@contextmanager
def opened(server: EmbeddedServer, **options: Any) -> Iterator[dscache.Cache]:
    config = {"name": "redis", "options": {"url": server.url, **PATIENT, **options}}
    with dscache.Cache.from_config(config) as cache:
        yield cache


async def bulk_of(
    kind: str, cache: dscache.AsyncCache, blocking: dscache.Cache, load: Any, **options: Any
) -> dict[str, dscache.Record]:
    """Fetch "a" and "b" by one of the caches."""
    if kind == "async":
        return await cache.fetch_bulk(["a", "b"], load, **options)
    return blocking.fetch_bulk(["a", "b"], load, **options)


async def fetch_by(
    kind: str, cache: dscache.AsyncCache, blocking: dscache.Cache, load: Any, **options: Any
) -> dscache.Record | None:
    """Fetch "n" by one of the caches."""
    options = {"ttl": 60} | options
    if kind == "async":
        return await cache.fetch("n", load, **options)
    return blocking.fetch("n", load, **options)


# -- a miss


@PLACES
async def test_a_miss_is_loaded_once_and_then_read(make_cache: MakeCache, place: str) -> None:
    cache = await in_place(make_cache, place)
    source = Source(Loaded(3, {"a": 1}))
    records = await asyncio.gather(*(cache.fetch("n", source, ttl=60) for _ in range(20)))
    assert source.loads == 1
    assert {(one.name, one.version, one.raw) for one in records if one} == {("n", 3, b'{"a":1}')}
    data = [one.data for one in records if one]
    assert len({id(one) for one in data}) == 20, "decoded data is shared"
    stored = await cache.get("n")
    assert stored == records[0]
    assert await cache.get(note_of("n")) is None, "the lease was not released"
    assert await cache.fetch("n", source, ttl=60) == stored
    assert source.loads == 1


async def test_a_blocking_miss_is_loaded_once(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    loads = []

    def load(name: str) -> Any:
        loads.append(name)
        assert begun.wait(PATIENCE)
        return [1, 2]

    begun = threading.Event()
    with opened(server) as cache:
        threading.Timer(0.05, begun.set).start()
        records = in_threads(8, lambda _: cache.fetch("n", load, ttl=60))
        assert loads == ["n"]
        assert {one.raw for one in records} == {b"[1,2]"}
        assert len({id(one.data) for one in records}) == 8
        assert cache.fetch("n", load, ttl=60) == records[0]
    assert sorted(redis.keys()) == [b"n_d", b"n_v"]
    assert 50 <= redis.ttl("n_v") <= 66


@PLACES
async def test_notes_are_no_records_of_a_scan_or_a_watch(make_cache: MakeCache, place: str) -> None:
    cache = await in_place(make_cache, place)
    async with cache.watch() as changes:
        assert await cache.fetch("user/1", lambda name: 1, ttl=60, refresh_after=30) is not None
        assert await cache.fetch("none", lambda name: None, ttl=60, keep_missing=30) is None
        assert await cache.head("none}:fetch") is not None
        await cache.set("z", 1, 0)
        seen = set()
        async with asyncio.timeout(PATIENCE):
            async for change in changes:
                seen.add(change.name)
                if change.name == "z":
                    break
    assert seen == {"user/1", "z"}
    assert sorted([name async for name in cache.scan()]) == ["user/1", "z"]


async def test_a_version_grows_without_one_of_its_own(cache: dscache.AsyncCache) -> None:
    first = await cache.fetch("n", lambda name: name, ttl=60)
    assert first is not None
    assert first.version > 1_600_000_000_000
    ahead = loading.record_of("n", "data", dscache.Record("n", 2**62, b"1"))
    assert ahead.version == 2**62 + 1


async def test_a_tuple_is_data(cache: dscache.AsyncCache) -> None:
    record = await cache.fetch("n", lambda _: (3, "x"), ttl=60)
    assert record is not None
    assert record.raw == b'[3,"x"]'


async def test_a_newer_write_stays(make_cache: MakeCache) -> None:
    cache, other = await make_cache(), await make_cache()
    source = Source(Loaded(1, "old"))
    source.open.clear()
    call = asyncio.ensure_future(cache.fetch("n", source, ttl=60))
    await until(lambda: source.loads)
    await other.set("n", 5, "newer")
    source.open.set()
    record = await call
    assert record is not None
    assert (record.version, record.data) == (5, "newer")
    assert await other.head("n") == 5


async def test_a_cancelled_caller_ends_no_load(cache: dscache.AsyncCache) -> None:
    source = Source("data")
    source.open.clear()
    calls = [asyncio.ensure_future(cache.fetch("n", source, ttl=60)) for _ in range(3)]
    await until(lambda: source.loads)
    calls[0].cancel()
    await asyncio.wait([calls[0]])
    assert calls[0].cancelled()
    source.open.set()
    records = await asyncio.gather(*calls[1:])
    assert [one.data for one in records if one] == ["data", "data"]
    assert source.loads == 1


async def test_close_ends_a_load_and_its_lease(make_cache: MakeCache) -> None:
    cache, other = await make_cache(), await make_cache()
    source = Source("data")
    source.open.clear()
    call = asyncio.ensure_future(cache.fetch("n", source, ttl=60))
    await until(lambda: source.loads)
    await cache.close()
    with pytest.raises(dscache.ConnectionLost, match="cancelled"):
        await call
    assert await other.get(note_of("n")) is None


async def test_a_load_that_fetches_its_own_record_is_refused(cache: dscache.AsyncCache) -> None:
    async def load(name: str) -> Any:
        return await cache.fetch(name, load, ttl=60)

    with pytest.raises(LoadError, match="UsageError") as caught:
        await cache.fetch("n", load, ttl=60)
    assert "wait for itself" in str(caught.value.__cause__)


async def test_an_interrupted_thread_leaves_the_load_to_the_next(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    turns = iter([SystemExit(), "data"])
    begun = threading.Event()
    with opened(server) as cache:

        def load(_: str) -> Any:
            turn = next(turns)
            if isinstance(turn, str):
                return turn
            begun.set()
            until_blocking(lambda: waits.is_alive())
            raise turn

        found: list[Any] = []
        waits = threading.Thread(target=lambda: found.append(cache.fetch("n", load, ttl=60)))

        def first() -> None:
            with pytest.raises(SystemExit):
                cache.fetch("n", load, ttl=60)

        leads = threading.Thread(target=first)
        leads.start()
        assert begun.wait(PATIENCE)
        waits.start()
        waits.join(PATIENCE)
        leads.join(PATIENCE)
        assert [one.data for one in found] == ["data"]


# -- failing loads, and nothing


@PLACES
async def test_a_failing_load_is_raised_to_all_and_not_repeated_at_once(
    make_cache: MakeCache, place: str
) -> None:
    cache = await in_place(make_cache, place)
    source = Source(ValueError("pa55"), "data")
    calls = (cache.fetch("n", source, ttl=60) for _ in range(5))
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [LoadError] * 5
    assert len(set(map(id, errors))) == 5
    for error in errors:
        assert isinstance(error, LoadError)
        assert (error.name, type(error.__cause__)) == ("n", ValueError)
        assert "ValueError" in str(error)
        assert "pa55" not in str(error)
    assert source.loads == 1
    with pytest.raises(LoadError, match=r"another call.*ValueError"):
        await cache.fetch("n", source, ttl=60)
    assert source.loads == 1
    await cache.delete(note_of("n"))  # as it ends by itself
    record = await cache.fetch("n", source, ttl=60)
    assert record is not None
    assert record.data == "data"


async def test_a_blocking_failing_load_is_raised(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    def load(_: str) -> Any:
        raise KeyError("x")

    with opened(server) as cache:
        with pytest.raises(LoadError, match="KeyError") as caught:
            cache.fetch("n", load, ttl=60)
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(LoadError, match="another call"):
            cache.fetch("n", load, ttl=60)


@KINDS
@pytest.mark.parametrize("made", [object(), Loaded(-1, {})], ids=["data", "version"])
async def test_what_is_no_record_is_a_failed_load(
    server: EmbeddedServer, make_cache: MakeCache, kind: str, made: Any
) -> None:
    def load(_: str) -> Any:
        loads.append(1)
        return made

    loads: list[int] = []
    cache = await make_cache()
    with opened(server) as blocking:
        refused = "'n': its load returned data that can't be stored"
        for text in (refused, "just failed in another call"):
            with pytest.raises(LoadError, match=text) as caught:
                await fetch_by(kind, cache, blocking, load)
            if "made" in text:
                assert type(caught.value.__cause__) is RecordError
    assert len(loads) == 1
    assert state_of(await cache.get(note_of("n"))) == "failed"


async def test_a_refresh_that_makes_no_record_keeps_the_old_one(cache: dscache.AsyncCache) -> None:
    await cache.set("n", 1, "old")
    record = await cache.fetch("n", lambda _: object(), ttl=60, refresh_after=30)
    await until(lambda: not cache._loads._tasks)
    assert record is not None
    assert await cache.get("n") == record
    assert state_of(await cache.get(note_of("n"))) == "stale"


class AsyncLoad:
    async def __call__(self, name: str) -> Any:
        return name


async def async_load(name: Any) -> Any:
    return name


@pytest.mark.parametrize("load", [async_load, AsyncLoad(), functools.partial(async_load)])
async def test_an_async_load_is_refused_by_a_cache_at_once(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis, load: Any
) -> None:
    with opened(server) as cache:
        cache.set("n", 1, {})
        for call in (lambda: cache.fetch("n", load, ttl=9), lambda: cache.fetch("x", load, ttl=9)):
            with pytest.raises(TypeError, match="fetch: load is a coroutine function"):
                call()
        with pytest.raises(TypeError, match="fetch_bulk: load_many is a coroutine function"):
            cache.fetch_bulk(["n"], load, ttl=9)
        with pytest.raises(LoadError) as caught:
            cache.fetch("x", lambda name: load(name), ttl=9)
        assert isinstance(caught.value.__cause__, TypeError)


@PLACES
async def test_arguments_that_are_no_functions_are_refused_at_the_call(
    server: EmbeddedServer, make_cache: MakeCache, place: str
) -> None:
    cache, bad = await in_place(make_cache, place), cast("Any", 5)
    await cache.set("n", 1, {})
    for name in ("n", "missing"):
        with pytest.raises(TypeError, match="fetch: load must be a function, not 5"):
            await cache.fetch(name, bad, ttl=60)
        with pytest.raises(TypeError, match="fetch_bulk: load_many must be a function"):
            await cache.fetch_bulk([name], bad, ttl=60)
        with pytest.raises(TypeError, match="update: change must be a function, not 5"):
            cache.update(name, bad)
        with opened(server) as blocking:
            with pytest.raises(TypeError, match="fetch: load must be a function, not 5"):
                blocking.fetch(name, bad, ttl=60)
            with pytest.raises(TypeError, match="fetch_bulk: load_many must be a function"):
                blocking.fetch_bulk([name], bad, ttl=60)
            with pytest.raises(TypeError, match="update: change must be a function, not 5"):
                blocking.update(name, bad)


@PLACES
@pytest.mark.parametrize("refresh_after", [None, 30])
async def test_the_name_of_a_note_is_refused(
    server: EmbeddedServer, make_cache: MakeCache, place: str, refresh_after: int | None
) -> None:
    cache = await in_place(make_cache, place)
    source = Source("data")
    source.open.clear()
    call = asyncio.ensure_future(cache.fetch("x", source, ttl=60))
    await until(lambda: source.loads)
    for name in ("x}:fetch", "}:fetch", "free}:fetch"):
        with pytest.raises(RecordError, match=r"names that end with \}:fetch belong to fetch"):
            await cache.fetch(name, lambda _: 1, ttl=60, refresh_after=refresh_after)
        with pytest.raises(RecordError, match=r"names that end with \}:fetch belong to fetch"):
            await cache.fetch_bulk(["n", name], lambda _: {}, ttl=60)
    source.open.set()
    assert await call is not None
    with opened(server, **OPTIONS[place] if place == "hashtag" else {}) as blocking:
        with pytest.raises(RecordError, match="belong to fetch"):
            blocking.fetch("x}:fetch", lambda _: 1, ttl=60, refresh_after=refresh_after)
        with pytest.raises(RecordError, match="belong to fetch"):
            blocking.fetch_bulk(["x}:fetch"], lambda _: {}, ttl=60)


@PLACES
async def test_nothing_is_remembered_for_keep_missing(make_cache: MakeCache, place: str) -> None:
    cache = await in_place(make_cache, place)
    source = Source(None)
    assert await cache.fetch("n", source, ttl=60) is None
    assert await cache.fetch("n", source, ttl=60) is None
    assert source.loads == 2
    assert await cache.fetch("n", source, ttl=60, keep_missing=60) is None
    assert await cache.fetch("n", source, ttl=60, keep_missing=60) is None
    assert source.loads == 3
    await cache.set("n", 1, "written")
    record = await cache.fetch("n", source, ttl=60, keep_missing=60)
    assert record is not None
    assert record.data == "written"


@PLACES
@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "bulk"])
@pytest.mark.parametrize("is_own", [False, True], ids=["another cache", "own"])
async def test_a_removal_ends_what_is_remembered(
    make_cache: MakeCache, place: str, bulk: bool, is_own: bool
) -> None:
    cache = await in_place(make_cache, place)
    other = cache if is_own or place == "memory" else await in_place(make_cache, place)
    source = Source(None)
    options: dict[str, Any] = {"ttl": 60, "keep_missing": 60}
    await other.fetch("unrelated", lambda name: name, **options)
    assert await cache.fetch("n", source, **options) is None
    if bulk:
        assert await other.delete_bulk(iter(["n", "m"])) == 0
    else:
        assert await other.delete("n") is False
    assert await cache.fetch("n", source, **options) is None
    assert source.loads == 2
    await cache.set_bulk({"n": (1, "written")}) if bulk else await cache.set("n", 1, "written")
    assert await cache.get(note_of("n")) is None
    assert await cache.update("n", lambda _: dscache.DELETE) is None
    assert await cache.fetch("n", source, **options) is None
    assert source.loads == 3


async def test_a_blocking_write_or_removal_ends_what_is_remembered(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    options: dict[str, Any] = {"ttl": 60, "keep_missing": 60}
    ends: list[Callable[[dscache.Cache], Any]] = [
        lambda cache: cache.delete("n"),
        lambda cache: cache.delete_bulk(iter(["n"])),
        lambda cache: cache.set("n", 1, {}),
        lambda cache: cache.set_bulk({"n": (1, {})}),
        lambda cache: cache.update("n", lambda data: data, default={}),
        lambda cache: cache.patch("n", {}, default={}),
    ]
    with opened(server) as cache:
        for end in ends:
            assert cache.fetch("n", lambda _: None, **options) is None
            assert redis.exists("n}:fetch_v")
            end(cache)
            assert not redis.exists("n}:fetch_v")
            redis.delete("n_v", "n_d")


@KINDS
@pytest.mark.parametrize("place", ["redis", "near", "hashtag"])
@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "bulk"])
async def test_a_record_of_another_program_ends_what_is_remembered(
    server: EmbeddedServer, make_cache: MakeCache, kind: str, place: str, bulk: bool
) -> None:
    """That program removes the record again, and leaves the note, of which it knows nothing."""
    cache, other = [await in_place(make_cache, place) for _ in range(2)]
    loads: list[str] = []
    options: dict[str, Any] = {"ttl": 60, "keep_missing": 60}
    with opened(server, **OPTIONS[place]) as blocking:

        async def fetch() -> int | None:
            """Return the version of the record "a"."""
            if bulk:
                found = await bulk_of(kind, cache, blocking, load_many, **options)
                return found["a"].version if "a" in found else None
            if kind == "async":
                record = await cache.fetch("a", loads.append, **options)
            else:
                record = await asyncio.to_thread(blocking.fetch, "a", loads.append, **options)
            return None if record is None else record.version

        def load_many(names: list[str]) -> dict[str, Any]:
            loads.extend(names)
            return {}

        async def until_read(version: int | None) -> None:
            """Wait until the near cache has heard of a change."""
            async with asyncio.timeout(PATIENCE):
                while await fetch() != version:
                    await asyncio.sleep(0.002)

        assert [await fetch(), await fetch()] == [None, None]
        assert loads.count("a") == 1
        await other.set("a", 7, "of another program")
        await until_read(7)
        assert await other.get(note_of("a")) is None
        await other.delete("a")
        await until_read(None)
        assert loads.count("a") == 2


@KINDS
async def test_a_record_counts_more_than_a_remembered_nothing(
    server: EmbeddedServer, make_cache: MakeCache, redis: redis_py.Redis, kind: str
) -> None:
    cache = await make_cache()
    versions = iter([3, 4])
    options: dict[str, Any] = {"ttl": 60, "refresh_after": 30, "keep_missing": 60}
    with opened(server) as blocking:

        async def fetch(load: Any) -> dscache.Record | None:
            cache._loads.checks.recent.clear()
            blocking._loads.checks.recent.clear()
            return await fetch_by(kind, cache, blocking, load, **options)

        assert await fetch(lambda _: None) is None
        redis.mset({"n_v": 2, "n_d": '"of another program"'})
        record = await fetch(lambda _: Loaded(next(versions), "anew"))
        await until(lambda: not cache._loads._tasks)
        assert record is not None
        assert record.version == (2 if kind == "async" else 3), "it was not due"
        assert redis.get("n_v") == b"3"
        assert (await fetch(lambda _: Loaded(next(versions), "anew"))) == await cache.get("n")
        assert redis.get("n_v") == b"3"


# -- rings


@PLACES
@pytest.mark.parametrize("length", [2, 3])
async def test_a_ring_of_loads_fails(make_cache: MakeCache, place: str, length: int) -> None:
    cache = await in_place(make_cache, place)

    async def load(name: str) -> Any:
        await asyncio.sleep(0.01)  # so that each load of a ring is under way
        following = str((int(name) + 1) % length)
        (record,) = await asyncio.gather(cache.fetch(following, load, ttl=60))
        return record and record.data

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(LoadError, match=r"'0'.*LoadError"):
            await cache.fetch("0", load, ttl=60)
        for name in map(str, range(length)):
            await cache.delete(note_of(name))
        calls = [cache.fetch(str(name), load, ttl=60) for name in range(length)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [LoadError] * length
    assert any("would wait for itself" in text for text in map(causes_of, errors))


def causes_of(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return " < ".join(texts)


def test_a_ring_of_threads_fails(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    def load(name: str) -> Any:
        begun.wait(0.1)
        record = cache.fetch("b" if name == "a" else "a", load, ttl=60)
        return record and record.data

    def fetch(number: int) -> Any:
        try:
            return cache.fetch("ab"[number], load, ttl=60)
        except LoadError as error:
            return error

    begun = threading.Event()
    with opened(server) as cache:
        errors = [*in_threads(1, fetch)]
        redis.flushdb()
        errors += in_threads(2, fetch)
    assert [type(error) for error in errors] == [LoadError] * 3
    assert "would wait for itself" in causes_of(errors[0])


async def test_a_task_that_a_load_has_begun_may_fetch_after_it(cache: dscache.AsyncCache) -> None:
    begun: list[asyncio.Task[Any]] = []

    async def fetch_later() -> Any:
        await until(lambda: "n" in done)
        return await cache.fetch("n", lambda _: 1, ttl=60)

    def load(name: str) -> Any:
        begun.append(asyncio.ensure_future(fetch_later()))
        return "data"

    done: list[str] = []
    first = await cache.fetch("n", load, ttl=60)
    done.append("n")
    assert await begun[0] == first


# -- refreshes


async def age(cache: dscache.AsyncCache, name: str) -> None:
    """End the note that says that a record is fresh, as time does, and what is known of it."""
    await cache.delete(note_of(name))
    cache._loads.checks.recent.clear()


@PLACES
async def test_an_old_record_is_served_while_it_is_refreshed(
    make_cache: MakeCache, place: str
) -> None:
    cache = await in_place(make_cache, place)
    source = Source(Loaded(1, "a"), Loaded(2, "b"))

    async def fetch() -> int | None:
        record = await cache.fetch("n", source, ttl=60, refresh_after=30)
        return record and record.version

    assert await fetch() == 1
    note = await cache.get(note_of("n"))
    assert state_of(note) == "fresh"
    cache._loads.checks.recent.clear()
    assert await fetch() == 1
    assert source.loads == 1
    await age(cache, "n")
    source.open.clear()
    assert await asyncio.gather(*(fetch() for _ in range(9))) == [1] * 9
    await until(lambda: source.loads == 2)
    assert await fetch() == 1
    source.open.set()
    async with asyncio.timeout(PATIENCE):
        while await fetch() != 2:
            await asyncio.sleep(0.002)
    assert source.loads == 2


async def test_a_failing_refresh_keeps_the_record(
    cache: dscache.AsyncCache, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(Loaded(1, "a"), ValueError())
    await cache.fetch("n", source, ttl=60, refresh_after=30)
    await age(cache, "n")
    record = await cache.fetch("n", source, ttl=60, refresh_after=30)
    assert record is not None
    await until(lambda: not cache._loads._tasks)
    assert source.loads == 2
    assert "was not refreshed" in caplog.text
    assert await cache.get("n") == record
    assert state_of(await cache.get(note_of("n"))) == "stale"
    # That note keeps nobody from loading a record that has ended.
    await cache.delete("n")
    source.results = [Loaded(3, "c")]
    record = await cache.fetch("n", source, ttl=60, refresh_after=30)
    assert record is not None
    assert record.version == 3


async def test_a_refresh_that_finds_nothing_removes_the_record(cache: dscache.AsyncCache) -> None:
    source = Source(Loaded(1, "a"), None)
    await cache.fetch("n", source, ttl=60, refresh_after=30)
    await age(cache, "n")
    await cache.fetch("n", source, ttl=60, refresh_after=30, keep_missing=60)
    await until(lambda: not cache._loads._tasks)
    assert await cache.get("n") is None
    assert state_of(await cache.get(note_of("n"))) == "missing"


async def test_a_refresh_moves_no_record_back(cache: dscache.AsyncCache) -> None:
    source = Source(Loaded(9, "a"), Loaded(4, "behind"))
    await cache.fetch("n", source, ttl=60, refresh_after=30)
    await age(cache, "n")
    await cache.fetch("n", source, ttl=60, refresh_after=30)
    await until(lambda: not cache._loads._tasks)
    assert source.loads == 2
    assert await cache.head("n") == 9


async def test_one_thread_refreshes(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    versions = iter([1, 2])
    begun, going = threading.Event(), threading.Event()

    def load(_: str) -> Loaded:
        version = next(versions)
        if version == 2:
            begun.set()
            assert going.wait(PATIENCE)
        return Loaded(version, "data")

    with opened(server) as cache:

        def fetch(_: int = 0) -> int:
            record = cache.fetch("n", load, ttl=60, refresh_after=30)
            assert record is not None
            return record.version

        assert fetch() == 1
        cache.delete(note_of("n"))
        cache._loads.checks.recent.clear()
        found: list[int] = []
        refreshing = threading.Thread(target=lambda: found.append(fetch()))
        refreshing.start()
        assert begun.wait(PATIENCE)
        assert in_threads(4, fetch) == [1] * 4
        going.set()
        refreshing.join(PATIENCE)
        assert found == [2]


@PLACES
async def test_refreshes_are_bounded_and_hold_up_no_other_call(
    make_cache: MakeCache, place: str
) -> None:
    cache = await in_place(make_cache, place)
    names = [f"n/{number}" for number in range(3 * MOST_REFRESHES)]
    await cache.set_bulk(dict.fromkeys(names, (1, "old")))
    gate, begun = asyncio.Event(), []

    async def load(name: str) -> Loaded:
        begun.append(name)
        if name != "gone":
            await gate.wait()
        return Loaded(2, "new")

    async def fetch(name: str) -> int | None:
        record = await cache.fetch(name, load, ttl=60, refresh_after=30)
        return record and record.version

    async with asyncio.timeout(PATIENCE):
        assert {await fetch(name) for name in names} == {1}
        await until(lambda: len(begun) == MOST_REFRESHES)
        assert begun == names[:MOST_REFRESHES]
        # What there is none of is loaded at once, also if its refresh waits.
        assert await fetch("gone") == 2
        assert set(await asyncio.gather(*map(fetch, names))) == {1}
        gate.set()
        await until(lambda: not cache._loads._tasks)
    assert sorted(begun) == sorted(["gone", *names])
    assert await cache.head_bulk(names) == dict.fromkeys(names, 2)


async def test_a_record_that_ends_while_its_refresh_waits_is_loaded_at_once(
    cache: dscache.AsyncCache,
) -> None:
    names = [f"n/{number}" for number in range(MOST_REFRESHES + 1)]
    await cache.set_bulk(dict.fromkeys(names, (1, "old")))
    gate = asyncio.Event()
    loads: list[str] = []

    async def load(name: str) -> Loaded:
        loads.append(name)
        if len(loads) <= MOST_REFRESHES:
            await gate.wait()
        return Loaded(2, "new")

    async with asyncio.timeout(PATIENCE):
        for name in names:
            await cache.fetch(name, load, ttl=60, refresh_after=30)
        await until(lambda: len(loads) == MOST_REFRESHES)
        await cache.delete(names[-1])
        record = await cache.fetch(names[-1], load, ttl=60, refresh_after=30)
        assert record is not None
        assert record.version == 2
        gate.set()
        await until(lambda: not cache._loads._tasks)
    assert loads == names, "the refresh that waited has loaded again"


async def test_refreshes_of_bulks_wait_for_their_turn(cache: dscache.AsyncCache) -> None:
    names = [f"n/{number}" for number in range(MOST_REFRESHES + 3)]
    await cache.set_bulk(dict.fromkeys(names, (1, "old")))
    gate, begun = asyncio.Event(), []

    async def load_many(names: list[str]) -> dict[str, Loaded]:
        begun.append(names)
        await gate.wait()
        return dict.fromkeys(names, Loaded(2, "new"))

    async with asyncio.timeout(PATIENCE):
        for name in names:
            await cache.fetch_bulk([name], load_many, ttl=60, refresh_after=30)
        await until(lambda: len(begun) == MOST_REFRESHES)
        await asyncio.sleep(0.01)
        assert begun == [[name] for name in names[:MOST_REFRESHES]]
        gate.set()
        await until(lambda: not cache._loads._tasks)
    assert await cache.head_bulk(names) == dict.fromkeys(names, 2)


async def test_each_refresh_runs_in_the_context_of_its_caller(cache: dscache.AsyncCache) -> None:
    await cache.set_bulk({"a": (1, "old"), "b": (1, "old"), "c": (1, "old")})
    seen: dict[str, list[str]] = {name: [] for name in "abc"}

    async def load(name: str) -> str:
        seen[name].append(caller.get())
        await asyncio.sleep(0)
        seen[name].append(caller.get())
        return "new"

    def load_c(name: str) -> str:
        seen[name] += [caller.get()] * 2
        return "new"

    async def fetch(name: str) -> None:
        caller.set(name)
        await cache.fetch(name, load_c if name == "c" else load, ttl=60, refresh_after=30)

    await asyncio.gather(*map(fetch, "abc"))
    await until(lambda: not cache._loads._tasks)
    assert seen == {"a": ["a", "a"], "b": ["b", "b"], "c": ["c", "c"]}


async def test_a_cancelled_refresh_keeps_the_record_and_no_lease(
    cache: dscache.AsyncCache, caplog: pytest.LogCaptureFixture
) -> None:
    await cache.set_bulk({"a": (1, "old"), "b": (1, "old"), "c": (1, "old")})

    async def load(name: str) -> Loaded:
        if name == "a":
            raise asyncio.CancelledError
        if name == "b":
            raise ValueError
        return Loaded(2, "new")

    await asyncio.gather(
        *(cache.fetch(name, load, ttl=60, refresh_after=30) for name in "abc"),
    )
    await until(lambda: not cache._loads._tasks)
    assert await cache.head_bulk(["a", "b", "c"]) == {"a": 1, "b": 1, "c": 2}
    states = [state_of(await cache.get(note_of(name))) for name in "abc"]
    assert states == ["", "stale", "fresh"]
    assert caplog.text.count("was not refreshed") == 1


async def test_close_ends_refreshes_that_run_and_wait(make_cache: MakeCache) -> None:
    cache = await make_cache()
    other = await make_cache()
    names = [f"n/{number}" for number in range(2 * MOST_REFRESHES)]
    await cache.set_bulk(dict.fromkeys(names, (1, "old")))
    begun = []

    async def load(name: str) -> Loaded:
        begun.append(name)
        await asyncio.Event().wait()
        return Loaded(2, "new")

    for name in names:
        await cache.fetch(name, load, ttl=60, refresh_after=30)
    await until(lambda: len(begun) == MOST_REFRESHES)
    await cache.close()
    assert not cache._loads._tasks
    assert len(begun) == MOST_REFRESHES
    assert not await other.get_bulk(map(note_of, names)), "a lease is left"


def test_so_many_threads_refresh_at_once(
    server: EmbeddedServer,
    backend: str,
    redis: redis_py.Redis,  # empties the server
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dscache.blocking.loading.MOST_REFRESHES", 2)
    gate, begun = threading.Event(), []

    def load(name: str) -> Loaded:
        begun.append(name)
        assert name == "gone" or gate.wait(PATIENCE)
        return Loaded(2, "new")

    with opened(server) as cache:

        def fetch(name: str) -> int | None:
            record = cache.fetch(name, load, ttl=60, refresh_after=30)
            return record and record.version

        cache.set_bulk(dict.fromkeys("abc", (1, "old")))
        refreshing = [threading.Thread(target=fetch, args=(name,)) for name in "ab"]
        for thread in refreshing:
            thread.start()
        until_blocking(lambda: len(begun) == 2)
        assert fetch("c") == 1
        assert fetch("gone") == 2
        gate.set()
        for thread in refreshing:
            thread.join(PATIENCE)
        # Threads that were struck at their very end have left their loads behind.
        for name in ("struck", "too"):
            left = _Flight([name], Holder())
            cache._loads._flights[True, frozenset([name])] = left
            assert left.is_over()
        cache._loads.checks.recent.clear()
        assert fetch("c") == 2
    assert sorted(begun) == ["a", "b", "c", "gone"]


# -- leases


async def test_a_lease_is_renewed_and_released_by_its_token_alone(
    cache: dscache.AsyncCache, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "RENEW_SECONDS", 0.01)
    source = Source("data")
    source.open.clear()
    call = asyncio.ensure_future(cache.fetch("n", source, ttl=60))
    await until(lambda: source.loads)
    note = note_of("n")
    token = redis.get(f"{note}_v")
    for half in "vd":
        redis.persist(f"{note}_{half}")
    await until(lambda: redis.pttl(f"{note}_v") > 0)
    assert redis.get(f"{note}_v") == token
    # Another caller has taken the lease over, as if this one had been silent for too long.
    redis.mset({f"{note}_v": 1, f"{note}_d": '{"state":"loading"}'})
    source.open.set()
    assert await call is not None
    assert redis.get(f"{note}_v") == b"1"


@contextmanager
def processes(
    server: EmbeddedServer, backend: str, seconds: float
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start four processes, half of them of threads, and let them begin together."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.programs.fetching", kind, server.url, str(seconds)],
            env={**os.environ, "DSCACHE_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in ("async", "blocking") * 2
    ]
    try:
        for one in started:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in started:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        yield started
    finally:
        for one in started:
            one.kill()
            one.communicate()


def test_many_callers_of_four_processes_load_once(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    with processes(server, backend, 0.5) as started:
        versions = [json.loads(one.communicate(timeout=PATIENCE)[0]) for one in started]
    assert versions == [[7] * CALLERS] * 4
    assert redis.get("loads") == b"1"


def test_a_killed_loader_is_replaced_once(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    with processes(server, backend, 2) as started:
        until_blocking(lambda: redis.get("loader"))
        loader = int(redis.get("loader") or 0)
        os.kill(loader, signal.SIGKILL)
        others = [one for one in started if one.pid != loader]
        versions = [json.loads(one.communicate(timeout=PATIENCE)[0]) for one in others]
    assert versions == [[7] * CALLERS] * 3
    assert redis.get("loads") == b"2"


def test_a_ring_over_processes_fails_in_all_of_them(
    server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> None:
    kinds = {"a": "async", "b": "blocking", "c": "async"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.programs.ring", kind, server.url, name, following, "3"],
            env={**os.environ, "DSCACHE_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for (name, kind), following in zip(kinds.items(), "bca", strict=True)
    ]
    try:
        causes = [json.loads(one.communicate(timeout=PATIENCE)[0]) for one in started]
    finally:
        for one in started:
            one.kill()
            one.communicate()
    assert all(causes), "a load in the ring has ended without an error"
    assert "fetches a record whose load fetches this one" in str(causes)
    assert not redis.exists("a_v", "b_v", "c_v")


# -- many names


@PLACES
async def test_a_bulk_loads_the_missing_names_in_one_call(
    make_cache: MakeCache, place: str
) -> None:
    cache = await in_place(make_cache, place)
    asked: list[list[str]] = []

    async def load_many(names: list[str]) -> dict[str, Any]:
        asked.append(sorted(names))
        return {"b": Loaded(2, "new"), "c": "plain", "extra": 1}

    await cache.set("a", 1, "there")
    records = await cache.fetch_bulk(["d", "c", "a", "b"], load_many, ttl=60, keep_missing=60)
    assert list(records) == ["c", "a", "b"]
    assert {name: one.data for name, one in records.items()} == {
        "c": "plain",
        "a": "there",
        "b": "new",
    }
    assert asked == [["b", "c", "d"]]
    again = await cache.fetch_bulk(["d", "c", "a", "b"], load_many, ttl=60, keep_missing=60)
    assert again == records
    assert len(asked) == 1
    assert await cache.get("extra") is None


async def test_a_bulk_waits_for_the_names_that_others_load(cache: dscache.AsyncCache) -> None:
    source = Source("of the other")
    source.open.clear()
    other = asyncio.ensure_future(cache.fetch("a", source, ttl=60))
    await until(lambda: source.loads)
    asked: list[list[str]] = []

    def load_many(names: list[str]) -> dict[str, Any]:
        asked.append(names)
        source.open.set()
        return dict.fromkeys(names, "own")

    records = await cache.fetch_bulk(["a", "b"], load_many, ttl=60)
    assert {name: one.data for name, one in records.items()} == {"a": "of the other", "b": "own"}
    assert asked == [["b"]]
    assert await other == records["a"]


@KINDS
async def test_a_failing_bulk_has_the_records_that_were_there(
    server: EmbeddedServer, make_cache: MakeCache, kind: str
) -> None:
    def load_many(_: list[str]) -> Any:
        raise OSError("source")

    cache = await make_cache()
    await cache.set("a", 1, "there")
    with opened(server) as blocking, pytest.raises(dscache.BulkError) as caught:
        await bulk_of(kind, cache, blocking, load_many, ttl=60)
    assert list(caught.value.result) == ["a"]
    assert type(caught.value.errors["b"]) is LoadError


@KINDS
async def test_a_bulk_is_refreshed(
    server: EmbeddedServer, make_cache: MakeCache, kind: str
) -> None:
    cache = await make_cache()
    await cache.set_bulk({"a": (1, "old"), "b": (1, "old")})

    def load_many(names: list[str]) -> dict[str, Any]:
        return {name: Loaded(2, "new") for name in names}

    with opened(server) as blocking:
        found = await bulk_of(kind, cache, blocking, load_many, ttl=60, refresh_after=30)
    await until(lambda: not cache._loads._tasks)
    # A thread refreshes by itself, and a task in the background.
    assert {one.version for one in found.values()} == {1 if kind == "async" else 2}
    assert await cache.head_bulk(["a", "b"]) == {"a": 2, "b": 2}


# -- options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ttl": -1}, "ttl must be whole seconds"),
        ({"ttl": 1.5}, "ttl must be whole seconds"),
        ({"ttl": True}, "ttl must be whole seconds"),
        ({"ttl": "60"}, "ttl must be whole seconds"),
        ({"ttl": 60, "refresh_after": 0}, "refresh_after must be whole seconds"),
        ({"ttl": 60, "refresh_after": 60}, "refresh_after must be less than the ttl"),
        ({"ttl": 60, "keep_missing": "x"}, "keep_missing must be whole seconds"),
        ({"ttl": timedelta(0)}, "ttl must be whole seconds.*; write 0 for no lifetime"),
        (
            {"ttl": timedelta(minutes=1), "refresh_after": timedelta(seconds=60)},
            "must be less than",
        ),
        (
            {"ttl": 60, "refresh_after": timedelta(seconds=0.5)},
            "refresh_after must be whole seconds",
        ),
        ({"ttl": 60, "keep_missing": timedelta(seconds=-1)}, "keep_missing must be whole seconds"),
        ({"ttl": 60, "jitter": 1}, "jitter must be a number"),
    ],
)
async def test_bad_options_are_refused(
    cache: dscache.AsyncCache, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(RecordError, match=text):
        await cache.fetch("n", lambda name: name, **options)


async def test_a_bad_name_is_refused(server: EmbeddedServer, cache: dscache.AsyncCache) -> None:
    for refresh_after in (None, 30):
        with pytest.raises(RecordError, match="must not be empty"):
            await cache.fetch("", lambda name: name, ttl=60, refresh_after=refresh_after)
        with opened(server) as blocking, pytest.raises(RecordError, match="must not be empty"):
            blocking.fetch("", lambda name: name, ttl=60, refresh_after=refresh_after)


def test_a_lifetime_has_jitter(server: EmbeddedServer) -> None:
    terms = terms_of(100, None, 0.1, None, None)
    lifetimes = {terms.lifetime(100) for _ in range(500)}
    assert min(lifetimes) >= 90
    assert max(lifetimes) <= 111
    assert len(lifetimes) > 5
    assert terms_of(None, None, 0, None, 30).lifetime(30) == 30
    assert terms_of(None, None, 0.1, None, None).lifetime(0) == 0
