"""``dscache.key_value``: the contract of py-key-value's stores, on one server and in memory."""

from __future__ import annotations

import asyncio
import datetime
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from fractions import Fraction
from typing import Any

import pytest
import redis as redis_py
from key_value.aio.errors import DeserializationError, InvalidTTLError, SerializationError
from key_value.aio.protocols import AsyncKeyValue
from key_value.aio.protocols import key_value as protocols
from key_value.aio.stores.redis import RedisStore
from key_value.aio.wrappers.prefix_keys import PrefixKeysWrapper

import dscache
from dscache.embedded import EmbeddedServer
from dscache.key_value import RecordStore
from tests.conftest import PATIENT

Make = Callable[..., RecordStore]


@pytest.fixture
async def make(server: EmbeddedServer, backend: str, redis: redis_py.Redis) -> AsyncIterator[Make]:
    """Make a store on ``server``; it is closed at the end."""
    made: list[RecordStore] = []

    def make_store(source: Any = server.url, **options: Any) -> RecordStore:
        if not isinstance(source, dscache.AsyncCache):
            options = PATIENT | options
        made.append(RecordStore(source, **options))
        return made[-1]

    yield make_store
    for store in made:
        await store.close()


@pytest.fixture(params=["redis", "near", "memory"])
def store(request: pytest.FixtureRequest, make: Make) -> RecordStore:
    """A store with the default options, with a near cache, and in memory."""
    if request.param == "memory":
        return make({"name": "memory"})
    return make(near_cache=True) if request.param == "near" else make()


def test_it_has_all_protocols(store: RecordStore) -> None:
    for kind in (
        AsyncKeyValue,
        protocols.AsyncKeyValueProtocol,
        protocols.AsyncEnumerateKeysProtocol,
        protocols.AsyncEnumerateCollectionsProtocol,
        protocols.AsyncDestroyCollectionProtocol,
        protocols.AsyncDestroyStoreProtocol,
    ):
        assert isinstance(store, kind)


# -- values


async def test_values_come_back_as_they_were(store: RecordStore) -> None:
    for value in (
        {},
        {"": None, "null": "null", "1": 1, "true": [True, False, None]},
        {"int": 10**18, "negative": -42, "float": 1.0, "large": 1.23456789012345e10},
        {"text": "Hello 世界 🌍\n\t", "long": "a" * 10_000, "list": list(range(1000))},
        {"a": {"b": [{"c": {"d": {}}}]}},
    ):
        await store.put("key", value)
        assert await store.get("key") == value
        assert await store.get_many(["key"]) == [value]
    await store.put("key", {"pair": (1, "two")})
    assert await store.get("key") == {"pair": [1, "two"]}


async def test_a_text_of_a_subclass_comes_back_as_a_plain_one(store: RecordStore) -> None:
    class Text(str):
        pass

    await store.put("key", {Text("a"): [Text("b"), 1.5]})
    assert repr(await store.get("key")) == "{'a': ['b', 1.5]}"


@pytest.mark.parametrize(
    "value",
    [
        *({"key": datetime.datetime(2025, 1, 1)}, {"key": uuid.UUID(int=0)}, {"key": b"bytes"}),
        *({"key": {1}}, {"key": math.inf}, {1: "key"}, ["no mapping"], object()),
    ],
    ids=lambda value: re.sub(" at 0x.*", "", repr(value)),
)
async def test_a_value_that_json_would_alter_is_refused(value: Any) -> None:
    async with RecordStore({"name": "memory"}) as store:
        with pytest.raises(SerializationError):
            await store.put("key", value)
        with pytest.raises(SerializationError):
            await store.put_many(["other", "key"], [{}, value])
        assert await store.get_many(["other", "key"]) == [None, None]


async def test_a_change_of_a_value_that_was_read_stays_outside(store: RecordStore) -> None:
    await store.put("key", {"list": [1]})
    found = [await store.get("key"), *await store.get_many(["key", "key"])]
    for value in found:
        assert value is not None
        value["list"].append(2)
        assert value == {"list": [1, 2]}
    assert await store.get("key") == {"list": [1]}


