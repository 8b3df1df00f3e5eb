"""Announcements of maintenance, played by a proxy in front of a real server."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot
from redis.maint_notifications import MaintNotificationsConfig

import dscache
from dscache.config import Options
from dscache.core.recovery import change_timeout
from dscache.net.maintenance import KINDS, RELAXED, Announcements, Leeway, Notice, SlotMove, parse
from tests.conftest import SERVERS, _server_id
from tests.support.announcer import REFUSAL, SLOTS, Announcer, FakeSlots
from tests.support.wire import CORES, Push, resp

pytestmark = pytest.mark.usefixtures("backend")
# Nodes are proxies, and not the server.
on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)


@pytest.fixture
async def before(server: Any) -> AsyncIterator[Announcer]:
    async with Announcer(server.host, server.port) as announcer:
        yield announcer


@pytest.fixture
async def behind(server: Any) -> AsyncIterator[Announcer]:
    async with Announcer(server.host, server.port) as announcer:
        yield announcer


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.005)


def open_cache(announcer: Announcer, **options: Any) -> dscache.AsyncCache:
    where = {"host": "127.0.0.1", "port": announcer.port, "commandTimeout": 10_000}
    return dscache.AsyncCache.from_config({**where, **options})


async def load(cache: dscache.AsyncCache, number: int, ended: asyncio.Event) -> int:
    """Write and read one record again and again; return the last version."""
    name, version = f"moving/{number}", 0
    while not ended.is_set():
        version += 1
        await cache.set(name, version, {"task": number, "version": version})
        record = await cache.get(name)
        assert record is not None
        assert record.version == version
        assert record.data == {"task": number, "version": version}
        await asyncio.sleep(0)
    return version


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("named", [True, False])
async def test_move_under_load(
    before: Announcer, behind: Announcer, redis: Any, near: bool, named: bool
) -> None:
    """Each operation ends once with its own reply, and new ones go to the new address."""
    async with open_cache(before, maintNotifications="on", nearCache=near) as cache:
        await cache.when_ready()
        ended = asyncio.Event()
        tasks = [asyncio.create_task(load(cache, number, ended)) for number in range(100)]
        await until(lambda: before.served > 20)
        if named:
            before.push(b"MOVING", 1, 10, b"127.0.0.1:%d" % behind.port)
            before.push(b"MOVING", 1, 10, b"127.0.0.1:%d" % behind.port)
            await until(lambda: behind.served > 20)
            assert behind.accepted == 1
        else:
            before.push(b"MOVING", 1, 1, None)
            await until(lambda: before.accepted == 2)
            served = before.served
            await until(lambda: before.served > served + 20)
        await until(lambda: before.connections == (0 if named else 1))
        ended.set()
        versions = await asyncio.gather(*tasks)
        assert min(versions) > 0
        assert cache.stats()["failed"] == 0
        for number, version in enumerate(versions):
            assert redis.get(f"moving/{number}_v") == b"%d" % version


async def test_move_of_another_client(before: Announcer, behind: Announcer) -> None:
    """The client of redis-py reads the same script as the same move."""
    config = MaintNotificationsConfig(enabled=True)
    client: Any = Redis(
        host="127.0.0.1", port=before.port, protocol=3, maint_notifications_config=config
    )
    async with client:
        await client.set("moving/other", 1)
        assert before.requests
        # Its pool takes the host alone from the address, and keeps the port.
        before.push(b"MOVING", 1, 1, b"127.0.0.1:%d" % behind.port)
        await client.set("moving/other", 2)
        await until(lambda: before.connections == 0)
        assert await client.get("moving/other") == b"2"


async def test_invalidations_after_a_move(before: Announcer, behind: Announcer, redis: Any) -> None:
    """No record that was cached over the former socket is a hit after the move."""
    async with open_cache(before, maintNotifications="on", nearCache=True) as cache:
        await cache.set("moving", 1, "old")
        await cache.get("moving")
        before.push(b"MOVING", 1, 10, b"127.0.0.1:%d" % behind.port)
        await until(lambda: behind.accepted and not before.connections)
        redis.mset({"moving_v": 2, "moving_d": '"new"'})
        record = await cache.get("moving")
        assert record is not None
        assert (record.version, record.data) == (2, "new")


async def test_an_address_that_is_not_there_is_no_loss(before: Announcer) -> None:
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        before.push(b"MOVING", 1, 1, b"127.0.0.1:1")
        for version in range(1, 100):
            assert await cache.set("moving", version, None)
            await asyncio.sleep(0.001)
        assert before.connections == 1
        assert cache.stats()["reconnections"] == 0


async def test_a_move_that_is_announced_during_the_login(
    before: Announcer, behind: Announcer
) -> None:
    """The server is followed once the login is done, before it ends the connection."""
    before.answer += resp(Push((b"MOVING", 1, 60, behind.address)))
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        await until(lambda: behind.connections and not before.connections)
        assert await cache.set("moving", 1, None)
        assert cache.stats()["maintenance"]["moves"] == 1
        assert cache.stats()["last_loss"] == ""


async def test_a_new_address_that_fails_for_a_moment(before: Announcer, behind: Announcer) -> None:
    """Once the old server has gone, both addresses are tried in turn."""
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        behind.greets = False
        before.push(b"MOVING", 1, 60, behind.address)
        await until(lambda: behind.accepted)
        before.greets = False
        await before.cut()
        tried = behind.accepted
        setting = asyncio.ensure_future(cache.set("moving", 1, None))
        await until(lambda: behind.accepted > tried and before.accepted > 1)
        behind.greets = True
        assert await setting


async def test_a_new_address_that_refuses(before: Announcer, behind: Announcer) -> None:
    """Its refusal of the login isn't final: operations wait for the usual address."""
    behind.answer = REFUSAL
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        before.push(b"MOVING", 1, 60, behind.address)
        await until(lambda: behind.requests)
        assert await cache.set("moving", 1, None)
        await before.cut()
        assert await cache.set("moving", 2, None)
        assert before.accepted == 2


