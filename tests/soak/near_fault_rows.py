"""The soak row of everything that changes records behind a blocking near cache or breaks its links.

In each scene threads read all the time. No read may return what was outdated for longer than
``idleLimit`` or go back in time. Behind each fault changes must arrive, and be kept, as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.soak.cluster_rows import CURIOUS, KINDS, prefix_on, slot_of
from tests.soak.figures import Figures
from tests.support.blocking import ProxyThread, until
from tests.support.clusters import ClusterGroup
from tests.support.near_truth import (
    RIGHTS,
    RIGHTS_LOST,
    Readers,
    Truth,
    assert_serves,
    counters,
    has_last,
    links,
    open_cache,
    port_of,
    putting,
    putting_on,
    version_of,
    write_without_rights,
)
from tests.support.sentinels import SentinelGroup

_READER = "near-reader"
_NAMES = [f"f/{number}" for number in range(8)]
# Seconds.
_IDLE_LIMIT = 0.5
# Longer than a read may take on a busy machine, shorter than the time for which a server stops.
_TIMEOUTS = {"commandTimeout": 2000, "connectTimeout": 2000}


async def faults(
    figures: Figures,
    binary: ServerBinary,
    *,
    seconds: float = 10.0,
    rounds: int = 20,
    scenes: Sequence[str] = (),
    near: str = "",
) -> None:
    """Play each scene; ``seconds`` is for how long a server stops."""
    for scene in scenes or SCENES:
        try:
            await asyncio.to_thread(SCENES[scene], figures, binary, seconds, rounds, near)
        except (AssertionError, TimeoutError, dscache.DscacheError, redis_py.RedisError) as error:
            figures.problems.append(f"{scene}: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _reading(
    figures: Figures,
    scene: str,
    options: dict[str, Any],
    near: str,
    names: Sequence[str] = _NAMES,
) -> Iterator[tuple[Any, Truth]]:
    """Read records all the time through a near cache, which is drained at the end."""
    settings: Any = near or {"idleLimit": round(_IDLE_LIMIT * 1000)}
    with open_cache({"connectionName": _READER, **_TIMEOUTS, **options}, settings) as cache:
        truth = Truth(names, _IDLE_LIMIT)
        readers = Readers(cache, truth)
        with readers:
            yield cache, truth
        near_counts = counters(cache)
        figures.operations += readers.reads
        figures.outcomes.update({"ok": readers.reads, **readers.errors})
        figures.notes.append(
            f"{scene}: {readers.reads} reads, {near_counts['hits']} hits, "
            f"flushes {near_counts['flushes']}"
        )
    figures.drained(cache)


# -- one server


def _stopped(
    figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str
) -> None:
    """Stop the server: nothing is served beyond the limit; then all of it is again."""
    with EmbeddedServer(binary) as server, redis_py.Redis.from_url(server.url) as redis:
        put = putting(redis)
        with _reading(figures, "stopped", {"url": server.url}, near) as (cache, truth):
            for _ in range(max(1, rounds // 10)):
                assert_serves(cache, truth, put)
                served = _served_while_stopped(server, cache, seconds)
                assert served, "nothing was kept when the server stopped"
                late = [one for one in served if one > _IDLE_LIMIT]
                assert not late, f"{len(late)} reads were served, up to {max(late):.3f} s after"
                assert_serves(cache, truth, put)


def _served_while_stopped(server: EmbeddedServer, cache: Any, seconds: float) -> list[float]:
    """Stop a server; return when the reads began that ended meanwhile, in seconds after that."""
    served: list[float] = []
    over = threading.Event()

    def read(name: str) -> None:
        while not over.is_set():
            began = time.monotonic()
            with contextlib.suppress(dscache.DscacheError):
                cache.get(name)
                if not over.is_set():
                    served.append(began - stopped)

    threads = [threading.Thread(target=read, args=(name,)) for name in _NAMES[:2]]
    server.pause()
    stopped = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        time.sleep(seconds)
    finally:
        over.set()
        server.resume()
        for thread in threads:
            thread.join(120)
    return served


def _removed(
    figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str
) -> None:
    """Remove all records in each way."""
    with EmbeddedServer(binary) as server, redis_py.Redis.from_url(server.url) as redis:
        put = putting(redis)
        with _reading(figures, "removed", {"url": server.url}, near) as (cache, truth):
            for _ in range(rounds):
                for words in ("FLUSHALL", "FLUSHALL ASYNC", "FLUSHDB", "FLUSHDB ASYNC"):
                    assert_serves(cache, truth, put)
                    truth.remove(lambda w=words: redis.execute_command(*w.split()))
                    _wait_for_last(cache, truth)
            assert_serves(cache, truth, put)


def _killed(figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str) -> None:
    """Kill connections of each kind, while records change."""
    with EmbeddedServer(binary) as server, redis_py.Redis.from_url(server.url) as redis:
        put = putting(redis)
        with _reading(figures, "killed", {"url": server.url}, near) as (cache, truth):
            for number in range(3 * rounds):
                listening, pooled = links(redis, _READER)
                for client in (listening, pooled, listening + pooled)[number % 3]:
                    redis.client_kill_filter(_id=client["id"])
                truth.write(put)
                _wait_for_last(cache, truth)
                assert_serves(cache, truth, put, *_NAMES[:2])


def _overrun(
    figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str
) -> None:
    """Hold the reports back until the server ends the link for what it has to keep."""
    limits = ("--client-output-buffer-limit", "normal 1mb 0 0 pubsub 1mb 0 0")
    long = {f"{'x' * 2000}/{number}_v": 1 for number in range(500)}
    with (
        EmbeddedServer(binary, args=limits) as server,
        redis_py.Redis.from_url(server.url) as redis,
        ProxyThread(server.host, server.port) as proxy,
    ):
        put = putting(redis)
        with _reading(figures, "overrun", {"url": proxy.url}, near) as (cache, truth):
            for _ in range(max(1, rounds // 4)):
                assert_serves(cache, truth, put)
                (link,), _ = links(redis, _READER)
                proxy.do("stall_one", port_of(link), "replies")

                def is_over(link: dict[str, str] = link) -> bool:
                    redis.mset(long)
                    truth.write(put)
                    return link["id"] not in {one["id"] for one in links(redis, _READER)[0]}

                until(is_over, "the end of the link")
                proxy.do("cut_one", port_of(link))
                proxy.do("resume")
                _wait_for_last(cache, truth)
            assert_serves(cache, truth, put)


def _rights(figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str) -> None:
    """Take rights from the user, and give them back."""
    with EmbeddedServer(binary) as server, redis_py.Redis.from_url(server.url) as redis:
        redis.execute_command(*RIGHTS)
        put = putting(redis)
        login = {"url": server.url, "username": "reader", "password": "secret"}
        with _reading(figures, "rights", login, near) as (cache, truth):
            for _ in range(max(1, rounds // 5)):
                for change in RIGHTS_LOST:
                    assert_serves(cache, truth, put)
                    write_without_rights(redis, truth, _READER, change, 1.5 * _IDLE_LIMIT)
                    _wait_for_last(cache, truth)
            assert_serves(cache, truth, put)


def _small_table(
    figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str
) -> None:
    """Read more records than the server's table of tracked keys has room for."""
    names = [f"t/{number}" for number in range(500)]
    with (
        EmbeddedServer(binary, args=("--tracking-table-max-keys", "100")) as server,
        redis_py.Redis.from_url(server.url) as redis,
    ):
        put = putting(redis)
        with _reading(figures, "small table", {"url": server.url}, near, names) as (cache, truth):
            for _ in range(rounds):
                truth.write(put)
                cache.get_bulk(names)
                _wait_for_last(cache, truth)
            assert_serves(cache, truth, put, *names[:20])


