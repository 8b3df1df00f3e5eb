"""The promises of ``fetch`` and ``fetch_bulk``, by both caches and on each kind of server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis as redis_py

from dscache import Loaded, LoadError
from dscache.core import notes
from dscache.core.notes import note_of, state_of
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE, SERVERS, _server_id
from tests.support.clusters import ClusterGroup
from tests.support.either import Either
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.parametrize("server", SERVERS[-1:], indirect=True, ids=_server_id)

OPTIONS: dict[str, dict[str, Any]] = {
    "redis": {},
    "near": {"nearCache": {"idleLimit": 30_000}},
    "hashtag": {"keyLayout": "hashtag", "keyPrefix": "p:"},
}
# Of the ones that several caches share.
SHARED = pytest.mark.parametrize("place", ["redis", "near", "hashtag", "cluster"])
EVERYWHERE = pytest.mark.parametrize("place", ["redis", "near", "hashtag", "cluster", "memory"])

Open = Callable[[], Any]


@pytest.fixture(scope="module")
def binary() -> ServerBinary:
    """The servers of the cluster: the newest."""
    return BY_AGE[-1]


@pytest.fixture(params=["AsyncCache", "Cache"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def opened(
    kind: str,
    place: str,
    server: EmbeddedServer,
    backend: str,
    redis: redis_py.Redis,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Open]:
    """Open caches of a kind; those in memory are one."""
    options: dict[str, Any]
    if place == "memory":
        options = {"name": "memory"}
    elif place == "cluster":
        group: ClusterGroup = request.getfixturevalue("group")
        options = group.options
    else:
        options = {"url": server.url, **OPTIONS[place]}
    async with AsyncExitStack() as stack:
        in_memory: list[Either] = []

        async def open_one() -> Either:
            if in_memory:
                return in_memory[0]
            cache = await stack.enter_async_context(Either(kind, **options))
            if place == "memory":
                in_memory.append(cache)
            return cache

        yield open_one


class Source:
    """A source of data for either cache: counts its loads, and waits in each while it is shut."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.loads = 0
        self.open = asyncio.Event()
        self.open.set()
        self._loop = asyncio.get_running_loop()

    async def __call__(self, _: Any) -> Any:
        self.loads += 1
        await self.open.wait()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def of(self, cache: Either) -> Any:
        """Return the function that a cache calls."""
        if cache.kind == "AsyncCache":
            return self
        return lambda name: asyncio.run_coroutine_threadsafe(self(name), self._loop).result(
            PATIENCE
        )


async def ended(cache: Either) -> None:
    """Wait until no load is under way."""
    loads = cache.cache._loads
    await until(lambda: not (loads._tasks if cache.kind == "AsyncCache" else loads._flights))


def forget_ages(cache: Either) -> None:
    cache.cache._loads.checks.recent.clear()


@EVERYWHERE
@pytest.mark.parametrize("way", ["miss", "refresh", "bulk", "refresh of a bulk"])
async def test_a_slow_load_keeps_a_newer_write(opened: Open, way: str) -> None:
    """Although its record would have the higher version: that is the time."""
    cache, other = await opened(), await opened()
    is_refresh = way.startswith("refresh")
    if is_refresh:
        await cache.do("set", "n", 1, "old")
    source = Source({"n": "slow"} if way.endswith("bulk") else "slow")
    source.open.clear()
    operation, what = ("fetch_bulk", ["n"]) if way.endswith("bulk") else ("fetch", "n")
    options = {"ttl": 600, "refresh_after": 300 if is_refresh else None}
    call = asyncio.ensure_future(cache.do(operation, what, source.of(cache), **options))
    await until(lambda: source.loads)
    assert await other.do("set", "n", 5, "newer")
    source.open.set()
    found = await call
    await ended(cache)
    record = found["n"] if way.endswith("bulk") else found
    # A refresh of an AsyncCache runs in the background.
    served = (1, "old") if is_refresh and cache.kind == "AsyncCache" else (5, "newer")
    assert tuple(record) == served
    assert tuple(await other.do("get", "n")) == (5, "newer")
    assert source.loads == 1


