"""Writes and removals with ``if_version`` on real servers, and in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, MakeCache, MakeServer, _server_id
from tests.support import three_clients
from tests.support.blocking import BlockingCache
from tests.support.clusters import ClusterGroup
from tests.support.faults import FaultProxy
from tests.support.wire import plain

PATIENT = {"connectTimeout": 600_000, "commandTimeout": 600_000}
PATIENCE = 60
# For tests that cut the connection so often that waiting takes most of the time.
AT_ONCE = {"first": 1, "cap": 2}
LAST = 2**63 - 1

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
everywhere = pytest.mark.parametrize(
    ("server", "kind"),
    [*((server, "redis") for server in SERVERS), (SERVERS[0], "memory")],
    indirect=["server"],
    ids=[*map(_server_id, SERVERS), "memory"],
)

# Stored version, expected version, and whether the condition holds.
ROWS: list[tuple[int | None, int | None, bool]] = [
    (None, None, True),
    (None, 0, False),
    (0, None, False),
    (0, 0, True),
    (7, 7, True),
    (7, 6, False),
    (7, 70, False),
    (7, LAST, False),
    (2**53, 2**53 + 1, False),
    (2**53 + 1, 2**53 + 1, True),
    (LAST, LAST, True),
    (LAST, LAST - 1, False),
]


@pytest.fixture(params=[dscache.AsyncCache, BlockingCache], ids=["async", "blocking"])
def cache_class(request: pytest.FixtureRequest) -> Any:
    """The class under test, with the interface of an AsyncCache."""
    return request.param


@everywhere
@pytest.mark.parametrize("ttl", [None, 1000], ids=["lasting", "ttl"])
@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "bulk"])
async def test_only_the_expected_version_is_replaced_or_removed(
    make_cache: MakeCache, kind: str, bulk: bool, ttl: int | None
) -> None:
    cache = await make_cache(name=kind)
    rows = {f"{row}": row for row in ROWS}
    stored = {name: (has, "old") for name, (has, _, _) in rows.items() if has is not None}
    expected = {name: wanted for name, (_, wanted, _) in rows.items()}
    fits = {name for name, (_, _, holds) in rows.items() if holds}
    await cache.set_bulk(stored)
    if bulk:
        news = dict.fromkeys(rows, (3, "new"))
        assert await cache.set_bulk(news, ttl=ttl, if_version=expected) == rows.keys() - fits
    else:
        calls = [cache.set(n, 3, "new", ttl=ttl, if_version=expected[n]) for n in rows]
        assert await asyncio.gather(*calls) == [name in fits for name in rows]
    wanted = stored | dict.fromkeys(fits, (3, "new"))
    assert plain(await cache.get_bulk(wanted)) == wanted
    await cache.delete_bulk(rows)
    await cache.set_bulk(stored)
    held = {name: has for name, has in expected.items() if has is not None}
    gone = fits & held.keys()
    if bulk:
        assert await cache.delete_bulk(held, if_version=held) == len(gone)
    else:
        calls = [cache.delete(name, if_version=has) for name, has in held.items()]
        assert await asyncio.gather(*calls) == [name in gone for name in held]
    assert (await cache.get_bulk(rows)).keys() == stored.keys() - gone
    assert cache.stats()["not_newer"] == len(rows) - len(fits) + len(held) - len(gone)


async def test_halves_and_damaged_records(cache: dscache.AsyncCache, redis: redis_py.Redis) -> None:
    redis.mset({"v_v": 1, "d_d": "1", "bad_v": "one", "bad_d": "1"})
    redis.lpush("list_v", 1)
    for name in ("v", "d"):
        assert await cache.set(name, 2, [], if_version=1) is False
        assert await cache.delete(name, if_version=1) is False
        assert await cache.set(name, 2, [], if_version=None) is True
        assert await cache.delete(name, if_version=2) is True
    for call in (
        lambda: cache.set("bad", 2, [], if_version=1),
        lambda: cache.set("bad", 2, [], if_version=None),
        lambda: cache.delete("bad", if_version=1),
    ):
        with pytest.raises(dscache.RecordError, match="bad"):
            await call()
    for call in (
        lambda: cache.set("list", 2, [], if_version=1),
        lambda: cache.set("list", 2, [], if_version=None),
        lambda: cache.set("list", 2, [], if_newer=True),
        lambda: cache.delete("list", if_version=1),
    ):
        with pytest.raises(dscache.ReplyError, match="'list'") as refused:
            await call()
        assert refused.value.code == "WRONGTYPE"
    with pytest.raises(dscache.BulkError) as caught:
        await cache.set_bulk({"list": (2, 1), "new": (2, 1)}, if_version={"list": 1, "new": None})
    assert type(caught.value.errors["list"]) is dscache.ReplyError
    assert await cache.head("new") == 2
    assert redis.get("bad_v") == b"one"
    assert redis.type("list_v") == b"list"


@pytest.mark.parametrize("remove", [False, True])
async def test_one_bulk_of_whole_half_and_stale_records(
    cache: dscache.AsyncCache, redis: redis_py.Redis, remove: bool
) -> None:
    expected = {"whole": 1, "half": 1, "stale": 2, "list": 1}
    for half in (False, True):
        await cache.set_bulk(dict.fromkeys(expected, (1, "old")))
        redis.delete("list_d")
        redis.lpush("list_d", 1)
        if half:
            redis.delete("half_d")
        if remove:
            assert await cache.delete_bulk(expected, if_version=expected) == (1 if half else 3)
        else:
            kept = await cache.set_bulk(dict.fromkeys(expected, (3, "new")), if_version=expected)
            assert kept == ({"half", "stale", "list"} if half else {"stale"})
        assert redis.mget("whole_v", "stale_v") == [None if remove else b"3", b"1"]
        # Each is looked at by itself if one of them is half a record.
        assert redis.type("list_d") == (b"list" if half else b"none" if remove else b"string")


async def test_a_ttl_is_that_of_the_write(cache: dscache.AsyncCache, redis: redis_py.Redis) -> None:
    await cache.set("a", 1, [], ttl=1000)
    assert await cache.set("a", 2, [], ttl=0, if_version=2) is False
    assert redis.ttl("a_v") > 0
    assert await cache.set("a", 2, [], if_version=1) is True
    assert redis.ttl("a_v") == redis.ttl("a_d") == -1
    assert await cache.set("a", 3, [], ttl=1000, if_version=2) is True
    assert redis.pexpiretime("a_v") == redis.pexpiretime("a_d") > 0


async def test_no_update_is_lost(make_cache: MakeCache) -> None:
    caches = [await make_cache() for _ in range(3)]

    async def count_up(cache: dscache.AsyncCache) -> None:
        for _ in range(20):
            while True:
                record = await cache.get("count")
                version, data = (None, 0) if record is None else record
                following = 1 if version is None else version + 1
                if await cache.set("count", following, data + 1, if_version=version):
                    break

    await asyncio.gather(*map(count_up, caches))
    assert plain(await caches[0].get("count")) == (60, 60)


async def test_a_near_cache_shows_own_writes_and_no_refused_ones(server: EmbeddedServer) -> None:
    options = {"host": server.host, "port": server.port, "nearCache": {"required": False}}
    config = {"name": "redis", "options": options}
    async with (
        dscache.AsyncCache.from_config(config) as cache,
        dscache.AsyncCache.from_config(config) as other,
    ):
        await cache.delete("near")
        assert await cache.set("near", 1, "first", if_version=None) is True
        assert plain(await cache.get("near")) == (1, "first")
        assert await other.set("near", 2, "second", if_version=1) is True
        assert await cache.set("near", 2, "mine", if_version=1) is False
        assert plain(await cache.get("near")) == (2, "second")
        assert await cache.set("near", 3, "third", if_version=2) is True
        assert plain(await cache.get("near")) == (3, "third")
        assert await cache.delete("near", if_version=3) is True
        assert await cache.get("near") is None


async def test_on_a_cluster(group: ClusterGroup, backend: str, cache_class: Any) -> None:
    names = [f"record/{n}" for n in range(100)]
    config = {"name": "redis", "options": group.options}
    async with cache_class.from_config(config) as cache:
        nothing: dict[str, int | None] = dict.fromkeys(names)
        assert await cache.set_bulk(dict.fromkeys(names, (1, 0)), if_version=nothing) == set()
        assert await cache.set_bulk(dict.fromkeys(names, (1, 0)), if_version=nothing) == {*names}
        calls = [cache.set(name, 2, 0, if_version=1 + n % 2) for n, name in enumerate(names)]
        assert await asyncio.gather(*calls) == [n % 2 == 0 for n in range(100)]
        assert await cache.delete_bulk(names, if_version=dict.fromkeys(names, 2)) == 50
        assert await cache.delete(names[1], if_version=1) is True
        assert len(await cache.head_bulk(names)) == 49


async def test_a_record_on_two_nodes_of_a_cluster(
    group: ClusterGroup, backend: str, cache_class: Any
) -> None:
    config = {"name": "redis", "options": {**group.options, "keyLayout": "deepstream"}}
    async with cache_class.from_config(config) as cache:
        await cache.set("a", 1, "old")
        for call in (
            lambda: cache.set("a", 2, "new", if_version=1),
            lambda: cache.set("b", 1, "new", if_version=None),
            lambda: cache.delete("a", if_version=1),
            lambda: cache.set_bulk({"a": (2, "new")}, if_version={"a": 1}),
            lambda: cache.delete_bulk(["a"], if_version={"a": 1}),
        ):
            with pytest.raises(dscache.RecordError, match="neither if_newer nor if_version"):
                await call()
        assert plain(await cache.get("a")) == (1, "old")
        assert await cache.get("b") is None
        assert await cache.set("{t}a", 1, "new", if_version=None) is True
        assert await cache.delete("{t}a", if_version=1) is True


@on_one_server
@pytest.mark.parametrize("cache_class", [dscache.AsyncCache], indirect=True, ids=["async"])
@pytest.mark.parametrize("way", ["requests", "replies"])
async def test_a_connection_cut_anywhere(
    make_cache: MakeCache, redis: redis_py.Redis, proxy: FaultProxy, way: Any
) -> None:
    cache = await make_cache(url=proxy.url, retryStrategy=AT_ONCE, **PATIENT)
    outcomes = []
    for count in range(0, 420 if way == "requests" else 60, 4 if way == "requests" else 1):
        _store(redis)
        proxy.cut_after(count, way)
        async with asyncio.timeout(PATIENCE):
            found = await asyncio.gather(
                cache.set("held", 2, "new", if_version=1),
                cache.set("made", 1, "new", if_version=None),
                cache.set("other", 6, "new", if_version=4),
                cache.delete("gone", if_version=1),
                return_exceptions=True,
            )
        proxy.heal()
        outcomes += found
        assert found[0] is True  # the first attempt is found, or the condition holds still
        _check_outcomes(redis, found)
    assert any(isinstance(outcome, dscache.ConnectionLost) for outcome in outcomes)


@on_one_server
@pytest.mark.parametrize("way", ["requests", "replies"])
async def test_a_blocking_connection_cut_anywhere(
    redis: redis_py.Redis, proxy: FaultProxy, way: Any
) -> None:
    options = {"url": proxy.url, "retryStrategy": AT_ONCE, **PATIENT}
    cache = dscache.Cache.from_config({"name": "redis", "options": options})

    def issue() -> list[Any]:
        found: list[Any] = []
        for call in (
            lambda: cache.set("held", 2, "new", if_version=1),
            lambda: cache.set("made", 1, "new", if_version=None),
            lambda: cache.set("other", 6, "new", if_version=4),
            lambda: cache.delete("gone", if_version=1),
        ):
            try:
                found.append(call())
            except dscache.ConnectionLost as error:
                found.append(error)
        return found

    outcomes = []
    # In a thread, as the proxy needs the event loop.
    for count in range(0, 420 if way == "requests" else 60, 8 if way == "requests" else 1):
        _store(redis)
        proxy.cut_after(count, way)
        async with asyncio.timeout(PATIENCE):
            found = await asyncio.to_thread(issue)
        proxy.heal()
        outcomes += found
        assert found[0] is True
        _check_outcomes(redis, found)
    await asyncio.to_thread(cache.close)
    assert any(isinstance(outcome, dscache.ConnectionLost) for outcome in outcomes)


def _store(redis: redis_py.Redis) -> None:
    redis.flushdb()
    redis.mset({"held_v": 1, "held_d": "1", "gone_v": 1, "gone_d": "1"})
    redis.mset({"other_v": 5, "other_d": "5"})


def _check_outcomes(redis: redis_py.Redis, found: list[Any]) -> None:
    """Assert that no outcome contradicts what is stored; nothing else writes there."""
    held, made, other, gone = found
    for outcome in found:
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, dscache.ConnectionLost)
            assert "may have happened" in str(outcome)
    assert held is not False
    assert held is not True or redis.get("held_v") == b"2"
    assert made is not False
    assert made is not True or redis.get("made_d") == b'"new"'
    assert gone is not False
    assert gone is not True or redis.get("gone_v") is None
    assert other is not True
    assert redis.get("other_v") == b"5"


@on_one_server
def test_three_clients(make_server: MakeServer, backend: str) -> None:
    """With ``if_newer``, updates, lifetimes and lost connections."""
    server = make_server()
    assert three_clients.check(server.host, server.port, examples=60) > 0