def _evicted(
    figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str
) -> None:
    """Let the server evict records: each end arrives, as Redis reports it."""
    memory = ("--maxmemory", "20mb", "--maxmemory-policy", "allkeys-random")
    settings: Any = near or {"idleLimit": 600_000, "maxAge": 3_600_000}
    with (
        EmbeddedServer(binary, args=memory) as server,
        redis_py.Redis.from_url(server.url) as redis,
        open_cache({"url": server.url, **_TIMEOUTS}, settings) as cache,
    ):
        put = putting(redis)
        for number in range(1, max(1, rounds // 4) + 1):
            for name in _NAMES:
                put(name, number)
                until(lambda n=name, v=number: version_of(cache, n) == v, f"version of {name}")
            left = set(_NAMES)
            filler = 0
            while left:
                redis.set(f"filler {filler}", "x" * 100_000)
                filler += 1
                ordered = sorted(left)
                found = redis.mget([f"{name}_{part}" for name in ordered for part in "vd"])
                left -= {n for i, n in enumerate(ordered) if None in found[2 * i : 2 * i + 2]}
            for name in _NAMES:
                until(lambda n=name: version_of(cache, n) is None, f"the end of {name}")
            redis.delete(*(f"filler {one}" for one in range(filler)))
            figures.operations += filler
        figures.notes.append(f"evicted: {redis.info('stats')['evicted_keys']} keys")


# -- several servers


def _failover(
    figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str
) -> None:
    """Kill the primary behind Sentinels."""
    for _ in range(max(1, rounds // 7)):
        with SentinelGroup(binary, replicas=1, sentinels=1) as group:
            old = group.primary()
            with _reading(figures, "failover", group.options, near) as (cache, truth):
                with group.ask(old.port) as redis:
                    assert_serves(cache, truth, putting(redis))
                    redis.wait(1, 4000)
                old.kill()
                group.wait_for_primary(old)
                with group.ask(group.primary().port) as redis:
                    truth.write(putting(redis))
                    _wait_for_last(cache, truth)
                    assert_serves(cache, truth, putting(redis))


def _slots(figures: Figures, binary: ServerBinary, seconds: float, rounds: int, near: str) -> None:
    """Move a slot to and fro, and replace a primary in each way."""
    with ClusterGroup(binary) as group:
        source, target = group.primaries()[:2]
        room = prefix_on(group, source)
        names = [f"{room}/{number}" for number in range(8)]
        others = [f"{room}/another {number}" for number in range(8)]
        put = putting_on(group)
        options = {**group.options, **CURIOUS}
        with _reading(figures, "slots", options, near, names) as (cache, truth):
            for _ in range(rounds):
                for old, new in ((source, target), (target, source)):
                    assert_serves(cache, truth, put, *names[:2])
                    group.migrate([slot_of(room)], old, new)
                    truth.write(put)
                    _wait_for_last(cache, truth)
            assert_serves(cache, truth, put)
        with _reading(figures, "replaced primaries", options, near, others) as (cache, truth):
            for kind in KINDS * max(1, rounds // 10):
                # The next vote of a cluster is a few seconds later.
                assert_serves(cache, truth, put)
                primary = group.primary_of(slot_of(room))
                primary.ask("WAIT", 1, 4000)
                group.failover(group.replica_of(primary), kind)
                truth.write(put)
                _wait_for_last(cache, truth)
            assert_serves(cache, truth, put)


def _wait_for_last(cache: Any, truth: Truth) -> None:
    """Wait until a read of each record gives its last step; a read that fails doesn't."""

    for name in truth.names:
        until(lambda n=name: has_last(cache, truth, n), f"the last step of {name}")


SCENES: dict[str, Callable[[Figures, ServerBinary, float, int, str], None]] = {
    "stopped": _stopped,
    "removed": _removed,
    "killed": _killed,
    "overrun": _overrun,
    "rights": _rights,
    "small table": _small_table,
    "evicted": _evicted,
    "failover": _failover,
    "slots": _slots,
}
