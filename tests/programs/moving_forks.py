"""Fork a blocking cache whose server then moves.

``python -m tests.programs.moving_forks PORT`` prints the counters of both processes as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time

import dscache

_PATIENCE = 60.0


def main() -> None:
    where = {"host": "127.0.0.1", "port": int(sys.argv[1]), "maintNotifications": "on"}
    with dscache.Cache.from_config({**where, "commandTimeout": 10_000}) as cache:
        cache.set("moving", 1, None)
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.write(writing, json.dumps(moved(cache)).encode())
            os._exit(0)
        os.close(writing)
        of_child = os.read(reading, 65536)
        os.close(reading)
        os.waitpid(child, 0)
        assert cache.set("moving", 3, None)
        print(json.dumps({"child": json.loads(of_child), "parent": moved(cache)}))


def moved(cache: dscache.Cache) -> dict[str, object]:
    """Write until the server has moved; return the counters."""
    end = time.monotonic() + _PATIENCE
    while not cache.stats()["maintenance"]["moves"] and time.monotonic() < end:
        assert cache.set("moving", 2, None)
        time.sleep(0.005)
    stats = cache.stats()
    return {**stats["maintenance"], "failed": stats["failed"]}


if __name__ == "__main__":
    main()
