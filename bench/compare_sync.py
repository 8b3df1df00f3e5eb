"""The blocking Cache beside redis-py in one run: interleaved rounds, medians, and the limit.

``python bench/compare_sync.py`` prints the table, and which of the wanted ratios are reached. For a
single read the limit is ``redis-benchmark -c 1``, a C program that discards the replies. On a
cluster of three primaries both read the same records, each in a different slot.
"""

from __future__ import annotations

import contextlib
import csv
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

import dscache
from contestants import LIMIT
from dscache.embedded import EmbeddedServer
from machine import facts
from rounds import arguments
from workload import (
    CORES,
    DOCUMENT,
    NAMES,
    RECORDS,
    VERSION,
    apart,
    chosen,
    decode,
    encode,
    keys_of,
)

# The clusters of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.clusters import ClusterGroup

NAME = NAMES[1]
PAIRS = dict.fromkeys(NAMES, (VERSION, DOCUMENT))
FAST, PURE, PEER = "fast", "pure", "redis-py"


@dataclass
class Row:
    """One row, and the seconds that one call took in each round."""

    label: str
    call: Callable[[], object] | None
    """What is called; None for what another program measures."""
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def records_of(values: Sequence[Any]) -> dict[str, tuple[int, Any]]:
    """Return the decoded records of a bulk."""
    return {
        name: (int(version), decode(text))
        for name, version, text in zip(NAMES, values[::2], values[1::2], strict=True)
    }


class RedisPy:
    """redis-py's blocking client with hiredis: its fastest way for each operation."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._redis = redis.Redis(host=server.host, port=server.port, protocol=3)

    def get(self) -> object:
        version, text = self._redis.mget(NAME + "_v", NAME + "_d")
        return int(version), decode(text)

    def get_bulk(self) -> object:
        return records_of(self._redis.mget(keys_of(NAMES)))

    def set_bulk(self) -> object:
        pipeline = self._redis.pipeline(transaction=False)
        for name in NAMES:
            pipeline.mset({name + "_v": VERSION, name + "_d": encode(DOCUMENT)})
        return pipeline.execute()


class RedisPyCluster:
    """redis-py's blocking client of a cluster, on the keys that dscache uses there."""

    def __init__(self, port: int) -> None:
        self._redis: Any = redis.RedisCluster(host="127.0.0.1", port=port)
        self._keys = [f"{{{name}}}{half}" for name in NAMES for half in ("_v", "_d")]
        self._key = [f"{{{NAME}}}_v", f"{{{NAME}}}_d"]

    def get(self) -> object:
        version, text = self._redis.mget(*self._key)
        return int(version), decode(text)

    def get_bulk(self) -> object:
        return records_of(self._redis.mget_nonatomic(self._keys))


@contextlib.contextmanager
def caches_on(options: dict[str, Any]) -> Iterator[dict[str, dscache.Cache]]:
    """Open a cache with each core, whose server has the records."""
    with contextlib.ExitStack() as stack:
        caches = {}
        for core in CORES:
            with chosen(core):
                config = {"name": "redis", "options": options | {"commandTimeout": 60_000}}
                cache = stack.enter_context(dscache.Cache.from_config(config))
                cache.set_bulk(PAIRS)
            caches[core] = cache
        yield caches