async def test_a_new_address_that_ends_logins(before: Announcer, behind: Announcer) -> None:
    """It says nothing about the usual address, as the end of a login by a proxy would."""
    behind.ends_at = b"HELLO"
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        before.push(b"MOVING", 1, 60, behind.address)
        await until(lambda: behind.accepted >= 3)
        await before.cut()
        assert await cache.set("moving", 1, None)
        assert before.accepted == 2
        assert len(before.requests) == 2


async def test_a_watch_follows_a_move(before: Announcer, behind: Announcer) -> None:
    """It connects to the new address too, while the usual one leads to no server."""
    async with (
        open_cache(before, maintNotifications="on") as cache,
        cache.watch("moving/") as watch,
    ):
        before.push(b"MOVING", 1, 600, behind.address)
        await until(lambda: cache.stats()["maintenance"]["moves"])
        before.greets = False
        await before.cut()
        async with asyncio.timeout(20):
            while (await anext(watch)).kind != "resumed":
                pass
            assert await cache.set("moving/1", 1, None)
            assert (await anext(watch)).kind == "changed"


async def test_a_move_goes_on_after_its_watch_has_failed(
    before: Announcer, behind: Announcer
) -> None:
    """The watch tries the new address, and then the usual one, where the cache still is."""
    behind.greets = False
    async with (
        open_cache(before, maintNotifications="on") as cache,
        cache.watch("moving/"),
    ):
        before.push(b"MOVING", 1, 60, behind.address)
        await until(lambda: behind.accepted)
        accepted = before.accepted
        before.cut_latest()
        await until(lambda: before.accepted > accepted)
        behind.greets = True
        await until(lambda: cache.stats()["maintenance"]["moves"])
        topology: Any = cache._topology
        assert topology.address == f"127.0.0.1:{behind.port}"


async def test_a_repeated_announcement_begins_no_other_move(before: Announcer) -> None:
    """A server that repeats it over the next connection states the time that is left."""
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        before.answer += resp(Push((b"MOVING", 1, 1, None)))
        before.push(b"MOVING", 1, 2, None)
        await until(lambda: cache.stats()["maintenance"]["moves"])
        assert cache.stats()["maintenance"]["notifications"]["MOVING"] == 1
        assert before.accepted == 2


