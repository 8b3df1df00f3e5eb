"""A blocking near cache beside everything that changes records or breaks a link.

Threads read all the time. Whatever happens, no read returns what was outdated for longer than
``idleLimit``, and no thread reads back in time; afterwards records are kept again, and changes
arrive again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.conftest import BY_AGE, SERVERS, MakeServer, _server_id
from tests.soak.cluster_rows import CURIOUS, prefix_on, slot_of
from tests.support.blocking import ProxyThread, until
from tests.support.clusters import ClusterGroup
from tests.support.near_truth import (
    RIGHTS,
    NaiveCache,
    Readers,
    Truth,
    assert_serves,
    counters,
    is_at_hand,
    links,
    open_cache,
    port_of,
    putting,
    putting_on,
    version_of,
    write_without_rights,
)
from tests.support.sentinels import SentinelGroup

MODES = pytest.mark.parametrize("mode", ["default", "broadcast"])
ON_ONE_SERVER = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

NAMES = [f"f/{number}" for number in range(8)]
READER = "near-reader"
# Seconds; what ends within it isn't known sooner. A read that waits for another's may get what was
# current a twentieth of commandTimeout earlier.
IDLE_LIMIT = 1.0
SLOW = {"commandTimeout": 20_000, "connectTimeout": 20_000}
BOUND = max(IDLE_LIMIT, SLOW["commandTimeout"] / 20 / 1000)
# A server that is silent, and the limit that ends what it vouched for.
SHORT = 0.4


@pytest.fixture
def own(make_server: MakeServer) -> EmbeddedServer:
    """A server to break."""
    return make_server()


@contextmanager
def reading(
    url: str, mode: str, names: list[str] = NAMES, idle_limit: float = IDLE_LIMIT, **options: Any
) -> Iterator[tuple[Any, Truth, Readers]]:
    """Read records of a server all the time through a near cache, which is drained at the end."""
    near = {"mode": mode, "idleLimit": round(idle_limit * 1000)}
    with open_cache({"url": url, "connectionName": READER, **SLOW, **options}, near) as cache:
        truth = Truth(names, max(idle_limit, BOUND))
        with Readers(cache, truth) as readers:
            yield cache, truth, readers
    assert not any(cache.stats()[name] for name in ("pending", "in_flight", "queued"))


# -- changes of all records

REMOVALS: dict[str, Callable[[redis_py.Redis], object]] = {
    "flushall": lambda redis: redis.flushall(),
    "flushall async": lambda redis: redis.flushall(asynchronous=True),
    "flushdb": lambda redis: redis.flushdb(),
}


@MODES
@pytest.mark.parametrize("what", REMOVALS)
def test_all_records_are_removed(own: EmbeddedServer, backend: str, mode: str, what: str) -> None:
    with redis_py.Redis.from_url(own.url) as redis, reading(own.url, mode) as (cache, truth, _):
        put = putting(redis)
        for _ in range(3):
            assert_serves(cache, truth, put)
            truth.remove(lambda: REMOVALS[what](redis))
            for name in NAMES:
                until(lambda n=name: version_of(cache, n) is None, f"the end of {name}")
            for name in NAMES:
                until(lambda n=name: is_at_hand(cache, n), f"a hit of {name}, which is missing")
        assert_serves(cache, truth, put)
        assert counters(cache)["flushes"].get("flushall", 0) >= 3


@MODES
def test_records_expire(own: EmbeddedServer, backend: str, mode: str) -> None:
    """Redis tells of an expired record when it deletes it, and it looks for those by itself."""
    with redis_py.Redis.from_url(own.url) as redis:

        def put(name: str, version: int) -> None:
            data = json.dumps([name, version])
            both = redis.pipeline(transaction=True)
            both.set(f"{name}_v", version, px=100).set(f"{name}_d", data, px=100).execute()

        with open_cache(
            {"url": own.url, **SLOW}, {"mode": mode, "idleLimit": 30_000, "maxAge": 600_000}
        ) as cache:
            for round_ in range(1, 4):
                for name in NAMES:
                    put(name, round_)
                    assert version_of(cache, name) in (round_, None)
                for name in NAMES:
                    until(lambda n=name: version_of(cache, n) is None, f"the end of {name}")
            truth = Truth(NAMES, BOUND)
            assert_serves(cache, truth, putting(redis))


@MODES
def test_records_are_evicted(make_server: MakeServer, backend: str, mode: str) -> None:
    server = make_server("--maxmemory", "20mb", "--maxmemory-policy", "allkeys-random")
    with (
        redis_py.Redis.from_url(server.url) as redis,
        open_cache({"url": server.url, **SLOW}, {"mode": mode, "idleLimit": 30_000}) as cache,
    ):
        put = putting(redis)
        for round_ in range(1, 3):
            for name in NAMES:
                put(name, round_)
                until(lambda n=name: is_at_hand(cache, n), f"a hit of {name}")
            left = set(NAMES)
            number = 0
            while left:
                redis.set(f"filler {number}", "x" * 100_000)
                number += 1
                keys = [key for name in left for key in (f"{name}_v", f"{name}_d")]
                found = redis.mget(keys)
                left -= {n for i, n in enumerate(list(left)) if None in found[2 * i : 2 * i + 2]}
                assert number < 100_000
            for name in NAMES:
                until(lambda n=name: version_of(cache, n) is None, f"the end of {name}")
            assert redis.info("stats")["evicted_keys"] > 0
            for n in range(number):
                redis.delete(f"filler {n}")


# -- lost links


@MODES
@pytest.mark.parametrize("whose", ["listening", "pooled", "all"])
def test_connections_are_killed(own: EmbeddedServer, backend: str, mode: str, whose: str) -> None:
    with redis_py.Redis.from_url(own.url) as redis, reading(own.url, mode) as (cache, truth, _):
        put = putting(redis)
        assert_serves(cache, truth, put)
        for _ in range(5):
            listening, pooled = links(redis, READER)
            assert len(listening) == 1
            for client in {"listening": listening, "pooled": pooled}.get(whose, listening + pooled):
                redis.client_kill_filter(_id=client["id"])
            truth.write(put)  # which no invalidation announces
            for name in NAMES:
                until(lambda n=name: truth.is_last(n, version_of(cache, n)), f"the last of {name}")
            assert_serves(cache, truth, put, *NAMES[:2])
        assert_serves(cache, truth, put)


@ON_ONE_SERVER
@MODES
def test_a_server_that_stops_for_a_while(own: EmbeddedServer, backend: str, mode: str) -> None:
    with (
        redis_py.Redis.from_url(own.url) as redis,
        reading(own.url, mode, idle_limit=SHORT) as (cache, truth, _),
    ):
        put = putting(redis)
        assert_serves(cache, truth, put)
        assert_nothing_served_while_stopped(own, cache)
        assert_serves(cache, truth, put)


def assert_nothing_served_while_stopped(
    server: EmbeddedServer, cache: Any, seconds: float = 3 * SHORT, idle_limit: float = SHORT
) -> None:
    """Stop a server; nothing that asked for beyond the limit is served until it goes on.

    What a stopped server was asked it answers later, so that a read ends only if it was served from
    here.
    """
    served: list[float] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            began = time.monotonic()
            cache.get(NAMES[0])
            if not over.is_set():
                served.append(began)

    server.pause()
    stopped = time.monotonic()
    threads = [threading.Thread(target=read) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(seconds)
    finally:
        over.set()
        server.resume()
        for thread in threads:
            thread.join(120)
    assert served, "nothing was kept when the server stopped"
    late = [began - stopped for began in served if began - stopped > idle_limit]
    assert not late, f"{len(late)} reads were served beyond the limit, up to {max(late)} s after"


@ON_ONE_SERVER
@MODES
def test_a_server_that_starts_anew(own: EmbeddedServer, backend: str, mode: str) -> None:
    with redis_py.Redis.from_url(own.url) as redis, reading(own.url, mode) as (cache, truth, _):
        put = putting(redis)
        for _ in range(2):
            assert_serves(cache, truth, put)
            for name in NAMES:  # it has lost them
                truth.begin(name, gone=True)
            own.kill()
            own.start()
            for name in NAMES:
                truth.done(name)
            until(lambda: is_answered(cache), "a read")
        assert_serves(cache, truth, put)


def is_answered(cache: Any, name: str = NAMES[0]) -> bool:
    try:
        cache.get(name)
    except dscache.DscacheError:
        return False
    return True


@ON_ONE_SERVER
@MODES
@pytest.mark.parametrize("late", ["listening", "pooled", "both"])
def test_a_link_that_stalls(own: EmbeddedServer, backend: str, mode: str, late: str) -> None:
    """What is held back is no loss: the limit alone ends what was kept."""
    with (
        redis_py.Redis.from_url(own.url) as redis,
        ProxyThread(own.host, own.port) as proxy,
        reading(proxy.url, mode, idle_limit=SHORT) as (cache, truth, readers),
    ):
        put = putting(redis)
        for _ in range(3):
            assert_serves(cache, truth, put, *NAMES[:2])
            listening, pooled = links(redis, READER)
            chosen = {"listening": listening, "pooled": pooled}.get(late, listening + pooled)
            for client in chosen:
                proxy.do("stall_one", port_of(client), "replies")
            end = time.monotonic() + 3 * SHORT
            while time.monotonic() < end:
                truth.write(put)
                time.sleep(0.01)
            proxy.do("resume")
        assert_serves(cache, truth, put)
        assert readers.reads > 0


@MODES
def test_a_limit_of_the_output_buffer(make_server: MakeServer, backend: str, mode: str) -> None:
    """A server that can't get rid of its messages ends the link."""
    server = make_server("--client-output-buffer-limit", "normal 1mb 0 0 pubsub 1mb 0 0")
    long = [f"{'x' * 2000}/{number}" for number in range(2000)]
    with (
        redis_py.Redis.from_url(server.url) as redis,
        ProxyThread(server.host, server.port) as proxy,
        reading(proxy.url, mode, maxConnections=4) as (cache, truth, _),
    ):
        put = putting(redis)
        assert_serves(cache, truth, put)
        listening, _ = links(redis, READER)
        proxy.do("stall_one", port_of(listening[0]), "replies")
        end = time.monotonic() + 120
        while (
            links(redis, READER)[0][:1] and links(redis, READER)[0][0]["id"] == listening[0]["id"]
        ):
            assert time.monotonic() < end, "the server bears it"
            for start in range(0, len(long), 100):
                some = long[start : start + 100]
                if mode == "default":
                    cache.get_bulk(some)  # each is told of once after it was read
                redis.mset({f"{name}_v": 1 for name in some})
            truth.write(put)
        proxy.do("cut_one", port_of(listening[0]))
        proxy.do("resume")
        truth.write(put)
        assert_serves(cache, truth, put)
        assert counters(cache)["flushes"].get("connection", 0) >= 1


