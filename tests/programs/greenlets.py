"""Use a blocking cache in gevent's greenlets.

``python -m tests.programs.greenlets URL OTHER_URL KILLS`` is how it is run.

OTHER_URL is a server that accepts and never answers. In place of each may stand options, as JSON.
Prints what happened as JSON.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

import dscache  # noqa: E402
from tests.support.blocking import options_of  # noqa: E402

GREENLETS = 50
ROUNDS = 40
# Seconds for a step, on a busy machine.
PATIENCE = 200


def main(where: str, silent_where: str, kills: int) -> dict[str, Any]:
    wrong: list[str] = []
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while True:
            gevent.sleep(0.001)
            ticks += 1

    def work(number: int) -> int:
        for version in range(ROUNDS):
            name = f"record/{number}"
            cache.set(name, version, [number, version])
            record = cache.get(name)
            if record is None or (record.version, record.data) != (version, [number, version]):
                wrong.append(f"{name} {version}: {record!r}")
        return number

    options = options_of(where) | {"maxConnections": 8, "commandTimeout": 60_000}
    cache = dscache.Cache.from_config({"name": "redis", "options": options})
    large = {f"large/{n}": (n, "x" * 1000) for n in range(3000)}
    gevent.spawn(tick)
    done = gevent.joinall(
        [gevent.spawn(work, number) for number in range(GREENLETS)], timeout=PATIENCE
    )
    finished = sorted(one.value for one in done if one.value is not None)
    nodes = cache.stats().get("nodes", {"": cache.stats()})
    connections = max(node["connections"] for node in nodes.values())

    # A bulk that fills the buffers, beside single reads.
    bulk = gevent.spawn(cache.set_bulk, large)
    reads = [gevent.spawn(cache.get, f"record/{number}") for number in range(GREENLETS)]
    gevent.joinall([bulk, *reads], timeout=PATIENCE)
    found = cache.get_bulk(large)
    if bulk.value != set() or {n: (r.version, r.data) for n, r in found.items()} != large:
        wrong.append("the bulk")

    # Killed in the middle of an exchange, and limited by a Timeout.
    killed = 0
    for _ in range(kills):
        reader = gevent.spawn(cache.get_bulk, large)
        gevent.sleep(0.001)
        killed += not reader.dead
        reader.kill()
        record = cache.get("record/7")
        if record is None or record.data != [7, ROUNDS - 1]:
            wrong.append(f"after a greenlet was killed: {record!r}")
    limited = ""
    silent = dscache.Cache.from_config(
        {"name": "redis", "options": options_of(silent_where) | {"commandTimeout": 60_000}}
    )
    try:
        with gevent.Timeout(0.05):
            silent.get("a")
    except gevent.Timeout:
        limited = "gevent.Timeout"
    impatient = dscache.Cache.from_config(
        {"name": "redis", "options": options_of(silent_where) | {"commandTimeout": 100}}
    )
    before, began = ticks, time.monotonic()
    try:
        impatient.get("a")
    except dscache.ConnectError:
        limited += " ConnectError"
    stats = cache.stats()
    for one in (cache, silent, impatient):
        one.close()
    return {
        "wrong": wrong[:5],
        "finished": finished == list(range(GREENLETS)),
        "connections": connections,
        "killed": killed,
        "limited": limited,
        "waited": time.monotonic() - began < 30,
        "others_ran": ticks > before,
        "pending": stats["pending"],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
