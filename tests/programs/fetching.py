"""Fetch one cold record in many callers: ``python -m tests.programs.fetching KIND URL SECONDS``.

Waits for a line on stdin, fetches, and prints the versions as JSON. Each load adds 1 to the key
``loads``, writes its process id to the key ``loader``, and takes that many seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis as redis_py

import dscache

NAME = "cold"
CALLERS = int(os.environ.get("CALLERS", "25"))


def note_load(url: str) -> None:
    with redis_py.Redis.from_url(url) as client:
        client.incr("loads")
        client.set("loader", os.getpid())


async def fetch_in_tasks(config: dict[str, Any], url: str, seconds: float) -> list[int]:
    async def load(name: str) -> dscache.Loaded:
        note_load(url)
        await asyncio.sleep(seconds)
        return dscache.Loaded(7, name)

    async with dscache.AsyncCache.from_config(config) as cache:
        begin()
        calls = (cache.fetch(NAME, load, ttl=600) for _ in range(CALLERS))
        return [record.version for record in await asyncio.gather(*calls) if record]


def fetch_in_threads(config: dict[str, Any], url: str, seconds: float) -> list[int]:
    def load(name: str) -> dscache.Loaded:
        note_load(url)
        time.sleep(seconds)
        return dscache.Loaded(7, name)

    with dscache.Cache.from_config(config) as cache, ThreadPoolExecutor(CALLERS) as threads:
        begin()
        calls = [threads.submit(cache.fetch, NAME, load, ttl=600) for _ in range(CALLERS)]
        return [record.version for call in calls if (record := call.result())]


def begin() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def main(kind: str, url: str, seconds: str) -> None:
    times = {"commandTimeout": 30_000, "connectTimeout": 30_000}
    config = {"name": "redis", "options": {"url": url, **times}}
    if kind == "async":
        versions = asyncio.run(fetch_in_tasks(config, url, float(seconds)))
    else:
        versions = fetch_in_threads(config, url, float(seconds))
    print(json.dumps(versions))


if __name__ == "__main__":
    main(*sys.argv[1:])