async def test_the_address_while_another_one_is_tried(
    before: Announcer, caplog: pytest.LogCaptureFixture
) -> None:
    """Announcements and a loss are those of the server that is in use."""
    caplog.set_level(logging.INFO, "dscache")
    async with open_cache(before, maintNotifications="on") as cache:
        await cache.when_ready()
        before.push(b"MOVING", 1, 60, b"127.0.0.1:1")
        await until(lambda: "can't move to 127.0.0.1:1 yet" in caplog.text)
        before.push(b"MOVING", 1, 60, b"127.0.0.1:1")
        assert await cache.set("moving", 1, None)
        assert cache.stats()["maintenance"]["notifications"]["MOVING"] == 1
        await before.cut()
        assert await cache.set("moving", 2, None)
        assert f"connection to 127.0.0.1:{before.port} lost" in caplog.text
        assert "connection to 127.0.0.1:1 lost" not in caplog.text


async def test_more_time(before: Announcer, caplog: pytest.LogCaptureFixture) -> None:
    """During maintenance, operations have more time, and so have those under way."""
    caplog.set_level(logging.INFO, "dscache")
    async with open_cache(before, maintNotifications="on", commandTimeout=1500) as cache:
        await cache.when_ready()
        before.slow = 3.0
        before.push(b"MIGRATING", 1, 0, b"1")
        assert await cache.set("moving", 1, None)
        before.slow = 0.0
        before.push(b"MIGRATED", 2, b"1")
        await until(lambda: "is over" in caplog.text)
        before.slow = 3.0
        with pytest.raises(dscache.DeadlineExceeded):
            await cache.get("moving")


@pytest.mark.parametrize(
    "words",
    [
        (b"MOVING",),
        (b"MOVING", b"1", 10, b"127.0.0.1:1"),
        (b"MOVING", 1, -1, None),
        (b"MOVING", 1, 10**9, None),
        (b"MOVING", 1, 10, b"127.0.0.1"),
        (b"MOVING", 1, 10, b"127.0.0.1:0"),
        (b"MOVING", 1, 10, b"127.0.0.1:99999999999999999999"),
        (b"MOVING", 1, 10, b"a\nb:1"),
        (b"MOVING", 1, 10, b"\xff:1"),
        (b"MOVING", 1, 10, 7),
        (b"MIGRATING", 1),
        (b"FAILING_OVER", 1, b"10"),
        (b"MIGRATED",),
        (b"FAILED_OVER", None),
        (b"SMIGRATING",),
        (b"SMIGRATED", 1),
        (b"SMIGRATED", 1, b"1-5"),
        (b"SMIGRATED", b"1", []),
        (b"SMIGRATED", 1, [b"127.0.0.1:1"]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1:2"]]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1", b"1"]]),
        (b"SMIGRATED", 1, [[None, b"127.0.0.1:2", b"1"]]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1:2", 1]]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1:2", b""]]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1:2", b"5-1"]]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1:2", b"1-16384"]]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1:2", b"\xff"]]),
        (b"SMIGRATED", 1, [[b"127.0.0.1:1", b"127.0.0.1:2", b"0-16383,5"]]),
        (b"SMIGRATED", 1, [[b"a:1", b"b:2", b"0-16383"], [b"b:2", b"a:1", b"5"]]),
    ],
)
def test_malformed(words: tuple[Any, ...], caplog: pytest.LogCaptureFixture) -> None:
    """A malformed announcement is ignored, and the first one is logged."""
    announcements = Announcements(Options())
    for _ in range(2):
        assert announcements.read(list(words), "a:1") is None
    assert len(caplog.records) == 1


def test_well_formed() -> None:
    assert parse([b"MOVING", 1, 10, b"[::1]:6379"]) == Notice(b"MOVING", 1, 10, ("::1", 6379))
    assert parse([b"MOVING", 1, 10, None]) == Notice(b"MOVING", 1, 10)
    assert parse([b"MIGRATING", 1, 10, b"1,2"]) == Notice(b"MIGRATING", 1, 10)
    assert parse([b"FAILED_OVER", 2, b"1"]) == Notice(b"FAILED_OVER", 2)
    assert parse([b"SMIGRATING", 3, b"1,5-10"]) == Notice(b"SMIGRATING", 3)
    moves = [[b"a:1", b"[::1]:2", b"1,5-10"], [b"a:1", b"b:3", b"7-7"]]
    assert parse([b"SMIGRATED", 4, moves]).moves == (
        SlotMove(("a", 1), ("::1", 2), ((1, 1), (5, 10))),
        SlotMove(("a", 1), ("b", 3), ((7, 7),)),
    )
    assert Announcements(Options()).read([b"invalidate", None], "a:1") is None


