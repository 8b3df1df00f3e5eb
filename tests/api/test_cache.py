"""The public API: the same methods and results on every server, core and in memory.

Most tests run with both classes; ``BlockingCache`` gives a Cache the interface of an AsyncCache.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import datetime
import decimal
import enum
import json
import pickle
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import msgspec
import pydantic
import pytest
import redis as redis_py
import trustme
import uvloop
from redis.cluster import key_slot

import dscache
from dscache.embedded import EmbeddedServer, TLSFiles
from tests.conftest import SERVERS, _server_id
from tests.support.blocking import BlockingCache
from tests.support.faults import FaultProxy

MakeCache = Callable[..., Awaitable[dscache.AsyncCache]]
MakeServer = Callable[..., EmbeddedServer]
Call = Callable[[dscache.AsyncCache], Any]

# Seconds until something must have ended: far more than any machine needs, since it measures
# nothing.
PATIENCE = 60
LAST = 2**63 - 1
# The timeout of operations that can only end by a deadline.
IMPATIENT = {"connectTimeout": 300, "commandTimeout": 300}
SECRET = "pa55-w0rd"

# A test with this mark also runs in memory.
everywhere = pytest.mark.parametrize(
    ("server", "kind"),
    [*((server, "redis") for server in SERVERS), (SERVERS[0], "memory")],
    indirect=True,
    ids=[*map(_server_id, SERVERS), "memory"],
)
# Expensive tests whose result can't depend on the server's version.
on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

# Tests of futures, and tests that need the event loop while an operation is in flight.
async_only = pytest.mark.parametrize(
    "cache_class", [dscache.AsyncCache], indirect=True, ids=["async"]
)


@pytest.fixture(params=[dscache.AsyncCache, BlockingCache], ids=["async", "blocking"])
def cache_class(request: pytest.FixtureRequest) -> Any:
    """The class under test, with the interface of an AsyncCache."""
    return request.param


@pytest.fixture(scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    """The cache's ``name``: "redis", or "memory" if a test's mark says so."""
    return getattr(request, "param", "redis")


@pytest.fixture
def open_cache(make_cache: MakeCache, kind: str) -> MakeCache:
    """``make_cache`` for caches of this kind."""

    async def open_one(**options: Any) -> dscache.AsyncCache:
        return await make_cache(name=kind, **options)

    return open_one


@pytest.fixture
async def cache(open_cache: MakeCache) -> dscache.AsyncCache:
    """An open cache of this kind, with default options."""
    return await open_cache()


def put(redis: redis_py.Redis, name: str, version: object, data: object) -> None:
    redis.mset({f"{name}_v": version, f"{name}_d": data})


def pairs(found: Mapping[str, dscache.Record]) -> dict[str, tuple[int, Any]]:
    return {name: (record.version, record.data) for name, record in found.items()}


def record_commands(redis: redis_py.Redis) -> dict[str, int]:
    """Return how often the server has executed each command that a record operation may use."""
    stats = redis.info("commandstats")
    names = ("mget", "mset", "get", "set", "del", "eval", "evalsha", "msetex", "setex")
    return {name: stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in names}


# -- one record


@everywhere
async def test_a_record_has_its_name_version_data_and_text(cache: dscache.AsyncCache) -> None:
    assert await cache.set("user/1", 3, {"firstname": "Ada"}) is True
    record = await cache.get("user/1")
    assert (record.name, record.version, record.data) == ("user/1", 3, {"firstname": "Ada"})
    assert record.raw == b'{"firstname":"Ada"}'
    assert record.stale is False
    version, data = record
    assert (version, data) == (3, {"firstname": "Ada"})
    assert repr(record) == "Record('user/1', 3, b'{\"firstname\":\"Ada\"}')"


@everywhere
async def test_missing_records(cache: dscache.AsyncCache) -> None:
    assert await cache.get("a") is None
    assert await cache.head("a") is None
    assert await cache.delete("a") is False
    assert await cache.get_bulk(["a", "b"]) == {}
    assert await cache.head_bulk(["a", "b"]) == {}
    assert await cache.delete_bulk(["a", "b"]) == 0


@everywhere
async def test_a_plain_write_overwrites_any_version(cache: dscache.AsyncCache) -> None:
    for version in (5, 4, 5, 0, LAST, 1):
        assert await cache.set("a", version, [version]) is True
        assert tuple(await cache.get("a")) == (version, [version])
        assert await cache.head("a") == version


@everywhere
async def test_a_removed_record_is_gone(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 1, [])
    await cache.set("b", 1, [])
    assert await cache.delete("a") is True
    assert await cache.get("a") is None
    assert await cache.head("a") is None
    assert await cache.delete("a") is False
    assert await cache.head("b") == 1


@everywhere
async def test_versions_stay_exact(cache: dscache.AsyncCache) -> None:
    for version in (0, 1, 9, 10, 2**31, 2**53, 2**53 + 1, LAST - 1, LAST):
        await asyncio.gather(
            cache.set("a", version, version),
            cache.set("b", version, version, ttl=1000),
            cache.set("c", version, version, if_newer=True),
        )
        for name in "abc":
            assert tuple(await cache.get(name)) == (version, version)
            assert await cache.head(name) == version
        assert await cache.head_bulk(iter("abc")) == dict.fromkeys("abc", version)


class Level(enum.IntEnum):
    HIGH = 7


class Name(str):
    """A str like a StrEnum or a lazy string of some framework."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        raise AssertionError("a name's own methods are none of dscache's business")


@everywhere
async def test_subclasses_of_int_and_str_are_taken_by_value(
    cache: dscache.AsyncCache,
) -> None:
    assert await cache.set(Name("a"), Level.HIGH, Level.HIGH) is True
    record = await cache.get(Name("a"))
    assert (record.name, record.version, record.data) == ("a", 7, 7)
    assert (type(record.name), type(record.version)) == (str, int)
    assert await cache.head_bulk([Name("a"), "a"]) == {"a": 7}
    assert await cache.delete(Name("a")) is True


NAMES = [
    " ",
    "two words",
    "\r\n",
    "a\r\n*1\r\n$4\r\nPING\r\n",
    "\0",
    "a\0b",
    "\U0001f600",
    "e\u0301 \u00e9",
    "\ufeff",
    "}",
    "}a",
    "{tag}/a",
    "_v",
    "a_d",
    "__proto__",
    "x" * 65_536,
    "\U0001f600" * 16_384,
]


@everywhere
async def test_any_text_is_a_name(cache: dscache.AsyncCache) -> None:
    for name in NAMES:
        other = name + "x"
        assert await cache.set(name, 1, [1]) is True
        assert await cache.set(other, 2, [2], ttl=1000) is True
        for record in (await cache.get(name), (await cache.get_bulk([name, other]))[name]):
            assert (record.name, record.version, record.data) == (name, 1, [1])
        assert await cache.head(other) == 2
        assert await cache.head_bulk([name, other]) == {name: 1, other: 2}
        assert await cache.set_bulk({name: (1, [3]), other: (3, [3])}, if_newer=True) == {name}
        assert await cache.delete(name) is True
        assert await cache.get(name) is None
        assert tuple(await cache.get(other)) == (3, [3])
        assert await cache.delete_bulk([name, other]) == 1


@everywhere
async def test_names_of_any_text_in_one_tick(cache: dscache.AsyncCache) -> None:
    records = {name: (n, name) for n, name in enumerate(NAMES)}
    assert all(await asyncio.gather(*(cache.set(name, *records[name]) for name in NAMES)))
    found = await asyncio.gather(*map(cache.get, NAMES))
    assert {record.name: tuple(record) for record in found} == records
    assert pairs(await cache.get_bulk(NAMES)) == records
    assert all(await asyncio.gather(*map(cache.delete, NAMES)))


# -- data


