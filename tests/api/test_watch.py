"""watch on real servers: a mirror kept from the changes ends as the servers' records."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.blocking import watch as blocking_watch
from dscache.blocking.waiter import BlockingWaiter
from dscache.core.keys import KeyLayout
from dscache.core.memory import MemoryPipeline
from dscache.embedded import EmbeddedServer
from dscache.errors import ConnectError, ConnectionLost, DscacheError, ReplyError, UsageError
from tests.conftest import BY_AGE, SERVERS, MakeServer, _server_id
from tests.soak.figures import open_files
from tests.support.blocking import strike
from tests.support.clusters import ClusterGroup
from tests.support.either import Either, fill, moving
from tests.support.faults import FakeServer
from tests.support.sentinels import GROUP, FakeSentinel, SentinelGroup
from tests.support.waiting import PATIENCE, own_tasks, until

ON_ONE_SERVER = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)


@pytest.fixture(params=["AsyncCache", "Cache"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@asynccontextmanager
async def watching(either: Either, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
    watch = either.cache.watch(*arguments, **options)
    await enter(either, watch)
    try:
        yield watch
    finally:
        if either.kind == "AsyncCache":
            await watch.close()
        else:
            await asyncio.to_thread(watch.close)


async def enter(either: Either, watch: Any) -> None:
    if either.kind == "AsyncCache":
        await watch.__aenter__()
    else:
        await asyncio.to_thread(watch.__enter__)


async def until_change(either: Either, watch: Any, **wanted: Any) -> Any:
    """Return the first change with these attributes."""
    async with asyncio.timeout(PATIENCE):
        while True:
            change = await either.next(watch)
            assert change is not None
            if all(getattr(change, name) == value for name, value in wanted.items()):
                return change


class Mirror:
    """The versions of the records of a prefix, kept from the changes of a watch."""

    def __init__(self, either: Either, prefix: str, **options: Any) -> None:
        self._either = either
        self._prefix = prefix
        self._options = options
        self.versions: dict[str, int] = {}
        self.kinds: list[str] = []
        self.changes = 0

    async def _read_all(self) -> None:
        while True:
            try:
                records = await self._either.all(self._prefix, records=True)
            except DscacheError:
                continue
            self.versions = {record.name: record.version for record in records}
            return

    async def keep(self, begun: asyncio.Event) -> None:
        async with watching(self._either, self._prefix, **self._options) as watch:
            await self._read_all()
            begun.set()
            while (change := await self._either.next(watch)) is not None:
                self.changes += 1
                if change.is_loss:
                    await self._read_all()
                if change.kind == "changed":
                    self.versions[change.name] = change.version
                elif change.kind == "deleted":
                    self.versions.pop(change.name, None)
                else:
                    self.kinds.append(change.kind)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        begun = asyncio.Event()
        task = asyncio.ensure_future(self.keep(begun))
        try:
            waiting = asyncio.ensure_future(begun.wait())
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            assert begun.is_set(), task.result()
            yield
        finally:
            if self._either.kind == "AsyncCache":
                task.cancel()
            else:
                for watch in list(self._either.cache._watches):
                    await asyncio.to_thread(watch.close)
            await asyncio.wait([task])


async def write_at_random(either: Either, prefix: str, count: int, seed: int) -> None:
    """Write and delete records at random, whatever fails."""
    rng = random.Random(seed)
    for version in range(count // 10):
        names = [f"{prefix}{rng.randrange(200)}" for _ in range(10)]
        try:
            if rng.randrange(4):
                await either.do("set_bulk", {name: (version, {}) for name in names})
            else:
                await either.do("delete_bulk", names[:3])
        except DscacheError:
            await asyncio.sleep(0.01)
        if not rng.randrange(10):
            await asyncio.sleep(0.002)


async def assert_equal_at_the_end(mirror: Mirror, either: Either, prefix: str) -> None:
    """Assert that the mirror comes to equal the servers' records, and stays so."""
    while True:
        try:
            await either.do("set", f"{prefix}last", 1, {})
            break
        except DscacheError:  # the connection was lost a moment ago
            await asyncio.sleep(0.01)
    try:
        async with asyncio.timeout(PATIENCE):
            # Read again each time: a primary that is being replaced may have answered the first.
            while mirror.versions != (wanted := await versions_of(either, prefix)):
                await asyncio.sleep(0.02)
    except TimeoutError:
        wrong = dict(mirror.versions.items() ^ wanted.items())
        raise AssertionError(f"of {len(wanted)} records, the mirror has other: {wrong}") from None
    assert len(wanted) > 50
    await asyncio.sleep(0.1)
    assert mirror.versions == wanted