def limit(server: EmbeddedServer, calls: int) -> float:
    """Return how many seconds redis-benchmark takes for one read of a record, one at a time."""
    program = shutil.which(LIMIT)
    assert program is not None
    where = ("-h", server.host, "-p", str(server.port))
    how = ("-c", "1", "-n", str(calls), "--csv")
    done = subprocess.run(
        [program, *where, *how, "MGET", *keys_of([NAME])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    *_, values = csv.reader(done.stdout.splitlines())
    return 1 / float(values[1])


def took(call: Callable[[], object], calls: int) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def main() -> None:
    options = arguments(__doc__, rounds=15, seconds=0.2).parse_args()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        placing = stack.enter_context(apart(server))
        three = stack.enter_context(ClusterGroup(server.binary, primaries=3, replicas=0))
        caches = stack.enter_context(caches_on({"url": server.url}))
        spread = stack.enter_context(caches_on(dict(three.options)))
        on_cluster = RedisPyCluster(three.nodes[0].port)
        peer = RedisPy(server)
        fast, pure = caches[FAST], caches[PURE]
        groups = {
            "get, one after the other": [
                Row("dscache, fast core", lambda: fast.get(NAME)),
                Row("dscache, pure core", lambda: pure.get(NAME)),
                Row("redis-py, hiredis: mget, decoded", peer.get),
                *([Row(f"{LIMIT} -c 1: MGET", None)] if shutil.which(LIMIT) else []),
            ],
            f"{RECORDS} names in bulk, raw": [
                Row("dscache, fast core", lambda: fast.get_bulk(NAMES)),
                Row("dscache, pure core", lambda: pure.get_bulk(NAMES)),
                Row("redis-py, hiredis: one MGET, decoded", peer.get_bulk),
            ],
            f"{RECORDS} records written in bulk": [
                Row("dscache, fast core", lambda: fast.set_bulk(PAIRS)),
                Row("dscache, pure core", lambda: pure.set_bulk(PAIRS)),
                Row("redis-py, hiredis: a pipeline of MSET", peer.set_bulk),
            ],
            "on a cluster: get, one after the other": [
                Row("dscache, fast core", lambda: spread[FAST].get(NAME)),
                Row("dscache, pure core", lambda: spread[PURE].get(NAME)),
                Row("redis-py RedisCluster: mget, decoded", on_cluster.get),
            ],
            f"on a cluster: {RECORDS} names in bulk, raw": [
                Row("dscache, fast core", lambda: spread[FAST].get_bulk(NAMES)),
                Row("dscache, pure core", lambda: spread[PURE].get_bulk(NAMES)),
                Row("redis-py RedisCluster: mget_nonatomic", on_cluster.get_bulk),
            ],
        }
        rows = [row for group in groups.values() for row in group]
        sizes = [1 if row.call is None else _size(row.call, options.seconds) for row in rows]
        for _ in range(options.rounds):
            for row, size in zip(rows, sizes, strict=True):
                if row.call is None:
                    row.seconds.append(limit(server, sizes[0]))
                else:
                    row.seconds.append(took(row.call, size))
        header = facts(server, placing, options.rounds)
    print(*header, sep="\n")
    for title, group in groups.items():
        print(f"\n{title:44}{'median, us':>12}{'best round':>12}{'ratio':>9}")
        for row in group:
            ratio = row.median / group[0].median
            print(
                f"  {row.label:42}{row.median * 1e6:12,.1f}{min(row.seconds) * 1e6:12,.1f}"
                f"{ratio:7.2f} x"
            )
    get, bulk, written, get_there, bulk_there = groups.values()
    print()
    # A round that is too short is reported as taking no time.
    if len(get) == 4 and get[3].median:
        _judge("get, fast core to the limit", get[0].median / get[3].median, at_most=1.25)
    _judge("get, redis-py to fast core", get[2].median / get[0].median, at_least=1)
    _judge("get_bulk, redis-py to fast core", bulk[2].median / bulk[0].median, at_least=6)
    _judge("set_bulk, redis-py to fast core", written[2].median / written[0].median, at_least=4)
    there = get_there[2].median / get_there[0].median
    _judge("get on a cluster, redis-py to fast core", there, at_least=1)
    there = bulk_there[2].median / bulk_there[0].median
    _judge("get_bulk on a cluster, redis-py to fast core", there, at_least=4)


def _size(call: Callable[[], object], seconds: float) -> int:
    took(call, 5)
    return max(1, round(seconds / took(call, 5)))


def _judge(text: str, ratio: float, at_least: float = 0, at_most: float = 1e9) -> None:
    wanted = f"at least {at_least:g}" if at_least else f"at most {at_most:g}"
    verdict = "reached" if at_least <= ratio <= at_most else "MISSED"
    print(f"{text}: {ratio:.2f} x, wanted {wanted}: {verdict}")


if __name__ == "__main__":
    main()
