"""Close a ring of loads over processes: ``python -m tests.programs.ring KIND URL NAME NEXT SIZE``.

Fetches a record whose load fetches the next one, once so many processes load. Prints as JSON the
texts of the error and of its causes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import redis as redis_py

import dscache


def note_begin(client: redis_py.Redis[bytes]) -> None:
    client.incr("loading")


def all_begun(client: redis_py.Redis[bytes], size: int) -> bool:
    return int(client.get("loading") or 0) >= size


async def fetch_in_task(config: dict[str, Any], url: str, name: str, next_: str, size: int) -> None:
    async def load(_: str) -> Any:
        with redis_py.Redis.from_url(url) as client:
            note_begin(client)
            while not all_begun(client, size):
                await asyncio.sleep(0.01)
        record = await cache.fetch(next_, read, ttl=600)
        return record and record.data

    async with dscache.AsyncCache.from_config(config) as cache:
        await cache.fetch(name, load, ttl=600)


def fetch_in_thread(config: dict[str, Any], url: str, name: str, next_: str, size: int) -> None:
    def load(_: str) -> Any:
        with redis_py.Redis.from_url(url) as client:
            note_begin(client)
            while not all_begun(client, size):
                time.sleep(0.01)
        record = cache.fetch(next_, read, ttl=600)
        return record and record.data

    with dscache.Cache.from_config(config) as cache:
        cache.fetch(name, load, ttl=600)


def read(name: str) -> str:
    return f"{name} of another process"


def main(kind: str, url: str, name: str, next_: str, size: str) -> None:
    times = {"commandTimeout": 30_000, "connectTimeout": 30_000}
    config = {"name": "redis", "options": {"url": url, **times}}
    texts = []
    try:
        if kind == "async":
            asyncio.run(fetch_in_task(config, url, name, next_, int(size)))
        else:
            fetch_in_thread(config, url, name, next_, int(size))
    except dscache.LoadError as error:
        cause: BaseException | None = error
        while cause is not None:
            texts.append(str(cause))
            cause = cause.__cause__
    print(json.dumps(texts))


if __name__ == "__main__":
    main(*sys.argv[1:])
