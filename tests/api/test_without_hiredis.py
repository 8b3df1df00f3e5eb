"""Caches and message nodes in a process that may import neither hiredis nor redis-py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.waiting import PATIENCE

CODE = """
import asyncio, json, sys
sys._is_gil_enabled = lambda: False
sys.modules["hiredis"] = sys.modules["redis"] = None
import dscache

url = sys.argv[1]
found = {}

async def operate():
    async with dscache.AsyncCache(url, near_cache=True) as cache:
        found["set"] = await cache.set("without/1", 1, {"a": [1, "ü"]}, if_newer=True)
        found["older"] = await cache.set("without/1", 1, {}, if_newer=True)
        await cache.set_bulk({f"without/{i}": (i, {"i": i}) for i in range(2, 500)}, ttl=100)
        found["get"] = [(await cache.get("without/1")).data, await cache.get("without/0")]
        found["head"] = await cache.head("without/7")
        found["heads"] = len(await cache.head_bulk([f"without/{i}" for i in range(600)]))
        records = await cache.get_bulk([f"without/{i}" for i in range(600)])
        found["bulk"] = [len(records), sum(one.version for one in records.values())]
        await cache.set("without/large", 1, "x" * 2_000_000)
        found["large"] = len((await cache.get("without/large")).data)
        found["names"] = len([name async for name in cache.scan("without/")])
        found["deleted"] = await cache.delete_bulk([f"without/{i}" for i in range(2, 600)])

async def exchange():
    first, second = (dscache.MessageNode.from_config(url, server_name=name) for name in "ab")
    async with first, second:
        messages = second.messages(1000)
        await second.when_ready()
        await first.send({"topic": 1000, "text": "hello"})
        message, sender = await anext(messages)
        found["message"] = [sender, message["text"]]

asyncio.run(operate())
asyncio.run(exchange())
with dscache.Cache(url) as cache:
    found["blocking"] = cache.get("without/1").data
    found["removed"] = [cache.delete("without/1"), cache.delete("without/large")]
found["core"] = dscache.BACKEND
print(json.dumps(found))
"""


def test_caches_work_without_hiredis(server: Any) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "DSCACHE_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, server.url],
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "set": True,
        "older": False,
        "get": [{"a": [1, "ü"]}, None],
        "head": 7,
        "heads": 499,
        "bulk": [499, sum(range(500))],
        "large": 2_000_000,
        "names": 500,
        "deleted": 498,
        "message": ["a", "hello"],
        "blocking": {"a": [1, "ü"]},
        "removed": [True, True],
        "core": "fast",
    }