DATA = [
    None, True, False, 0, -1, 1.5, -1e300, 2**53 + 1, 2**64 - 1, -(2**63), 10**30,
    "", "text", "\0\r\n\u2028\U0001f600", "\ud800", [], {}, [[[]]], [None, {"": [{}]}],
    {"b": 1, "a": {"2": [1, 2.5, "three", None, True]}, "1": {}},
]  # fmt: skip


@everywhere
async def test_any_json_value_is_data(cache: dscache.AsyncCache) -> None:
    await asyncio.gather(*(cache.set(f"one/{n}", n, data) for n, data in enumerate(DATA)))
    await cache.set_bulk({f"bulk/{n}": (n, data) for n, data in enumerate(DATA)}, ttl=1000)
    for way in ("one", "bulk"):
        for n, data in enumerate(DATA):
            record = await cache.get(f"{way}/{n}")
            assert (record.version, record.data) == (n, data)
            assert type(record.data) is type(data)
            if isinstance(data, dict):
                assert list(record.data) == list(data)


@everywhere
async def test_nan_and_infinity_become_null(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 1, [float("nan"), float("inf"), {"deep": -float("inf")}])
    record = await cache.get("a")
    assert record.raw == b'[null,null,{"deep":null}]'
    assert record.data == [None, None, {"deep": None}]


class Address(msgspec.Struct, rename="camel"):
    street_name: str
    number: int | None = None


@dataclasses.dataclass
class User:
    name: str
    born: datetime.date
    address: Address
    tags: tuple[str, ...] = ()


USER = User("Ada", datetime.date(1815, 12, 10), Address("St James's Square", 12), ("x", "y"))


@everywhere
async def test_typed_data_is_encoded_and_decoded_by_msgspec(cache: dscache.AsyncCache) -> None:
    seen = datetime.datetime(2024, 2, 29, 23, 59, 1, 500, tzinfo=datetime.UTC)
    await cache.set("user", 1, USER)
    await cache.set_bulk({"seen": (2, {"at": seen})})
    record = await cache.get("user")
    assert record.data == {
        "name": "Ada",
        "born": "1815-12-10",
        "address": {"streetName": "St James's Square", "number": 12},
        "tags": ["x", "y"],
    }
    assert record.decode(User) == USER
    assert record.decode(dict[str, Any]) == record.data
    assert (await cache.get("seen")).decode(dict[str, datetime.datetime]) == {"at": seen}


@everywhere
async def test_data_of_another_type_is_refused_with_its_path(cache: dscache.AsyncCache) -> None:
    await cache.set("user", 4, {"name": "Ada", "born": "1815-12-10", "address": {"streetName": 5}})
    record = await cache.get("user")
    with pytest.raises(
        dscache.RecordError, match=r"'user', version 4: .*`\$\.address\.streetName`"
    ) as caught:
        record.decode(User)
    assert caught.value.name == "user"
    assert record.data["address"] == {"streetName": 5}


@everywhere
async def test_raw_text_is_stored_unchanged(cache: dscache.AsyncCache) -> None:
    text = b' {"b" : 1.0,\n"a":[ ] , "n": 1e2} '
    await cache.set("a", 1, msgspec.Raw(text))
    await cache.set_bulk({"b": (1, msgspec.Raw(text))})
    for record in (await cache.get("a"), await cache.get("b")):
        assert record.raw == text
        assert record.data == {"b": 1.0, "a": [], "n": 100}


@everywhere
async def test_large_data(cache: dscache.AsyncCache) -> None:
    documents = {f"large/{n}": (n, {"text": chr(97 + n) * 5_000_000}) for n in range(3)}
    name, (version, data) = next(iter(documents.items()))
    await cache.set(name, version, data)
    assert tuple(await cache.get(name)) == (version, data)
    assert await cache.set_bulk(documents, ttl=1000) == set()
    assert pairs(await cache.get_bulk(documents)) == documents
    assert await cache.head_bulk(documents) == {"large/0": 0, "large/1": 1, "large/2": 2}


@everywhere
async def test_data_is_encoded_at_the_call(cache: dscache.AsyncCache) -> None:
    data = {"list": [1]}
    records = {"b": (1, data)}
    writes = [cache.set("a", 1, data), cache.set_bulk(records), cache.set("c", 1, data, ttl=1000)]
    data["list"].append(2)
    records["d"] = (1, data)
    await asyncio.gather(*writes)
    names = ["a", "b", "c", "d"]
    assert pairs(await cache.get_bulk(names)) == dict.fromkeys("abc", (1, {"list": [1]}))


@everywhere
async def test_calls_do_not_share_decoded_data(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 1, {"list": []})
    first, second, *bulks = await asyncio.gather(
        cache.get("a"), cache.get("a"), cache.get_bulk(["a"]), cache.get_bulk(["a", "a"])
    )
    assert first.data is first.data
    first.data["list"].append("changed")
    tuple(first)[1]["list"].append("again")
    assert first.data == {"list": ["changed", "again"]}
    for record in (second, *(bulk["a"] for bulk in bulks), await cache.get("a")):
        assert record.data == {"list": []}


@everywhere
async def test_a_record_is_a_value(cache: dscache.AsyncCache) -> None:
    await cache.set_bulk({"a": (1, [1]), "b": (1, [1])})
    a, again, b = await asyncio.gather(cache.get("a"), cache.get("a"), cache.get("b"))
    assert a == again
    assert hash(a) == hash(again)
    assert a != b
    assert a != (1, [1])
    assert pickle.loads(pickle.dumps(a)) == copy.copy(a) == a
    for attempt in ("version", "data", "anything"):
        with pytest.raises(AttributeError):
            setattr(a, attempt, 5)
    assert tuple(a) == (1, [1])


# -- types


class Person(msgspec.Struct):
    name: str
    age: int = 0


@everywhere
async def test_a_read_with_a_type(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 3, Person("Ada", 36))
    record = await cache.get("a", type=Person)
    version, person = record
    assert (version, person) == (3, Person("Ada", 36))
    assert record.raw == b'{"name":"Ada","age":36}'
    assert (await cache.get("a")).data == {"name": "Ada", "age": 36}
    assert (await cache.get("a", type=dict[str, str | int])).data == {"name": "Ada", "age": 36}
    assert (await cache.get("a", type=None)).data == {"name": "Ada", "age": 36}
    assert await cache.get("b", type=Person) is None


class PersonModel(pydantic.BaseModel):
    name: str
    age: int = 0


@dataclasses.dataclass
class PersonDataclass:
    name: str
    age: int = 0


@attrs.define
class PersonAttrs:
    name: str
    age: int = 0


@everywhere
@pytest.mark.parametrize("person", [PersonModel, PersonDataclass, PersonAttrs])
async def test_a_class_of_another_library(cache: dscache.AsyncCache, person: Any) -> None:
    ada = person(name="Ada", age=36)
    await cache.set("a", 3, ada)
    await cache.set_bulk({"b": (4, ada), "bad": (5, {"name": 5})})
    assert (await cache.get("a")).data == {"name": "Ada", "age": 36}
    assert (await cache.get("a")).decode(person) == ada
    assert tuple(await cache.get("a", type=person)) == (3, ada)
    assert pairs(await cache.get_bulk(["a", "b"], type=person)) == {"a": (3, ada), "b": (4, ada)}
    with pytest.raises(dscache.RecordDamaged, match=r"record 'bad', version 5: .*name"):
        await cache.get("bad", type=person)


@everywhere
async def test_a_read_of_data_that_does_not_fit_the_type(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 3, {"name": "Ada", "age": "old"})
    text = r"^record 'a', version 3: Expected `int`, got `str` - at `\$\.age`$"
    with pytest.raises(dscache.RecordDamaged, match=text) as misfit:
        await cache.get("a", type=Person)
    assert misfit.value.name == "a"
    assert tuple(await cache.get("a")) == (3, {"name": "Ada", "age": "old"})


