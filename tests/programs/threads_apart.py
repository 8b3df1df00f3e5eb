"""Checks of an AsyncCache that other threads try to use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import dscache

CALLS: dict[str, Callable[[dscache.AsyncCache], Any]] = {
    "get": lambda cache: cache.get("a"),
    "head": lambda cache: cache.head("a"),
    "set": lambda cache: cache.set("a", 2, "elsewhere"),
    "guarded": lambda cache: cache.set("a", 2, "elsewhere", if_newer=True),
    "delete": lambda cache: cache.delete("a"),
    "get_bulk": lambda cache: cache.get_bulk(["a", "b"]),
    "head_bulk": lambda cache: cache.head_bulk(["a", "b"]),
    "set_bulk": lambda cache: cache.set_bulk({"a": (2, "elsewhere")}),
    "delete_bulk": lambda cache: cache.delete_bulk(["a"]),
    "get_bulk of none": lambda cache: cache.get_bulk([]),
    "set_bulk of none": lambda cache: cache.set_bulk({}),
}


async def assert_other_threads_are_refused(cache: dscache.AsyncCache) -> None:
    """Use a cache in another thread: before and within a tick, with and without a loop there."""
    assert await cache.set("a", 1, "here") is True
    assert await cache.get("a") == await cache.get("a")  # cached, if there is a near cache
    for in_tick in (False, True):
        waiting = []
        if in_tick:
            for name in ("a", "b", "c"):  # on a cluster they may be on several nodes
                waiting += [
                    cache.set(name, 1, "here"),
                    asyncio.ensure_future(cache.get(name)),
                    cache.get_bulk([name]),
                ]
        for with_loop in (False, True):
            outcomes = _in_a_thread(cache, with_loop)
            expected = dict.fromkeys(CALLS, "UsageError")
            if outcomes["guarded"] == "RecordError":  # when records are split, for any caller
                expected["guarded"] = "RecordError"
            assert outcomes == expected, (in_tick, with_loop)
        await asyncio.gather(*waiting)
    record = await cache.get("a")
    assert record is not None
    assert (record.version, record.data) == (1, "here")
    assert (await cache.get_bulk(["a", "b"])).keys() == {"a", "b"}


def _in_a_thread(cache: dscache.AsyncCache, with_loop: bool) -> dict[str, str]:
    outcomes: dict[str, str] = {}

    def use() -> None:
        for name, call in CALLS.items():
            try:
                outcomes[name] = repr(call(cache))
            except Exception as error:
                outcomes[name] = type(error).__name__

    async def use_on_a_loop() -> None:
        use()

    def work() -> None:
        if with_loop:
            asyncio.run(use_on_a_loop())
        else:
            use()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return outcomes


def assert_the_loop_may_move(make: Callable[[], dscache.AsyncCache]) -> None:
    """Run a loop in one thread after the other: a cache belongs to the loop, not to a thread."""
    loop = asyncio.new_event_loop()
    cache: Any = None
    found: list[Any] = []

    async def begin() -> None:
        nonlocal cache
        cache = make()
        await cache.set("a", 1, "here")
        await cache.get("a")

    async def go_on() -> None:
        found.append(await cache.get("a"))
        await cache.set("a", 2, "moved")
        found.append(await cache.get("a"))

    loop.run_until_complete(begin())
    thread = threading.Thread(target=lambda: loop.run_until_complete(go_on()))
    thread.start()
    thread.join()
    loop.run_until_complete(go_on())
    loop.run_until_complete(cache.close())
    loop.close()
    said = [(record.version, record.data) for record in found]
    assert said == [(1, "here"), (2, "moved"), (2, "moved"), (2, "moved")]
