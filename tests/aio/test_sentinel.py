"""A cache behind Sentinels: it finds the primary, and its successor after a failover."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

import dscache
from dscache import _backend
from dscache.aio import sentinel
from dscache.aio.connection import Connection
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import OLDEST_AND_NEWEST
from tests.soak.figures import open_files
from tests.support.faults import HELLO_REPLY, FakeServer, FaultProxy
from tests.support.sentinels import GROUP, FakeSentinel, SentinelGroup
from tests.support.waiting import PATIENCE, own_tasks, until

PASSWORD = "the-sentinels-own"
# Timeouts for operations that must not end by a deadline.
PATIENT = {"connectTimeout": 600_000, "commandTimeout": 600_000, "closeTimeout": 600_000}


@pytest.fixture(scope="module")
def shared_group(binary: ServerBinary) -> Iterator[SentinelGroup]:
    """A primary, two replicas and three Sentinels with a password."""
    with SentinelGroup(binary, password=PASSWORD) as started:
        yield started


@pytest.fixture
def group(shared_group: SentinelGroup) -> SentinelGroup:
    """The shared group, whole again whatever the last test did to it."""
    shared_group.heal()
    return shared_group


def open_cache(group: SentinelGroup, **options: Any) -> dscache.AsyncCache:
    return dscache.AsyncCache.from_config({"name": "redis", "options": group.options | options})


def behind(*sentinels: FakeServer | FaultProxy, **options: Any) -> dscache.AsyncCache:
    """Return a cache behind fake Sentinels."""
    nodes = [{"host": one.host, "port": one.port} for one in sentinels]
    return dscache.AsyncCache.from_config(
        {"name": "redis", "options": {"sentinels": nodes, "name": GROUP, **options}}
    )


def named(cache: dscache.AsyncCache) -> int:
    """Return the port that the cache is connected to."""
    node = cache._topology
    assert isinstance(node, Connection)
    return int(node.address.rpartition(":")[2])


async def _replicated(group: SentinelGroup) -> None:
    """Wait until all replicas have everything written so far: replication is asynchronous."""
    replicas = len(group.servers) - 1
    with group.ask(group.primary().port) as client:
        # WAIT covers the writes of its own connection, and thereby all before them.
        client.set("marker", "1")
        while await asyncio.to_thread(client.wait, replicas, 1000) < replicas:
            await asyncio.sleep(0.05)


async def test_replicas_are_read_and_refuse_writes(group: SentinelGroup, backend: str) -> None:
    async with asyncio.timeout(30):
        async with open_cache(group) as cache:
            await cache.set("a", 1, {"b": 2})
            assert GROUP in cache.description
            await _replicated(group)
        async with open_cache(group, role="slave") as cache:
            record = await cache.get("a")
            assert record is not None
            assert (record.version, record.data) == (1, {"b": 2})
            with pytest.raises(dscache.ReplyError) as refusal:
                await cache.set("a", 2, {})
            assert refusal.value.code == "READONLY"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "others"}, 'names a primary of "others": .*reports no primary that is up'),
        ({"sentinelPassword": "wrong"}, 'names a primary of "records": .*password'),
        ({"sentinels": [{"port": 1}]}, r'a primary of "records": 127\.0\.0\.1:1: '),
        ({"name": "others", "role": "slave"}, 'names a replica of "others": .*No such master'),
    ],
)
async def test_no_sentinel_knows_a_primary(
    options: dict[str, Any], message: str, group: SentinelGroup
) -> None:
    cache = open_cache(group, connectTimeout=1000, **options)
    with pytest.raises(dscache.ConnectError, match=message) as refusal:
        await cache.when_ready()
    await cache.close()
    assert PASSWORD not in str(refusal.value)
    assert "wrong" not in str(refusal.value)


async def test_the_first_sentinels_may_be_down(group: SentinelGroup, backend: str) -> None:
    nodes = [{"host": "127.0.0.1", "port": port} for port in (1, *group.ports)]
    async with asyncio.timeout(30), open_cache(group, sentinels=nodes) as cache:
        assert await cache.set("a", 1, 1)


# -- fake Sentinels: which one is believed


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lost subscriptions be renewed quickly."""
    monkeypatch.setattr(sentinel, "_PAUSE", 0.01)
    monkeypatch.setattr(sentinel, "_LONGEST_PAUSE", 0.05)