@everywhere
async def test_a_bulk_read_with_a_type(cache: dscache.AsyncCache) -> None:
    people = {f"user/{n}": (n, Person(str(n), n)) for n in range(500)}
    await cache.set_bulk(people)
    found = await cache.get_bulk(iter([*people, "none"]), type=Person)
    assert list(found) == list(people)
    assert pairs(found) == people
    await cache.set_bulk({"user/3": (9, []), "user/7": (9, {"name": None})})
    with pytest.raises(dscache.BulkError) as failure:
        await cache.get_bulk(people, type=Person)
    errors = failure.value.errors
    assert list(errors) == ["user/3", "user/7"]
    assert str(errors["user/7"]) == (
        "record 'user/7', version 9: Expected `str`, got `null` - at `$.name`"
    )
    del people["user/3"], people["user/7"]
    assert pairs(failure.value.result) == people


@everywhere
async def test_a_type_that_msgspec_does_not_know(cache: dscache.AsyncCache) -> None:
    for kind in (5, {}, list[int] | set[int]):
        with pytest.raises(TypeError):
            cache.get("a", type=kind)
        with pytest.raises(TypeError):
            cache.get_bulk(["a"], type=kind)
    assert not cache.stats().get("operations")


@everywhere
@pytest.mark.parametrize("name", ["", 5, "\ud800"], ids=repr)
async def test_a_bad_name_with_a_type(cache: dscache.AsyncCache, name: Any) -> None:
    with pytest.raises(dscache.RecordError, match="name"):
        cache.get(name, type=Person)
    for names in ([name], ["a", name], name or [name]):
        with pytest.raises((dscache.RecordError, TypeError)):
            cache.get_bulk(names, type=Person)


@async_only
async def test_reads_with_and_without_a_type_share_a_command(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    await cache.set("a", 1, Person("Ada"))
    before = record_commands(redis)["mget"]
    typed, untyped = await asyncio.gather(cache.get("a", type=Person), cache.get("a"))
    assert record_commands(redis)["mget"] == before + 1
    assert typed == untyped
    assert typed.data == Person("Ada")
    assert untyped.data == {"name": "Ada", "age": 0}


@async_only
async def test_a_typed_read_is_a_future(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 1, {"name": 5})
    futures = [cache.get("a", type=Person), cache.get_bulk(["a"], type=Person)]
    assert all(isinstance(future, asyncio.Future) for future in futures)
    assert not any(future.done() for future in futures)
    cancelled = cache.get("a", type=Person)
    cancelled.cancel()
    await asyncio.wait(futures)
    assert isinstance(futures[0].exception(), dscache.RecordError)
    assert isinstance(futures[1].exception(), dscache.BulkError)
    # A mismatch is not the connection's fault.
    assert cache.stats()["reconnections"] == 0
    assert (await cache.get("a")).data == {"name": 5}


async def test_a_closed_cache_reads_no_type(cache: dscache.AsyncCache) -> None:
    await cache.close()
    with pytest.raises(dscache.UsageError, match="closed"):
        cache.get("a", type=Person)
    with pytest.raises(dscache.UsageError, match="closed"):
        cache.get_bulk(["a"], type=Person)


# -- only newer


IF_NEWER: list[tuple[int | None, int, bool]] = [
    # stored, given, written
    (None, 0, True),
    (None, LAST, True),
    (0, 0, False),
    (0, 1, True),
    (3, 2, False),
    (3, 3, False),
    (3, 4, True),
    (9, 10, True),
    (10, 9, False),
    (99, 100, True),
    (2**53, 2**53 + 1, True),
    (2**53 + 1, 2**53, False),
    (2**53 + 1, 2**53 + 1, False),
    (2**53, 2**53, False),
    (LAST - 1, LAST, True),
    (LAST, LAST - 1, False),
    (LAST, LAST, False),
    (LAST, 0, False),
]


@everywhere
@pytest.mark.parametrize("ttl", [None, 1000], ids=["lasting", "ttl"])
@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "bulk"])
async def test_if_newer_writes_only_newer_versions(
    cache: dscache.AsyncCache, bulk: bool, ttl: int | None
) -> None:
    rows = {f"{stored} {given}": (stored, given, written) for stored, given, written in IF_NEWER}
    await cache.set_bulk(
        {name: (stored, "old") for name, (stored, _, _) in rows.items() if stored is not None}
    )
    if bulk:
        news = {name: (given, "new") for name, (_, given, _) in rows.items()}
        refused = await cache.set_bulk(news, ttl=ttl, if_newer=True)
        outcome = {name: name not in refused for name in rows}
    else:
        results = await asyncio.gather(
            *(
                cache.set(name, given, "new", ttl=ttl, if_newer=True)
                for name, (_, given, _) in rows.items()
            )
        )
        outcome = dict(zip(rows, results, strict=True))
    assert outcome == {name: written for name, (_, _, written) in rows.items()}
    assert pairs(await cache.get_bulk(rows)) == {
        name: (given, "new") if written else (stored, "old")
        for name, (stored, given, written) in rows.items()
    }


@everywhere
async def test_guarded_writes_of_one_name_have_separate_results(
    cache: dscache.AsyncCache,
) -> None:
    versions = [2, 1, 2, 5, 3, 6]
    results = await asyncio.gather(
        *(cache.set("a", version, version, if_newer=True) for version in versions)
    )
    assert results == [True, False, False, True, False, True]
    assert tuple(await cache.get("a")) == (6, 6)


@everywhere
async def test_a_guarded_bulk_returns_the_names_it_did_not_write(cache: dscache.AsyncCache) -> None:
    await cache.set_bulk({f"r{n}": (n, "old") for n in range(300)})
    news = {f"r{n}": (150, "new") for n in range(300)} | {"other": (0, "new")}
    assert await cache.set_bulk(news, if_newer=True) == {f"r{n}" for n in range(150, 300)}
    found = pairs(await cache.get_bulk(news))
    assert found["other"] == (0, "new")
    assert all(found[f"r{n}"] == ((150, "new") if n < 150 else (n, "old")) for n in range(300))


@pytest.mark.parametrize(
    ("stored", "given", "written"),
    [
        ("007", 7, False),
        ("007", 8, True),
        ("000", 0, False),
        ("0" * 30 + "9007199254740993", 2**53, False),
        ("0" * 30 + str(LAST - 1), LAST, True),
    ],
)
async def test_leading_zeros_of_a_version_are_ignored(
    cache: dscache.AsyncCache, redis: redis_py.Redis, stored: str, given: int, written: bool
) -> None:
    put(redis, "a", stored, '"old"')
    put(redis, "b", stored, '"old"')
    assert await cache.set("a", given, "new", if_newer=True) is written
    assert await cache.set_bulk({"b": (given, "new")}, if_newer=True) == (
        set() if written else {"b"}
    )
    assert await cache.head("a") == (given if written else int(stored))


@pytest.mark.parametrize("stored", ["", "abc", "-1", "1.5", "1e3", str(LAST + 1), "9" * 40])
@pytest.mark.parametrize("ttl", [None, 1000], ids=["lasting", "ttl"])
async def test_nothing_is_newer_than_a_damaged_version(
    cache: dscache.AsyncCache, redis: redis_py.Redis, stored: str, ttl: int | None
) -> None:
    put(redis, "bad", stored, '"old"')
    put(redis, "good", 5, '"old"')
    bad, good, fresh = await asyncio.gather(
        *(cache.set(name, LAST, "x", ttl=ttl, if_newer=True) for name in ("bad", "good", "fresh")),
        return_exceptions=True,
    )
    assert type(bad) is dscache.RecordDamaged
    assert bad.name == "bad"
    assert (good, fresh) == (True, True)
    news = {"good": (5, 5), "bad": (6, 6), "more": (7, 7)}
    with pytest.raises(dscache.BulkError, match="'bad'") as caught:
        await cache.set_bulk(news, ttl=ttl, if_newer=True)
    assert list(caught.value.errors) == ["bad"]
    assert isinstance(caught.value.errors["bad"], dscache.RecordError)
    assert caught.value.result == {"good"}
    assert redis.mget("bad_v", "bad_d") == [stored.encode(), b'"old"']
    assert await cache.head("more") == 7
    assert cache.stats()["damaged"] == 2


