"""The near cache of a blocking Cache on real clusters and behind real Sentinels."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

import dscache
from dscache.embedded import ServerBinary
from tests.blocking.test_near import (
    NEAR,
    Provider,
    counters,
    is_answered,
    is_at_hand,
    put,
    version_of,
)
from tests.conftest import BY_AGE, PATIENT
from tests.soak.cluster_rows import CURIOUS, prefix_on, slot_of
from tests.support.blocking import strike, until
from tests.support.clusters import ClusterGroup
from tests.support.sentinels import SentinelGroup


@pytest.fixture(scope="module")
def binary() -> ServerBinary:
    """The oldest server, which the cluster consists of."""
    return BY_AGE[0]


@contextlib.contextmanager
def on_cluster(group: ClusterGroup, **options: Any) -> Iterator[dscache.Cache]:
    options = {**group.options, "nearCache": NEAR, **PATIENT, **CURIOUS, **options}
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        yield cache


def put_on(group: ClusterGroup, name: str, version: int) -> None:
    """Let another client write a record on its owner."""
    owner = group.primary_of(slot_of(name))
    owner.ask("MSET", f"{{{name}}}_v", version, f"{{{name}}}_d", "1")


def at_hand_twice(cache: dscache.Cache, name: str) -> bool:
    return is_at_hand(cache, name) and is_at_hand(cache, name)


def test_records_of_a_cluster_are_kept(group: ClusterGroup, backend: str) -> None:
    names = [f"n/{number}" for number in range(60)]
    with on_cluster(group) as cache:
        cache.set_bulk({name: (1, name) for name in names})
        assert len(cache.get_bulk([*names, "missing"])) == 60
        for name in (*names, "missing"):
            until(lambda n=name: is_at_hand(cache, n))
        for name in names[::7]:
            put_on(group, name, 2)
            until(lambda n=name: version_of(cache, n) == 2)
        [primary, *_] = group.primaries()
        primary.ask("FLUSHALL")
        gone = [name for name in names if group.primary_of(slot_of(name)) is primary]
        for name in gone:
            until(lambda n=name: cache.get(n) is None)
        assert counters(cache)["flushes"]["flushall"] >= 1


def test_new_credentials_are_those_of_all_links(group: ClusterGroup, backend: str) -> None:
    users = ("first", "second")
    for node in group.nodes:
        for user in users:
            words = (user, "reset", "on", f">secret-{user}", "~*", "&*", "+@all")
            node.ask("ACL", "SETUSER", *words)
    provider = Provider()
    options = {**group.options, "nearCache": NEAR, **PATIENT, **CURIOUS, "connectionName": "user"}
    config = {"name": "redis", "options": options}
    names = [f"c/{number}" for number in range(30)]
    try:
        with dscache.Cache.from_config(config, credentials=provider) as cache:
            for turn, user in enumerate((*users, users[0]), start=1):
                provider.login = (user, f"secret-{user}")
                if turn > 1:
                    provider.tell(object())
                    assert not any(is_at_hand(cache, name) for name in names)
                for name in names:
                    put_on(group, name, turn)
                    until(lambda n=name, t=turn: version_of(cache, n) == t)
                    until(lambda n=name: is_at_hand(cache, n))
                until(lambda user=user: users_of_links(group) == {user})
    finally:
        for node in group.nodes:
            node.ask("ACL", "DELUSER", *users)


def users_of_links(group: ClusterGroup) -> set[str]:
    """Return the users of the connections that hear of changes at the primaries."""
    found = set()
    for node in group.primaries():
        lines = node.ask("CLIENT", "LIST").splitlines()
        clients = [dict(word.split("=", 1) for word in line.split()) for line in lines]
        listening = [
            one["user"] for one in clients if one["name"] == "user" and "B" in one["flags"]
        ]
        assert len(listening) <= 2  # the next one, and one that is about to end
        found.update(listening or ["none"])
    return found


def test_a_slot_that_moves(group: ClusterGroup, backend: str) -> None:
    source, target = group.primaries()[:2]
    room = prefix_on(group, source)
    slot = slot_of(room)
    there, missing = f"{room}/there", f"{room}/missing"
    try:
        with on_cluster(group) as cache:
            cache.set(there, 1, 1)
            for name in (there, missing):
                until(lambda n=name: is_at_hand(cache, n))
            group.migrate([slot], source, target)
            put_on(group, there, 2)
            put_on(group, missing, 3)
            until(lambda: version_of(cache, there) == 2)
            # A miss is believed until the move is known.
            until(lambda: version_of(cache, missing) == 3)
            for name, version in ((there, 4), (missing, 5)):
                until(lambda n=name: is_at_hand(cache, n))
                put_on(group, name, version)
                until(lambda n=name, v=version: version_of(cache, n) == v)
            assert counters(cache)["flushes"]["slots"] >= 1
    finally:
        if slot in group.slots_of(target):
            group.migrate([slot], target, source)


def test_a_primary_that_leaves_and_returns_at_once(group: ClusterGroup, backend: str) -> None:
    """Its link ends after the slots were read again, in which it has its slots as before."""
    name = "n/1"
    with on_cluster(group) as cache:
        cache.set(name, 1, 1)
        until(lambda: is_at_hand(cache, name))
        pool: Any = cache._topology
        front: Any = cache._near
        primaries, left = pool.primaries, pool.owner(slot_of(name))
        node = front._nodes[left]
        others = {shown: options for shown, options in primaries().items() if shown != left}
        # No refresh makes up for what the end of the link has left undone.
        pool.state.start_refresh = lambda now: 0.0
        pool.primaries = lambda: others
        front._wanted.set()
        until(lambda: left not in front._by_address and not node.is_live)
        pool.primaries = primaries
        front._wanted.set()
        until(lambda: is_at_hand(cache, name))
        put_on(group, name, 2)
        until(lambda: version_of(cache, name) == 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_thread_keeps_the_links_after_one_that_is_struck(
    group: ClusterGroup, backend: str
) -> None:
    """Under gevent, a KeyboardInterrupt may strike any greenlet."""
    name = "n/1"
    with on_cluster(group) as cache:
        cache.set(name, 1, 1)
        until(lambda: is_at_hand(cache, name))
        pool: Any = cache._topology
        front: Any = cache._near
        keeper, left = front._keeper, pool.owner(slot_of(name))
        strike(keeper, KeyboardInterrupt)
        front._wanted.set()
        until(lambda: not keeper.is_alive())
        link = front._by_address[left]
        link.stop()
        link.join()
        del front._by_address[left]  # the next thread begins another link
        until(lambda: is_at_hand(cache, name))


def test_a_new_primary_that_two_threads_find_at_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that keeps the links begins one, and another thread routes the slots."""
    options = {"nodes": [{"host": "127.0.0.1", "port": 1}], "nearCache": NEAR}
    with contextlib.closing(dscache.Cache(options)) as cache:
        cache._open()
        front: Any = cache._near
        make = front.core.node
        both = threading.Barrier(2)

        def make_slowly() -> Any:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # the other thread may have to wait for this one
            return make()

        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
            patch.setattr(front, "core", SimpleNamespace(node=make_slowly))
            one, other = threads.map(front._node_at, ["10.0.0.1:6379"] * 2)
        assert one is other


