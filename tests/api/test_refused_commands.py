"""Servers that refuse commands, to everybody or to this user: each alone, and all together.

What needs none of them works; what does says which command is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE, OLDEST_AND_NEWEST, PATIENT
from tests.soak.cluster_rows import CURIOUS, a_name_each
from tests.support.blocking import ThreadedCache
from tests.support.clusters import ClusterGroup
from tests.support.commands import invoke
from tests.support.waiting import PATIENCE

# None of these is needed for records.
DISPENSABLE = ("hello", "client", "info", "config", "script", "evalsha", "ping", "role", "scan")
ALL = "all of them"
USER, PASSWORD = "ada", "s3cret"
CASES = [
    *((BY_AGE[0], missing) for missing in DISPENSABLE),
    *((binary, ALL) for binary in OLDEST_AND_NEWEST),
]

Refuse = Callable[..., Any]


@pytest.fixture(params=["async", "blocking"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def refusing() -> Iterator[Refuse]:
    """A function that starts a server which refuses commands, and returns the URL for clients."""
    started: list[EmbeddedServer] = []

    def start(binary: ServerBinary, way: str, *commands: str) -> str:
        if way == "renamed":
            args = [word for command in commands for word in ("--rename-command", command, "")]
        else:
            rights = [f"-{command}" for command in commands]
            args = ["--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all", *rights]
        server = EmbeddedServer(binary, args=args)
        started.append(server)
        server.start()
        login = f"{USER}:{PASSWORD}@" if way == "by ACL" else ""
        return f"redis://{login}127.0.0.1:{server.port}"

    yield start
    for server in started:
        server.close()


@asynccontextmanager
async def opened(kind: str, config: Any, **options: Any) -> AsyncIterator[Any]:
    if isinstance(config, str):
        config = {"url": config}
    config = {"name": "redis", "options": {**config, **PATIENT, **options}}
    async with asyncio.timeout(PATIENCE):
        if kind == "async":
            async with dscache.AsyncCache.from_config(config) as cache:
                yield cache
        else:
            async with ThreadedCache(dscache.Cache.from_config(config), 2) as threaded:
                yield threaded


async def use(cache: Any, names: list[str]) -> None:
    """Do every operation that needs no further right, and check its results."""
    a, b = names[:2]
    await cache.set(a, 1, {"a": 1})
    await cache.set_bulk({name: (2, name) for name in names})
    found = await cache.get_bulk(names)
    assert {name: record.data for name, record in found.items()} == {n: n for n in names}
    assert await cache.head_bulk(names) == dict.fromkeys(names, 2)
    assert (await cache.get(a)).version == 2
    assert await cache.set(a, 1, "old", if_newer=True) is False
    assert await cache.set(a, 3, "new", if_newer=True) is True
    assert await cache.set(b, 3, "mine", if_version=2) is True
    assert await cache.set(b, 4, "theirs", if_version=2) is False
    # Those under way together are refused together. Threads would write one record in any order.
    at_once = 5 if isinstance(cache, dscache.AsyncCache) else 1
    for first in range(10, 15, at_once):
        versions = range(first, first + at_once)
        done = await asyncio.gather(
            *(cache.set(name, version, 1, if_newer=True) for version in versions for name in names)
        )
        assert done == [True] * len(done)
    assert await cache.head_bulk(names) == dict.fromkeys(names, 14)
    assert not await cache.set_bulk({name: (15, name) for name in names}, ttl=1000)
    assert (await cache.update(a, lambda data: [data, "updated"])).data == [a, "updated"]
    assert (await cache.fetch("loaded", lambda name: {"of": name}, ttl=100)).data == {
        "of": "loaded"
    }
    assert await cache.delete(a) is True
    assert await cache.delete(b, if_version=15) is True
    assert await cache.get(a) is None


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
@pytest.mark.parametrize(
    ("binary", "missing"), CASES, ids=lambda one: getattr(one, "name", str(one))
)
async def test_records_without_a_command(
    refusing: Refuse, binary: ServerBinary, way: str, missing: str, kind: str, backend: str
) -> None:
    commands = DISPENSABLE if missing == ALL else (missing,)
    async with opened(kind, refusing(binary, way, *commands)) as cache:
        await use(cache, [f"user/{number}" for number in range(20)])
        assert cache.is_ready


async def test_records_of_a_cluster_without_a_command(
    group: ClusterGroup, kind: str, backend: str
) -> None:
    """Of CLUSTER, SLOTS is needed, INFO and MYID."""
    refused = ["-cluster|shards", "-cluster|nodes", *(f"-{name}" for name in DISPENSABLE)]
    for node in group.nodes:
        node.ask("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all", *refused)
    login = {"username": USER, "password": PASSWORD}
    try:
        async with opened(kind, group.options, redisOptions=login, **CURIOUS) as cache:
            await use(cache, [*a_name_each(group), *(f"user/{number}" for number in range(20))])
    finally:
        for node in group.nodes:
            node.ask("ACL", "DELUSER", USER)


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
async def test_the_missing_command_is_named(
    refusing: Refuse, way: str, kind: str, backend: str
) -> None:
    """And, where Redis says so, the user who lacks it."""
    url = refusing(BY_AGE[0], way, "eval", "evalsha", "client", "select", "scan", "mget")
    async with opened(kind, url) as cache:
        await cache.set("a", 1, {})
        for attempt, command in (
            (lambda: cache.set("a", 2, {}, if_newer=True), "eval"),
            (lambda: cache.get_bulk(["a", "b"]), "mget"),
            (lambda: names_of(kind, cache), "scan"),
        ):
            with pytest.raises(dscache.ReplyError) as caught:
                await attempt()
            told = str(caught.value).lower()
            assert f"'{command}'" in told
            assert way == "renamed" or f"user {USER} " in told
    for options, command in (({"db": 1}, "select"), ({"nearCache": True}, "client")):
        with pytest.raises(dscache.DscacheError) as refused:
            async with opened(kind, url, **options):
                pass
        assert command in str(refused.value).lower()


async def names_of(kind: str, cache: Any) -> list[str]:
    if kind == "async":
        return [name async for name in cache.scan()]
    return await asyncio.to_thread(lambda: list(cache.cache.scan()))


@pytest.mark.parametrize("way", ["renamed", "by ACL"])
@pytest.mark.parametrize(
    ("missing", "verdict"),
    [
        ((), "ok"),
        (("ping", "evalsha"), "ok"),
        (("time", "strlen"), "warning"),
        (("mget",), "bad"),
        (("mset", "time"), "bad"),
    ],
)
def test_the_doctor_lists_the_missing_rights(
    refusing: Refuse, way: str, missing: tuple[str, ...], verdict: str
) -> None:
    url = refusing(BY_AGE[0], way, *missing)
    found = {one["check"]: one for one in invoke("doctor", "--url", url).document["findings"]}
    rights = found["rights"]
    assert rights["verdict"] == verdict
    for name in missing:
        assert name in rights["found"]
    if verdict != "ok":
        user = USER if way == "by ACL" else "default"
        assert f"ACL SETUSER {user} " in rights["advice"]
        assert {f"+{name}" for name in missing} <= {*rights["advice"].replace(",", " ").split()}


def test_the_doctor_tells_of_keys_that_are_refused(refusing: Refuse) -> None:
    url = refusing(BY_AGE[0], "by ACL")
    with redis_py.Redis.from_url(url) as admin:
        admin.execute_command("ACL", "SETUSER", USER, "resetkeys", "~other/*")
    found = {one["check"]: one for one in invoke("doctor", "--url", url).document["findings"]}
    assert found["rights"]["verdict"] == "bad"
    assert "the names of records" in found["rights"]["found"]
    assert "pattern of the keys" in found["rights"]["advice"]


def test_the_doctor_writes_nothing(refusing: Refuse) -> None:
    url = refusing(BY_AGE[0], "by ACL")
    invoke("doctor", "--url", url)
    with redis_py.Redis.from_url(url) as admin:
        assert admin.dbsize() == 0
        assert admin.info("persistence")["rdb_changes_since_last_save"] == 0
