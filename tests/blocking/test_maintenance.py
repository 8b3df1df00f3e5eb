"""Announcements of maintenance to a blocking cache, played by proxies in front of a real server."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_py
from redis.crc import key_slot
from redis.maint_notifications import MaintNotificationsConfig

import dscache
from dscache.blocking.pool import Pool
from dscache.net.maintenance import Notice
from tests.conftest import SERVERS, _server_id
from tests.support.announcer import REFUSAL, Announcer, FakeSlots, Stage, staged
from tests.support.blocking import PATIENCE, in_threads, run_child, until

# The proxies, and not the server, are what is tried: one kind of server is enough.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id),
]

THREADS = 16


@pytest.fixture
def stage(server: Any) -> Iterator[Stage]:
    with staged(server) as stage:
        yield stage


def open_cache(announcer: Announcer, **options: Any) -> dscache.Cache:
    where = {"host": "127.0.0.1", "port": announcer.port}
    given = {"commandTimeout": 10_000, "maintNotifications": "on", **options}
    return dscache.Cache.from_config({**where, **given})


def open_cluster(stage: Stage, **options: Any) -> dscache.Cache:
    nodes = [{"host": "127.0.0.1", "port": stage.slots.nodes[0].port}]
    given = {"nodes": nodes, "commandTimeout": 10_000, "maintNotifications": "on", **options}
    return dscache.Cache.from_config({"name": "redis", "options": given})


class Load:
    """Threads that write and read one record each, again and again; all have begun in the block."""

    def __init__(self, cache: dscache.Cache) -> None:
        self._cache = cache
        self._begun: set[int] = set()
        self._ended = threading.Event()
        self._threads = threading.Thread(target=self._run)
        self.versions: list[int] = []
        self._failure: BaseException | None = None

    def _run(self) -> None:
        try:
            self.versions = in_threads(THREADS, self._work)
        except BaseException as error:
            self._failure = error

    def _work(self, number: int) -> int:
        name, version = f"moving/{number}", 0
        while not self._ended.is_set():
            version += 1
            self._cache.set(name, version, {"thread": number, "version": version})
            record = self._cache.get(name)
            assert record is not None
            assert record.version == version
            assert record.data == {"thread": number, "version": version}
            self._begun.add(number)
        return version

    def __enter__(self) -> Load:
        self._threads.start()
        until(lambda: len(self._begun) == THREADS or self._failure is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads.join(PATIENCE)
        if self._failure is not None:
            raise self._failure


def maintenance(cache: dscache.Cache) -> Any:
    return cache.stats()["maintenance"]


# -- one server


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_move_under_load(stage: Stage, redis: Any, near: bool, named: bool) -> None:
    """Each operation ends once with its own reply, and new ones go to the new address."""
    before, behind = stage.server(), stage.server()
    with open_cache(before, nearCache=near) as cache:
        with Load(cache) as load:
            until(lambda: before.served > 20 and before.connections >= THREADS)
            accepted = before.accepted
            if named:
                for _ in range(2):
                    stage.push(b"MOVING", 1, 10, behind.address, by=before)
                until(lambda: behind.served > 20 and not before.connections)
                # One for each thread, and the link of the near cache: none was made anew.
                assert before.accepted <= THREADS + near
            else:
                stage.push(b"MOVING", 1, 1, None, by=before)
                until(lambda: before.accepted >= accepted + THREADS)
                served = before.served
                until(lambda: before.served > served + 20)
                until(lambda: before.connections <= THREADS + near)
            until(lambda: maintenance(cache)["moves"])
        assert min(load.versions) > 0
        stats = cache.stats()
        assert stats["failed"] == 0
        assert stats["last_loss"] == ""
        assert stats["maintenance"]["notifications"]["MOVING"] == 1
        assert stats["maintenance"]["moves"] == 1
        for number, version in enumerate(load.versions):
            assert redis.get(f"moving/{number}_v") == b"%d" % version
    until(lambda: not (before.connections or behind.connections))


def test_move_of_another_client(stage: Stage) -> None:
    """The client of redis-py reads the same script as the same move."""
    before, behind = stage.server(), stage.server()
    config = MaintNotificationsConfig(enabled=True)
    with redis_py.Redis(
        host="127.0.0.1", port=before.port, protocol=3, maint_notifications_config=config
    ) as client:
        client.set("moving/other", 1)
        assert before.requests
        accepted = before.accepted
        # Its pool takes the host alone from the address, and keeps the port.
        stage.push(b"MOVING", 1, 1, behind.address, by=before)
        client.set("moving/other", 2)
        client.set("moving/other", 3)
        assert client.get("moving/other") == b"3"
        assert before.accepted == accepted + 1


def test_an_idle_connection_learns_at_its_next_use(stage: Stage) -> None:
    """One thread that reads the announcement moves the pool, idle connections included."""
    before, behind = stage.server(), stage.server()
    with open_cache(before) as cache:
        together = threading.Barrier(4)

        def first(number: int) -> None:
            # All at once, so that each needs a connection of its own.
            def names() -> Iterator[str]:
                together.wait(PATIENCE)
                yield f"moving/{number}"

            cache.get_bulk(names())

        in_threads(4, first)
        until(lambda: before.connections >= 4)
        stage.push(b"MOVING", 1, 10, behind.address, by=before)
        assert cache.set("moving/0", 1, "the old server still serves")
        until(lambda: not before.connections)
        assert cache.get("moving/0") is not None
        assert behind.served
        assert cache.stats()["connections"] == 1
        assert cache.stats()["last_loss"] == ""


def test_an_idle_pool_whose_server_has_gone(stage: Stage) -> None:
    """Announcement and end are read before the next operation is sent: no write is in doubt."""
    before, behind = stage.server(), stage.server()
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 30, behind.address, by=before)
        time.sleep(0.05)  # for the announcement to leave before the end
        stage.cut(before)
        until(lambda: not before.connections)
        for version in range(1, 20):
            assert cache.set("moving", version, None)
        assert cache.stats()["failed"] == 0
        assert maintenance(cache)["notifications"]["MOVING"] == 1
        until(lambda: maintenance(cache)["moves"] == 1 and cache.set("moving", 20, None))
        until(lambda: behind.served or not cache.set("moving", 20, None))


def test_an_address_that_is_not_there_is_no_loss(stage: Stage) -> None:
    before = stage.server()
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 1, b"127.0.0.1:1", by=before)
        for version in range(1, 100):
            assert cache.set("moving", version, None)
            time.sleep(0.001)
        assert before.accepted == 1
        assert cache.stats()["reconnections"] == 0
        assert maintenance(cache)["moves"] == 0
        pool: Any = cache._topology
        until(lambda: not pool._mover._thread.is_alive())
        # The counters of the attempts are kept, and don't get lost with their connections.
        assert [held() for held in pool._uncounted.values()] == list(pool._idle)


def test_an_address_that_does_not_answer_delays_nobody(stage: Stage) -> None:
    """Operations go on over the old connections while the new address is tried."""
    before, behind = stage.server(), stage.server()
    behind.greets = False
    with open_cache(before, connectTimeout=60_000) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        cache.set("moving", 1, None)
        until(lambda: behind.accepted)
        for version in range(2, 100):
            assert cache.set("moving", version, None)
        assert before.accepted == 1
    # ``close`` has ended the attempt.
    until(lambda: not behind.connections)


def test_a_second_move_begins_before_the_first_has_ended(stage: Stage) -> None:
    """The end of one attempt hides no other one from ``close``, nor from a fork."""
    before, first, second = stage.server(), stage.server(), stage.server()
    for server in (first, second):
        stage.do(server.answers.clear)
    with open_cache(before, connectTimeout=600_000) as cache:
        pool: Any = cache._topology
        cache.when_ready()
        for serial, server in enumerate((first, second), 1):
            stage.push(b"MOVING", serial, 60, server.address, by=before)
            cache.set("moving", serial, None)
            until(lambda server=server: server.connections)
        assert len(pool._mover.opening) == 2
        stage.cut(first)
        until(lambda: len(pool._mover.opening) == 1)
    # ``close`` has ended the attempt, which would have had ten minutes.
    until(lambda: not (pool._mover.opening or pool._mover._thread.is_alive()))
    stage.do(second.answers.set)


def test_a_move_with_old_credentials_is_made_again(stage: Stage) -> None:
    """New credentials concern a connection to the new address that the pool doesn't have yet."""
    before, behind = stage.server(), stage.server()
    stage.do(behind.answers.clear)
    with open_cache(before) as cache:
        pool: Any = cache._topology
        cache.when_ready()
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        cache.set("moving", 1, None)
        until(lambda: behind.connections)
        [early] = pool._mover.opening
        pool._renew()
        stage.do(behind.answers.set)
        until(lambda: maintenance(cache)["moves"])
        assert early.gone
        assert cache.set("moving", 2, None)
        assert behind.accepted == 2
        until(lambda: behind.connections == 1)