async def test_records_are_those_of_other_programs(make: Make, server: EmbeddedServer) -> None:
    store = make()
    await store.put("user/1", {"name": "Ada"}, collection="users")
    async with dscache.AsyncCache(server.url, **PATIENT) as records:
        record = await records.get("kv/users::user/1")
        assert record is not None
        assert record.raw == b'{"name":"Ada"}'
        await records.set("kv/users::user/2", 1, {"name": "Bob"})
        await records.set("kv/users::user/3", 1, ["no mapping"])
    assert await store.ttl("user/2", collection="users") == ({"name": "Bob"}, None)
    with pytest.raises(DeserializationError, match="user/3' has no dict"):
        await store.get("user/3", collection="users")
    with pytest.raises(DeserializationError):
        await store.get_many(["user/2", "user/3"], collection="users")


# -- operations


async def test_one_value(store: RecordStore) -> None:
    assert await store.get("key") is None
    assert await store.ttl("key") == (None, None)
    assert await store.delete("key") is False
    await store.put("key", {"a": 1})
    await store.put("key", {"a": 2})
    assert await store.get("key") == {"a": 2}
    assert await store.ttl("key") == ({"a": 2}, None)
    assert await store.delete("key") is True
    assert await store.get("key") is None


async def test_many_values(store: RecordStore) -> None:
    assert await store.get_many([]) == []
    assert await store.ttl_many(["a"]) == [(None, None)]
    await store.put_many([], [])
    await store.put_many(["a", "b"], ({"a": 1}, {"b": 2}))
    assert await store.get_many(["b", "c", "a", "b"]) == [{"b": 2}, None, {"a": 1}, {"b": 2}]
    assert await store.ttl_many(("a", "c")) == [({"a": 1}, None), (None, None)]
    assert await store.delete_many(["a", "b", "c"]) == 2
    assert await store.delete_many(["a", "b", "c"]) == 0
    with pytest.raises(ValueError, match="put_many has 1 keys and 2 values"):
        await store.put_many(["a"], [{}, {}])


async def test_concurrent_operations(store: RecordStore) -> None:
    async def work(number: int) -> None:
        key = f"key{number}"
        for turn in range(5):
            assert await store.get(key) is None
            await store.put(key, {"turn": turn})
            assert await store.get(key) == {"turn": turn}
            assert await store.delete(key)

    await asyncio.gather(*map(work, range(20)))


async def test_odd_names(store: RecordStore) -> None:
    names = ["", "a" * 1500, "!@#$%^&*()", "with space", "a:b", "a::b", "%3A", "清"]
    for number, name in enumerate(names):
        await store.put(name, {"number": number}, collection="keys")
        await store.put("key", {"number": number}, collection=name or None)
    assert sorted(await store.keys("keys")) == sorted(names)
    for number, name in enumerate(names):
        assert await store.get(name, collection="keys") == {"number": number}
        assert await store.get("key", collection=name) == {"number": number}
    assert {*await store.collections()} == {*names[1:], "keys", "default_collection"}


async def test_collections_do_not_meet(store: RecordStore) -> None:
    """A collection named as another one with a separator keeps its keys to itself."""
    await store.put("b::key", {"of": "a"}, collection="a")
    await store.put("key", {"of": "a::b"}, collection="a::b")
    assert await store.get("b::key", collection="a") == {"of": "a"}
    assert await store.keys("a") == ["b::key"]
    assert await store.destroy_collection("a") is True
    assert await store.get("key", collection="a::b") == {"of": "a::b"}


# -- lifetimes


@pytest.mark.parametrize("ttl", [100, 99.5, Fraction(199, 2)])
async def test_ttl(store: RecordStore, ttl: Any) -> None:
    await store.put("one", {"a": 1}, ttl=ttl)
    await store.put_many(["two"], [{"a": 2}], ttl=ttl)
    for value, rest in [await store.ttl("one"), *await store.ttl_many(["two"])]:
        assert value is not None
        assert rest is not None
        assert 60 < rest <= ttl
    await store.put("one", {"a": 1})
    assert await store.ttl("one") == ({"a": 1}, None)


async def test_the_record_lives_as_long(make: Make, redis: redis_py.Redis) -> None:
    store = make()
    await store.put("key", {}, ttl=99.5)
    await store.put_many(["many"], [{}], ttl=99.5)
    for key in ("key", "many"):
        for part in "vd":
            assert 70_000 < redis.pttl(f"kv/default_collection::{key}_{part}") <= 100_000