# -- TTLs


@everywhere
async def test_records_expire(open_cache: MakeCache) -> None:
    cache = await open_cache(ttl=1)
    gone = ["default", "explicit", "guarded", "bulk"]
    kept = ["zero", "longer", "overwritten", "bulk of longer"]
    await cache.set("overwritten", 5, 5, ttl=1)
    written = await asyncio.gather(
        cache.set("default", 5, 5),
        cache.set("explicit", 5, 5, ttl=1),
        cache.set("guarded", 5, 5, if_newer=True),
        cache.set_bulk({"bulk": (5, 5)}),
        cache.set("zero", 5, 5, ttl=0),
        cache.set("longer", 5, 5, ttl=1000),
        cache.set("overwritten", 6, 6, ttl=0),
        cache.set_bulk({"bulk of longer": (5, 5)}, ttl=1000, if_newer=True),
    )
    assert written == [True, True, True, set(), True, True, True, set()]
    async with asyncio.timeout(PATIENCE):
        while (await cache.get_bulk(gone)) or (await cache.head_bulk(gone)):
            await asyncio.sleep(0.02)
    assert await asyncio.gather(*map(cache.get, gone)) == [None] * len(gone)
    assert await cache.delete_bulk(gone) == 0
    # An expired record has no version to compare with.
    assert await cache.set("guarded", 1, 1, ttl=0, if_newer=True) is True
    assert list(await cache.head_bulk([*kept, *gone])) == [*kept, "guarded"]