def test_a_small_table_of_tracked_keys(make_server: MakeServer, backend: str) -> None:
    server = make_server("--tracking-table-max-keys", "100")
    names = [f"t/{number}" for number in range(500)]
    with (
        redis_py.Redis.from_url(server.url) as redis,
        reading(server.url, "default", names) as (cache, truth, _),
    ):
        put = putting(redis)
        for _ in range(3):
            truth.write(put)
            cache.get_bulk(names)
        for name in names:
            until(lambda n=name: truth.is_last(n, version_of(cache, n)), f"the last of {name}")
        assert_serves(cache, truth, put, *names[:20])
        # The server gives up keys in steps.
        assert redis.info("stats")["tracking_total_keys"] < 2 * len(names)


# -- rights


CHANGES = [
    ("default", "SETUSER reader -@all"),
    ("broadcast", "SETUSER reader -@all"),
    ("default", "SETUSER reader resetkeys"),
    ("broadcast", "SETUSER reader off"),
    ("default", "SETUSER reader resetpass >another"),
    ("default", "DELUSER reader"),
    ("broadcast", "DELUSER reader"),
    ("broadcast", "SETUSER reader reset"),
    ("broadcast", "SETUSER reader -client|tracking"),
]


@ON_ONE_SERVER
@pytest.mark.parametrize(("mode", "change"), CHANGES)
def test_a_user_that_changes(own: EmbeddedServer, backend: str, mode: str, change: str) -> None:
    """What the server does to a user ends no promise: what is served is current."""
    with redis_py.Redis.from_url(own.url) as redis:
        redis.execute_command(*RIGHTS)
        login = {"username": "reader", "password": "secret"}
        with reading(own.url, mode, **login) as (cache, truth, readers):
            put = putting(redis)
            for _ in range(2):
                assert_serves(cache, truth, put)
                write_without_rights(redis, truth, READER, change, 1.2 * BOUND)
                until(lambda: is_answered(cache), "a read")
            assert_serves(cache, truth, put)
            assert readers.reads > 0