@pytest.mark.parametrize("scale_reads", ["master", "all"])
def test_a_replaced_primary(group: ClusterGroup, backend: str, scale_reads: str) -> None:
    old = group.primaries()[0]
    heir = group.replica_of(old)
    # The slot decides which of primary and replica is read.
    odd = [slot for slot in group.slots_of(old) if slot % 2]
    names = (name for name in (f"n/{number}" for number in range(10**6)) if slot_of(name) in odd)
    there, missing = next(names), next(names)
    with on_cluster(group, scaleReads=scale_reads) as cache:
        cache.set(there, 1, 1)
        until(lambda: reads_from(cache, 6 if scale_reads == "all" else 3))
        until(lambda: at_hand_twice(cache, there))
        until(lambda: at_hand_twice(cache, missing))
        group.failover(heir)
        for version in (2, 3):
            put_on(group, there, version)
            put_on(group, missing, version)
            until(lambda v=version: version_of(cache, there) == v)
            until(lambda v=version: version_of(cache, missing) == v)
            until(lambda: at_hand_twice(cache, there))
            until(lambda: at_hand_twice(cache, missing))


def test_a_lost_shard(group: ClusterGroup, backend: str) -> None:
    """The other shards' records are current; its own are served stale, or by the heir."""
    victim, other, *_ = group.primaries()
    lost, well = f"{prefix_on(group, victim)}/a", f"{prefix_on(group, other)}/a"
    near = {**NEAR, "serveStale": True}
    with on_cluster(group, nearCache=near) as cache:
        cache.set_bulk({lost: (1, 1), well: (1, 1)})
        until(lambda: at_hand_twice(cache, well))
        until(lambda: at_hand_twice(cache, lost))
        group.kill(victim)
        until(lambda: "connection" in counters(cache)["flushes"])
        assert is_at_hand(cache, well)
        record = cache.get(well)
        assert record is not None
        assert not record.stale
        until(lambda: is_answered(cache, lost))
        group.start(victim)