@pytest.mark.parametrize("stale", [0, 1, 2])
async def test_the_newest_configuration_is_believed(stale: int) -> None:
    """In any order of replies: with a stale one among the first two, the third one decides."""
    async with FakeServer() as old, FakeServer() as new, AsyncExitStack() as stack:
        sentinels = [
            await stack.enter_async_context(
                FakeSentinel(old.port, 3) if number == stale else FakeSentinel(new.port, 4)
            )
            for number in range(3)
        ]
        async with asyncio.timeout(PATIENCE), behind(*sentinels, **PATIENT) as cache:
            assert named(cache) == new.port
            assert old.accepted == 0
            # The cache subscribes to all of them, and none leads it elsewhere.
            await until(lambda: all(one.subscriptions and one.questions > 1 for one in sentinels))
            assert (cache.stats()["connects"], cache.stats()["last_loss"]) == (1, "")
        assert own_tasks() == []


async def test_a_majority_is_enough(backend: str) -> None:
    """Neither a lost Sentinel nor one that refuses causes a delay."""
    async with (
        FakeServer() as server,
        FakeSentinel(server.port) as first,
        FakeSentinel(server.port) as second,
        FaultProxy("127.0.0.1", 1) as gone,
    ):
        gone.deaf()
        async with asyncio.timeout(PATIENCE), behind(gone, first, second, **PATIENT) as cache:
            assert named(cache) == server.port
    assert own_tasks() == []


async def test_one_answer_is_enough() -> None:
    refusing = {"*": b"-NOPERM not for you\r\n"}
    async with (
        FakeServer() as server,
        FakeServer(refusing) as first,
        FakeServer({"*": b"?nonsense\r\n"}) as second,
        FakeSentinel(server.port) as third,
        asyncio.timeout(PATIENCE),
        behind(first, second, third, **PATIENT) as cache,
    ):
        assert named(cache) == server.port


async def test_a_sentinel_may_omit_its_epoch(hasty: None, backend: str) -> None:
    async with (
        FakeServer() as old,
        FakeServer() as new,
        FakeSentinel(old.port) as first,
        FakeSentinel(old.port) as second,
    ):
        for one in (first, second):
            say = one.answers["SENTINEL"]
            assert callable(say)
            one.answers["SENTINEL"] = lambda command, say=say: (
                b"-NOPERM not that\r\n" if command[1] == b"MASTER" else say(command)
            )
        async with asyncio.timeout(PATIENCE), behind(first, second, **PATIENT) as cache:
            assert named(cache) == old.port
            first.primary = second.primary = new.port
            await until(lambda: first.connections == second.connections == 1)
            first.announce(old.port)
            await until(lambda: cache.is_ready and named(cache) == new.port)


async def test_without_the_right_to_subscribe_the_sentinel_is_polled(
    hasty: None, backend: str
) -> None:
    async with FakeServer() as old, FakeServer() as new, FakeSentinel(old.port) as only:
        only.answers["SUBSCRIBE"] = b"-NOPERM not for you\r\n"
        async with asyncio.timeout(PATIENCE), behind(only, **PATIENT) as cache:
            assert named(cache) == old.port
            only.primary = new.port
            await until(lambda: cache.is_ready and named(cache) == new.port)


