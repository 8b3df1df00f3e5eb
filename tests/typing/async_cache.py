"""The types of AsyncCache. Type checkers read this file (test_typing.py); nothing runs it."""

from __future__ import annotations

from asyncio import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict, assert_type

from redis.credentials import UsernamePasswordCredentialProvider

import dscache
from dscache import AsyncCache, Record
from dscache.aio.scan import AsyncScan
from dscache.aio.watch import AsyncChange, AsyncWatch
from dscache.config import Config


def configured() -> None:
    assert_type(AsyncCache.from_config("redis://127.0.0.1:6379"), AsyncCache)
    assert_type(AsyncCache.from_config(Path("config.yml")), AsyncCache)
    assert_type(AsyncCache.from_config({"name": "memory"}), AsyncCache)
    provider = UsernamePasswordCredentialProvider("user", "password")
    assert_type(AsyncCache.from_config("host:6379", credentials=provider), AsyncCache)


class Named(AsyncCache):
    """A subclass: ``from_config`` and ``async with`` keep its type."""


async def of_a_subclass() -> None:
    assert_type(Named.from_config({"name": "memory"}), Named)
    async with Named.from_config({"name": "memory"}) as cache:
        assert_type(cache, Named)


async def single(cache: AsyncCache) -> None:
    assert_type(cache.get("n"), Future[Record | None])
    assert_type(cache.head("n"), Future[int | None])
    assert_type(cache.set("n", 1, {}), Future[bool])
    assert_type(cache.delete("n"), Future[bool])
    assert_type(await cache.get("n"), Record | None)
    assert_type(await cache.head("n"), int | None)
    assert_type(await cache.set("n", 1, {"a": [1]}, ttl=60, if_newer=True), bool)
    assert_type(await cache.set("n", 1, {}, ttl=None), bool)
    assert_type(await cache.set("n", 1, {}, ttl=timedelta(minutes=1)), bool)
    assert_type(await cache.delete("n"), bool)
    assert_type(await cache.set("n", 2, {}, if_version=1), bool)
    assert_type(await cache.set("n", 1, {}, if_version=None), bool)
    assert_type(await cache.set("n", 1, {}, if_version=dscache.ANY), bool)
    assert_type(await cache.delete("n", if_version=2), bool)


async def bulk(cache: AsyncCache) -> None:
    names = {"a", "b"}
    assert_type(await cache.get_bulk(names), dict[str, Record])
    assert_type(await cache.head_bulk(iter(names)), dict[str, int])
    assert_type(await cache.set_bulk({"a": (1, {}), "b": (2, [])}, ttl=60), set[str])
    assert_type(await cache.delete_bulk(["a"]), int)
    assert_type(await cache.set_bulk({"a": (1, {})}, if_version={"a": None}), set[str])
    assert_type(await cache.delete_bulk(["a"], if_version={"a": 1}), int)


@dataclass
class User:
    name: str


class Profile(TypedDict):
    name: str


async def typed(cache: AsyncCache) -> None:
    assert_type(cache.get("n", type=User), Future[Record[User] | None])
    assert_type(cache.get("n", type=None), Future[Record | None])
    assert_type(await cache.get("n", type=User), Record[User] | None)
    assert_type(await cache.get("n", type=list[User]), Record[list[User]] | None)
    assert_type(await cache.get("n", type=dict[str, int]), Record[dict[str, int]] | None)
    assert_type(await cache.get("n", type=Profile), Record[Profile] | None)
    assert_type(await cache.get_bulk(["a"], type=User), dict[str, Record[User]])
    assert_type(cache.get_bulk(["a"], type=int), Future[dict[str, Record[int]]])
    # Type checkers know no type of other forms.
    assert_type(await cache.get("n", type=User | None), Record | None)
    if (record := await cache.get("n", type=User)) is not None:
        assert_type(record.data, User)
        version, user = record
        assert_type(version, int)
        assert_type(user, User)


async def scans(cache: AsyncCache, either: bool) -> None:
    assert_type(cache.scan(), AsyncScan[str])
    assert_type(cache.scan("a", count=10, cursor="c"), AsyncScan[str])
    assert_type(cache.scan("a", records=True).cursor, str)
    async for name in cache.scan("a"):
        assert_type(name, str)
    async for record in cache.scan(records=True):
        assert_type(record, Record)
    assert_type(cache.scan(records=either), AsyncScan[str] | AsyncScan[Record])


