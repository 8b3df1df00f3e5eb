"""``type`` of fetch, update, scan and watch, on both caches, by a server and in memory."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any, NewType, TypedDict

import msgspec
import pydantic
import pytest
import redis as redis_py

import dscache
from dscache import BulkError, RecordDamaged, RecordError
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.either import Either
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.parametrize("server", SERVERS[-1:], indirect=True, ids=_server_id)


class User(msgspec.Struct):
    name: str
    age: int = 0


class Unknown:
    """A class that msgspec can't make."""


ADA = {"name": "Ada"}
MISFIT = r"Expected `str`, got `int` - at `\$\.name`"


PLACES = [
    (kind, place) for kind in ("AsyncCache", "Cache") for place in ("redis", "memory", "near")
]


@pytest.fixture(params=PLACES, ids="-".join)
async def cache(
    request: pytest.FixtureRequest, server: EmbeddedServer, backend: str, redis: redis_py.Redis
) -> AsyncIterator[Either]:
    kind, place = request.param
    options: dict[str, Any] = {"name": "memory"} if place == "memory" else {"url": server.url}
    if place == "near":
        options["nearCache"] = {"idleLimit": 30_000}
    async with Either(kind, **options) as opened:
        yield opened


async def test_fetch(cache: Either) -> None:
    for _ in range(2):  # loaded, and found
        for refresh_after in (None, 30):
            record = await cache.do(
                *("fetch", "n", lambda _: ADA),
                **{"ttl": 60, "type": User, "refresh_after": refresh_after},
            )
            assert (record.data, record.version > 0) == (User("Ada"), True)
    assert await cache.do("fetch", "none", lambda _: None, ttl=60, type=User) is None
    with pytest.raises(RecordDamaged, match=MISFIT):
        await cache.do("fetch", "x", lambda _: {"name": 5}, ttl=60, type=User)
    # It is a record, and the type is only this caller's.
    assert (await cache.do("get", "x")).data == {"name": 5}


async def test_fetch_bulk(cache: Either) -> None:
    await cache.do("set", "there", 1, ADA)
    found = await cache.do(
        *("fetch_bulk", ["a", "there"], lambda names: {name: {"name": "B"} for name in names}),
        **{"ttl": 60, "type": User},
    )
    assert {name: one.data for name, one in found.items()} == {"a": User("B"), "there": User("Ada")}
    with pytest.raises(BulkError, match=r"fetch_bulk: 2 .*failed") as caught:
        await cache.do(
            *("fetch_bulk", ["there", "b", "c"], lambda _: {"b": {"name": 5}, "c": object()}),
            **{"ttl": 60, "type": User},
        )
    assert caught.value.errors.keys() == {"b", "c"}
    assert type(caught.value.errors["b"]) is RecordDamaged
    assert type(caught.value.errors["c"]) is dscache.LoadError
    assert {name: one.data for name, one in caught.value.result.items()} == {"there": User("Ada")}


async def test_an_update_that_removes_members_is_logged_once_for_each_type(
    cache: Either, caplog: pytest.LogCaptureFixture
) -> None:
    class Renamed(msgspec.Struct, rename="camel", omit_defaults=True):
        first_name: str
        last_name: str = ""

    @dataclasses.dataclass
    class Plain:
        name: str

    class Dict(TypedDict):
        name: str

    class Model(pydantic.BaseModel):
        name: str = pydantic.Field(alias="Name")

    class Keeps(pydantic.BaseModel, extra="allow"):
        name: str

    named = {"firstName": "Ada", "lastName": ""}
    quiet: tuple[tuple[Any, dict[str, object]], ...] = (
        (Renamed, named),
        (Keeps, {"name": "Ada", "age": 5}),
        (dict[str, str], ADA),
    )
    for type_, data in quiet:
        await cache.do("set", "n", 1, data)
        await cache.do("update", "n", lambda user: user, type=type_)
    assert caplog.messages == []
    loud: tuple[tuple[Any, dict[str, object]], ...] = (
        (Renamed, named),
        (Plain, ADA),
        (Dict, ADA),
        (Model, {"Name": "Ada"}),
    )
    for type_, data in loud:
        for _ in range(2):
            await cache.do("set", "n", 1, {**data, "new": 1})
            await cache.do("update", "n", lambda user: dscache.KEEP, type=type_)
            await cache.do("update", "n", lambda user: user, type=type_)
    assert [one.partition(", which")[0] for one in caplog.messages] == [
        f"update: record 'n': the type {type_.__qualname__} doesn't name the member 'new'"
        for type_, _ in loud
    ]


async def test_other_names_of_a_type(cache: Either, caplog: pytest.LogCaptureFixture) -> None:
    """An update that removes members takes each form of a type that a read takes."""

    class Own(msgspec.Struct):
        name: str

    known: dict[str, Any] = {
        "NewType": NewType("Own", Own),
        "Annotated": Annotated[Own, "of a test"],
    }
    if sys.version_info >= (3, 12):
        exec("type Alias = Own", {"Own": Own}, known)  # nothing can refer to it weakly
    for type_ in known.values():
        await cache.do("set", "n", 1, {"name": "Ada", "new": 1})
        record = await cache.do("update", "n", lambda user: user, type=type_)
        assert record.raw == b'{"name":"Ada"}'
    assert len(caplog.messages) == len(known)