@pytest.mark.parametrize(
    ("options", "peer", "kind"),
    [
        ({"host": "records.test"}, "10.0.0.1", "internal-fqdn"),
        ({"host": "records.test"}, "8.8.8.8", "external-fqdn"),
        ({"host": "10.0.0.1"}, "10.0.0.1", "internal-ip"),
        ({"host": "8.8.8.8"}, "8.8.8.8", "external-ip"),
        ({"host": "records.test"}, "127.0.0.1", None),
        ({"path": "/socket"}, "", None),
        ({"proxied": True}, "8.8.8.8", None),
        ({"maint_notifications": "off"}, "8.8.8.8", None),
        ({"maint_notifications": "on", "path": "/socket"}, "", "none"),
        ({"maint_notifications": "on", "host": "::1"}, "::1", "internal-ip"),
    ],
)
def test_request(options: dict[str, Any], peer: str, kind: str | None) -> None:
    given = Options(**options)
    request = Announcements(given).request(given.host, peer)
    assert (None if request is None else request[-1]) == kind


def test_refusal_is_remembered() -> None:
    announcements = Announcements(Options(host="records.test"))
    announcements.note("LOADING", "8.8.8.8")
    assert announcements.request("records.test", "8.8.8.8")
    announcements.note("ERR", "8.8.8.8")
    assert announcements.request("records.test", "8.8.8.8") is None
    # Another server, or another node of a cluster, may announce.
    assert announcements.request("records.test", "8.8.4.4")


async def test_refusal_of_what_is_required(server: Any) -> None:
    async with Announcer(server.host, server.port, REFUSAL) as announcer:
        cache = open_cache(announcer, maintNotifications="on", connectTimeout=500)
        with pytest.raises(dscache.ConnectError, match="maintNotifications"):
            async with cache:
                await cache.when_ready()
        assert announcer.requests


@pytest.mark.parametrize("core", CORES)
def test_change_of_timeout(core: Any) -> None:
    """More time moves deadlines; less time leaves an operation at least the new time."""
    pipeline = core.Pipeline(asyncio.Event, lambda: None, timeout=1.0)
    pipeline.set("a", 1, None)
    (batch,) = pipeline.queue
    deadline = batch.deadline
    change_timeout(pipeline, 10.0)
    assert batch.deadline == pytest.approx(deadline + 9)
    change_timeout(pipeline, 1.0)
    assert deadline <= batch.deadline < deadline + 9
    assert pipeline.timeout == 1.0


# -- what both caches share


def test_announcements_count_once() -> None:
    """An announcement over several connections, or by all nodes of a cluster, counts once."""
    announcements = Announcements(Options())
    assert list(announcements.stats()["notifications"]) == [kind.decode() for kind in KINDS]
    notice = Notice(b"MIGRATING", 1, 5)
    assert [announcements.is_new(notice, one) for one in ("a:1", "a:1", "b:1")] == [
        True,
        False,
        True,
    ]
    for seconds in (4, 0):
        assert not announcements.is_new(Notice(b"MIGRATING", 1, seconds), "a:1")
    moved = Notice(b"SMIGRATED", 1)
    assert [announcements.is_new(moved, one) for one in ("a:1", "b:1")] == [True, False]
    counted = announcements.stats()["notifications"]
    assert {kind: count for kind, count in counted.items() if count} == {
        "MIGRATING": 2,
        "SMIGRATED": 1,
    }


def test_announcements_without_end() -> None:
    """Of a server that announces all the time, few announcements are remembered."""
    announcements = Announcements(Options())
    for serial in range(2500):
        assert announcements.is_new(Notice(b"MIGRATING", serial), "a:1")
    assert not announcements.is_new(Notice(b"MIGRATING", 2499), "a:1")
    assert announcements.is_new(Notice(b"MIGRATING", 0), "a:1")


