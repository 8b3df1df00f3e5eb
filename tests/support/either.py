"""An AsyncCache or a Cache, with one interface for tests of both; and work on real servers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import redis as redis_py

import dscache
from dscache.core.keys import KeyLayout
from tests.conftest import PATIENT
from tests.support.clusters import ClusterGroup


class Either:
    """An AsyncCache or a Cache, whose scan a test goes through in the same way."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind = kind
        config: dict[str, Any] = {"name": "redis", "options": PATIENT | options}
        if options == {"name": "memory"}:
            config = {"name": "memory"}
        self.cache: Any = getattr(dscache, kind).from_config(config)

    async def __aenter__(self) -> Either:
        await self.do("when_ready")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.do("close")

    async def do(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """Do an operation of the cache."""
        method = getattr(self.cache, operation)
        if self.kind == "AsyncCache":
            return await method(*arguments, **options)
        return await asyncio.to_thread(method, *arguments, **options)

    async def next(self, scan: Any) -> Any:
        """Return the next item of a scan, or None at its end."""
        if self.kind == "AsyncCache":
            return await anext(scan, None)
        return await asyncio.to_thread(next, scan, None)

    async def rest(self, scan: Any) -> list[Any]:
        """Return the other items of a scan."""
        if self.kind == "AsyncCache":
            return [item async for item in scan]
        return await asyncio.to_thread(list, scan)

    async def all(
        self, prefix: str = "", *, each: Callable[[int], object] = lambda at: None, **options: Any
    ) -> list[Any]:
        """Return all items of a scan; calls ``each`` after every item."""
        scan = self.cache.scan(prefix, **options)
        if self.kind != "AsyncCache":
            return await asyncio.to_thread(_through, scan, each)
        found: list[Any] = []
        async for item in scan:
            found.append(item)
            each(len(found))
        return found


def _through(scan: Any, each: Callable[[int], object]) -> list[Any]:
    found = []
    for item in scan:
        found.append(item)
        each(len(found))
    return found


def fill(client: redis_py.Redis, names: list[str], layout: KeyLayout | None = None) -> None:
    layout = layout or KeyLayout("", hash_tag=False)
    with client.pipeline(transaction=False) as pipe:
        for number, name in enumerate(names):
            version, data = layout.keys(name)
            pipe.mset({version: number, data: "{}"})
        pipe.execute()


def moving(group: ClusterGroup, ended: threading.Event) -> Callable[[], None]:
    """Return a function that moves slots between random primaries until ``ended`` is set.

    Servers that can do so move every second time in one step.
    """

    def move() -> None:
        rng = random.Random(1)
        while not ended.is_set():
            source, target = rng.sample(group.primaries(), 2)
            slots = group.slots_of(source)
            if len(slots) > 400:
                first = rng.randrange(len(slots) - 200)
                some = slots[first : first + 200]
                if group.moves_atomically and rng.random() < 0.5:
                    group.migrate_atomically(some, source, target)
                else:
                    group.migrate(some, source, target, at_once=50)

    return move