# -- other nodes


def test_a_primary_that_the_sentinels_replace(backend: str) -> None:
    with SentinelGroup(BY_AGE[0], replicas=1, sentinels=1) as group:
        near = {"idleLimit": round(IDLE_LIMIT * 1000)}
        with open_cache({**group.options, **SLOW}, near) as cache:
            truth = Truth(NAMES, BOUND)
            old = group.primary()
            with group.ask(old.port) as redis:
                assert_serves(cache, truth, putting(redis))
                redis.wait(1, 4000)
            with Readers(cache, truth):
                old.kill()
                group.wait_for_primary(old)
                with group.ask(group.primary().port) as redis:
                    truth.write(putting(redis))
                    for name in NAMES:
                        until(lambda n=name: truth.is_last(n, version_of(cache, n)), name)
                    assert_serves(cache, truth, putting(redis))


@pytest.fixture(scope="module")
def binary() -> ServerBinary:
    """The oldest server, which the cluster consists of."""
    return BY_AGE[0]


@contextmanager
def on_cluster(group: ClusterGroup, names: list[str]) -> Iterator[tuple[Any, Truth]]:
    near = {"idleLimit": round(IDLE_LIMIT * 1000)}
    with open_cache({**group.options, **SLOW, **CURIOUS}, near) as cache:
        truth = Truth(names, BOUND)
        with Readers(cache, truth):
            yield cache, truth