def test_connections_beyond_the_move_fall_back(stage: Stage) -> None:
    """If the new address refuses later connections, they are made to the usual one."""
    before, behind = stage.server(), stage.server()
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        cache.set("moving", 1, None)
        until(lambda: maintenance(cache)["moves"])
        behind.greets = False
        stage.cut(behind)
        until(lambda: not behind.connections)
        assert cache.set("moving", 2, None)
        assert before.connections == 1


def test_a_failure_of_the_usual_address_keeps_the_new_one(stage: Stage) -> None:
    """An attempt to connect that began before the move says nothing about the new address."""
    before, behind = stage.server(), stage.server()
    with open_cache(before, connectTimeout=500) as cache:
        cache.when_ready()
        stage.do(before.answers.clear)
        waiting = [
            threading.Thread(target=cache.set, args=(f"moving/{number}", 1, None))
            for number in range(2)
        ]
        for thread in waiting:
            thread.start()
        until(lambda: before.connections == 2)  # one awaits its reply, the other logs in
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        until(lambda: behind.served)
        stage.do(before.answers.set)
        for thread in waiting:
            thread.join(PATIENCE)
        assert cache.stats()["failed"] == 0
        assert cache.stats()["writes"] == 2


def test_back_to_the_usual_address(stage: Stage) -> None:
    """An announcement without an address means the configured one, also soon after a move."""
    before, behind = stage.server(), stage.server()
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        until(lambda: cache.set("moving", 1, None) and maintenance(cache)["moves"] == 1)
        stage.push(b"MOVING", 2, 0, None, by=behind)
        until(lambda: cache.set("moving", 2, None) and maintenance(cache)["moves"] == 2)
        until(lambda: not behind.connections)
        assert before.connections == 1
        assert cache.stats()["last_loss"] == ""