def test_leeway() -> None:
    """More time begins once, and ends with any end or by itself."""
    leeway = Leeway(1.0)
    assert leeway.follow(Notice(b"MIGRATED", 1), 0.0) is None
    assert leeway.follow(Notice(b"SMIGRATING", 2), 0.0) == RELAXED
    assert leeway.follow(Notice(b"FAILING_OVER", 3, 100), 0.0) is None
    assert leeway.end_if_over(100.0) is None
    assert leeway.follow(Notice(b"MOVING", 4, 1), 0.0) is None
    assert leeway.follow(Notice(b"FAILED_OVER", 5), 0.0) == 1.0
    assert leeway.begin(5.0) == RELAXED
    assert leeway.end_if_over(5.0) == 1.0
    assert leeway.end_if_over(5.0) is None
    assert Leeway(RELAXED + 1).begin(1.0) == RELAXED + 1


def test_time_of_a_slow_server() -> None:
    announcements = Announcements(Options())
    announcements.read([b"MIGRATING", 1, 5], "a:1")
    assert announcements.slow_until("a:1") > time.monotonic() + 5
    assert announcements.slow_until("b:1") < time.monotonic()
    announcements.read([b"MIGRATED", 1], "a:1")
    assert announcements.slow_until("a:1") < time.monotonic()


# -- clusters


@pytest.fixture
async def slots(server: Any) -> AsyncIterator[FakeSlots]:
    """A cluster of two nodes, and a third without slots."""
    slots = FakeSlots()
    async with (
        Announcer(server.host, server.port, slots=slots) as first,
        Announcer(server.host, server.port, slots=slots) as second,
        Announcer(server.host, server.port, slots=slots),
    ):
        slots.divide(first, second)
        yield slots


def open_cluster(slots: FakeSlots, **options: Any) -> dscache.AsyncCache:
    nodes = [{"host": "127.0.0.1", "port": slots.nodes[0].port}]
    given = {"nodes": nodes, "commandTimeout": 10_000, "maintNotifications": "on", **options}
    return dscache.AsyncCache.from_config({"name": "redis", "options": given})


def announce(
    slots: FakeSlots, serial: int, moves: list[tuple[Announcer, Announcer, bytes]]
) -> None:
    """Have all nodes announce that slots have moved."""
    told = [[source.address, target.address, ranges] for source, target, ranges in moves]
    for node in slots.nodes:
        node.push(b"SMIGRATED", serial, told)


@on_one_server
@pytest.mark.parametrize("near", [False, True])
async def test_slots_move_under_load(slots: FakeSlots, redis: Any, near: bool) -> None:
    """Slots move to and fro, and last to a new node, which ends the connection to the former."""
    first, second, third = slots.nodes
    async with open_cluster(slots, nearCache=near) as cache:
        await cache.when_ready()
        ended = asyncio.Event()
        tasks = [asyncio.create_task(load(cache, number, ended)) for number in range(100)]
        for serial in range(1, 9, 2):
            source, target = (first, second) if serial % 4 == 1 else (second, first)
            served = target.served
            for node in slots.nodes:
                node.push(b"SMIGRATING", serial, b"0-4095")
            slots.give(0, 4095, target)
            announce(slots, serial + 1, [(source, target, b"0-4095")])
            await until(lambda n=target, served=served: n.served > served + 20)
        slots.give(0, 8191, third)
        announce(slots, 10, [(first, third, b"0-8191")])
        await until(lambda: third.served > 20 and not first.connections)
        ended.set()
        versions = await asyncio.gather(*tasks)
        stats = cache.stats()
        assert stats["failed"] == 0
        assert stats["maintenance"]["notifications"]["SMIGRATING"] == 4
        assert stats["maintenance"]["notifications"]["SMIGRATED"] == 5
        assert 0 < stats["maintenance"]["moved_slots"] <= 4 * 4096 + 8192
        assert set(stats["nodes"]) == {f"127.0.0.1:{one.port}" for one in (second, third)}
        for number, version in enumerate(versions):
            assert redis.get(f"{{moving/{number}}}_v") == b"%d" % version


