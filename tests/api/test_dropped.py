"""Caches and message nodes that a program drops without closing them."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import SERVERS, _server_id
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)

REMEDY = r"was dropped without close\(\); use (async )?with, or"


def connections(redis: redis_py.Redis) -> int:
    """Return the number of the server's clients, this one included."""
    return len(redis.client_list())


async def until_connections(redis: redis_py.Redis, number: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while connections(redis) != number:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("options", [{}, {"nearCache": {}}], ids=["plain", "near"])
async def test_a_dropped_async_cache(
    options: dict[str, Any], server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    """Its connection ends behind the operations under way."""
    before = connections(redis)
    config = {"name": "redis", "options": {"url": server.url, **options}}
    cache = dscache.AsyncCache.from_config(config)
    assert await cache.set("a", 1, "x") is True
    assert connections(redis) == before + 1
    pending = cache.get("a")
    with pytest.warns(ResourceWarning, match=REMEDY):
        del cache
    record = await pending
    assert record is not None
    assert record.version == 1
    await until_connections(redis, before)


@pytest.mark.parametrize("keeps_cache", [True, False])
async def test_a_dropped_watch(
    keeps_cache: bool, server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    """Its connection ends; until then it keeps its cache."""
    before = connections(redis)
    cache: dscache.AsyncCache | None = dscache.AsyncCache.from_config(server.url)
    assert cache is not None
    watch = cache.watch("a")
    changes = await watch.__aenter__()
    assert connections(redis) == before + 2
    if not keeps_cache:
        cache = None
        gc.collect()
    redis.mset({"a_v": "1", "a_d": "1"})
    assert (await anext(changes)).name == "a"
    with pytest.warns(ResourceWarning, match=REMEDY) as caught:
        del watch, changes
    assert len(caught) == (1 if keeps_cache else 2)
    await until_connections(redis, before + keeps_cache)
    if cache is not None:
        await cache.close()


@pytest.mark.parametrize("keeps_cache", [True, False])
def test_a_dropped_watch_of_threads(
    keeps_cache: bool, server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    before = connections(redis)
    cache: dscache.Cache | None = dscache.Cache.from_config(server.url)
    assert cache is not None
    watch = cache.watch("a")
    changes = watch.__enter__()
    if not keeps_cache:
        cache = None
        gc.collect()
    redis.mset({"a_v": "1", "a_d": "1"})
    assert next(changes).name == "a"
    with pytest.warns(ResourceWarning, match=REMEDY) as caught:
        del watch, changes
    assert len(caught) == (1 if keeps_cache else 2)
    asyncio.run(until_connections(redis, before + keeps_cache))
    # The thread ends just behind its connection.
    asyncio.run(until(lambda: "dscache watches" not in str(threading.enumerate())))
    if cache is not None:
        cache.close()


async def test_a_dropped_watch_of_memory(server: EmbeddedServer, backend: str) -> None:
    cache = dscache.AsyncCache.from_config({"name": "memory"})
    watch = cache.watch("a")
    await watch.__aenter__()
    with pytest.warns(ResourceWarning, match=REMEDY):
        del watch
    blocking = dscache.Cache.from_config({"name": "memory"})
    other = blocking.watch("a")
    other.__enter__()
    with pytest.warns(ResourceWarning, match=REMEDY):
        del other
    assert await cache.set("a", 1, 1) is True
    assert blocking.set("a", 1, 1) is True
    assert cache.watch("a").addresses == []
    await cache.close()
    blocking.close()


async def test_a_dropped_message_node(
    server: EmbeddedServer, redis: redis_py.Redis, backend: str
) -> None:
    before = connections(redis)
    heard: list[Any] = []
    node = dscache.MessageNode.from_config(server.url)
    node.subscribe(4, lambda message, sender: heard.append(message))
    await node.when_ready()
    assert connections(redis) > before
    with pytest.warns(ResourceWarning, match=REMEDY):
        del node
    await until_connections(redis, before)
    assert heard == []


def test_an_iterator_keeps_its_message_node(server: EmbeddedServer, backend: str) -> None:
    async def use() -> None:
        def messages() -> tuple[Any, Callable[[], Any]]:
            node = dscache.MessageNode.from_config(server.url)
            return node.messages(40), node.when_ready

        received, when_ready = messages()
        gc.collect()
        await when_ready()
        async with dscache.MessageNode.from_config(server.url) as other:
            await other.send({"topic": 40, "n": 1})
            async with asyncio.timeout(PATIENCE):
                message, _ = await anext(received)
        assert message["n"] == 1
        assert len(caught) == 0
        del message
        del received, when_ready  # the subscription ends in the next tick
        await asyncio.sleep(0.01)
        assert len(caught) == 1

    # Around the loop, which drops the node outside of any task. Without the GIL, only the context
    # in which warnings are caught sees them.
    with pytest.warns(ResourceWarning, match=REMEDY) as caught:
        asyncio.run(use())


def test_a_dropped_cache(server: EmbeddedServer, redis: redis_py.Redis, backend: str) -> None:
    before = connections(redis)
    cache = dscache.Cache.from_config(server.url)
    assert cache.set("a", 1, "x") is True
    assert connections(redis) == before + 1
    with pytest.warns(ResourceWarning, match=REMEDY):
        del cache
    end = time.monotonic() + PATIENCE
    while connections(redis) != before and time.monotonic() < end:
        time.sleep(0.01)
    assert connections(redis) == before


async def test_no_warning_without_a_connection(
    server: EmbeddedServer, backend: str, recwarn: pytest.WarningsRecorder
) -> None:
    """One that is closed, in memory, or was never opened has none; nor has a failed one."""
    made: list[Any] = [
        kind.from_config(source)
        for kind in (dscache.AsyncCache, dscache.Cache)
        for source in (server.url, {"name": "memory"})
    ]
    made.append(dscache.MessageNode.from_config(server.url))
    memory = dscache.AsyncCache.from_config({"name": "memory"})
    await memory.get("a")
    async with dscache.AsyncCache.from_config(server.url) as cache:
        await cache.get("a")
    async with dscache.MessageNode.from_config(server.url) as node:
        await node.send({"topic": 40})
    with dscache.Cache.from_config(server.url) as blocking:
        blocking.get("a")
    with pytest.raises(TypeError):
        dscache.AsyncCache(None, None, None)  # type: ignore[call-arg, arg-type]
    made.clear()
    del memory, cache, node, blocking
    gc.collect()
    await asyncio.sleep(0)
    assert [str(one.message) for one in recwarn] == []


PROGRAM = """
import asyncio, os, sys
import dscache

url, kind = sys.argv[1:]
blocking = dscache.Cache.from_config(url)
blocking.set("a", 1, 1)


async def use():
    global cache, node
    cache = dscache.AsyncCache.from_config(url)
    await cache.get("a")
    node = dscache.MessageNode.from_config(url)
    await node.when_ready()
    if kind == "fork":
        global blocking
        child = os.fork()
        if not child:
            del cache, node, blocking
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (await cache.get("a")).version == blocking.get("a").version == 1
        await cache.close()
        await node.close()
        blocking.close()


asyncio.run(use())
"""


@pytest.mark.parametrize("kind", ["exit", "fork"])
def test_no_warning_at_exit_or_in_a_forked_child(
    kind: str, server: EmbeddedServer, backend: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", PROGRAM, server.url, kind],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "DSCACHE_BACKEND": backend},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "without close()" not in done.stderr
    assert "Traceback" not in done.stderr
