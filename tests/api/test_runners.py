"""A whole life of each async class on every kind of event loop and task that asyncio runs."""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

import dscache
from dscache.embedded import EmbeddedServer
from tests.conftest import PATIENT, SERVERS, _server_id
from tests.support.waiting import PATIENCE

Run = Callable[[Coroutine[Any, Any, None]], None]


def run_on(loop_factory: Callable[[], asyncio.AbstractEventLoop], eager: bool) -> Run:
    def run(main: Coroutine[Any, Any, None]) -> None:
        # Without an event loop policy, which Python 3.14 deprecates and 3.16 lacks.
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            if eager:
                runner.get_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
            runner.run(main)

    return run


NAMES = [f"n/{i}" for i in range(20)]
RUNS: dict[str, Run] = {
    "asyncio": asyncio.run,
    "uvloop": run_on(uvloop.new_event_loop, False),
}
if sys.version_info >= (3, 12):
    RUNS["eager tasks"] = run_on(asyncio.new_event_loop, True)
    RUNS["eager tasks on uvloop"] = run_on(uvloop.new_event_loop, True)


async def live(server: EmbeddedServer) -> None:
    config = {"name": "redis", "options": PATIENT | {"url": server.url}}
    async with dscache.AsyncCache.from_config(config) as cache:
        await cache.delete_bulk(["l", *NAMES])
    async with asyncio.timeout(PATIENCE), dscache.AsyncCache.from_config(config) as cache:
        assert await asyncio.gather(*map(cache.get, NAMES)) == [None] * 20
        async with asyncio.TaskGroup() as group:
            for i, name in enumerate(NAMES):
                group.create_task(write(cache, name, i))
        records = await cache.get_bulk(NAMES)
        assert [one and one.data for one in map(records.get, NAMES)] == list(range(20))
        changes = [cache.update("n/0", lambda data: data + 1) for _ in range(5)]
        assert sorted(one.version for one in await asyncio.gather(*changes)) == [2, 3, 4, 5, 6]
        loads = await asyncio.gather(*(cache.fetch("l", load, ttl=60) for _ in range(5)))
        assert [one and one.data for one in loads] == ["loaded"] * 5
        assert sorted([name async for name in cache.scan("n/")]) == sorted(NAMES)
        await talk(server)
        task = asyncio.create_task(write(cache, "n/1", 5))
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cache.get("n/0") is not None
        await cache.delete_bulk(["l", *NAMES])


async def talk(server: EmbeddedServer) -> None:
    """Send a message from one node to another."""
    options = PATIENT | {"url": server.url}
    one, other = (
        dscache.MessageNode.from_config(
            {"serverName": name, "clusterNode": {"name": "redis", "options": options}}
        )
        for name in ("one", "other")
    )
    async with one, other:
        received = one.messages(4)
        await one.when_ready()
        await other.send({"topic": 4, "n": 1}, unchecked=True)
        message, sender = await anext(received)
        assert (message, sender) == ({"topic": 4, "n": 1}, "other")


async def write(cache: dscache.AsyncCache, name: str, data: int) -> None:
    await cache.set(name, 1, data)


async def load(name: str) -> str:
    await asyncio.sleep(0)
    return "loaded"


@pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
@pytest.mark.parametrize("runner", RUNS)
def test_a_whole_life(server: EmbeddedServer, runner: str, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RUNS[runner](live(server))