def test_answers_of_replicas_are_not_kept(group: ClusterGroup, backend: str) -> None:
    names = [f"n/{number}" for number in range(60)]
    with on_cluster(group, scaleReads="all") as cache:
        cache.set_bulk({name: (1, name) for name in names})
        # Replicas receive it later, and are read from when they are ready.
        until(lambda: reads_from(cache, 6))
        until(lambda: len(cache.get_bulk(names)) == len(names))
        kept = [name for name in names if is_at_hand(cache, name)]
        # As many readers as there are primaries and replicas; the slot decides which one.
        of_primaries = [name for name in names if slot_of(name) % 2]
        assert set(kept) <= set(of_primaries)
        until(lambda: all(is_at_hand(cache, name) for name in of_primaries))
        for name in names:
            put_on(group, name, 2)
        for name in names:
            until(lambda n=name: version_of(cache, n) == 2)


def test_scaling_reads_to_replicas_alone_excludes_it(group: ClusterGroup, backend: str) -> None:
    options = {"scaleReads": "slave", "nearCache": {"required": False}}
    with on_cluster(group, **options) as cache:
        cache.set("a", 1, 1)
        until(lambda: version_of(cache) == 1)
        assert "near_cache" not in cache.stats()
    with pytest.raises(dscache.ConfigError, match="scaleReads: slave"):
        dscache.Cache.from_config(
            {
                "name": "redis",
                "options": {**group.options, "scaleReads": "slave", "nearCache": True},
            }
        )


def test_a_user_who_may_not_track(group: ClusterGroup, backend: str) -> None:
    """Known once the cache is ready, and not after some reads."""
    for node in group.nodes:
        node.ask("ACL", "SETUSER", "near", "on", ">secret", "~*", "+@all", "-client")
    login = {"username": "near", "password": "secret"}
    try:
        options = {**group.options, "redisOptions": login, "nearCache": True, **PATIENT}
        cache = dscache.Cache.from_config({"name": "redis", "options": options})
        with pytest.raises(dscache.ConnectError, match=r"NOPERM.*CLIENT TRACKING ON"):
            cache.when_ready()
        cache.close()
        with on_cluster(group, redisOptions=login, nearCache={"required": False}) as without:
            assert without.set("a", 1, 1) is True
            assert version_of(without) == 1
    finally:
        for node in group.nodes:
            node.ask("ACL", "DELUSER", "near")


def reads_from(cache: dscache.Cache, count: int) -> bool:
    """Whether that many nodes have been read from by now."""
    cache.get_bulk([f"unknown/{random.randrange(10**6)}" for _ in range(50)])
    return len([one for one in cache.stats()["nodes"].values() if one["reads"]]) == count


@pytest.mark.parametrize("is_partitioned", [False, True])
def test_a_primary_that_the_sentinels_replace(backend: str, is_partitioned: bool) -> None:
    with SentinelGroup(BY_AGE[0], replicas=1, sentinels=1) as sentinels:
        options = {**sentinels.options, "nearCache": NEAR, **PATIENT}
        with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
            cache.set("a", 1, 1)
            until(lambda: at_hand_twice(cache, "a"))
            if is_partitioned:
                old = sentinels.fail_over()
            else:
                old = sentinels.primary()
                old.kill()
            sentinels.wait_for_primary(old)
            with sentinels.ask(sentinels.primary().port) as client:
                for version in (2, 3):
                    put(client, "a", version)
                    until(lambda v=version: version_of(cache) == v)
                    until(lambda: at_hand_twice(cache, "a"))