def test_a_new_address_that_fails_for_a_moment(stage: Stage) -> None:
    """Once the old server has gone, both addresses are tried in turn."""
    before, behind = stage.server(), stage.server()
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        until(lambda: cache.set("moving", 1, None) and maintenance(cache)["moves"])
        before.greets = behind.greets = False
        stage.cut(behind)
        tried, usual = behind.accepted, before.accepted
        setting = threading.Thread(target=cache.set, args=("moving", 2, None))
        setting.start()
        until(lambda: behind.accepted > tried and before.accepted > usual)
        behind.greets = True
        setting.join(PATIENCE)
        assert cache.stats()["failed"] == 0
        assert behind.connections == 1


def test_a_new_address_that_refuses(stage: Stage) -> None:
    """Its refusal of the login isn't final: operations wait for the usual address."""
    before, behind = stage.server(), stage.server()
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        until(lambda: cache.set("moving", 1, None) and maintenance(cache)["moves"])
        behind.answer = REFUSAL
        stage.cut(behind)
        assert cache.set("moving", 2, None)
        assert before.connections == 1


@pytest.mark.parametrize("named", [True, False])
def test_moves_that_are_announced_without_end(stage: Stage, named: bool) -> None:
    """Each announcement ends the move before, so that threads don't pile up."""
    before, behind = stage.server(), stage.server()
    stage.do(behind.answers.clear)
    with open_cache(before, connectTimeout=600_000) as cache:
        cache.when_ready()
        for serial in range(40):
            address = behind.address if named else None
            stage.push(b"MOVING", serial, 600, address, by=before)
            assert cache.set("moving", serial, None)
        until(lambda: maintenance(cache)["notifications"]["MOVING"] == 40)
        until(lambda: len(movers()) < 10)
    until(lambda: not movers())
    stage.do(behind.answers.set)


