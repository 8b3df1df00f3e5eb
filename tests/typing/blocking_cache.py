"""The types of Cache. Type checkers read this file (test_typing.py); nothing runs it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, assert_type

from msgspec import Struct

import dscache
from dscache import Cache, Loaded, Record
from dscache.blocking.scan import Scan
from dscache.blocking.watch import BlockingChange, Watch
from dscache.config import Config


def configured() -> None:
    assert_type(Cache.from_config("redis://127.0.0.1:6379"), Cache)
    assert_type(Cache.from_config(Path("config.yml")), Cache)
    with Cache.from_config({"name": "memory"}) as cache:
        assert_type(cache, Cache)


def single(cache: Cache) -> None:
    assert_type(cache.get("n"), Record | None)
    assert_type(cache.head("n"), int | None)
    assert_type(cache.set("n", 1, {"a": [1]}, ttl=60, if_newer=True), bool)
    assert_type(cache.delete("n"), bool)


def bulk(cache: Cache) -> None:
    assert_type(cache.get_bulk(["a"]), dict[str, Record])
    assert_type(cache.head_bulk(("a", "b")), dict[str, int])
    assert_type(cache.set_bulk({"a": (1, {})}, if_newer=True), set[str])
    assert_type(cache.delete_bulk({"a": 1}), int)


class User(Struct):
    name: str


def typed(cache: Cache) -> None:
    assert_type(cache.get("n", type=User), Record[User] | None)
    assert_type(cache.get("n", type=None), Record | None)
    assert_type(cache.get("n", type=list[User]), Record[list[User]] | None)
    assert_type(cache.get("n", type=User | None), Record | None)
    assert_type(cache.get_bulk(["a"], type=User), dict[str, Record[User]])
    for record in cache.get_bulk(["a"], type=User).values():
        assert_type(record.data, User)


def scans(cache: Cache, either: bool) -> None:
    assert_type(cache.scan(), Scan[str])
    assert_type(cache.scan("a", count=10, cursor="c"), Scan[str])
    assert_type(cache.scan("a", records=True).cursor, str)
    for name in cache.scan("a"):
        assert_type(name, str)
    for record in cache.scan(records=True):
        assert_type(record, Record)
    assert_type(cache.scan(records=either), Scan[str] | Scan[Record])


def watches(cache: Cache) -> None:
    with cache.watch("a", records=True, max_pending=10) as changes:
        assert_type(changes, Watch)
        for change in changes:
            assert_type(change, BlockingChange)
            assert_type(change.name, str)
            assert_type(change.version, int | None)
            assert_type(change.record, Record | None)
            assert_type(change.is_loss, bool)
            assert_type(change.read(), Record | None)


def fetched(cache: Cache) -> None:
    def load_many(names: list[str]) -> dict[str, Loaded]:
        return dict.fromkeys(names, Loaded(1, None))

    assert_type(cache.fetch("n", len, ttl=60), Record | None)
    assert_type(cache.fetch("n", len, ttl=None, refresh_after=9, jitter=0), Record | None)
    assert_type(cache.fetch("n", len, ttl=60, keep_missing=5), Record | None)
    minute = timedelta(minutes=1)
    fetched = cache.fetch("n", len, ttl=9 * minute, refresh_after=minute, keep_missing=minute)
    assert_type(fetched, Record | None)
    assert_type(cache.set("n", 1, {}, ttl=minute), bool)
    assert_type(cache.fetch_bulk({"n"}, load_many, ttl=60), dict[str, Record])


def state(cache: Cache) -> None:
    assert_type(cache.is_ready, bool)
    assert_type(cache.description, str)
    assert_type(cache.config, Config)
    assert_type(cache.stats(), dict[str, Any])
    # Neither returns anything, which mypy doesn't let a program use.
    cache.when_ready()
    cache.close()


def refused(cache: Cache) -> None:
    cache.get(1)  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]
    cache.get("n", User)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    cache.set("n", 1, {}, 60)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    cache.set_bulk([("n", 1, {})])  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    if (record := cache.get("n")) is None:
        record.version  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # noqa: B018


def changed(cache: Cache) -> None:
    assert_type(cache.update("n", lambda data: data, default=[]), Record | None)
    assert_type(cache.update("n", lambda data: dscache.KEEP, ttl=60), Record | None)
    assert_type(cache.patch("n", {"a": None}), Record)
    assert_type(cache.patch("n", path="a.b[0]", value=1), Record)
    cache.update("n", 5)  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]
    cache.patch("n", {}, "a")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


def of_a_type(cache: Cache) -> None:
    def many(names: list[str]) -> dict[str, User]:
        return {name: User(name) for name in names}

    def change(user: User) -> User:
        return user

    assert_type(cache.fetch("n", User, ttl=60, type=User), Record[User] | None)
    assert_type(cache.fetch_bulk(["n"], many, ttl=60, type=User), dict[str, Record[User]])
    assert_type(cache.update("n", change, type=User), Record[User] | None)
    for record in cache.scan(records=True, type=User):
        assert_type(record, Record[User])
        assert_type(record.data, User)
    with cache.watch(records=True, type=User) as changes:
        for one in changes:
            assert_type(one, BlockingChange[User])
            assert_type(one.record, Record[User] | None)
            assert_type(one.read(), Record[User] | None)
            assert_type(changes.skipped, int)
    assert_type(cache.scan().skipped, int)