async def versions_of(either: Either, prefix: str) -> dict[str, int]:
    records = await either.all(prefix, records=True)
    return {record.name: record.version for record in records}


# -- changes


async def test_kinds_of_changes(
    kind: str, backend: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either(kind, url=server.url) as cache, watching(cache, "a") as watch:
        fill(redis, ["b"])
        redis.mset({"a_v": 7, "a_d": "[1]"})
        change = await until_change(cache, watch, kind="changed")
        assert (change.name, change.version, change.record, change.is_loss) == ("a", 7, None, False)
        read = change.read()
        record = await read if kind == "AsyncCache" else read
        assert (record.version, record.data) == (7, [1])
        redis.delete("a_v")
        assert (await until_change(cache, watch, kind="deleted")).name == "a"
        await cache.do("set", "a", 8, [2], ttl=1)
        assert (await until_change(cache, watch, kind="changed")).version == 8
        assert (await until_change(cache, watch, kind="deleted")).name == "a"
        redis.mset({"a_v": "x", "a_d": "[1]"})
        damaged = await until_change(cache, watch, kind="damaged")
        assert (damaged.name, damaged.version) == ("a", None)
        assert "its stored version isn't an integer" in damaged.reason
        redis.flushdb()
        assert (await until_change(cache, watch, kind="flushed")).is_loss


@pytest.mark.parametrize("layout", ["deepstream", "hashtag"])
@pytest.mark.parametrize("prefix", ["", "user/", "}x"])
async def test_records_of_a_prefix(
    layout: str,
    prefix: str,
    kind: str,
    backend: str,
    server: EmbeddedServer,
    redis: redis_py.Redis,
) -> None:
    names = ["user/1", "users", "}x1", "}", "last", "user/last", "}xlast"]
    options = {"keyLayout": layout, "keyPrefix": "p:"}
    async with (
        Either(kind, url=server.url, **options) as cache,
        watching(cache, prefix, records=True) as watch,
    ):
        fill(redis, names)  # without the key prefix
        fill(redis, names, KeyLayout("p:", layout == "hashtag"))
        found = {}
        wanted = {name: number for number, name in enumerate(names) if name.startswith(prefix)}
        while found != wanted:
            change = await cache.next(watch)
            assert change.kind == "changed"
            assert (change.record.name, change.record.data) == (change.name, {})
            assert change.record.version == change.version
            found[change.name] = change.version


async def test_in_memory(kind: str, backend: str) -> None:
    async with Either(kind, name="memory") as cache:
        async with watching(cache, "n/", records=True) as watch:
            await cache.do("set_bulk", {"n/1": (1, {}), "other": (1, {})})
            await cache.do("set", "n/1", 2, {})
            change = await cache.next(watch)
            assert (change.name, change.version, change.record.version) == ("n/1", 2, 2)
            await cache.do("delete", "n/1")
            assert (await cache.next(watch)).kind == "deleted"
        # A watch that has ended hears of nothing.
        await cache.do("set", "n/1", 3, {})
        assert await cache.next(watch) is None


def test_in_memory_the_end_of_a_watch_hides_no_change_from_others() -> None:
    pipeline = MemoryPipeline(BlockingWaiter, lambda: None, None)
    heard: list[str] = []

    def first(names: Iterable[str]) -> None:
        pipeline.forget(first)  # as the finalizer of a watch does

    pipeline.listen(first)
    pipeline.listen(heard.extend)
    pipeline.set("a", 1, {})
    pipeline.delete("a")
    assert heard == ["a", "a"]


async def test_in_memory_an_expiry_is_told_in_time(kind: str, backend: str) -> None:
    async with Either(kind, name="memory") as cache, watching(cache, "n/") as watch:
        await cache.do("set", "other", 1, {}, ttl=1)
        await cache.do("set", "n/1", 1, {}, ttl=1)
        await cache.do("set", "n/lasting", 1, {})
        async with asyncio.timeout(PATIENCE):
            changes = [await cache.next(watch) for _ in range(3)]
        assert [(one.kind, one.name) for one in changes] == [
            ("changed", "n/1"),
            ("changed", "n/lasting"),
            ("deleted", "n/1"),
        ]


@ON_ONE_SERVER
async def test_names_that_are_no_text_are_told(
    kind: str,
    backend: str,
    server: EmbeddedServer,
    redis: redis_py.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Either(kind, url=server.url) as cache, watching(cache, "n/") as watch:
        assert watch.skipped == 0
        redis.mset({b"n/\xff_v": 1, b"n/\xff_d": "{}", b"n/\xfe_v": 1, b"other\xff_v": 1})
        fill(redis, ["n/last"])
        assert (await cache.next(watch)).name == "n/last"
        assert watch.skipped >= 3
    assert caplog.text.count("is no UTF-8") == 1


@ON_ONE_SERVER
async def test_many_changes_of_a_name_are_one(
    kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either(kind, url=server.url) as cache, watching(cache) as watch:
        for version in range(500):
            redis.mset({"a_v": version, "a_d": "{}"})
        fill(redis, ["last"])
        await asyncio.sleep(0.2)
        changes = [await cache.next(watch)]
        while changes[-1].name != "last":
            changes.append(await cache.next(watch))
        assert [one.version for one in changes if one.name == "a"][-1] == 499
        assert len(changes) < 100


@ON_ONE_SERVER
async def test_too_many_pending_names_are_a_gap(
    kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    names = [f"n/{number}" for number in range(200)]
    async with Either(kind, url=server.url) as cache, watching(cache, max_pending=50) as watch:
        fill(redis, names)
        gap = await until_change(cache, watch, kind="gap")
        assert "more than 50 names" in gap.reason
        assert (await until_change(cache, watch, kind="resumed")).is_loss


# -- a mirror


@ON_ONE_SERVER
@pytest.mark.parametrize("options", [{}, {"nearCache": {}}])
async def test_a_mirror(
    options: dict[str, Any], kind: str, backend: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    if options and kind == "Cache":
        options = {"nearCache": {"required": False}}
    async with Either(kind, url=server.url, **options) as cache:
        mirror = Mirror(cache, "n/")
        async with mirror.kept():
            await asyncio.gather(
                *(write_at_random(cache, "n/", 3000, seed) for seed in range(2)),
                write_at_random(cache, "other/", 500, 3),
            )
            await assert_equal_at_the_end(mirror, cache, "n/")
        assert mirror.kinds == []


@ON_ONE_SERVER
async def test_a_mirror_over_lost_connections_and_overflows(
    kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either(kind, url=server.url) as cache:
        mirror = Mirror(cache, "n/", max_pending=60)
        async with mirror.kept():
            writing = asyncio.ensure_future(write_at_random(cache, "n/", 6000, 1))
            while not writing.done():
                await asyncio.sleep(0.05)
                redis.client_kill_filter(_type="normal", skipme=True)
            await assert_equal_at_the_end(mirror, cache, "n/")
        assert {"gap", "resumed"} <= {*mirror.kinds}


async def test_a_mirror_of_a_server_that_is_killed(
    kind: str, backend: str, make_server: MakeServer
) -> None:
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    async with Either(kind, url=server.url) as cache:
        mirror = Mirror(cache, "n/")
        async with mirror.kept():
            for seed in range(3):
                writing = asyncio.ensure_future(write_at_random(cache, "n/", 2000, seed))
                await asyncio.sleep(0.05)
                server.kill()
                await asyncio.to_thread(server.start)
                await writing
            await assert_equal_at_the_end(mirror, cache, "n/")
        assert mirror.kinds.count("gap") >= 3


@pytest.mark.parametrize("options", [{}, {"scaleReads": "slave"}, {"keyLayout": "deepstream"}])
async def test_a_mirror_of_a_cluster_whose_slots_move(
    options: dict[str, str], kind: str, backend: str, group: ClusterGroup
) -> None:
    async with Either(kind, **group.options, **options) as cache:
        mirror = Mirror(cache, "n/")
        ended = threading.Event()
        async with mirror.kept():
            move = asyncio.ensure_future(asyncio.to_thread(moving(group, ended)))
            try:
                await asyncio.gather(*(write_at_random(cache, "n/", 3000, one) for one in range(2)))
            finally:
                ended.set()
                await move
            primaries = Either(kind, **group.options, **{**options, "scaleReads": "master"})
            async with primaries:
                await assert_equal_at_the_end(mirror, primaries, "n/")


async def test_a_mirror_over_a_failover_of_a_cluster(
    kind: str, backend: str, group: ClusterGroup
) -> None:
    async with Either(kind, **group.options) as cache:
        mirror = Mirror(cache, "n/")
        async with mirror.kept():
            await write_at_random(cache, "n/", 1000, 1)
            group.wait_until_ok()
            lost = group.primaries()[0]
            group.kill(lost)
            await write_at_random(cache, "n/", 1000, 2)
            await asyncio.to_thread(group.heal)
            await write_at_random(cache, "n/", 1000, 3)
            await assert_equal_at_the_end(mirror, cache, "n/")
        assert {"gap", "resumed"} <= {*mirror.kinds}


async def test_a_mirror_over_a_sentinel_failover(kind: str, sentinel_group: SentinelGroup) -> None:
    await asyncio.to_thread(sentinel_group.heal)
    async with Either(kind, **sentinel_group.options) as cache:
        mirror = Mirror(cache, "n/")
        async with mirror.kept():
            await write_at_random(cache, "n/", 1000, 1)
            writing = asyncio.ensure_future(write_at_random(cache, "n/", 2000, 2))
            await asyncio.to_thread(sentinel_group.fail_over)
            await writing
            await until(lambda: {"gap", "resumed"} <= {*mirror.kinds})
            await write_at_random(cache, "n/", 500, 3)
            await assert_equal_at_the_end(mirror, cache, "n/")


async def test_records_are_read_from_the_primary_that_resumes(
    kind: str, make_server: MakeServer
) -> None:
    """The one before is up, takes itself for the primary, and has a record that is lost."""
    old, new = make_server(), make_server()
    for server, version in ((old, 1), (new, 2)):
        with redis_py.Redis(port=server.port) as redis:
            redis.mset({"n/a_v": version, "n/a_d": "{}"})
    async with FakeSentinel(old.port) as sentinel:
        sentinels = [{"host": "127.0.0.1", "port": sentinel.port}]
        async with Either(kind, sentinels=sentinels, name=GROUP) as cache:
            assert (await cache.do("get", "n/a")).version == 1
            async with watching(cache, "n/") as watch:
                sentinel.primary, sentinel.epoch = new.port, 2
                with redis_py.Redis(port=old.port) as redis:
                    for client in redis.client_list():
                        if "B" in client["flags"]:
                            redis.client_kill_filter(_id=client["id"])
                # Before the cache may have heard of it, if it listens to Sentinels at all.
                announcing = asyncio.get_running_loop().call_later(0.5, sentinel.announce, old.port)
                await until_change(cache, watch, kind="resumed")
                assert (await cache.do("get", "n/a")).version == 2
                announcing.cancel()


@pytest.fixture(scope="module")
def sentinel_group() -> Iterator[SentinelGroup]:
    with SentinelGroup(BY_AGE[-1]) as started:
        yield started


# -- beginnings and ends


@ON_ONE_SERVER
async def test_bad_arguments(kind: str, server: EmbeddedServer) -> None:
    async with Either(kind, url=server.url) as cache:
        for arguments, words in (
            ({"prefix": b"a"}, "must be a str"),
            ({"prefix": "ü\ud800"}, "has a lone surrogate"),
            ({"max_pending": 0}, "from 1 to"),
            ({"max_pending": True}, "from 1 to"),
            ({"max_pending": "7"}, "from 1 to"),
        ):
            with pytest.raises(UsageError, match=words):
                cache.cache.watch(**arguments)


@ON_ONE_SERVER
async def test_a_watch_is_entered_once_and_before_its_iteration(
    kind: str, server: EmbeddedServer
) -> None:
    async with Either(kind, url=server.url) as cache:
        with pytest.raises(UsageError, match=r"use (async )?with cache\.watch"):
            await cache.next(cache.cache.watch())
        async with watching(cache) as watch:
            pass
        assert await cache.next(watch) is None
        with pytest.raises(UsageError, match="entered once"):
            await enter(cache, watch)
        never = cache.cache.watch()
    with pytest.raises(UsageError, match="the cache is closed; open another one"):
        await enter(cache, never)
    with pytest.raises(UsageError, match="entered once"):
        await enter(cache, watch)


@ON_ONE_SERVER
async def test_nothing_is_left_behind(kind: str, server: EmbeddedServer) -> None:
    async with Either(kind, url=server.url) as cache:
        await cache.do("head", "a")
        before = own_tasks(), open_files(), threading.active_count()
        for _ in range(3):
            async with watching(cache) as watch:
                await cache.do("set", "a", 1, {})
                assert (await cache.next(watch)).name == "a"
        assert (own_tasks(), open_files()) == before[:2]
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith("dscache")]


@ON_ONE_SERVER
async def test_a_closed_cache_ends_the_iteration(kind: str, server: EmbeddedServer) -> None:
    async with Either(kind, url=server.url) as cache, watching(cache) as watch:
        waiting = asyncio.ensure_future(cache.next(watch))
        await asyncio.sleep(0.05)
        await cache.do("close")
        with pytest.raises(ConnectionLost, match="the cache is closed"):
            await waiting
        with pytest.raises(ConnectionLost, match="the cache is closed"):
            await cache.next(watch)
        with pytest.raises(UsageError, match="the cache is closed"):
            cache.cache.watch()


@ON_ONE_SERVER
async def test_the_end_of_the_block_ends_the_iteration(kind: str, server: EmbeddedServer) -> None:
    async with Either(kind, url=server.url) as cache:
        async with watching(cache) as watch:
            waiting = asyncio.ensure_future(cache.next(watch))
            await asyncio.sleep(0.05)
            assert not waiting.done()
        assert await waiting is None


def test_a_handler_closes_a_watch_at_any_line_of_a_wait(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler runs between two lines of its thread, and so does a trace function."""
    monkeypatch.setattr(blocking_watch, "CHECK_INTERVAL", 0.05)

    def wait_struck_at(line: int, seen: list[int]) -> None:
        def trace(frame: FrameType, what: str, _: object) -> Any:
            if what == "line" and frame.f_code.co_filename in files:
                seen.append(line)
                if len(seen) == line:
                    sys.settrace(None)
                    watch.close()
            return trace

        with dscache.Cache({"name": "memory"}) as cache, cache.watch() as watch:
            sys.settrace(trace)
            try:
                assert list(watch) == []
            finally:
                sys.settrace(None)

    files = (threading.__file__, blocking_watch.__file__)
    for line in range(1, 60):  # the first wait takes fewer
        seen: list[int] = []
        thread = threading.Thread(target=wait_struck_at, args=(line, seen), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert len(seen) == line


async def test_an_unreachable_server(kind: str) -> None:
    cache = Either(kind, url="redis://127.0.0.1:1", connectTimeout=200)
    with pytest.raises(ConnectError):
        async with watching(cache):
            pass
    await cache.do("close")


@ON_ONE_SERVER
async def test_a_user_without_the_right_to_track(
    kind: str, server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    redis.execute_command(
        "ACL", "SETUSER", "ada", "on", ">secret", "~*", "+@all", "-client|tracking"
    )
    try:
        url = server.url.replace("://", "://ada:secret@")
        async with Either(kind, url=url) as cache:
            with pytest.raises(ReplyError, match="NOPERM") as caught:
                async with watching(cache):
                    pass
            assert "secret" not in str(caught.value)
    finally:
        redis.acl_deluser("ada")


async def test_a_server_without_pushes(kind: str) -> None:
    async with (
        FakeServer({"HELLO": b"-ERR unknown command 'HELLO'\r\n"}) as old,
        Either(kind, url=old.url) as cache,
    ):
        with pytest.raises(ReplyError, match="has no RESP3"):
            async with watching(cache):
                pass


@ON_ONE_SERVER
async def test_a_cancelled_wait_loses_no_change(
    server: EmbeddedServer, redis: redis_py.Redis
) -> None:
    async with Either("AsyncCache", url=server.url) as cache, watching(cache) as watch:
        names = [f"n/{number}" for number in range(300)]
        fill(redis, names)
        found: set[str] = set()
        rng = random.Random(1)
        while len(found) < len(names):
            step = asyncio.ensure_future(cache.next(watch))
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            step.cancel()
            try:
                found.add((await step).name)
            except asyncio.CancelledError:
                found.add((await cache.next(watch)).name)


@ON_ONE_SERVER
def test_another_loop(server: EmbeddedServer) -> None:
    cache = dscache.AsyncCache.from_config(server.url)
    opened: list[Any] = []

    async def begin() -> None:
        opened.append(await cache.watch().__aenter__())

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
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_struck_thread_ends_the_watch_with_an_error(server: EmbeddedServer) -> None:
    """Under gevent, a KeyboardInterrupt may strike any greenlet."""
    with dscache.Cache.from_config(server.url) as cache, cache.watch("n/") as watch:
        [listener] = [one for one in threading.enumerate() if one.name.startswith("dscache watche")]
        strike(listener, KeyboardInterrupt)
        cache.set("n/a", 1, {})  # its report wakes the thread
        with pytest.raises(ConnectionLost, match="KeyboardInterrupt has ended a thread"):
            for _ in watch:
                pass


@ON_ONE_SERVER
def test_a_primary_that_is_found_while_the_watch_ends_gets_no_thread(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dscache.Cache.from_config(server.url) as cache:
        watch = cache.watch("n/")
        watch.__enter__()
        watching = watch._watching
        changes = watching.changes
        lose = changes.lose

        def end_meanwhile(node: str, reason: str) -> None:
            watch.close()
            lose(node, reason)

        monkeypatch.setattr(changes, "lose", end_meanwhile)
        options = cache.config.options
        watching._follow({options.address: options, "new": options}, is_first=False)
        thread = watching._listening["new"].thread
        thread.join(PATIENCE)
        assert not thread.is_alive()


@ON_ONE_SERVER
def test_a_forked_child(server: EmbeddedServer) -> None:
    with dscache.Cache.from_config(server.url) as cache, cache.watch("n/") as watch:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                next(watch)
            except UsageError:
                cache.set("n/child", 1, {})
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert next(watch).name == "n/child"
