"""Fork while a near cache is in use: ``python -m tests.programs.near_fork URL BACKEND``.

The inherited cache serves nothing in the child, and the parent continues.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import dscache
from dscache import _backend


def refused(cache: dscache.AsyncCache, calls: list[Any]) -> int:
    """Return, in the child, how many calls were not refused."""
    served = 0
    for call in calls:
        try:
            call(cache)
            served += 1
        except dscache.UsageError as error:
            served += "fork" not in str(error)
    return served


def fork(cache: dscache.AsyncCache, calls: list[Any]) -> None:
    pid = os.fork()
    if not pid:
        code = 99
        try:
            code = refused(cache, calls)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"{code} calls were served in the child"


async def main(url: str) -> None:
    options = {"url": url, "commandTimeout": 30_000, "closeTimeout": 100}
    options["nearCache"] = {"idleLimit": 30_000, "serveStale": True}
    async with dscache.AsyncCache.from_config({"name": "redis", "options": options}) as cache:
        await cache.get_bulk(["a", "b"])
        reading = cache.get("c")
        await asyncio.sleep(0)
        calls = [
            *(lambda one, name=name: one.get(name) for name in "abcd"),
            *(lambda one, names=names: one.get_bulk(names) for names in (["a"], ["c"], ["a", "d"])),
            *(lambda one, name=name: one.head(name) for name in "ad"),
        ]
        fork(cache, calls)
        assert await reading is None
        hits = cache.stats()["near_cache"]["hits"]
        await cache.get_bulk(["a", "b"])  # a fork affects nothing in the parent
        assert cache.stats()["near_cache"]["hits"] == hits + 2
        # As without a connection.
        cache._topology.pipeline.connection_lost(dscache.ConnectionLost("cut"), True)  # type: ignore[union-attr]
        assert (await cache.get("a")).stale
        fork(cache, calls)
    print("parent done")


if __name__ == "__main__":
    _backend.BACKEND, _backend.core = _backend.choose(sys.argv[2])
    asyncio.run(main(sys.argv[1]))