async def test_announcements_are_verified(hasty: None, backend: str) -> None:
    """Events of a stale Sentinel have no effect, nor do those about other groups."""
    async with (
        FakeServer() as old,
        FakeServer() as new,
        FakeSentinel(old.port, 3) as stale,
        FakeSentinel(new.port, 4) as first,
        FakeSentinel(new.port, 4) as second,
        asyncio.timeout(PATIENCE),
        behind(stale, first, second, **PATIENT) as cache,
    ):
        sentinels = (stale, first, second)
        await until(lambda: all(one.subscriptions and one.connections == 1 for one in sentinels))
        first.announce(old.port, group="others")
        for _ in range(5):
            asked = first.questions
            stale.announce(new.port)
            await until(lambda asked=asked: first.questions > asked)
            await until(lambda: all(one.connections == 1 for one in sentinels))
        assert (cache.stats()["connects"], cache.stats()["last_loss"]) == (1, "")
        assert named(cache) == new.port


async def test_the_announcing_sentinel_is_always_asked(hasty: None, backend: str) -> None:
    """Two Sentinels without the news answer faster than its announcer, and are a majority."""
    async with (
        FakeServer() as old,
        FakeServer() as new,
        FakeSentinel(old.port, 3) as first,
        FakeSentinel(old.port, 3) as second,
        FakeSentinel(old.port, 3) as knowing,
        FaultProxy(knowing.host, knowing.port) as slow,
        asyncio.timeout(PATIENCE),
        behind(first, second, slow, **PATIENT) as cache,
    ):
        sentinels = (first, second, knowing)
        await until(lambda: all(one.subscriptions and one.connections == 1 for one in sentinels))
        slow.delay(0.1)
        knowing.primary, knowing.epoch = new.port, 4
        knowing.announce(old.port)
        # The same holds when the next connection is made.
        await until(lambda: cache.is_ready and named(cache) == new.port)
        assert cache.stats()["connects"] == 2
        assert str(new.port) in cache.stats()["last_loss"]


async def test_a_move_during_the_handshake(hasty: None, backend: str) -> None:
    """A server that is replaced before it has answered the handshake is not used."""
    async with (
        FakeServer({"HELLO": b"", "*": b""}) as old,
        FakeServer() as new,
        FakeSentinel(old.port) as only,
        asyncio.timeout(PATIENCE),
    ):
        cache = behind(only, **PATIENT)
        waiting = asyncio.ensure_future(cache.when_ready())
        await until(lambda: old.commands and only.subscriptions and only.connections == 1)
        only.primary = new.port
        asked = only.questions
        only.announce(old.port)
        await until(lambda: only.questions > asked and only.connections == 1)
        errors = b"-ERR unknown\r\n" * 2
        old.push(HELLO_REPLY + errors)
        await waiting
        assert named(cache) == new.port
        assert cache.stats()["connects"] == 1
        await cache.close()


# -- broken subscriptions


@asynccontextmanager
async def behind_a_proxy() -> AsyncIterator[
    tuple[FakeSentinel, FaultProxy, dscache.AsyncCache, FakeServer, FakeServer]
]:
    """Return a Sentinel, its proxy, a cache behind them, its primary, and another server."""
    async with (
        FakeServer() as old,
        FakeServer() as new,
        FakeSentinel(old.port) as only,
        FaultProxy(only.host, only.port) as way,
        asyncio.timeout(PATIENCE),
        behind(way, **PATIENT) as cache,
    ):
        yield only, way, cache, old, new


async def test_nothing_is_missed_without_a_subscription(hasty: None, backend: str) -> None:
    async with behind_a_proxy() as (only, way, cache, old, new):
        await until(lambda: only.subscriptions)
        await way.refuse()
        way.cut("rst")
        only.primary = new.port
        only.announce(old.port)
        assert named(cache) == old.port
        await way.listen()
        await until(lambda: cache.is_ready and named(cache) == new.port)


async def test_a_silent_sentinel_is_found(
    hasty: None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "_PING_AFTER", 0.1)
    async with behind_a_proxy() as (only, way, cache, _, new):
        await until(lambda: only.subscriptions and way.connections == 1)
        pings = len(only.commands)
        # While it answers, it is not silent.
        await until(lambda: only.commands[pings:].count([b"PING"]) > 3)
        assert only.subscriptions == 1
        monkeypatch.setattr(sentinel, "_PING_ANSWER", 0.1)
        way.stall("replies")
        accepted = way.accepted
        await until(lambda: way.accepted > accepted)
        only.primary = new.port
        monkeypatch.setattr(sentinel, "_PING_ANSWER", 4.0)
        way.resume()
        await until(lambda: cache.is_ready and named(cache) == new.port)


