"""Use a blocking near cache in gevent's greenlets: ``python -m tests.programs.near_greenlets URL``.

Prints what happened as JSON.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
import redis as redis_py  # noqa: E402

import dscache  # noqa: E402
from tests.support.near_truth import (  # noqa: E402
    Truth,
    counters,
    has_last,
    is_at_hand,
    links,
    putting,
)

GREENLETS = 20
NAMES = [f"g/{number}" for number in range(10)]
PATIENCE = 200
READER = "near-reader"


def until(condition: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        gevent.sleep(0.001)


def main(url: str) -> dict[str, Any]:
    truth = Truth(NAMES, PATIENCE)
    wrong: list[str] = []
    ticks = 0
    over = False

    def tick() -> None:
        nonlocal ticks
        while True:
            gevent.sleep(0.001)
            ticks += 1

    def read(number: int) -> int:
        floors = dict.fromkeys(NAMES, 0)
        reads = 0
        while not over:
            name = NAMES[(number + reads) % len(NAMES)]
            began = time.monotonic()
            record = cache.get(name)
            version = None if record is None else record.version
            floors[name], problem = truth.check(name, version, began, floors[name])
            if problem:
                wrong.append(problem)
            reads += 1
            gevent.sleep(0)
        return reads

    options = {"url": url, "connectionName": READER, "commandTimeout": 60_000, "maxConnections": 8}
    options["nearCache"] = {"idleLimit": 30_000, "maxAge": 3_600_000}
    redis = redis_py.Redis.from_url(url)
    put = putting(redis)
    gevent.spawn(tick)
    with dscache.Cache.from_config({"name": "redis", "options": options}) as cache:
        readers = [gevent.spawn(read, number) for number in range(GREENLETS)]
        for _ in range(20):
            truth.write(put)
            for name in NAMES:
                until(lambda name=name: has_last(cache, truth, name), "the last step")
                until(lambda name=name: is_at_hand(cache, name), "a hit")
        # Own writes, of other names.
        for version in range(20):
            cache.set("own", version, version)
            record = cache.get("own")
            if record is None or record.data != version:
                wrong.append(f"own {version}: {record!r}")
        # A greenlet that only hits gives way to none; the others go on when it has ended.
        before = counters(cache)["hits"]
        for _ in range(1000):
            cache.get(NAMES[0])
        hits = counters(cache)["hits"] - before
        # The connections are killed.
        for which in range(2):
            for client in links(redis, READER)[which]:
                redis.client_kill_filter(_id=client["id"])
            truth.write(put)
            for name in NAMES:
                until(lambda name=name: has_last(cache, truth, name), "the last step")
                until(lambda name=name: is_at_hand(cache, name), "a hit")
        over = True
        done = gevent.joinall(readers, timeout=PATIENCE)
        reads = [one.value for one in done]
        # A reader that is killed while it reads leaves all as it was.
        for number in range(20):
            reader = gevent.spawn(cache.get_bulk, [f"new/{number}/{n}" for n in range(500)])
            gevent.sleep(0.001)
            reader.kill()
        truth.write(put)
        for name in NAMES:
            until(lambda name=name: has_last(cache, truth, name), "the last step")
        # Those that look up hosts are gevent's own.
        pooled = gevent.get_hub().threadpool.size
        tasks = "/proc/self/task"
        native = len(os.listdir(tasks)) - pooled if os.path.exists(tasks) else 1
        listening, _ = links(redis, READER)
    before = ticks
    until(lambda: not any(links(redis, READER)), "the end of the connections")
    until(lambda: ticks > before, "a turn of another greenlet")
    return {
        "wrong": wrong[:5],
        "readers": len([one for one in reads if one]),
        "hits": hits,
        "listening": len(listening),
        "native_threads": native,
        "others_ran": ticks > before,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