async def test_update(cache: Either) -> None:
    def grow(user: User) -> User:
        user.age += 1
        return user

    record = await cache.do("update", "n", grow, default=ADA, type=User)
    assert (record.version, record.data) == (1, User("Ada", 1))
    record = await cache.do("update", "n", grow, type=User)
    assert (record.version, record.data) == (2, User("Ada", 2))
    kept = await cache.do("update", "n", lambda user: dscache.KEEP, type=User)
    assert (kept.version, kept.data) == (2, User("Ada", 2))
    with pytest.raises(
        RecordError, match=r"^update 'n': the function returned None, which doesn't"
    ):
        await cache.do("update", "n", lambda user: None, type=User)
    assert await cache.do("head", "n") == 2
    empty = await cache.do("update", "n", lambda user: None, type=User | None)
    assert (empty.version, empty.data) == (3, None)
    await cache.do("set", "x", 7, {"name": 5})
    with pytest.raises(RecordDamaged, match=MISFIT):
        await cache.do("update", "x", grow, type=User)
    assert await cache.do("head", "x") == 7


class Model(pydantic.BaseModel):
    name: str


@pytest.mark.parametrize(
    ("type_", "misfit"), [(User, MISFIT), (Model, "name: Input should be a valid string")]
)
async def test_update_refuses_data_that_does_not_fit(
    cache: Either, type_: Any, misfit: str
) -> None:
    """It would be written, and fail all later reads with the type."""
    said = f"^update 'n': the default doesn't fit the type: {misfit}; give a default of it$"
    with pytest.raises(RecordError, match=said) as caught:
        await cache.do("update", "n", lambda user: user, default={"name": 5}, type=type_)
    assert not isinstance(caught.value, RecordDamaged)
    await cache.do("set", "n", 1, ADA)
    said = f"^update 'n': the function returned data that doesn't fit the type: {misfit}; return"
    with pytest.raises(RecordError, match=said) as caught:
        await cache.do("update", "n", lambda user: {"name": 5}, type=type_)
    assert not isinstance(caught.value, RecordDamaged)
    assert await cache.do("head", "n") == 1
    record = await cache.do("update", "n", lambda user: {"name": "Bob"}, type=type_)
    assert (record.version, record.data) == (2, type_(name="Bob"))
    # Raw is written without a check.
    record = await cache.do("update", "n", lambda user: msgspec.Raw(b"5"), type=type_)
    assert (record.version, record.raw) == (3, b"5")


async def test_update_refuses_a_default_that_is_not_json(cache: Either) -> None:
    said = "^update 'n': the default is a msgspec.Raw whose text isn't JSON$"
    with pytest.raises(RecordError, match=said):
        await cache.do("update", "n", lambda data: data, default=msgspec.Raw(b"{bad"))


async def test_update_refuses_an_object_of_the_type_with_a_wrong_attribute(cache: Either) -> None:
    def spoil(user: Any) -> User:
        user.name = 5
        return user

    await cache.do("set", "n", 1, ADA)
    with pytest.raises(RecordError, match=f"data that doesn't fit the type: {MISFIT}; return"):
        await cache.do("update", "n", spoil, type=User)
    assert await cache.do("head", "n") == 1


async def test_scan(cache: Either) -> None:
    await cache.do("set_bulk", {f"u/{number}": (1, ADA) for number in range(300)})
    await cache.do("set", "u/x", 1, {"name": 5})
    scan = cache.cache.scan("u/", records=True, type=User)
    found: list[Any] = []
    errors: list[BulkError] = []
    while True:
        try:
            item = await cache.next(scan)
        except BulkError as error:
            errors.append(error)
            continue
        if item is None:
            break
        found.append(item)
    assert {one.name for one in found} == {f"u/{number}" for number in range(300)}
    assert all(one.data == User("Ada") for one in found)
    (error,) = errors
    assert error.errors.keys() == {"u/x"}
    with pytest.raises(dscache.UsageError, match="a type is that of records"):
        cache.cache.scan(type=User)


@pytest.mark.parametrize("records", [False, True])
async def test_watch(cache: Either, records: bool) -> None:
    watch = cache.cache.watch("u/", records=records, type=User)
    if cache.kind == "AsyncCache":
        await watch.__aenter__()
    else:
        await asyncio.to_thread(watch.__enter__)
    try:
        await cache.do("set", "u/1", 3, ADA)
        async with asyncio.timeout(PATIENCE):
            change = await cache.next(watch)
            assert (change.kind, change.version) == ("changed", 3)
            record = change.record if records else await read(cache, change)
            assert record.data == User("Ada")
            await cache.do("set", "u/1", 4, {"name": 5})
            change = await cache.next(watch)
            while change.version == 3:  # each of its two keys is reported
                change = await cache.next(watch)
        if records:
            assert change.kind == "damaged"
            assert "at `$.name`" in change.reason
        with pytest.raises(RecordDamaged, match=MISFIT):
            await read(cache, change)
    finally:
        await watch.close() if cache.kind == "AsyncCache" else await asyncio.to_thread(watch.close)


async def read(cache: Either, change: Any) -> Any:
    return await change.read() if cache.kind == "AsyncCache" else change.read()


async def test_a_class_that_msgspec_can_not_make_is_refused_at_the_call(cache: Either) -> None:
    for operation, arguments, options in (
        ("get", ["n"], {}),
        ("get_bulk", [["n"]], {}),
        ("fetch", ["n", len], {"ttl": 9}),
        ("fetch_bulk", [["n"], len], {"ttl": 9}),
        ("update", ["n", len], {}),
        ("scan", [], {"records": True}),
        ("watch", [], {"records": True}),
    ):
        said = "^type=.*: msgspec can't decode JSON into Unknown; give a Struct, "
        with pytest.raises(TypeError, match=said):
            await cache.do(operation, *arguments, **options, type=list[Unknown])