async def test_a_lost_sentinel_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss of a Sentinel is logged once, and so is its return; the end is not logged."""
    caplog.set_level(logging.INFO, "dscache")
    pauses: list[int] = []

    async def pause(failures: int) -> None:
        pauses.append(failures)
        await asyncio.sleep(0.01)

    monkeypatch.setattr(sentinel, "_pause", pause)

    def logged() -> list[str]:
        records = [one for one in caplog.records if one.name == "dscache"]
        return [one.getMessage() for one in records if str(way.port) in one.getMessage()]

    async with (
        FakeServer() as server,
        FakeSentinel(server.port) as first,
        FakeSentinel(server.port) as second,
        FakeSentinel(server.port) as third,
        FaultProxy(third.host, third.port) as way,
        asyncio.timeout(PATIENCE),
    ):
        async with behind(first, second, way, **PATIENT):
            await until(lambda: third.subscriptions == 1)
            assert logged() == []
            for subscriptions in (2, 3):
                await way.refuse()
                way.cut("rst")
                pauses.clear()
                await until(lambda: len(pauses) > 5)
                await way.listen()
                await until(lambda n=subscriptions: third.subscriptions == n)
                await until(lambda n=subscriptions: len(logged()) == 2 * (n - 1))
        lost, back = logged()[:2]
        assert lost.startswith(f"can't subscribe to the Sentinel 127.0.0.1:{way.port}: ")
        assert back == f"subscribed to the Sentinel 127.0.0.1:{way.port} again"
        assert len(logged()) == 4, logged()


# -- closing


@pytest.mark.parametrize("state", ["connecting", "connected"])
async def test_close_does_not_wait_for_a_sentinel(state: str, backend: str) -> None:
    gc.collect()
    files = open_files()
    async with FakeServer() as server, AsyncExitStack() as stack:
        sentinels = [await stack.enter_async_context(FakeSentinel(server.port)) for _ in range(3)]
        ways = [
            await stack.enter_async_context(FaultProxy(one.host, one.port)) for one in sentinels
        ]
        cache = behind(*ways, **PATIENT)
        async with asyncio.timeout(PATIENCE):
            if state == "connected":
                await cache.when_ready()
                await until(lambda: all(one.subscriptions for one in sentinels))
                for way in ways:
                    way.stall()
            else:
                for way in ways:
                    way.deaf()
                waiting = asyncio.ensure_future(cache.when_ready())
                await until(lambda: all(way.accepted > 1 for way in ways))
            await cache.close()
            assert own_tasks() == []
            if state == "connecting":
                assert isinstance(
                    (await asyncio.gather(waiting, return_exceptions=True))[0],
                    dscache.ConnectionLost,
                )
            for way in ways:
                way.resume()
        del cache
    await until(lambda: open_files() <= files)


ENDINGS = {
    "asyncio.run": "asyncio.run(use())",
    "uvloop.run": "uvloop.run(use())",
    "a closed loop": "loop.run_until_complete(use()); loop.close()",
    "a loop left open": "loop.run_until_complete(use())",
    "sys.exit": "asyncio.run(use(lambda: sys.exit()))",
    "a fork": "asyncio.run(use(fork))",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("state", ["connecting", "connected"])
async def test_an_interpreter_ends_with_an_open_cache(ending: str, state: str) -> None:
    program = f"""
        import asyncio, os, sys, uvloop
        import dscache

        def fork():
            pid = os.fork()
            if not pid:
                asyncio.run(child())
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert cache.is_ready == ({state!r} == "connected")

        async def child():
            async with dscache.AsyncCache.from_config(config):
                pass
            try:
                await cache.close()
            except dscache.UsageError:
                return
            os._exit(1)

        async def use(last=lambda: None):
            global cache
            cache = dscache.AsyncCache.from_config(config if {state!r} == "connected" else silent)
            waiting = asyncio.ensure_future(cache.when_ready())
            if {state!r} == "connected":
                await waiting
            await asyncio.sleep(0.1)  # for subscriptions; whatever is under way is well
            print("used", flush=True)
            last()

        def options(port):
            nodes = [{{"port": int(port)}}]
            return {{"sentinels": nodes, "name": "{GROUP}", "connectTimeout": 60_000}}

        config, silent = ({{"name": "redis", "options": options(port)}} for port in sys.argv[1:])
        loop = asyncio.new_event_loop()
        {ENDINGS[ending]}
        """
    async with (
        FakeServer() as server,
        FakeSentinel(server.port) as only,
        FaultProxy(only.host, only.port) as silent,
    ):
        silent.deaf()
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", textwrap.dedent(program), str(only.port), str(silent.port)],
            env={**os.environ, "DSCACHE_BACKEND": _backend.BACKEND},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, "used\n"), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr


# -- changes of role come last: a group takes a while to be whole again


async def test_a_demoted_primary_is_left() -> None:
    """A connection that outlives the change of roles ends with the first READONLY."""
    with SentinelGroup(OLDEST_AND_NEWEST[0], replicas=1, sentinels=1) as group:
        await _demote_and_write(group)


async def _demote_and_write(group: SentinelGroup) -> None:
    async with asyncio.timeout(30), open_cache(group) as cache:
        await cache.set("a", 1, 1)
        await _replicated(group)
        old = group.primary()
        # Without the Sentinels, which would close the clients' connections themselves.
        other = next(server for server in group.servers if server is not old)
        with group.ask(old.port) as client:
            client.replicaof(other.host, str(other.port))
        with pytest.raises(dscache.ReplyError, match="READONLY"):
            await cache.set("a", 2, 2)
        connects = cache.stats()["connects"]
        while cache.stats()["connects"] == connects and cache.is_ready:
            await asyncio.sleep(0.01)
        assert "replica" in cache.stats()["last_loss"]


async def test_failover_under_load(group: SentinelGroup, backend: str) -> None:
    """Guarded writes continue after a failover, and no acknowledged one is undone."""
    old = group.primary()
    async with asyncio.timeout(60), open_cache(group) as cache:
        acknowledged = dict.fromkeys((f"{backend}/{i}" for i in range(8)), 0)
        stop = asyncio.Event()
        failures: list[Exception] = []

        async def write(name: str) -> None:
            for version in itertools.count(1):
                if stop.is_set():
                    return
                try:
                    if await cache.set(name, version, {"version": version}, if_newer=True):
                        acknowledged[name] = version
                except dscache.DscacheError as error:
                    failures.append(error)
                await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as tasks:
            for name in acknowledged:
                tasks.create_task(write(name))
            await asyncio.sleep(0.5)
            await _replicated(group)
            before = dict(acknowledged)
            old.kill()
            await asyncio.to_thread(group.wait_for_primary, old)
            at_failover = dict(acknowledged)
            while any(acknowledged[name] <= at_failover[name] for name in acknowledged):
                await asyncio.sleep(0.01)
            stop.set()

        stored = await cache.head_bulk(acknowledged)
        assert stored == acknowledged
        assert all(acknowledged[name] > before[name] > 0 for name in acknowledged)
        assert cache.stats()["connects"] >= 2
        assert named(cache) == group.primary().port
        # Every error is a refusal or a lost connection.
        assert {type(error) for error in failures} <= {
            dscache.ConnectionLost,
            dscache.ConnectError,
            dscache.DeadlineExceeded,
            dscache.ReplyError,
        }


async def _write_until_moved(
    group: SentinelGroup, cache: dscache.AsyncCache, backend: str
) -> tuple[EmbeddedServer, dict[str, int], dict[str, int]]:
    """Replace the healthy primary under a load of guarded writes.

    Returns the old one, the writes acknowledged when the cache had moved, and those acknowledged at
    the end, when each name was written several times more.
    """
    acknowledged = dict.fromkeys((f"moved/{backend}/{i}" for i in range(8)), 0)
    stop = asyncio.Event()

    async def write(name: str) -> None:
        for version in itertools.count(1):
            if stop.is_set():
                return
            try:
                if await cache.set(name, version, [version], if_newer=True):
                    acknowledged[name] = version
            except dscache.DscacheError:
                pass  # refused, or the connection was lost
            await asyncio.sleep(0.001)

    await cache.delete_bulk(acknowledged)
    async with asyncio.TaskGroup() as tasks:
        for name in acknowledged:
            tasks.create_task(write(name))
        await until(lambda: all(acknowledged.values()))
        connects = cache.stats()["connects"]
        old = await asyncio.to_thread(group.fail_over)
        await until(lambda: cache.is_ready and cache.stats()["connects"] > connects)
        moved = dict(acknowledged)
        await until(lambda: all(acknowledged[name] > moved[name] + 9 for name in moved))
        stop.set()
    return old, moved, acknowledged


async def test_a_replaced_primary_is_left_while_it_is_healthy(
    group: SentinelGroup, backend: str
) -> None:
    """Writes acknowledged after the move go to the new primary and aren't lost."""
    async with asyncio.timeout(PATIENCE), open_cache(group) as cache:
        old, moved, acknowledged = await _write_until_moved(group, cache, backend)
        assert named(cache) != old.port
        reason = f"the Sentinels name another primary, 127.0.0.1:{named(cache)}"
        assert cache.stats()["last_loss"] == reason
        assert await cache.head_bulk(acknowledged) == acknowledged
        with group.ask(old.port) as client:
            # Only the Sentinels announced it: the old one believes to the end that it is the
            # primary.
            assert client.role()[0] == "master"
            stored = client.mget(f"{name}_v" for name in acknowledged)
        # One write may have been in flight, and was retried.
        for version, last in zip(stored, moved.values(), strict=True):
            assert int(version) <= last + 1
        await asyncio.to_thread(group.wait_for_primary, old)
        assert named(cache) == group.primary().port