def test_an_announcement_ends_no_connection_that_has_moved(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the attempts to connect, if there are several."""
    before, behind = stage.server(), stage.server()
    silent = [stage.server() for _ in range(2)]
    for one in silent:
        stage.do(one.answers.clear)
    retire = Pool._retire
    has_moved, may_end = threading.Event(), threading.Event()

    def retire_slowly(pool: Pool, concerns: Any) -> None:
        retire(pool, concerns)
        has_moved.set()
        may_end.wait(PATIENCE)

    with open_cache(before) as cache:
        cache.when_ready()
        monkeypatch.setattr(Pool, "_retire", retire_slowly)
        for serial, one in enumerate([*silent, behind]):
            stage.push(b"MOVING", serial, 60, one.address, by=before)
            until(lambda one=one: cache.head("moving") != 0 and one.accepted)
        assert has_moved.wait(PATIENCE)
        behind.slow = 0.5
        with ThreadPoolExecutor(1) as threads:
            writing = threads.submit(cache.set, "moving", 1, None)
            until(lambda: behind.served)
            pool: Any = cache._topology
            pool._mover.follow(Notice(b"MOVING", 60, 60, ("127.0.0.1", before.port)))
            assert writing.result(PATIENCE)
        may_end.set()


def movers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("dscache moves")]


def test_a_new_address_that_ends_logins(stage: Stage) -> None:
    """It says nothing about the usual address, as the end of a login by a proxy would."""
    before, behind = stage.server(), stage.server()
    behind.ends_at = b"HELLO"
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, 60, behind.address, by=before)
        until(lambda: cache.set("moving", 1, None) and behind.accepted >= 3)
        stage.cut(before)
        assert cache.set("moving", 2, None)
        assert before.accepted == 2
        assert len(before.requests) == 2


def test_a_scan_and_a_watch_follow_a_move(stage: Stage) -> None:
    """They connect to the new address too, while the usual one leads to no server."""
    before, behind = stage.server(), stage.server()
    with open_cache(before) as cache, cache.watch("followed/") as watch:
        kinds: list[str] = []
        watching = threading.Thread(target=lambda: kinds.extend(one.kind for one in watch))
        watching.start()
        stage.push(b"MOVING", 1, 600, behind.address, by=before)
        until(lambda: cache.set("followed/1", 1, None) and maintenance(cache)["moves"])
        before.greets = False
        stage.cut(before)
        assert list(cache.scan("followed/")) == ["followed/1"]
        until(lambda: "resumed" in kinds)
        kinds.clear()
        until(lambda: cache.set("followed/1", 2, None) and "changed" in kinds)
        watch.close()
        watching.join(PATIENCE)


def test_a_move_that_is_put_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later announcement of the same address has the pool try it for longer."""
    monkeypatch.setattr("dscache.net.maintenance.LEAST", 0.2)
    before, behind = stage.server(), stage.server()
    behind.greets = False
    with open_cache(before) as cache:
        cache.when_ready()
        for serial, seconds in ((1, 0), (2, 60)):
            stage.push(b"MOVING", serial, seconds, behind.address, by=before)
            cache.set("moving", serial, None)
        until(lambda: maintenance(cache)["notifications"]["MOVING"] == 2)
        time.sleep(0.5)
        behind.greets = True
        until(lambda: maintenance(cache)["moves"] == 1)


def test_more_time(stage: Stage) -> None:
    """During maintenance, operations have more time, and so have those under way."""
    before = stage.server()
    with open_cache(before, commandTimeout=600) as cache:
        cache.when_ready()
        before.slow = 1.2
        stage.push(b"MIGRATING", 1, 0, b"1", by=before)
        assert cache.set("moving", 1, None)
        assert cache.set("moving", 2, None)
        assert maintenance(cache)["relaxed"] == 1
        stage.push(b"MIGRATED", 2, b"1", by=before)
        with pytest.raises(dscache.DeadlineExceeded):
            cache.get("moving")
        before.slow = 0.0
        assert cache.get("moving") is not None


def test_more_time_for_an_operation_under_way(stage: Stage) -> None:
    before = stage.server()
    with open_cache(before, commandTimeout=1500) as cache:
        cache.when_ready()
        before.slow = 2.5
        setting = threading.Thread(target=cache.set, args=("moving", 1, None))
        setting.start()
        until(lambda: before.served)
        stage.push(b"FAILING_OVER", 1, 10, by=before)
        setting.join(PATIENCE)
        assert cache.stats()["failed"] == 0
        assert cache.stats()["writes"] == 1


def test_a_new_connection_during_maintenance(stage: Stage) -> None:
    """A connection that is made while the server is slow begins with more time."""
    before = stage.server()
    with open_cache(before, commandTimeout=600) as cache:
        cache.when_ready()
        stage.push(b"FAILING_OVER", 1, 60, by=before)
        cache.set("moving", 1, None)
        stage.cut(before)
        until(lambda: not before.connections)
        before.slow = 1.2
        assert cache.set("moving", 2, None)


def test_maintenance_without_an_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """More time ends by itself, though no announcement comes."""
    monkeypatch.setattr("dscache.net.maintenance.LASTS", 0.05)
    before = stage.server()
    with open_cache(before, commandTimeout=600) as cache:
        cache.when_ready()
        stage.push(b"MIGRATING", 1, 0, by=before)
        cache.set("moving", 1, None)
        assert maintenance(cache)["relaxed"] == 1
        time.sleep(0.1)
        before.slow = 1.2
        with pytest.raises(dscache.DeadlineExceeded):
            cache.get("moving")


def test_replies_without_a_command_end_the_socket(stage: Stage) -> None:
    """Only pushes may arrive between operations: a reply would be taken for the next one's."""
    before = stage.server()
    with open_cache(before) as cache:
        cache.set("moving", 1, "right")
        stage.do(lambda: [writer.write(b"*1\r\n$-1\r\n") for writer in before._tasks])
        time.sleep(0.05)
        record = cache.get("moving")
        assert record is not None
        assert record.data == "right"
        assert before.accepted == 2


def test_a_malformed_announcement_is_ignored(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    before = stage.server()
    with open_cache(before) as cache:
        cache.when_ready()
        stage.push(b"MOVING", 1, b"soon", by=before)
        stage.push(b"of another kind", 1, by=before)
        assert cache.set("moving", 1, None)
        assert not any(maintenance(cache)["notifications"].values())
        assert [one.levelname for one in caplog.records].count("WARNING") == 1


def test_refusal(stage: Stage) -> None:
    before = stage.server(REFUSAL)
    with (
        pytest.raises(dscache.ConnectError, match="maintNotifications"),
        open_cache(before, connectTimeout=500),
    ):
        pass
    assert before.requests
    with open_cache(before, maintNotifications="off") as cache:
        assert cache.set("moving", 1, None)
    with open_cache(before, maintNotifications="auto") as cache:
        assert cache.set("moving", 1, None)
    assert len(before.requests) == 1  # none of the others, as it is on this machine


def test_a_fork_moves_by_itself(stage: Stage, backend: str) -> None:
    """A forked child has connections of its own, and moves them, as its parent does."""
    before, behind = stage.server(), stage.server()

    def announce_to_both() -> None:
        until(lambda: before.connections == 2)
        stage.push(b"MOVING", 1, 30, behind.address, by=before)

    announcing = threading.Thread(target=announce_to_both)
    announcing.start()
    counted = run_child("moving_forks.py", str(before.port), backend=backend)
    announcing.join(PATIENCE)
    for process in ("child", "parent"):
        assert (counted[process]["moves"], counted[process]["failed"]) == (1, 0)
    assert behind.accepted == 2


# -- near caches, which are used without any command


def cached(cache: dscache.Cache, name: str) -> Any:
    """Read until the record is a hit; return its data."""

    def is_hit() -> bool:
        hits = cache.stats()["near_cache"]["hits"]
        assert cache.get(name) is not None
        return bool(cache.stats()["near_cache"]["hits"] > hits)

    until(is_hit)
    record = cache.get(name)
    assert record is not None
    return record.data


def test_a_near_cache_without_misses_moves(stage: Stage, redis: Any) -> None:
    """The link reads announcements, so that a cache with hits alone follows the server."""
    before, behind = stage.server(), stage.server()
    with open_cache(before, nearCache=True) as cache:
        cache.set("moving", 1, "old")
        assert cached(cache, "moving") == "old"
        stage.push(b"MOVING", 1, 30, behind.address, by=before)
        until(lambda: maintenance(cache)["moves"] and not before.connections)
        assert cached(cache, "moving") == "old"
        redis.mset({"moving_v": 2, "moving_d": '"new"'})
        until(lambda: cached(cache, "moving") == "new")


def test_a_slow_server_is_not_lost_to_the_near_cache(stage: Stage) -> None:
    before = stage.server()
    with open_cache(before, nearCache=True) as cache:
        cache.when_ready()
        stage.push(b"FAILING_OVER", 1, 30, by=before)
        until(lambda: maintenance(cache)["relaxed"])
        assert cache.set("moving", 1, None)
        assert maintenance(cache)["notifications"]["FAILING_OVER"] == 1


# -- clusters


@pytest.fixture
def cluster(stage: Stage) -> Stage:
    """A cluster of two nodes, and a third without slots."""
    first, second, _ = stage.node(), stage.node(), stage.node()
    stage.slots.divide(first, second)
    return stage


def announce(stage: Stage, serial: int, moves: list[tuple[Announcer, Announcer, bytes]]) -> None:
    """Have all nodes announce that slots have moved."""
    told = [[source.address, target.address, ranges] for source, target, ranges in moves]
    for node in stage.slots.nodes:
        stage.push(b"SMIGRATED", serial, told, by=node)


def give(stage: Stage, first: int, last: int, target: Announcer) -> None:
    stage.do(lambda: stage.slots.give(first, last, target))


@pytest.mark.parametrize("near", [False, True])
def test_slots_move_under_load(cluster: Stage, redis: Any, near: bool) -> None:
    """Slots move to and fro, and last to a new node, which ends the connections to the former."""
    first, second, third = cluster.slots.nodes
    with open_cluster(cluster, nearCache=near) as cache:
        with Load(cache) as load:
            until(lambda: first.served > 20 and second.served > 20)
            for serial in range(1, 9, 2):
                source, target = (first, second) if serial % 4 == 1 else (second, first)
                served = target.served
                for node in cluster.slots.nodes:
                    cluster.push(b"SMIGRATING", serial, b"0-4095", by=node)
                give(cluster, 0, 4095, target)
                announce(cluster, serial + 1, [(source, target, b"0-4095")])
                until(lambda n=target, served=served: n.served > served + 20)
                counted = serial // 2 + 1
                until(lambda n=counted: maintenance(cache)["notifications"]["SMIGRATED"] == n)
            give(cluster, 0, 8191, third)
            announce(cluster, 10, [(first, third, b"0-8191")])
            until(lambda: third.served > 20 and not first.connections)
        stats = cache.stats()
        assert min(load.versions) > 0
        assert stats["failed"] == 0
        assert stats["maintenance"]["notifications"]["SMIGRATING"] == 4
        assert stats["maintenance"]["notifications"]["SMIGRATED"] == 5
        assert set(stats["nodes"]) == {f"127.0.0.1:{one.port}" for one in (second, third)}
        for number, version in enumerate(load.versions):
            assert redis.get(f"{{moving/{number}}}_v") == b"%d" % version


def test_routes_follow_without_a_redirection(cluster: Stage) -> None:
    """The operation after the one that has read the announcement goes to the new node."""
    first, second, third = cluster.slots.nodes
    names = [f"moving/{number}" for number in range(100)]
    with open_cluster(cluster) as cache:
        cache.when_ready()
        give(cluster, 0, 8191, third)
        announce(cluster, 1, [(first, third, b"0-8191")])
        of_second = next(one for one in names if key_slot(one.encode()) > 8191)
        until(lambda: cache.set(of_second, 1, None) and maintenance(cache)["moved_slots"])
        assert maintenance(cache)["moved_slots"] == 8192
        cache.set_bulk({name: (1, name) for name in names})
        assert first.redirected == second.redirected == 0
        assert third.served
        assert cache.stats()["redirections"] == 0
        until(lambda: cache.set(of_second, 1, None) and not first.connections)


def test_a_near_cache_drops_slots_that_have_moved(cluster: Stage) -> None:
    """Without a read of Redis, records of slots that have another owner are no hits any more."""
    first, _, third = cluster.slots.nodes
    name = next(one for one in map(str, range(100)) if key_slot(one.encode()) < 8192)
    with open_cluster(cluster, nearCache=True) as cache:
        cache.set(name, 1, "old")
        assert cached(cache, name) == "old"
        give(cluster, 0, 8191, third)
        announce(cluster, 1, [(first, third, b"0-8191")])
        until(lambda: maintenance(cache)["moved_slots"] == 8192)
        until(lambda: cache.get(name) and third.served)
        assert cached(cache, name) == "old"
        until(lambda: not first.connections)


def test_nodes_that_have_ended_the_login_are_connected_to_again(
    cluster: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a refused bulk, whose parts go to several nodes."""
    reply = FakeSlots.reply
    ended: dict[Announcer, int] = {}

    def reply_or_refuse(slots: FakeSlots, node: Announcer, command: list[bytes]) -> bytes | None:
        if command[0] in (b"MGET", b"MSET") and node.accepted <= ended.get(node, 0):
            return b"-NOAUTH Authentication required.\r\n"
        return reply(slots, node, command)

    monkeypatch.setattr(FakeSlots, "reply", reply_or_refuse)
    names = [f"moving/{number}" for number in range(20)]
    with open_cluster(cluster, maxConnections=1) as cache:
        assert cache.set_bulk(dict.fromkeys(names, (1, [1]))) == set()
        ended.update({node: node.accepted for node in cluster.slots.nodes})
        with pytest.raises(dscache.ReplyError, match="NOAUTH"):
            cache.get_bulk(names)
        for name in names:
            assert cache.get(name) is not None


def test_more_time_on_a_cluster(cluster: Stage) -> None:
    first = cluster.slots.nodes[0]
    name = next(one for one in map(str, range(100)) if key_slot(one.encode()) < 8192)
    with open_cluster(cluster, commandTimeout=600) as cache:
        cache.when_ready()
        first.slow = 1.2
        cluster.push(b"SMIGRATING", 1, b"0-10", by=first)
        assert cache.set(name, 1, None)
        assert maintenance(cache)["relaxed"] == 1
        announce(cluster, 2, [])
        with pytest.raises(dscache.DeadlineExceeded):
            cache.get(name)


def test_slots_move_for_another_client(cluster: Stage) -> None:
    """The client of redis-py goes through the same script without an error."""
    first, second, third = cluster.slots.nodes
    config = MaintNotificationsConfig(enabled=True)
    names = [f"moving/{number}" for number in random.sample(range(1000), 50)]
    with redis_py.RedisCluster(
        host="127.0.0.1", port=first.port, protocol=3, maint_notifications_config=config
    ) as client:
        for name in names:
            client.set(name, 1)
        for node in cluster.slots.nodes:
            cluster.push(b"SMIGRATING", 1, b"0-8191", by=node)
        give(cluster, 0, 8191, third)
        announce(cluster, 2, [(first, third, b"0-8191")])
        for name in names:
            client.set(name, 2)
            assert client.get(name) == b"2"
        assert third.served
        assert second.requests