async def watches(cache: AsyncCache) -> None:
    async with cache.watch("a", records=True, max_pending=10) as changes:
        assert_type(changes, AsyncWatch)
        async for change in changes:
            assert_type(change, AsyncChange)
            assert_type(change.name, str)
            assert_type(change.version, int | None)
            assert_type(change.record, Record | None)
            assert_type(change.is_loss, bool)
            assert_type(await change.read(), Record | None)


async def state(cache: AsyncCache) -> None:
    assert_type(cache.is_ready, bool)
    assert_type(cache.description, str)
    assert_type(cache.config, Config)
    assert_type(cache.stats(), dict[str, Any])
    assert_type(await cache.when_ready(), None)
    assert_type(await cache.close(), None)


async def refused(cache: AsyncCache) -> None:
    cache.get(1)  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]
    cache.head(b"n")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    cache.set("n", "1", {})  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    cache.set("n", 1)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    cache.set("n", 1, {}, 60)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    cache.set("n", 1, {}, ttl=1.5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    cache.delete("n", if_version=None)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    cache.get_bulk(1)  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]
    cache.get("n", User)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    cache.get_bulk(["n"], User)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    cache.set_bulk({"n": 1})  # type: ignore[dict-item] # pyright: ignore[reportArgumentType]
    cache.is_ready = True  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]
    AsyncCache.from_config(6379)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    dscache.AsyncCache(6379)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with cache:  # type: ignore[attr-defined] # pyright: ignore[reportGeneralTypeIssues]
        pass


async def changed(cache: AsyncCache) -> None:
    def count(data: dict[str, int]) -> dict[str, int]:
        return data

    async def count_slowly(data: Any) -> Any:
        return dscache.KEEP

    assert_type(await cache.update("n", count), Record | None)
    assert_type(await cache.update("n", count_slowly, default=None, ttl=60), Record | None)
    assert_type(await cache.update("n", lambda data: dscache.DELETE), Record | None)
    assert_type(await cache.patch("n", {"a": None}), Record)
    assert_type(await cache.patch("n", path="a.b[0]", value=None, default={}, ttl=0), Record)
    assert_type(await cache.patch("n", path="a"), Record)
    await cache.update("n")  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    await cache.update("n", 5)  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]
    await cache.patch("n", path=5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def fetched(cache: AsyncCache) -> None:
    async def load(name: str) -> dscache.Loaded:
        return dscache.Loaded(1, name)

    async def load_many(names: list[str]) -> dict[str, int]:
        return dict.fromkeys(names, 1)

    assert_type(cache.fetch("n", load, ttl=60), Future[Record | None])
    assert_type(await cache.fetch("n", load, ttl=60), Record | None)
    assert_type(await cache.fetch("n", len, ttl=None, refresh_after=9, jitter=0), Record | None)
    assert_type(await cache.fetch("n", load, ttl=60, keep_missing=5), Record | None)
    minute = timedelta(minutes=1)
    fetched = await cache.fetch(
        "n", load, ttl=9 * minute, refresh_after=minute, keep_missing=minute
    )
    assert_type(fetched, Record | None)
    assert_type(await cache.fetch_bulk({"n"}, load_many, ttl=60), dict[str, Record])
    await cache.fetch("n", load)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    await cache.fetch("n", 1, ttl=9)  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]


async def of_a_type(cache: AsyncCache) -> None:
    def many(names: list[str]) -> dict[str, User]:
        return {name: User(name) for name in names}

    async def load(name: str) -> User:
        return User(name)

    def change(user: User) -> User:
        return user

    assert_type(cache.fetch("n", load, ttl=60, type=User), Future[Record[User] | None])
    assert_type(await cache.fetch("n", load, ttl=60, type=User), Record[User] | None)
    assert_type(await cache.fetch_bulk(["n"], many, ttl=60, type=User), dict[str, Record[User]])
    assert_type(await cache.update("n", change, type=User), Record[User] | None)
    async for record in cache.scan(records=True, type=User):
        assert_type(record, Record[User])
        assert_type(record.data, User)
    assert_type(cache.scan(records=True, type=list[int]), AsyncScan[Record[list[int]]])
    async with cache.watch(records=True, type=User) as changes:
        async for one in changes:
            assert_type(one, AsyncChange[User])
            assert_type(one.record, Record[User] | None)
            assert_type(await one.read(), Record[User] | None)
            assert_type(changes.skipped, int)
    assert_type(cache.scan().skipped, int)
    # Type checkers know no type of other forms.
    assert_type(await cache.fetch("n", load, ttl=60, type=User | None), Record | None)
    assert_type(await cache.update("n", change, type=User | None), Record | None)
    cache.scan(type=User)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