async def test_an_outdated_sentinel_is_outvoted(group: SentinelGroup, backend: str) -> None:
    """A Sentinel that names the old, healthy primary is outvoted by the others."""
    async with asyncio.timeout(PATIENCE), open_cache(group, connectionName="tested") as cache:
        await cache.set("a", 1, 1)
        group.pause_sentinel(0)
        old = await asyncio.to_thread(group.fail_over, 1)
        await until(lambda: cache.is_ready and named(cache) != old.port)
        new = named(cache)
        connects = cache.stats()["connects"]
        group.resume_sentinel(0)
        for _ in range(3):
            with group.ask(new) as client:
                # Without the Sentinels' own connections, or they would mark it as down.
                (own,) = [one for one in client.client_list() if one["name"] == "tested"]
                client.client_kill_filter(_id=own["id"])
            connects += 1
            await until(lambda n=connects: cache.is_ready and cache.stats()["connects"] >= n)
            assert named(cache) == new
        await asyncio.to_thread(group.heal)
        assert await cache.set("a", 2, 2) is True
        assert (named(cache), cache.stats()["connects"]) == (new, connects)


async def test_a_restarted_sentinel_is_subscribed_to_again(backend: str) -> None:
    with SentinelGroup(OLDEST_AND_NEWEST[0], replicas=1, sentinels=1) as group:
        async with asyncio.timeout(PATIENCE), open_cache(group) as cache:
            await asyncio.to_thread(group.restart_sentinel, 0)
            subscribed = False
            while not subscribed:
                with group.ask(group.ports[0]) as client:
                    subscribed = any(int(one["sub"]) > 0 for one in client.client_list())
                await asyncio.sleep(0.01)
            old, _, acknowledged = await _write_until_moved(group, cache, backend)
            assert named(cache) != old.port
            assert await cache.head_bulk(acknowledged) == acknowledged