@pytest.mark.parametrize("removal", ["FLUSHALL", "FLUSHDB"])
def test_a_node_whose_records_are_removed(group: ClusterGroup, backend: str, removal: str) -> None:
    victim, other, *_ = group.primaries()
    names = [f"{prefix_on(group, victim)}/a", f"{prefix_on(group, other)}/b"]
    put = putting_on(group)
    with on_cluster(group, names) as (cache, truth):
        for _ in range(3):
            assert_serves(cache, truth, put)
            truth.remove(lambda: victim.ask(removal), names[0])
            until(lambda: version_of(cache, names[0]) is None, "the end of a record")
            assert truth.is_last(names[1], version_of(cache, names[1]))
        assert_serves(cache, truth, put)


def test_slots_that_move(group: ClusterGroup, backend: str) -> None:
    source, target = group.primaries()[:2]
    room = prefix_on(group, source)
    slot = slot_of(room)
    names = [f"{room}/there", f"{room}/missing"]
    put = putting_on(group)
    try:
        with on_cluster(group, names) as (cache, truth):
            for old, new in ((source, target), (target, source)):
                assert_serves(cache, truth, put)
                truth.remove(
                    lambda o=old: o.ask("DEL", f"{{{names[1]}}}_v", f"{{{names[1]}}}_d"), names[1]
                )
                until(lambda: version_of(cache, names[1]) is None, "the end of a record")
                group.migrate([slot], old, new)
                truth.write(put)
                for name in names:
                    until(lambda n=name: truth.is_last(n, version_of(cache, n)), name)
            assert_serves(cache, truth, put)
            assert counters(cache)["flushes"].get("slots", 0) >= 1
    finally:
        if slot in group.slots_of(target):
            group.migrate([slot], target, source)


def test_a_replaced_primary_of_a_cluster(group: ClusterGroup, backend: str) -> None:
    old = group.primaries()[0]
    names = [f"{prefix_on(group, old)}/{number}" for number in range(3)]
    put = putting_on(group)
    with on_cluster(group, names) as (cache, truth):
        assert_serves(cache, truth, put)
        group.failover(group.replica_of(old))
        truth.write(put)
        for name in names:
            until(lambda n=name: truth.is_last(n, version_of(cache, n)), name)
        assert_serves(cache, truth, put)


# -- whether these checks can fail


@ON_ONE_SERVER
def test_the_checks_notice_a_near_cache_that_hears_nothing(
    own: EmbeddedServer, backend: str
) -> None:
    """A number of reads is enough for it, however long they take; a check without reads fails."""
    with redis_py.Redis.from_url(own.url) as redis:
        put = putting(redis)
        truth = Truth(NAMES, 0.0)
        with open_cache({"url": own.url, **SLOW}, "naive") as cache:
            assert isinstance(cache, NaiveCache)
            truth.write(put)
            for name in NAMES:
                assert version_of(cache, name) == 1
            readers = Readers(cache, truth)
            with pytest.raises(AssertionError, match="step 1 was outdated for"):
                _write_beside(readers, truth, put)
            with pytest.raises(AssertionError, match="reads were served beyond the limit"):
                assert_nothing_served_while_stopped(own, cache, 0.5, 0.0)


def _write_beside(readers: Readers, truth: Truth, put: Callable[[str, int], object]) -> None:
    """Write beside readers, until they have read each name again."""
    with readers:
        truth.write(put)
        before = readers.reads
        until(lambda: readers.reads >= before + 4 * len(NAMES), "enough reads")


def test_the_checks_notice_a_read_back_in_time() -> None:
    truth = Truth(["a"], 1000.0)
    for _ in range(3):
        truth.write(lambda *_: None)
    truth.remove(lambda: None)
    now = time.monotonic()
    assert truth.check("a", 2, now, 0) == (2, "")
    assert truth.check("a", 1, now, 2) == (2, "a: step 1 was read after step 2")
    assert truth.check("a", None, now, 2) == (4, "")
    assert truth.check("a", 3, now, 4) == (4, "a: step 3 was read after step 4")
    assert truth.check("a", 4, now, 0) == (0, "a: version 4 was never written")
    assert truth.check("a", 5, now, 0) == (0, "a: version 5 was never written")
    truth.write(lambda *_: None)
    assert truth.check("a", None, now, 5)[1] == "a: a record was read at step 5, and none later"
    assert truth.check("a", 1, now + 1001, 0)[1].startswith("a: step 1 was outdated for 1001")
