"""Fork while threads use a blocking cache.

``python -m tests.programs.forks URL COUNT`` prints what happened as JSON.

In place of the URL may stand options, as JSON. Each child uses the cache that it inherited, in
several threads, while the parent goes on.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from typing import Any

import dscache
from tests.support.blocking import options_of

THREADS = 4
OPERATIONS = 100


def sockets() -> set[tuple[int, int]]:
    """Return the open sockets of this process."""
    found = set()
    for fd in range(3, 256):
        try:
            status = os.fstat(fd)
        except OSError:
            continue
        if stat.S_ISSOCK(status.st_mode):
            found.add((status.st_dev, status.st_ino))
    return found


def use(cache: dscache.Cache, who: str, wrong: list[str], stop: threading.Event | None) -> None:
    """Write and read this thread's own records, until stopped or for a number of operations."""
    version = 0
    while not stop.is_set() if stop else version < OPERATIONS:
        version += 1
        try:
            cache.set(who, version, [who, version])
            record = cache.get(who)
            if record is None or (record.version, record.data) != (version, [who, version]):
                wrong.append(f"{who} {version}: {record!r}")
        except dscache.DscacheError as error:
            wrong.append(f"{who} {version}: {error!r}")


def wait_until_connected(cache: dscache.Cache) -> None:
    """Wait until each thread has the connections that it needs, and none is being made."""
    connects = since = 0
    while True:
        stats = cache.stats()
        if stats.get("connections", 0) < THREADS or stats["connects"] != connects:
            connects, since = stats.get("connects", 0), stats.get("reads", 0)
        elif stats["reads"] - since >= 100 * THREADS:
            return
        time.sleep(0.001)


def child(cache: dscache.Cache, number: int, inherited: set[tuple[int, int]]) -> dict[str, Any]:
    shared_at_first = len(sockets() & inherited)
    wrong: list[str] = []
    threads = [
        threading.Thread(target=use, args=(cache, f"child {number}.{n}", wrong, None))
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    cache.close()
    return {
        "wrong": wrong[:3],
        "shared": shared_at_first + len(sockets() & inherited),
        "connections": stats["connections"],
        "pending": stats["pending"],
    }


def main(where: str, count: int) -> dict[str, Any]:
    cache = dscache.Cache.from_config(
        {"name": "redis", "options": options_of(where) | {"commandTimeout": 60_000}}
    )
    memory = dscache.Cache.from_config({"name": "memory"})
    memory.set("a", 1, [1])
    wrong: list[str] = []
    stop = threading.Event()
    threads = [
        threading.Thread(target=use, args=(cache, f"parent {n}", wrong, stop))
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    wait_until_connected(cache)
    children = []
    for number in range(count):
        reading, writing = os.pipe()
        inherited = sockets()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                result = child(cache, number, inherited)
                assert memory.get("a") is not None
            except BaseException as error:
                result = {"wrong": [repr(error)]}
            os.write(writing, json.dumps(result).encode())
            os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    results = []
    for pid, reading in children:
        with open(reading, "rb") as file:
            results.append(json.loads(file.read()))
        os.waitpid(pid, 0)
    connects = cache.stats()["connects"]
    before = cache.stats()["reads"]
    while cache.stats()["reads"] < before + 100 and not wrong:
        time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    cache.close()
    return {
        "children": results,
        "wrong": wrong[:3],
        "connects": connects,
        "again": stats["connects"],
        "last_loss": stats["last_loss"],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