@on_one_server
async def test_routes_follow_without_a_redirection(slots: FakeSlots) -> None:
    """The announcement is enough: the next operation goes to the new node."""
    first, _, third = slots.nodes
    async with open_cluster(slots) as cache:
        await cache.when_ready()
        slots.give(0, 8191, third)
        announce(slots, 1, [(first, third, b"0-4095,4096,4097-8191")])
        await until(lambda: cache.stats()["maintenance"]["moved_slots"])
        assert cache.stats()["maintenance"]["moved_slots"] == 8192
        await cache.set_bulk({f"moving/{number}": (1, number) for number in range(100)})
        assert first.redirected == 0
        assert third.served
        assert cache.stats()["redirections"] == 0
        await until(lambda: not first.connections)


@on_one_server
async def test_an_old_announcement_moves_nothing(slots: FakeSlots) -> None:
    """A slot stays with its owner if the announcement names another former one."""
    first, second, third = slots.nodes
    async with open_cluster(slots) as cache:
        await cache.when_ready()
        announce(slots, 1, [(second, third, b"0-100"), (third, first, b"0-100")])
        refreshes = cache.stats()["refreshes"]
        await until(lambda: cache.stats()["refreshes"] > refreshes)
        assert cache.stats()["maintenance"]["notifications"]["SMIGRATED"] == 1
        assert cache.stats()["maintenance"]["moved_slots"] == 0
        assert first.redirected == second.redirected == 0


@on_one_server
async def test_slots_that_go_to_very_many_nodes_stay(slots: FakeSlots) -> None:
    """A faulty node can't have the cache connect to any number of nodes at once."""
    first, _, _ = slots.nodes
    async with open_cluster(slots) as cache:
        await cache.when_ready()
        moves = [
            [first.address, b"127.0.0.2:%d" % (7000 + slot), b"%d" % slot] for slot in range(300)
        ]
        first.push(b"SMIGRATED", 1, moves)
        await until(lambda: cache.stats()["maintenance"]["notifications"]["SMIGRATED"])
        assert len(cache.stats()["nodes"]) == 2
        assert cache.stats()["maintenance"]["moved_slots"] == 0


@on_one_server
async def test_more_time_on_a_cluster(slots: FakeSlots) -> None:
    first = slots.nodes[0]
    name = next(one for one in map(str, range(100)) if key_slot(one.encode()) < 8192)
    async with open_cluster(slots, commandTimeout=600) as cache:
        await cache.when_ready()
        first.slow = 1.2
        first.push(b"SMIGRATING", 1, b"0-10")
        assert await cache.set(name, 1, None)
        assert cache.stats()["maintenance"]["relaxed"] == 1
        announce(slots, 2, [])
        await until(lambda: cache.stats()["maintenance"]["notifications"]["SMIGRATED"])
        with pytest.raises(dscache.DeadlineExceeded):
            await cache.get(name)


@on_one_server
async def test_slots_move_for_another_client(slots: FakeSlots) -> None:
    """The client of redis-py goes through the same script without an error."""
    first, second, third = slots.nodes
    config = MaintNotificationsConfig(enabled=True)
    client: Any = RedisCluster(
        host="127.0.0.1", port=first.port, protocol=3, maint_notifications_config=config
    )
    names = [f"moving/{number}" for number in random.sample(range(1000), 50)]
    async with client:
        for name in names:
            await client.set(name, 1)
        for node in slots.nodes:
            node.push(b"SMIGRATING", 1, b"0-8191")
        slots.give(0, 8191, third)
        announce(slots, 2, [(first, third, b"0-8191")])
        for name in names:
            await client.set(name, 2)
            assert await client.get(name) == b"2"
        assert third.served
        assert second.requests


@on_one_server
async def test_a_node_without_announcements(server: Any) -> None:
    slots = FakeSlots()
    async with Announcer(server.host, server.port, REFUSAL, slots) as node:
        slots.divide(node)
        async with open_cluster(slots, maintNotifications="auto") as cache:
            assert await cache.set("moving", 1, None)
            assert not node.requests  # on this machine
        with pytest.raises(dscache.ConnectError, match="maintNotifications"):
            async with open_cluster(slots, connectTimeout=500) as cache:
                await cache.when_ready()
        assert node.requests
        assert len(slots.owners) == SLOTS