@EVERYWHERE
async def test_a_failing_refresh_keeps_the_record_and_its_lifetime(
    opened: Open, place: str, redis: redis_py.Redis
) -> None:
    cache, other = await opened(), await opened()
    await cache.do("set", "n", 1, "old", ttl=1000)
    end = redis.pexpiretime("n_v")
    source = Source(ValueError("the source is away"))
    for one in (cache, other, cache):
        forget_ages(one)
        record = await one.do("fetch", "n", source.of(one), ttl=600, refresh_after=300)
        assert tuple(record) == (1, "old")
        await ended(one)
    assert source.loads == 1, "it was repeated at once"
    assert state_of(await other.do("get", note_of("n"))) == "stale"
    assert redis.pexpiretime("n_v") == end
    assert (end > 0) == (place in ("redis", "near"))


@EVERYWHERE
async def test_a_failing_load_is_raised_to_all_and_not_repeated_at_once(opened: Open) -> None:
    cache, other = await opened(), await opened()
    source = Source(ValueError("the source is away"))
    source.open.clear()
    calls = [
        asyncio.ensure_future(one.do("fetch", "n", source.of(one), ttl=600))
        for one in (cache, cache, other)
    ]
    await until(lambda: source.loads)
    source.open.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [LoadError] * 3
    assert source.loads == 1


@SHARED
async def test_one_of_two_caches_refreshes(opened: Open) -> None:
    cache, other = await opened(), await opened()
    await cache.do("set", "n", 1, "old")
    source = Source(Loaded(2, "new"))
    source.open.clear()
    options = {"ttl": 600, "refresh_after": 300}
    first = asyncio.ensure_future(cache.do("fetch", "n", source.of(cache), **options))
    await until(lambda: source.loads)
    for _ in range(3):
        forget_ages(other)
        record = await other.do("fetch", "n", source.of(other), **options)
        assert tuple(record) == (1, "old")
    source.open.set()
    await first
    await ended(cache)
    await ended(other)
    assert source.loads == 1
    # A near cache hears of it a moment later.
    async with asyncio.timeout(PATIENCE):
        while (await other.do("get", "n")).version != 2:
            await asyncio.sleep(0.002)


@EVERYWHERE
async def test_nothing_is_remembered_in_all_caches(opened: Open) -> None:
    cache, other = await opened(), await opened()
    source = Source(None)
    for one in (cache, other, cache):
        assert await one.do("fetch", "n", source.of(one), ttl=600, keep_missing=300) is None
    assert source.loads == 1
    assert await cache.do("fetch", "m", source.of(cache), ttl=600) is None
    assert await cache.do("fetch", "m", source.of(cache), ttl=600) is None
    assert source.loads == 3
    await other.do("set", "n", 1, "written")
    async with asyncio.timeout(PATIENCE):
        while await cache.do("fetch", "n", source.of(cache), ttl=600, keep_missing=300) is None:
            await asyncio.sleep(0.002)
    assert source.loads == 3


@pytest.mark.parametrize("place", ["redis"])
async def test_records_that_are_loaded_together_end_apart(
    opened: Open, redis: redis_py.Redis
) -> None:
    cache = await opened()
    names = [f"n/{number}" for number in range(200)]
    source = Source(dict.fromkeys(names, 1))
    options = {"ttl": 10_000, "refresh_after": 5000}
    await cache.do("fetch_bulk", names, source.of(cache), **options)
    alone = Source(1)
    single = [f"s/{number}" for number in range(20)]
    for name in single:
        await cache.do("fetch", name, alone.of(cache), **options)
    for some, least in ((names, 9000), (single, 9000), (map(note_of, names), 4500)):
        seconds = {redis.ttl(f"{name}_v") for name in some}
        assert len(seconds) > 5
        assert least - 60 <= min(seconds) <= max(seconds) <= least * 11 / 9 + 1
    exact = {**options, "jitter": 0}
    await cache.do("fetch", "exact", alone.of(cache), **exact)
    assert 9940 <= redis.ttl("exact_v") <= 10_000


@pytest.mark.parametrize("place", ["redis"])
async def test_a_lease_is_renewed_while_its_load_runs(
    opened: Open, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "RENEW_SECONDS", 0.01)
    cache = await opened()
    source = Source("data")
    source.open.clear()
    call = asyncio.ensure_future(cache.do("fetch", "n", source.of(cache), ttl=60))
    await until(lambda: source.loads)
    note = note_of("n")
    token = redis.get(f"{note}_v")
    for half in "vd":
        redis.persist(f"{note}_{half}")
    await until(lambda: redis.pttl(f"{note}_v") > 0)
    assert redis.get(f"{note}_v") == token
    source.open.set()
    assert (await call).data == "data"
    assert not redis.exists(f"{note}_v")