async def test_the_ttl_is_the_argument_or_the_default(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    lasting, limited = await make_cache(), await make_cache(ttl=500)
    await lasting.set("a", 1, 1)
    await lasting.set("b", 1, 1, ttl=1000)
    await limited.set("c", 1, 1)
    await limited.set("d", 1, 1, ttl=1000)
    await limited.set("e", 1, 1, ttl=0)
    await limited.set_bulk({"f": (1, 1)})
    await limited.set_bulk({"g": (1, 1)}, ttl=0)
    await limited.set("h", 1, 1, if_newer=True)
    hundreds = {name: -(-redis.ttl(f"{name}_v") // 100) for name in "abcdefgh"}
    assert hundreds == {"a": 0, "b": 10, "c": 5, "d": 10, "e": 0, "f": 5, "g": 0, "h": 5}


async def test_both_keys_of_a_record_expire_at_the_same_instant(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache(ttl=1000)
    names = [f"r{n}" for n in range(300)]
    await asyncio.gather(*(cache.set(name, 1, "x" * 1000, if_newer=True) for name in names[:150]))
    await cache.set_bulk(dict.fromkeys(names[150:], (1, "x" * 1000)))
    before = {name: redis.pexpiretime(f"{name}_v") for name in names}
    assert min(before.values()) > 0
    await cache.get_bulk(names)
    await cache.head_bulk(names)
    assert {name: redis.pexpiretime(f"{name}_d") for name in names} == before


@everywhere
async def test_the_longest_ttl(cache: dscache.AsyncCache) -> None:
    assert await cache.set("a", 1, [1], ttl=10**10) is True
    assert tuple(await cache.get("a")) == (1, [1])


# -- many records


@everywhere
async def test_bulks_return_found_records_in_the_order_of_the_names(
    cache: dscache.AsyncCache,
) -> None:
    assert await cache.set_bulk({"a": (1, {"x": 1}), "b": (7, [7]), "c": (0, None)}) == set()
    names = ["c", "missing", "a", "b", "c", "a"]
    found = await cache.get_bulk(names)
    assert list(found) == ["c", "a", "b"]
    assert pairs(found) == {"c": (0, None), "a": (1, {"x": 1}), "b": (7, [7])}
    assert list((await cache.head_bulk(names)).items()) == [("c", 0), ("a", 1), ("b", 7)]
    assert await cache.delete_bulk(["a", "missing", "c", "a"]) == 2
    assert await cache.head_bulk(names) == {"b": 7}


@everywhere
async def test_names_are_any_iterable_of_names(cache: dscache.AsyncCache) -> None:
    records = {"a": (1, 1), "b": (2, 2)}
    await cache.set_bulk(MappingProxyType(records))
    for names in (["a", "b"], ("a", "b"), {"a", "b"}, records, records.keys(), iter(records)):
        assert await cache.head_bulk(names) == {"a": 1, "b": 2}
    assert pairs(await cache.get_bulk(name for name in "ab")) == records
    assert await cache.delete_bulk(map(str, ["a", "b"])) == 2


@everywhere
async def test_a_pair_is_any_iterable_of_two_values(cache: dscache.AsyncCache) -> None:
    await cache.set("old", 7, ["data"])
    record = await cache.get("old")
    assert await cache.set_bulk({"a": [1, "list"], "b": record, "c": iter((3, "iter"))}) == set()
    found = pairs(await cache.get_bulk("abc"[i] for i in range(3)))
    assert found == {"a": (1, "list"), "b": (7, ["data"]), "c": (3, "iter")}


@everywhere
async def test_a_single_str_is_not_many_names(cache: dscache.AsyncCache) -> None:
    for call in (cache.get_bulk, cache.head_bulk, cache.delete_bulk):
        for names in ("abc", b"abc", ""):
            with pytest.raises(dscache.RecordError, match=r"takes an iterable of names"):
                call(names)


@everywhere
async def test_an_iterable_that_raises_fails_only_its_bulk(cache: dscache.AsyncCache) -> None:
    def names() -> Iterator[str]:
        yield "a"
        raise LookupError("the caller's own")

    before = cache.set("a", 1, 1)
    for call in (cache.get_bulk, cache.head_bulk, cache.delete_bulk):
        with pytest.raises(LookupError, match="the caller's own"):
            call(names())
    assert await before is True
    assert await cache.head("a") == 1


@everywhere
async def test_empty_bulks_send_nothing(cache: dscache.AsyncCache) -> None:
    results = await asyncio.gather(
        cache.get_bulk([]), cache.head_bulk(iter(())), cache.set_bulk({}), cache.delete_bulk(())
    )
    assert results == [{}, {}, set(), 0]
    assert cache.stats()["commands"] == cache.stats()["bytes_out"] == 0


@on_one_server
async def test_a_bulk_of_a_hundred_thousand(make_cache: MakeCache) -> None:
    cache = await make_cache(commandTimeout=PATIENCE * 1000)
    records = {f"record/{n}": (n, n) for n in range(100_000)}
    names = list(records)
    absent = [f"absent/{n}" for n in range(1000)]
    wrote, heads, found = await asyncio.gather(
        cache.set_bulk(records), cache.head_bulk([*absent, *names]), cache.get_bulk(names)
    )
    assert wrote == set()
    assert heads == {name: version for name, (version, _) in records.items()}
    assert list(heads) == list(found) == names
    assert all(record.raw == b"%d" % n for n, record in enumerate(found.values()))
    assert await cache.delete_bulk([*names, *absent]) == len(names)


@everywhere
async def test_a_bulk_of_larger_documents_among_single_operations(open_cache: MakeCache) -> None:
    cache = await open_cache(commandTimeout=PATIENCE * 1000)
    records = {f"r{n}": (n, f"{n:07d}" * 290) for n in range(3000)}
    singles = [cache.get(f"r{n}") for n in range(10)]
    written = cache.set_bulk(records)
    singles += [cache.get(f"r{n}") for n in range(10)]
    found = cache.get_bulk(records)
    gone = cache.delete("r5")
    again = cache.get_bulk(records)
    assert await asyncio.gather(*singles[:10]) == [None] * 10
    assert await written == set()
    assert [tuple(await single) for single in singles[10:]] == [records[f"r{n}"] for n in range(10)]
    assert pairs(await found) == records
    assert await gone is True
    del records["r5"]
    assert pairs(await again) == records


# -- invalid arguments

BAD_NAMES = ["", None, 5, 1.5, b"a", ("a",), "\ud800", "a\udfffb"]
BAD_VERSIONS = [-1, True, False, 1.0, 2**63, 10**30, "1", None, decimal.Decimal(1), float("nan")]
BAD_TTLS = [-1, 1.5, 60.0, True, False, "60", 10**10 + 1, 2**70, float("inf")]


def cycle() -> list[Any]:
    data: list[Any] = []
    data.append({"again": data})
    return data


BAD_DATA: list[tuple[Any, str]] = [
    (object(), r"\$: .*object"),
    ({"users": [1, {"photo": object()}]}, r"\$\.users\[1\]\.photo"),
    (cycle(), r"\$\[0\]\.again"),
    ([1, {1.5: lambda: None}], r"\$\[1\]"),
    (msgspec.Raw(b""), "empty"),
]


def bad_name_calls(name: Any) -> list[Call]:
    return [
        lambda cache: cache.get(name),
        lambda cache: cache.head(name),
        lambda cache: cache.delete(name),
        lambda cache: cache.set(name, 1, []),
        lambda cache: cache.set(name, 1, [], ttl=1000, if_newer=True),
        lambda cache: cache.get_bulk(["good", name]),
        lambda cache: cache.head_bulk(iter(["good", name])),
        lambda cache: cache.delete_bulk([name, "good"]),
        lambda cache: cache.set_bulk({"good": (1, []), name: (1, [])}),
    ]


@everywhere
async def test_a_bad_name_is_refused_at_the_call(cache: dscache.AsyncCache) -> None:
    before = cache.set("good", 1, [1])
    for name in BAD_NAMES:
        for call in bad_name_calls(name):
            with pytest.raises(dscache.RecordError, match="name must") as caught:
                call(cache)
            assert caught.value.name == name
            assert isinstance(caught.value, ValueError)
    after = cache.get("good")
    assert await before is True
    assert tuple(await after) == (1, [1])


@everywhere
@pytest.mark.parametrize(
    "call",
    [
        lambda cache, version: cache.set("bad", version, []),
        lambda cache, version: cache.set("bad", version, [], ttl=5, if_newer=True),
        lambda cache, version: cache.set_bulk({"good": (1, []), "bad": (version, [])}),
    ],
    ids=["set", "set if newer", "set_bulk"],
)
async def test_a_bad_version_is_refused_at_the_call(
    cache: dscache.AsyncCache, call: Callable[[dscache.AsyncCache, Any], Any]
) -> None:
    for version in BAD_VERSIONS:
        with pytest.raises(dscache.RecordError, match="'bad': version must be an int") as caught:
            call(cache, version)
        assert caught.value.name == "bad"
    assert await cache.get_bulk(["good", "bad"]) == {}


@everywhere
@pytest.mark.parametrize(
    "call",
    [
        lambda cache, ttl: cache.set("bad", 1, [], ttl=ttl),
        lambda cache, ttl: cache.set("bad", 1, [], ttl=ttl, if_newer=True),
        lambda cache, ttl: cache.set_bulk({"bad": (1, [])}, ttl=ttl),
    ],
    ids=["set", "set if newer", "set_bulk"],
)
async def test_a_bad_ttl_is_refused_at_the_call(
    cache: dscache.AsyncCache, call: Callable[[dscache.AsyncCache, Any], Any]
) -> None:
    for ttl in BAD_TTLS:
        with pytest.raises(dscache.RecordError, match="'bad': ttl must be"):
            call(cache, ttl)
    assert await cache.get("bad") is None


@everywhere
@pytest.mark.parametrize(
    "call",
    [
        lambda cache, data: cache.set("bad", 1, data),
        lambda cache, data: cache.set("bad", 1, data, ttl=5, if_newer=True),
        lambda cache, data: cache.set_bulk({"good": (1, []), "bad": (1, data)}),
    ],
    ids=["set", "set if newer", "set_bulk"],
)
async def test_bad_data_is_refused_at_the_call(
    cache: dscache.AsyncCache, call: Callable[[dscache.AsyncCache, Any], Any]
) -> None:
    for data, message in BAD_DATA:
        with pytest.raises(dscache.RecordError, match=rf"'bad': .*{message}") as caught:
            call(cache, data)
        assert caught.value.name == "bad"
    assert await cache.get_bulk(["good", "bad"]) == {}


@everywhere
async def test_set_bulk_takes_a_mapping_of_pairs(cache: dscache.AsyncCache) -> None:
    pairs: list[Any] = [1, None, (1,), (1, 2, 3), "x"]
    for records in ([("a", 1, [])], {"a", "b"}, "ab", None, *({"a": pair} for pair in pairs)):
        with pytest.raises(dscache.RecordError, match="set_bulk takes"):
            cache.set_bulk(records)
    assert await cache.get("a") is None


async def test_a_call_that_is_refused_sends_nothing(
    cache: dscache.AsyncCache, redis: redis_py.Redis
) -> None:
    calls = [call for name in BAD_NAMES for call in bad_name_calls(name)]
    calls += [lambda cache, v=version: cache.set("a", v, []) for version in BAD_VERSIONS]
    calls += [lambda cache, t=ttl: cache.set("a", 1, [], ttl=t) for ttl in BAD_TTLS]
    calls += [lambda cache, d=data: cache.set("a", 1, d) for data, _ in BAD_DATA]
    calls += [lambda cache: cache.get_bulk("abc"), lambda cache: cache.set_bulk([])]
    before = record_commands(redis)
    for call in calls:
        with pytest.raises(dscache.RecordError):
            call(cache)
        await asyncio.sleep(0)
    stats = cache.stats()
    assert stats["commands"] == stats["bytes_out"] == stats["pending"] == 0
    assert await cache.get("a") is None
    after = record_commands(redis)
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "mget": 1
    }


# -- half a record


@pytest.mark.parametrize("half", ["_v", "_d"])
async def test_half_a_record_is_a_miss_for_every_operation(
    cache: dscache.AsyncCache, redis: redis_py.Redis, half: str
) -> None:
    for name in ("a", "b", "c", "d"):
        redis.set(f"{name}{half}", "5")
    await cache.set("whole", 1, [])
    assert await cache.get("a") is None
    assert await cache.head("a") is None
    assert list(await cache.get_bulk(["a", "whole", "b"])) == ["whole"]
    assert await cache.head_bulk(["a", "whole", "b"]) == {"whole": 1}
    assert cache.stats()["halves"] == 6
    assert await cache.delete("a") is False
    assert await cache.delete_bulk(["b", "whole"]) == 1
    assert await cache.set("c", 1, [], if_newer=True) is True
    assert await cache.set_bulk({"d": (1, [])}, if_newer=True) == set()
    assert sorted(redis.keys("*")) == [b"c_d", b"c_v", b"d_d", b"d_v"]


@everywhere
async def test_operations_are_counted(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 1, 1)
    await cache.set("a", 1, 1, if_newer=True)
    await cache.get("a")
    await cache.head("missing")
    await cache.get_bulk(["a", "missing"])
    await cache.delete("a")
    await cache.set_bulk({"b": (1, 1), "c": (1, 1)})
    await cache.delete_bulk(["b", "missing"])
    stats = cache.stats()
    names = ("reads", "hits", "halves", "damaged", "writes", "not_newer", "deletes")
    assert {name: stats[name] for name in names} == {
        "reads": 4, "hits": 2, "halves": 0, "damaged": 0, "writes": 3, "not_newer": 1, "deletes": 3,
    }  # fmt: skip
    assert stats["last_loss"] == ""


# -- the life of a cache


def config(server: EmbeddedServer, kind: str, **options: Any) -> dict[str, Any]:
    if kind == "redis":
        options["url"] = server.url
    return {"cache": {"name": kind, "options": options}}


@everywhere
async def test_from_creation_to_close(
    server: EmbeddedServer, kind: str, cache_class: Any, backend: str, redis: redis_py.Redis
) -> None:
    cache = cache_class.from_config(config(server, kind))
    assert not cache.is_ready
    assert cache.stats() == {}
    for text in (cache.description, repr(cache)):
        assert kind in text
        assert "\n" not in text
    assert f"{backend} core" in cache.description
    await cache.when_ready()
    assert cache.is_ready
    await asyncio.gather(cache.when_ready(), cache.when_ready())
    assert await cache.set("a", 1, [1]) is True
    assert cache.stats()["writes"] == 1
    if kind == "redis":
        assert f"{server.host}:{server.port}" in cache.description
        assert cache.stats()["connects"] == 1
    await cache.close()
    assert not cache.is_ready
    await cache.close()
    assert cache.stats()["writes"] == 1
    assert kind in cache.description


OPERATIONS: list[Call] = [
    lambda cache: cache.get("a"),
    lambda cache: cache.head("a"),
    lambda cache: cache.set("a", 1, []),
    lambda cache: cache.set("a", 1, [], if_newer=True),
    lambda cache: cache.delete("a"),
    lambda cache: cache.get_bulk(["a"]),
    lambda cache: cache.head_bulk(["a"]),
    lambda cache: cache.set_bulk({"a": (1, [])}),
    lambda cache: cache.delete_bulk(["a"]),
    lambda cache: cache.get_bulk([]),
    lambda cache: cache.set_bulk({}),
]


@everywhere
@pytest.mark.parametrize("opened", [True, False], ids=["opened", "never opened"])
async def test_a_closed_cache_refuses_at_the_call(
    server: EmbeddedServer,
    kind: str,
    cache_class: Any,
    backend: str,
    redis: redis_py.Redis,
    opened: bool,
) -> None:
    cache = cache_class.from_config(config(server, kind))
    if opened:
        await cache.set("a", 1, [])
    await cache.close()
    for call in OPERATIONS:
        with pytest.raises(dscache.UsageError, match="closed"):
            call(cache)
    with pytest.raises(dscache.UsageError, match="closed"):
        await cache.when_ready()
    with pytest.raises(dscache.UsageError, match="closed"):
        async with cache:
            pytest.fail("a closed cache was entered")
    await cache.close()


@everywhere
async def test_a_cache_opens_at_its_first_use(
    server: EmbeddedServer, kind: str, cache_class: Any, backend: str, redis: redis_py.Redis
) -> None:
    cache = cache_class.from_config(config(server, kind))
    written, found = cache.set("a", 1, [1]), cache.get("a")
    assert await written is True
    assert tuple(await found) == (1, [1])
    await cache.close()


@everywhere
async def test_a_with_block_always_closes_the_cache(
    server: EmbeddedServer, kind: str, cache_class: Any, backend: str, redis: redis_py.Redis
) -> None:
    async with cache_class.from_config(config(server, kind)) as cache:
        assert cache.is_ready
        written = cache.set("a", 1, [1])
    assert not cache.is_ready
    assert await written is True
    other = cache_class.from_config(config(server, kind))

    async def fail() -> None:
        async with other:
            failing.append(other.set("b", 1, [1]))
            raise LookupError("the caller's own")

    failing: list[Awaitable[bool]] = []
    with pytest.raises(LookupError, match="the caller's own"):
        await fail()
    assert not other.is_ready
    assert await failing[0] is True
    with pytest.raises(dscache.UsageError):
        other.get("a")


@everywhere
async def test_close_completes_issued_operations(open_cache: MakeCache) -> None:
    cache = await open_cache(closeTimeout=PATIENCE * 1000, commandTimeout=PATIENCE * 1000)
    names = [f"r{n}" for n in range(3000)]
    issued = [
        cache.set_bulk(dict.fromkeys(names, (1, "x" * 500))),
        cache.set("a", 2, 2, ttl=1000, if_newer=True),
        cache.head("a"),
        cache.head_bulk(names),
        cache.delete_bulk(names),
    ]
    await cache.close()
    assert all(future.done() for future in issued)
    results = [future.result() for future in issued]
    assert results == [set(), True, 2, dict.fromkeys(names, 1), 3000]


@everywhere
async def test_two_caches_in_one_process(open_cache: MakeCache, kind: str) -> None:
    one, two = await open_cache(), await open_cache()
    await one.set("a", 1, [1])
    assert (await two.head("a")) == (1 if kind == "redis" else None)
    await one.close()
    assert await two.set("a", 2, [2]) is True
    assert tuple(await two.get("a")) == (2, [2])


# -- operations return futures


@async_only
@everywhere
async def test_operations_return_ordinary_futures(cache: dscache.AsyncCache) -> None:
    future = cache.set("a", 1, [1])
    others = [cache.get("b"), cache.head("b"), cache.delete("b"), cache.get_bulk(["b"])]
    others += [cache.head_bulk(["b"]), cache.set_bulk({"c": (1, 1)}), cache.delete_bulk(["b"])]
    # No subclass and no coroutine: each function of asyncio takes it in the same way.
    assert {type(one) for one in (future, *others)} == {asyncio.Future}
    assert await asyncio.gather(*others) == [None, None, False, {}, {}, set(), 0]
    seen: list[bool] = []
    future.add_done_callback(lambda done: seen.append(done.result()))
    async with asyncio.timeout(PATIENCE):
        assert await asyncio.wait_for(cache.head("a"), PATIENCE) == 1
        done, pending = await asyncio.wait([cache.head("a"), cache.head("b")])
        assert ({future.result() for future in done}, pending) == ({1, None}, set())
        for coming in asyncio.as_completed([cache.head("a"), cache.head("a")]):
            assert await coming == 1
        async with asyncio.TaskGroup() as group:
            task = group.create_task(as_coroutine(cache.get("a")))
        assert tuple(task.result()) == (1, [1])
        assert await asyncio.shield(cache.head("a")) == 1
    assert await future is True
    assert await future is True
    assert seen == [True]


async def as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@everywhere
async def test_operations_that_are_not_awaited_are_still_executed(
    cache: dscache.AsyncCache,
) -> None:
    for version in range(5):
        cache.set("a", version, version)
        cache.set_bulk({"b": (version, version)})
    assert await cache.head_bulk(["a", "b"]) == {"a": 4, "b": 4}


@async_only
@everywhere
async def test_cancelling_one_waiter_affects_no_other(cache: dscache.AsyncCache) -> None:
    await cache.set("a", 1, [1])
    calls: list[Call] = [
        lambda cache: cache.get("a"),
        lambda cache: cache.head("a"),
        lambda cache: cache.set("b", 1, [1]),
        lambda cache: cache.set("b", 1, [1], ttl=1000),
        lambda cache: cache.get_bulk(["a", "b"]),
        lambda cache: cache.set_bulk({"c": (1, 1)}, if_newer=True),
    ]
    for sent in (False, True):
        for call in calls:
            futures = [call(cache) for _ in range(5)]
            if sent:
                await asyncio.sleep(0)
            futures[2].cancel()
            futures[0].cancel()
            results = await asyncio.gather(*futures, return_exceptions=True)
            kept = [results[1], results[3], results[4]]
            assert not any(isinstance(result, BaseException) for result in kept)
    assert await cache.head_bulk(["a", "b", "c"]) == {"a": 1, "b": 1, "c": 1}
    # In the order of the calls: a write whose waiter is gone is still a write.
    cache.set("d", 1, [1]).cancel()
    assert await cache.head("d") == 1


@async_only
async def test_cancelling_keeps_the_connection(cache: dscache.AsyncCache) -> None:
    for _ in range(50):
        tasks = [asyncio.ensure_future(as_coroutine(cache.get(f"r{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[1::2] == [None] * 10
    stats = cache.stats()
    assert (stats["connects"], stats["last_loss"]) == (1, "")


# -- uvloop


async def smoke(source: Mapping[str, Any]) -> None:
    """Use every method once, and the connection for larger data."""
    async with asyncio.timeout(PATIENCE), dscache.AsyncCache.from_config(source) as cache:
        results = await asyncio.gather(
            cache.set("a", 1, {"x": [1]}),
            cache.get("a"),
            cache.head("a"),
            cache.set("a", 1, "not newer", if_newer=True),
            cache.set_bulk({"b": (2, 2), "c": (3, 3)}, ttl=1000),
            cache.head_bulk(["a", "b", "c"]),
            cache.delete("b"),
            cache.delete_bulk(["b", "c"]),
        )
        assert tuple(results[1]) == (1, {"x": [1]})
        assert results[2:] == [1, False, set(), {"a": 1, "b": 2, "c": 3}, True, 1]
        large = {f"r{n}": (n, "x" * 2000) for n in range(2000)} | {"big": (1, "y" * 5_000_000)}
        await cache.set_bulk(large)
        assert pairs(await cache.get_bulk(large)) == large
        futures = [cache.get(f"r{n}") for n in range(100)]
        # In memory, an operation completes at the call.
        cancelled = {n for n, future in enumerate(futures) if n % 3 == 0 and future.cancel()}
        for n, result in enumerate(await asyncio.gather(*futures, return_exceptions=True)):
            if n in cancelled:
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert result.name == f"r{n}"
    assert not any(cache.stats()[name] for name in ("pending", "in_flight", "queued"))
    with pytest.raises(dscache.UsageError):
        cache.get("a")


class TestUvloop:
    """The same on the other event loop: over TCP, a unix socket, TLS, and in memory."""

    def run(self, source: Mapping[str, Any]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(smoke(source))
            # A second cache on the same loop, and a third on another.
            runner.run(smoke(source))
        uvloop.run(smoke(source))

    @everywhere
    def test_every_method(
        self, server: EmbeddedServer, kind: str, backend: str, redis: redis_py.Redis
    ) -> None:
        self.run(config(server, kind))

    @on_one_server
    def test_over_a_unix_socket(self, unix_server: EmbeddedServer, backend: str) -> None:
        self.run({"name": "redis", "options": {"url": unix_server.url}})

    @on_one_server
    def test_a_lost_server(self, make_server: MakeServer, backend: str) -> None:
        server = make_server()

        async def lose() -> None:
            async with asyncio.timeout(PATIENCE):
                source = {"options": {"url": server.url, "commandTimeout": PATIENCE * 1000}}
                async with dscache.AsyncCache.from_config({"name": "redis", **source}) as cache:
                    await cache.set("a", 1, [1])
                    await asyncio.to_thread(server.restart)
                    assert await cache.get("a") is None
                    assert cache.stats()["connects"] == 2

        uvloop.run(lose())

    @on_one_server
    def test_a_certificate_of_an_unknown_authority(
        self, server: EmbeddedServer, certificates: TLSFiles, backend: str
    ) -> None:
        async def refuse() -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates.certificate, certificates.key)
            async with (
                asyncio.timeout(PATIENCE),
                FaultProxy(server.host, server.port, tls=context) as proxy,
            ):
                trusting = {"url": proxy.url, "tls": {"ca": certificates.authority}}
                await smoke({"name": "redis", "options": trusting})
                cache = dscache.AsyncCache.from_config(proxy.url)
                with pytest.raises(dscache.ConnectError, match="certificate"):
                    await cache.when_ready()
                await cache.close()

        uvloop.run(refuse())


# -- options


async def test_the_prefix_stands_before_both_keys(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache(keyPrefix="app:\u00e9:")
    other = await make_cache()
    await cache.set("a", 1, [1])
    await cache.set_bulk({"b": (1, 1)}, ttl=1000, if_newer=True)
    keys = sorted(key.decode() for key in redis.keys("*"))
    assert keys == [f"app:\u00e9:{key}" for key in ("a_d", "a_v", "b_d", "b_v")]
    assert await cache.head_bulk(["a", "b"]) == {"a": 1, "b": 1}
    assert await other.head_bulk(["a", "b", "app:\u00e9:a"]) == {"app:\u00e9:a": 1}
    assert await cache.delete_bulk(["a", "b"]) == 2
    assert redis.dbsize() == 0


async def test_hash_tags_keep_both_keys_in_one_slot(
    make_cache: MakeCache, redis: redis_py.Redis
) -> None:
    cache = await make_cache(keyLayout="hashtag", keyPrefix="p:")
    names = ["a", "}a", "{a", "{a}", "a}", "}{0}a", "}", "}}", "{}", "{", "0", "}0", "a}_v", " "]
    assert await cache.set_bulk({name: (1, name) for name in names}) == set()
    keys = redis.keys("*")
    assert len(keys) == 2 * len(names)
    for key in keys:
        assert key_slot(key[:-2] + b"_v") == key_slot(key[:-2] + b"_d")
    assert {b"p:{a}_v", b"p:{a}_d"} < set(keys)
    assert pairs(await cache.get_bulk(names)) == {name: (1, name) for name in names}
    assert await cache.head_bulk(names) == dict.fromkeys(names, 1)
    for name in names:
        assert await cache.set(name, 2, 2, if_newer=True) is True
        assert await cache.delete(name) is True
    assert redis.dbsize() == 0


@pytest.mark.parametrize("options", [{}, {"keyLayout": "deepstream"}, {"keyLayout": "auto"}])
async def test_the_default_layout_is_that_of_deepstream(
    make_cache: MakeCache, redis: redis_py.Redis, options: dict[str, str]
) -> None:
    cache = await make_cache(**options)
    await cache.set("{a}", 1, [1])
    assert redis.mget("{a}_v", "{a}_d") == [b"1", b"[1]"]


async def test_the_connection_has_its_name(make_cache: MakeCache, redis: redis_py.Redis) -> None:
    cache = await make_cache(connectionName="orders")
    await cache.set("a", 1, [1])
    assert [client["db"] for client in redis.client_list() if client["name"] == "orders"] == ["0"]


async def test_the_database_is_selected(make_cache: MakeCache, make_server: MakeServer) -> None:
    # On a private server, as other tests share theirs.
    own = make_server()
    cache = await make_cache(url=own.url, db=3)
    by_url = await make_cache(url=f"{own.url}/4")
    await cache.set("a", 3, [3])
    await by_url.set("a", 4, [4])
    with redis_py.Redis.from_url(own.url) as redis:
        assert sorted(redis.info("keyspace")) == ["db3", "db4"]
    assert (await cache.head("a"), await by_url.head("a")) == (3, 4)


@on_one_server
@pytest.mark.parametrize("how", ["options", "URL", "password alone", "URL with password alone"])
async def test_user_and_password(
    make_cache: MakeCache, make_server: MakeServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    args = () if "alone" not in how else ("--requirepass", SECRET)
    own = make_server(*args)
    password = {"password": SECRET} if "alone" in how else {}
    where = {"host": own.host, "port": own.port}
    with redis_py.Redis(**where, **password) as redis:
        redis.acl_setuser(
            "ada", enabled=True, passwords=[f"+{SECRET}"], categories=["+@all"], keys=["*"]
        )
        options = {
            "options": {**where, "username": "ada", "password": SECRET},
            "URL": {"url": f"redis://ada:{SECRET}@{own.host}:{own.port}/1"},
            "password alone": {**where, "password": SECRET},
            "URL with password alone": {"url": f"redis://:{SECRET}@{own.host}:{own.port}"},
        }[how]
        cache = await make_cache(connectionName="me", **options)
        assert await cache.set("a", 1, [1]) is True
        assert tuple(await cache.get("a")) == (1, [1])
        users = [client["user"] for client in redis.client_list() if client["name"] == "me"]
    assert users == ["default" if "alone" in how else "ada"]
    for text in (cache.description, repr(cache), repr(cache.stats()), caplog.text):
        assert SECRET not in text


@on_one_server
@pytest.mark.parametrize("how", ["path", "URL", "URL with database"])
async def test_over_a_unix_socket(
    make_cache: MakeCache, unix_server: EmbeddedServer, how: str
) -> None:
    options = {
        "path": {"path": unix_server.path},
        "URL": {"url": unix_server.url},
        "URL with database": {"url": f"{unix_server.url}?db=2"},
    }[how]
    cache = await make_cache(**options)
    assert unix_server.path in cache.description
    documents = {f"r{n}": (n, "x" * 5000) for n in range(1000)}
    await cache.set_bulk(documents)
    assert pairs(await cache.get_bulk(documents)) == documents
    with redis_py.Redis.from_url(unix_server.url) as redis:
        assert list(redis.info("keyspace")) == ["db2" if "database" in how else "db0"]


@on_one_server
async def test_every_kind_of_configuration_source(
    server: EmbeddedServer, redis: redis_py.Redis, cache_class: Any, backend: str, tmp_path: Path
) -> None:
    options = {"host": server.host, "port": server.port}
    mapping = {"cache": {"name": "redis", "options": options}}
    path = tmp_path / "config.yml"
    path.write_text(f"cache:\n  name: redis\n  options: {json.dumps(options)}\n")
    address = f"{server.host}:{server.port}"
    for source in (mapping, mapping["cache"], path, str(path), f"redis://{address}", address):
        async with cache_class.from_config(source) as cache:
            await cache.set("a", 1, [1])
            assert address in cache.description


@on_one_server
async def test_a_subclass_opens_instances_of_itself(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    class Sessions(dscache.AsyncCache):
        pass

    async with Sessions.from_config(server.url) as cache:
        assert type(cache) is Sessions
        assert await cache.set("a", 1, [1]) is True


# -- TLS


@pytest.fixture
async def tls_url(
    server: EmbeddedServer,
    make_server: MakeServer,
    tls_proxy: FaultProxy,
    certificates: TLSFiles,
) -> AsyncIterator[str]:
    """The URL of a server that speaks TLS itself if it can, else of a proxy that does."""
    if isinstance(server, EmbeddedServer) and server.binary.tls:
        yield make_server(tls=certificates).url
    else:
        yield tls_proxy.url


@pytest.fixture(scope="session")
def foreign_authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the certificate of an authority that issued none of the others."""
    path = tmp_path_factory.mktemp("foreign") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture(scope="session")
def authority(certificates: TLSFiles) -> str:
    """The certificate of the authority as PEM text."""
    return Path(certificates.authority).read_text()


@async_only
@on_one_server
@pytest.mark.parametrize("how", ["path", "text", "URL", "plain URL", "other name"])
async def test_a_certificate_is_verified(
    make_cache: MakeCache, tls_url: str, certificates: TLSFiles, authority: str, how: str
) -> None:
    options: dict[str, Any] = {
        "path": {"url": tls_url, "tls": {"ca": certificates.authority}},
        "text": {"url": tls_url, "tls": {"ca": authority}},
        "URL": {"url": f"{tls_url}?ssl_ca_certs={certificates.authority}"},
        "plain URL": {"url": tls_url.replace("rediss", "redis"), "tls": {"ca": authority}},
        "other name": {"url": tls_url, "tls": {"ca": authority, "servername": "localhost"}},
    }[how]
    cache = await make_cache(**options)
    documents = {f"r{n}": (n, "x" * 5000) for n in range(1000)}
    await cache.set_bulk(documents)
    assert pairs(await cache.get_bulk(documents)) == documents


@on_one_server
@pytest.mark.parametrize("tls", [{}, {"ca": "foreign"}, {"servername": "elsewhere.example"}])
async def test_a_refused_certificate_fails_at_once(
    make_cache: MakeCache,
    tls_url: str,
    certificates: TLSFiles,
    foreign_authority: str,
    tls: dict[str, str],
) -> None:
    if tls:
        authority = foreign_authority if "ca" in tls else certificates.authority
        tls = {**tls, "ca": authority}
    options = {"url": tls_url, "tls": tls, "connectTimeout": 600_000, "commandTimeout": 600_000}
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
    async with asyncio.timeout(PATIENCE):
        for ask in (cache.when_ready, lambda: cache.get("a"), lambda: cache.set("a", 1, [])):
            with pytest.raises(dscache.ConnectError, match="certificate"):
                await ask()
        with pytest.raises(dscache.ConnectError, match="certificate"):
            async with cache:
                pytest.fail("it was entered")
    assert not cache.is_ready


@async_only
@on_one_server
@pytest.mark.parametrize(
    "tls",
    [{"rejectUnauthorized": False}, {"ca": "", "servername": "x.example", "checkHostname": False}],
    ids=["any", "any name"],
)
async def test_verification_can_be_switched_off(
    make_cache: MakeCache, tls_url: str, certificates: TLSFiles, tls: dict[str, Any]
) -> None:
    if "ca" in tls:
        tls = {**tls, "ca": certificates.authority}
    cache = await make_cache(url=tls_url, tls=tls)
    assert await cache.set("a", 1, [1]) is True
    by_url = await make_cache(url=f"{tls_url}?ssl_cert_reqs=none")
    assert await by_url.head("a") == 1


@async_only
@on_one_server
async def test_a_client_presents_its_certificate(
    make_cache: MakeCache, server: EmbeddedServer, certificates: TLSFiles
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.authority)
    context.load_cert_chain(certificates.certificate, certificates.key)
    context.verify_mode = ssl.CERT_REQUIRED
    async with FaultProxy(server.host, server.port, tls=context) as proxy:
        tls = {"ca": certificates.authority}
        own = {"cert": certificates.certificate, "key": certificates.key}
        cache = await make_cache(url=proxy.url, tls={**tls, **own})
        assert await cache.set("a", 1, [1]) is True
        await cache.close()
        nobody = dscache.AsyncCache.from_config(
            {"name": "redis", "options": {"url": proxy.url, "tls": tls, **IMPATIENT}}
        )
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(dscache.ConnectError):
                await nobody.when_ready()
            await nobody.close()


@on_one_server
async def test_tls_to_a_server_without_tls(server: EmbeddedServer, backend: str) -> None:
    options = {"host": server.host, "port": server.port, "tls": True, **IMPATIENT}
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(dscache.ConnectError):
            await cache.when_ready()
        with pytest.raises((dscache.ConnectError, dscache.ConnectionLost)):
            await cache.get("a")
        await cache.close()


@on_one_server
async def test_plain_tcp_to_a_server_with_tls(tls_url: str, backend: str) -> None:
    options = {"url": tls_url.replace("rediss", "redis"), **IMPATIENT}
    cache = dscache.AsyncCache.from_config({"name": "redis", "options": options})
    async with asyncio.timeout(PATIENCE):
        with pytest.raises((dscache.ConnectError, dscache.ProtocolError)):
            await cache.when_ready()
        with pytest.raises((dscache.ConnectError, dscache.ProtocolError)):
            await cache.get("a")
        await cache.close()


@pytest.mark.parametrize("cache_class", [dscache.Cache, dscache.AsyncCache])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_is_not_copied(
    cache_class: type[dscache.Cache | dscache.AsyncCache], duplicate: Callable[[Any], Any]
) -> None:
    """The end of a copy would close the connections of the original."""
    with pytest.raises(TypeError, match="can't be copied or pickled; open another one"):
        duplicate(cache_class({"name": "memory"}))
