"""scan on real servers: every name, whatever happens to the servers meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.core.keys import KeyLayout
from dscache.embedded import EmbeddedServer
from dscache.errors import BulkError, ConnectError, ConnectionLost, ReplyError, UsageError
from tests.conftest import BY_AGE, SERVERS, MakeServer, _server_id
from tests.soak.figures import open_files
from tests.support.clusters import ClusterGroup
from tests.support.either import Either, fill, moving
from tests.support.sentinels import SentinelGroup
from tests.support.waiting import own_tasks, until

ON_ONE_SERVER = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
# Keys of one SCAN, so that a scan of some thousand names takes many.
FEW = 50


@pytest.fixture(params=["AsyncCache", "Cache"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# -- names and records


@pytest.mark.parametrize("prefix", ["", "user/", "a*[b]?^-\\", "}x", "\u00e9"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keyPrefix": "p*:"},
        {"keyLayout": "hashtag"},
        {"keyLayout": "hashtag", "keyPrefix": "{"},
    ],
)
async def test_names_of_a_prefix(
    prefix: str,
    options: dict[str, str],
    kind: str,
    backend: str,
    server: EmbeddedServer,
    redis: redis_py.Redis,
) -> None:
    names = [
        *(
            "user/1",
            "user/2_v",
            "users",
            "a*[b]?^-\\x",
            "aab",
            "}x1",
            "}",
            "\u00e9\u00e9",
            "x" * 300,
        )
    ]
    layout = KeyLayout(options.get("keyPrefix", ""), options.get("keyLayout") == "hashtag")
    fill(redis, names, layout)
    redis.set("no record", 1)
    redis.set("other:user/3_v", 1)
    async with Either(kind, url=server.url, **options) as cache:
        found = await cache.all(prefix, count=3)
        if options:
            assert Counter(found) == Counter(one for one in names if one.startswith(prefix))
        else:
            wanted = [*names, "other:user/3"]
            assert Counter(found) == Counter(one for one in wanted if one.startswith(prefix))
        records = await cache.all(prefix, records=True, count=3)
        assert {(one.name, one.version) for one in records} == {
            (name, number) for number, name in enumerate(names) if name.startswith(prefix)
        }


@ON_ONE_SERVER
async def test_many_names_each_once(
    kind: str, backend: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    names = [f"n/{number}" for number in range(5000)]
    fill(redis, names)
    async with Either(kind, url=server.url) as cache:
        assert sorted(await cache.all("n/")) == sorted(names)
        records = await cache.all("n/", records=True)
        assert sorted(one.name for one in records) == sorted(names)


@ON_ONE_SERVER
@pytest.mark.parametrize("layout", ["deepstream", "hashtag"])
async def test_names_that_are_no_text_are_counted(
    layout: str,
    kind: str,
    backend: str,
    server: EmbeddedServer,
    redis: redis_py.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tags = (b"{", b"}") if layout == "hashtag" else (b"", b"")
    for stem in (b"n/\xff", b"n/\xfe", b"other\xff"):
        redis.mset({tags[0] + stem + tags[1] + suffix: "1" for suffix in (b"_v", b"_d")})
    redis.set(b"n/\xff", 1)
    fill(redis, ["n/1", "n/\u00e9"], KeyLayout("", layout == "hashtag"))
    async with Either(kind, url=server.url, keyLayout=layout) as cache:
        for options in ({}, {"records": True}):
            scan = cache.cache.scan("n/", **options)
            assert scan.skipped == 0
            found = [getattr(one, "name", one) for one in await cache.rest(scan)]
            assert sorted(found) == ["n/1", "n/\u00e9"]
            assert scan.skipped == 2
    assert caplog.text.count("is no UTF-8") == 2


async def test_in_memory(kind: str, backend: str) -> None:
    async with Either(kind, name="memory") as cache:
        await cache.do("set_bulk", {f"n/{number}": (number, {}) for number in range(250)})
        await cache.do("set", "other", 1, {})
        wanted = sorted(f"n/{number}" for number in range(250))
        assert await cache.all("n/", count=100) == wanted
        assert [one.version for one in await cache.all("other", records=True)] == [1]
        scan = cache.cache.scan("n/", count=100)
        first = [await cache.next(scan) for _ in range(101)]
        rest = await cache.all("n/", cursor=scan.cursor)
        assert [*first[:100], *rest] == wanted


@ON_ONE_SERVER
async def test_a_damaged_record_is_an_error_after_the_others(
    kind: str, backend: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    names = [f"n/{number}" for number in range(600)]
    fill(redis, names)
    redis.set("n/7_v", "x")
    redis.delete("n/8_d")
    async with Either(kind, url=server.url) as cache:
        scan = cache.cache.scan("n/", records=True)
        found, errors = [], []
        while True:
            try:
                item = await cache.next(scan)
            except BulkError as error:
                errors.append(error)
                continue
            if item is None:
                break
            found.append(item.name)
        assert [*errors[0].errors] == ["n/7"]
        assert len(errors) == 1
        assert sorted(found) == sorted({*names} - {"n/7", "n/8"})


@ON_ONE_SERVER
async def test_a_scan_reads_past_a_near_cache(
    server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    fill(redis, [f"n/{number}" for number in range(100)])
    async with Either("AsyncCache", url=server.url, nearCache={}) as cache:
        await cache.do("get_bulk", ["n/1", "n/2"])
        assert len(await cache.all(records=True)) == 100
        near = cache.cache.stats()["near_cache"]
        assert (near["hits"], near["misses"]) == (0, 2)


# -- cursors


@ON_ONE_SERVER
async def test_a_scan_goes_on_at_a_cursor(
    kind: str, backend: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    names = [f"n/{number}" for number in range(2000)]
    fill(redis, names)
    async with Either(kind, url=server.url) as cache:
        scan = cache.cache.scan("n/", count=FEW)
        first = [await cache.next(scan) for _ in range(1000)]
        cursor = scan.cursor
    assert isinstance(cursor, str)
    async with Either(kind, url=server.url) as cache:
        rest = await cache.all("n/", cursor=cursor)
        assert {*first, *rest} == {*names}
        # The names of the last batch alone are repeated.
        assert len(first) + len(rest) - len(names) <= 2 * FEW
        done = cache.cache.scan("n/")
        await cache.rest(done)
        assert await cache.all("n/", cursor=done.cursor) == []


@ON_ONE_SERVER
async def test_bad_arguments(kind: str, server: EmbeddedServer, redis: redis_py.Redis) -> None:
    async with Either(kind, url=server.url) as cache:
        of_another = cache.cache.scan("a").cursor
        for arguments, words in (
            ({"cursor": "x"}, "isn't a cursor"),
            ({"cursor": of_another[:-8]}, "isn't a cursor"),
            ({"cursor": of_another}, "of another prefix or cache"),
            ({"cursor": 7}, "must be the cursor"),
            ({"prefix": b"a"}, "must be a str"),
            ({"prefix": "ü\ud800"}, "has a lone surrogate"),
            ({"count": 0}, "from 1 to"),
            ({"count": True}, "from 1 to"),
        ):
            with pytest.raises(UsageError, match=words):
                cache.cache.scan(**arguments)


# -- lost connections and servers


@ON_ONE_SERVER
async def test_lost_connections(
    kind: str, backend: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    names = [f"n/{number}" for number in range(2000)]
    fill(redis, names)

    def kill(at: int) -> None:
        if at % 400 == 0 and at <= len(names):
            redis.client_kill_filter(_type="normal", skipme=True)

    async with Either(kind, url=server.url) as cache:
        found = await cache.all("n/", count=FEW, each=kill)
        # The server is the same, so a cursor holds over a new connection.
        assert Counter(found).keys() == {*names}
        assert len(found) == len(names)


async def test_a_server_that_is_killed_and_comes_back(
    kind: str, backend: str, make_server: MakeServer
) -> None:
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    names = [f"n/{number}" for number in range(2000)]
    with redis_py.Redis.from_url(server.url) as client:
        fill(client, names)

    def kill(at: int) -> None:
        if at == 1000:
            server.kill()
            server.start()

    async with Either(kind, url=server.url) as cache:
        found = await cache.all("n/", count=FEW, each=kill)
        assert {*found} == {*names}
        # Cursors of the old process mean nothing to the new one.
        assert len(found) >= len(names) + 900


async def test_an_unreachable_server_ends_the_scan(
    kind: str, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dscache.net.scan._PATIENCE", 0.2)
    server = make_server()
    with redis_py.Redis.from_url(server.url) as client:
        fill(client, [f"n/{number}" for number in range(500)])
    async with Either(kind, url=server.url, connectTimeout=200) as cache:
        scan = cache.cache.scan("n/", count=FEW)
        assert await cache.next(scan) is not None
        server.kill()
        with pytest.raises((ConnectError, ConnectionLost)):
            await cache.rest(scan)
        # The error comes again rather than an end that looks like a whole scan.
        with pytest.raises((ConnectError, ConnectionLost)):
            await cache.next(scan)


@ON_ONE_SERVER
async def test_a_user_without_the_right_to_scan(
    kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    redis.execute_command("ACL", "SETUSER", "ada", "on", ">secret", "~*", "+@all", "-scan")
    try:
        url = server.url.replace("://", "://ada:secret@")
        async with Either(kind, url=url) as cache:
            with pytest.raises(ReplyError, match=r"NOPERM .*scan") as caught:
                await cache.all()
            assert "secret" not in str(caught.value)
    finally:
        redis.acl_deluser("ada")


@ON_ONE_SERVER
async def test_a_user_without_the_right_to_info(
    kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    names = [f"n/{number}" for number in range(500)]
    fill(redis, names)
    redis.execute_command("ACL", "SETUSER", "ada", "on", ">secret", "~*", "+@all", "-info")
    try:
        url = server.url.replace("://", "://ada:secret@")
        async with Either(kind, url=url) as cache:
            assert sorted(await cache.all("n/", count=FEW)) == sorted(names)
    finally:
        redis.acl_deluser("ada")


async def test_a_closed_cache_ends_the_scan(kind: str, server: EmbeddedServer) -> None:
    with redis_py.Redis.from_url(server.url) as client:
        client.flushdb()
        fill(client, [f"n/{number}" for number in range(500)])
    cache = Either(kind, url=server.url)
    scan = cache.cache.scan(count=FEW)
    assert await cache.next(scan) is not None
    await cache.do("close")
    with pytest.raises(UsageError, match="the cache is closed"):
        await cache.rest(scan)
    with pytest.raises(UsageError, match="the cache is closed"):
        cache.cache.scan()


@ON_ONE_SERVER
async def test_a_scan_that_stops_leaves_nothing(
    kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    fill(redis, [f"n/{number}" for number in range(500)])
    async with Either(kind, url=server.url) as cache:
        await cache.do("head", "a")
        tasks, files = own_tasks(), open_files()
        for _ in range(3):
            scan = cache.cache.scan(count=FEW)
            assert await cache.next(scan) is not None
            del scan
        # The thread of the last step may hold the scan a moment longer.
        await until(lambda: (own_tasks(), open_files()) == (tasks, files))


@ON_ONE_SERVER
async def test_one_consumer_at_a_time(server: EmbeddedServer, redis: redis_py.Redis) -> None:
    fill(redis, ["a"])
    async with Either("AsyncCache", url=server.url) as cache:
        scan = cache.cache.scan()
        first = asyncio.ensure_future(anext(scan))
        await asyncio.sleep(0)
        with pytest.raises(UsageError, match="in use already"):
            await anext(scan)
        assert await first == "a"


@ON_ONE_SERVER
async def test_a_cancelled_wait_loses_no_name(
    server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    names = [f"n/{number}" for number in range(1000)]
    fill(redis, names)
    async with Either("AsyncCache", url=server.url) as cache:
        scan = cache.cache.scan(count=FEW)
        found = []
        while True:
            step = asyncio.ensure_future(anext(scan, None))
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            step.cancel()
            try:
                name = await step
            except asyncio.CancelledError:
                name = await anext(scan, None)
            if name is None:
                break
            found.append(name)
        assert {*found} == {*names}


@ON_ONE_SERVER
def test_another_loop(server: EmbeddedServer, redis: redis_py.Redis) -> None:
    fill(redis, ["a"])
    cache = dscache.AsyncCache.from_config(server.url)
    opened: list[Any] = []

    async def begin() -> None:
        await cache.when_ready()
        opened.append(cache.scan())

    async def go_on() -> None:
        with pytest.raises(UsageError, match="event loop"):
            await anext(opened[0])

    with asyncio.Runner() as runner:
        runner.run(begin())
        thread = threading.Thread(target=asyncio.run, args=(go_on(),))
        thread.start()
        thread.join()
        runner.run(cache.close())


@ON_ONE_SERVER
def test_a_forked_child(server: EmbeddedServer, redis: redis_py.Redis) -> None:
    names = [f"n/{number}" for number in range(500)]
    fill(redis, names)
    with dscache.Cache.from_config(server.url) as cache:
        scan = cache.scan("n/", count=FEW)
        found = [next(scan)]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(500):
                    next(scan)
            except UsageError:
                status = 0 if sorted(cache.scan("n/")) == sorted(names) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        found += scan
        assert sorted(found) == sorted(names)


# -- clusters


@pytest.mark.parametrize("layout", ["hashtag", "deepstream"])
async def test_every_name_while_slots_move(
    layout: str, kind: str, backend: str, group: ClusterGroup
) -> None:
    names = [f"n/{number}" for number in range(6000)]
    async with Either(kind, **group.options, keyLayout=layout) as cache:
        for first in range(0, len(names), 500):
            await cache.do("set_bulk", {one: (1, {}) for one in names[first : first + 500]})
        ended = threading.Event()
        move = asyncio.ensure_future(asyncio.to_thread(moving(group, ended)))
        try:
            for _ in range(4):
                found = await cache.all("n/", count=FEW)
                assert {*names} - {*found} == set()
                assert {*found} <= {*names}
        finally:
            ended.set()
            await move
        records = await cache.all("n/", records=True)
        assert sorted(one.name for one in records) == sorted(names)


async def test_slots_that_stay_open(kind: str, backend: str, group: ClusterGroup) -> None:
    names = [f"n/{number}" for number in range(3000)]
    async with Either(kind, **group.options) as cache:
        for first in range(0, len(names), 500):
            await cache.do("set_bulk", {one: (1, {}) for one in names[first : first + 500]})
        source, target = group.primaries()[:2]
        slots = random.Random(2).sample(group.slots_of(source), 20)
        for number, slot in enumerate(slots):
            group.begin_migration(slot, source, target)
            group.move_keys(slot, source, target, number % 3)
        try:
            assert {*await cache.all("n/", count=FEW)} == {*names}
        finally:
            for slot in slots:
                group.move_keys(slot, source, target)
                group.end_migration(slot, source, target)
        assert {*await cache.all("n/", count=FEW)} == {*names}


async def test_a_lost_primary(kind: str, backend: str, group: ClusterGroup) -> None:
    names = [f"n/{number}" for number in range(3000)]
    async with Either(kind, **group.options) as cache:
        for first in range(0, len(names), 500):
            await cache.do("set_bulk", {one: (1, {}) for one in names[first : first + 500]})
        group.wait_until_ok()  # the replicas have everything
        scan = cache.cache.scan("n/", count=FEW)
        found = [await cache.next(scan) for _ in range(100)]
        group.kill(group.owner(KeyLayout("", hash_tag=True).keys(found[0])[0]))
        found += await cache.rest(scan)
        assert {*found} == {*names}


async def test_a_cursor_of_a_cluster(kind: str, backend: str, group: ClusterGroup) -> None:
    names = [f"n/{number}" for number in range(3000)]
    async with Either(kind, **group.options) as cache:
        for first in range(0, len(names), 500):
            await cache.do("set_bulk", {one: (1, {}) for one in names[first : first + 500]})
        scan = cache.cache.scan("n/", count=FEW)
        found = [await cache.next(scan) for _ in range(1500)]
        cursor = scan.cursor
        source, target = group.primaries()[:2]
        group.migrate(group.slots_of(source)[:300], source, target)
    async with Either(kind, **group.options) as cache:
        found += await cache.all("n/", cursor=cursor)
        assert {*found} == {*names}


async def test_a_sentinel_failover(kind: str, sentinel_group: SentinelGroup) -> None:
    names = [f"n/{number}" for number in range(2000)]
    async with Either(kind, **sentinel_group.options) as cache:
        await cache.do("set_bulk", {one: (1, {}) for one in names})
        sentinel_group.heal()
        scan = cache.cache.scan("n/", count=FEW)
        found = [await cache.next(scan) for _ in range(500)]
        await asyncio.to_thread(sentinel_group.fail_over)
        found += await cache.rest(scan)
        assert {*found} == {*names}


@pytest.fixture(scope="module")
def sentinel_group() -> Iterator[SentinelGroup]:
    with SentinelGroup(BY_AGE[-1]) as started:
        yield started
