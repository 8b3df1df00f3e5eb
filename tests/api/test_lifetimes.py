"""A ``timedelta`` as a lifetime, wherever one is taken, in each kind of cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.config import load
from dscache.core import memory
from dscache.core.fetch_terms import terms_of
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.either import Either

HOUR = timedelta(hours=1)
WHOLE = [
    (timedelta(seconds=1), 1),
    (timedelta(minutes=1, seconds=1), 61),
    (timedelta(days=400), 34_560_000),
    (timedelta(seconds=10**10), 10**10),
]
BAD = [
    timedelta(0),
    timedelta(seconds=-1),
    timedelta(milliseconds=500),
    timedelta(seconds=60, microseconds=1),
    timedelta(seconds=10**10 + 1),
]
PLACES = {
    "redis": {},
    "near": {"nearCache": True},
    "hashtag": {"keyLayout": "hashtag"},
}
KINDS = ["AsyncCache", "Cache"]

on_one_server = pytest.mark.parametrize("server", SERVERS[-1:], indirect=True, ids=_server_id)


@pytest.fixture(params=PLACES)
async def either(
    request: pytest.FixtureRequest, kind: str, backend: str, server: EmbeddedServer
) -> AsyncIterator[Either]:
    async with Either(kind, url=server.url, **PLACES[request.param]) as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of caches in memory, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(memory.MemoryPipeline.__init__, "__defaults__", (lambda: now[0],))
    return now


async def write_all(cache: Either, ttl: Any) -> set[str]:
    """Write a record by each operation that takes a ttl, and return their names."""
    await cache.do("set", "set", 1, {}, ttl=ttl)
    await cache.do("set", "if_newer", 1, {}, ttl=ttl, if_newer=True)
    await cache.do("set", "if_version", 1, {}, ttl=ttl, if_version=None)
    await cache.do("set_bulk", {"a": (1, {}), "b": (2, {})}, ttl=ttl)
    await cache.do("update", "update", lambda data: data, default={}, ttl=ttl)
    await cache.do("patch", "patch", path="n", value=1, default={}, ttl=ttl)
    await cache.do("fetch", "fetch", lambda name: {}, ttl=ttl, jitter=0)

    def load_many(names: list[str]) -> dict[str, Any]:
        return dict.fromkeys(names, 1)

    await cache.do("fetch_bulk", ["c", "d"], load_many, ttl=ttl, jitter=0)
    return {"set", "if_newer", "if_version", "a", "b", "update", "patch", "fetch", "c", "d"}


@on_one_server
@pytest.mark.parametrize("kind", KINDS)
async def test_every_operation_writes_with_it(either: Either, redis: redis_py.Redis) -> None:
    names = await write_all(either, HOUR)
    keys = list(redis.scan_iter())
    assert len(keys) == 2 * len(names)
    assert all(3500 < redis.ttl(key) <= 3600 for key in keys)
    # A patch that changes nothing renews the lifetime that it is given.
    await either.do("patch", "patch", path="n", value=1, ttl=2 * HOUR)
    assert sorted(redis.ttl(key) > 3600 for key in keys) == [False] * (len(keys) - 2) + [True] * 2


KEPT = {"if_newer", "if_version", "a", "b", "c", "update", "patch"}


async def rewrite_all(cache: Either) -> None:
    """Write version 2 of records with version 1, each by another operation, and keep lifetimes."""
    keep = {"ttl": dscache.KEEP}
    assert await cache.do("set", "if_newer", 2, {}, if_newer=True, **keep)
    assert not await cache.do("set", "if_newer", 2, {}, if_newer=True, **keep)
    assert await cache.do("set", "if_version", 2, {}, if_version=1, **keep)
    assert not await cache.do("set_bulk", {"a": (2, {}), "b": (2, {})}, if_newer=True, **keep)
    assert not await cache.do("set_bulk", {"c": (2, {})}, if_version={"c": 1}, **keep)
    assert (await cache.do("update", "update", lambda data: [1], **keep)).version == 2
    assert (await cache.do("patch", "patch", path="n", value=1, **keep)).version == 2
    assert (await cache.do("patch", "patch", path="n", value=1, **keep)).version == 2
    assert set((await cache.do("head_bulk", KEPT)).values()) == {2}


@on_one_server
@pytest.mark.parametrize("kind", KINDS)
async def test_keep_keeps_what_is_left(either: Either, redis: redis_py.Redis) -> None:
    for ttl in (1000, 0):
        await either.do("set_bulk", dict.fromkeys(KEPT, (1, {})), ttl=ttl)
        keys = list(redis.scan_iter())
        ends = [redis.pexpiretime(key) for key in keys]
        assert len(ends) == 2 * len(KEPT)
        await rewrite_all(either)
        assert [redis.pexpiretime(key) for key in keys] == ends


@on_one_server
@pytest.mark.parametrize("kind", KINDS)
async def test_a_new_record_that_keeps_its_lifetime_has_none(
    backend: str, kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either(kind, url=server.url, ttl=1000) as cache:
        await cache.do("set", "set", 1, {}, ttl=dscache.KEEP, if_version=None)
        await cache.do("update", "update", lambda data: data, default={}, ttl=dscache.KEEP)
        await cache.do("set", "other", 1, {})
        assert {redis.ttl(f"{name}_{half}") for name in ("set", "update") for half in "vd"} == {-1}
        assert redis.ttl("other_v") > 0


@on_one_server
@pytest.mark.parametrize("kind", KINDS)
async def test_both_keys_keep_the_lifetime_of_the_version(
    backend: str, kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either(kind, url=server.url) as cache:
        await cache.do("set", "a", 1, {}, ttl=1000)
        redis.delete("a_d")  # as a server evicts it
        assert await cache.do("set", "a", 2, {}, ttl=dscache.KEEP, if_newer=True)
        assert redis.pexpiretime("a_v") == redis.pexpiretime("a_d") > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_only_conditional_writes_can_keep_a_lifetime(
    backend: str, kind: str, server: EmbeddedServer
) -> None:
    calls: list[tuple[Any, ...]] = [
        ("set", "n", 1, {}),
        ("set_bulk", {"n": (1, {})}),
        ("fetch", "n", lambda name: {}),
        ("fetch_bulk", ["n"], lambda names: {}),
    ]
    for options in ({"name": "memory"}, {"url": server.url}):
        async with Either(kind, **options) as cache:
            for call in calls:
                with pytest.raises(
                    dscache.RecordError,
                    match=r"ttl must be .* not dscache\.KEEP; update, or a set with if_newer or ",
                ):
                    await cache.do(*call, ttl=dscache.KEEP)


@pytest.mark.parametrize("kind", KINDS)
async def test_keep_keeps_what_is_left_in_memory(
    backend: str, kind: str, clock: list[float]
) -> None:
    async with Either(kind, name="memory") as cache:
        await cache.do("set_bulk", dict.fromkeys(KEPT, (1, {})), ttl=1000)
        await cache.do("set", "new", 1, {}, ttl=dscache.KEEP, if_newer=True)
        clock[0] += 999
        await rewrite_all(cache)
        clock[0] += 1
        assert (await cache.do("get_bulk", {*KEPT, "new"})).keys() == {"new"}


@pytest.mark.parametrize("kind", KINDS)
async def test_records_in_memory_end_by_it(backend: str, kind: str, clock: list[float]) -> None:
    async with Either(kind, name="memory") as cache:
        names = await write_all(cache, HOUR)
        clock[0] += 3599
        assert (await cache.do("get_bulk", names)).keys() == names
        clock[0] += 1
        assert await cache.do("get_bulk", names) == {}


@on_one_server
@pytest.mark.parametrize("kind", KINDS)
async def test_an_age_and_a_nothing_of_it(
    backend: str, kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either(kind, url=server.url) as cache:
        age = {"ttl": 2 * HOUR, "refresh_after": HOUR, "keep_missing": HOUR, "jitter": 0}
        assert (await cache.do("fetch", "there", lambda name: 1, **age)).data == 1
        assert await cache.do("fetch", "none", lambda name: None, **age) is None
    ttls = {key.decode(): redis.ttl(key) for key in redis.scan_iter()}
    assert {name for name, left in ttls.items() if 3500 < left <= 3600} == {
        f"{name}}}:fetch_{half}" for name in ("there", "none") for half in "vd"
    }
    assert {name for name, left in ttls.items() if 7100 < left <= 7200} == {"there_v", "there_d"}


@pytest.mark.parametrize(("given", "seconds"), WHOLE, ids=str)
def test_it_is_its_seconds(given: timedelta, seconds: int) -> None:
    assert terms_of(given, None, 0, given, None) == terms_of(seconds, None, 0, seconds, None)
    for source in ({"ttl": given}, {"name": "redis", "options": {"ttl": given}}):
        assert load(source).options.ttl == seconds
    assert dscache.AsyncCache("redis://h", ttl=given).config.options.ttl == seconds
    assert dscache.Cache("redis://h", ttl=given).config.options.ttl == seconds


@pytest.mark.parametrize("ttl", BAD, ids=str)
@pytest.mark.parametrize("kind", KINDS)
async def test_others_are_refused_in_the_words_for_ints(
    backend: str, kind: str, ttl: timedelta
) -> None:
    calls: list[tuple[Any, ...]] = [
        ("set", "n", 1, {}),
        ("set_bulk", {"n": (1, {})}),
        ("update", "n", lambda data: data),
        ("patch", "n", {}),
        ("fetch", "n", lambda name: {}),
        ("fetch_bulk", ["n"], lambda names: {}),
    ]
    async with Either(kind, name="memory") as cache:
        for call in calls:
            with pytest.raises(dscache.RecordError) as caught:
                await cache.do(*call, ttl=ttl)
            begin = call[0] if call[0].startswith("fetch") else "record 'n'"
            zero = "" if ttl else "; write 0 for no lifetime"
            assert str(caught.value) == (
                f"{begin}: ttl must be whole seconds from 1 to 10000000000 as an int or a "
                f"timedelta, 0 for none or None for the configured default, not {ttl!r}{zero}"
            )
        assert await cache.do("get", "n") is None
    with pytest.raises(
        dscache.ConfigError, match=r"ttl: must be 0, or a whole number.* not datetime\."
    ):
        load("redis://h", options={"ttl": ttl})