@pytest.mark.parametrize("ttl", [0, -100, True, "long", math.nan, math.inf, 10**11], ids=repr)
async def test_a_bad_ttl_is_refused(ttl: Any) -> None:
    async with RecordStore({"name": "memory"}) as store:
        with pytest.raises(InvalidTTLError):
            await store.put("key", {}, ttl=ttl)
        with pytest.raises(InvalidTTLError):
            await store.put_many(["key"], [{}], ttl=ttl)
        assert await store.get("key") is None


async def test_values_expire_to_the_millisecond(store: RecordStore) -> None:
    """Redis keeps whole seconds; the version is exact."""
    await store.put("key", {"a": 1}, ttl=0.05)
    began = time.monotonic()
    while await store.get("key") is not None:
        assert time.monotonic() < began + 60
        await asyncio.sleep(0.01)
    assert await store.ttl("key") == (None, None)
    assert await store.get_many(["key"]) == [None]


# -- enumeration and removal


async def test_enumeration(store: RecordStore) -> None:
    keys = [f"key{number}" for number in range(1200)]
    await store.put_many(keys, [{}] * 1200, collection="many")
    await store.put("key", {}, collection="few")
    assert sorted(await store.keys("many")) == sorted(keys)
    assert len(await store.keys("many", limit=7)) == 7
    assert await store.keys("many", limit=0) == await store.keys() == await store.keys("none") == []
    assert {*await store.collections()} == {"many", "few"}
    assert len(await store.collections(limit=1)) == 1
    assert await store.destroy_collection("many") is True
    assert await store.destroy_collection("many") is False
    assert await store.collections() == ["few"]


async def test_destroy_leaves_what_is_not_its_own(make: Make, server: EmbeddedServer) -> None:
    store, other = make(), make(prefix="other/")
    async with dscache.AsyncCache(server.url, **PATIENT) as records:
        await records.set("user/1", 1, {})
        await store.put_many([str(number) for number in range(1500)], [{}] * 1500)
        await other.put("key", {})
        assert await store.destroy() is True
        assert await store.destroy() is False
        assert await other.keys() == ["key"]
        assert await records.head("user/1") == 1
    with pytest.raises(ValueError, match="would remove every record"):
        await make(prefix="").destroy()


# -- its cache


async def test_a_given_cache_stays_open(cache: dscache.AsyncCache) -> None:
    async with RecordStore(cache, default_collection="mine") as store:
        await store.put("key", {"a": 1})
        assert store.records is cache
    assert await cache.head("kv/mine::key") is not None
    with pytest.raises(TypeError, match="has its options already"):
        RecordStore(cache, near_cache=True)


async def test_a_closed_store_opens_again(make: Make) -> None:
    store = make()
    await store.put("key", {"a": 1})
    first = store.records
    await store.close()
    assert not first.is_ready
    async with store:
        assert store.records.is_ready
        assert await store.get("key") == {"a": 1}
    await store.close()


async def test_an_outage_is_told(make: Make) -> None:
    store = make("127.0.0.1:1", commandTimeout=50)
    for call in (store.get, store.ttl, store.delete):
        with pytest.raises(dscache.ConnectError):
            await call("key")


async def test_under_a_wrapper(store: RecordStore) -> None:
    wrapped = PrefixKeysWrapper(store, prefix="mine")
    await wrapped.put("key", {"a": 1})
    assert await wrapped.get("key") == {"a": 1}
    assert await store.keys() == ["mine__key"]


# Of an older py-key-value with a newer redis-py.
@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")
async def test_it_does_what_their_store_does(make: Make, server: EmbeddedServer) -> None:
    """One sequence of calls on both; py-key-value's own tests cover more."""
    ours, theirs = make(), RedisStore(url=server.url)
    async with theirs:
        for store in (ours, theirs):
            await store.put("a", {"n": 1}, collection="c")
            await store.put_many(["b", "d"], [{"n": 2}, {"n": 3}], collection="c", ttl=50)
        for call in (
            lambda store: store.get("a", collection="c"),
            lambda store: store.get("a"),
            lambda store: store.get_many(["a", "x", "d"], collection="c"),
            lambda store: store.delete("a", collection="c"),
            lambda store: store.delete_many(["a", "b"], collection="c"),
            lambda store: store.keys("c"),
        ):
            assert await call(ours) == await call(theirs)
