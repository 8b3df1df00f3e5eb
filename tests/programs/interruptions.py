"""Raise in the way of an AsyncCache: ``interruptions.py SCENE LOOP URL [long]``.

Prints the violations found by ``after`` as JSON: 100 records of 100 owners must be read as theirs,
and nothing may be pending. LOOP is ``asyncio`` or ``uvloop``; ``DSCACHE_BACKEND`` names the core.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import signal
import sys
import time
from asyncio import selector_events
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

import dscache

OWNERS = [f"owner/{i}" for i in range(100)]
HUGE = "x" * 60_000_000
# Timeouts of a cache's operations, in milliseconds, and of the program, in seconds.
TIMEOUT = 2000
PATIENCE = 30
# How often a signal handler raises at least, and for how many seconds at most.
STRIKES = 20
STRIKING = 60
Report = dict[str, Any]


class Size:
    """How much a scene does: the long form is a row of the soak test."""

    seconds = 1.5  # of signals
    stride = 4  # of the depths of a stack, and of the methods of a Connection
    turns = 30  # of finalizers


async def issued(*calls: Callable[[], Any]) -> list[Any]:
    """Return the results of operations issued in one tick, even if issuing one raises."""
    pending: list[Any] = []
    for call in calls:
        try:
            pending.append(call())
        except BaseException as error:
            pending.append(error)
    return await results_of(pending)


async def results_of(pending: Iterable[Any]) -> list[Any]:
    """Return the result or the error of each future; one that never ends is an error."""
    found = []
    for one in pending:
        if asyncio.isfuture(one):
            try:
                async with asyncio.timeout(PATIENCE):
                    await asyncio.wait([one])
                one = one.exception() or one.result()
            except TimeoutError:
                one = AssertionError("this operation has no end")
        found.append(one)
    return found


def wrong_owners(names: Iterable[str], found: Iterable[Any]) -> list[str]:
    """Return which results are neither errors nor the records of their owners."""
    return [
        f"{name}: {one!r}"
        for name, one in zip(names, found, strict=True)
        if not isinstance(one, dscache.DscacheError)
        and (type(one) is not dscache.Record or tuple(one) != (1, {"owner": name}))
    ]


async def after(cache: dscache.AsyncCache) -> Report:
    """Read all records once more, and return the violations."""
    for _ in range(50):  # a connection cut just now loses the commands sent on it
        found = await issued(*(lambda name=name: cache.get(name) for name in OWNERS))
        if not any(isinstance(one, BaseException) for one in found):
            break
        await asyncio.sleep(0.1)
    stats = cache.stats()
    counters = ("queued", "in_flight", "pending", "pending_bytes")
    return {
        "wrong": wrong_owners(OWNERS, found),
        "failed": [repr(one) for one in found if isinstance(one, BaseException)],
        "pending": {name: stats[name] for name in counters if stats[name]},
    }


# -- scenes: each returns its violations, apart from those that ``after`` finds


async def short_of_memory(cache: dscache.AsyncCache) -> Report:
    """Let memory end in the middle of a tick, while a huge record is being sent."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])  # noqa: ASYNC240
    limit = resource.getrlimit(resource.RLIMIT_AS)
    wrong = []
    for spare in range(10, 250, 24):  # megabytes: in turn each of the copies doesn't fit
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + spare * 1_000_000, limit[1]))
        try:
            first = await issued(lambda: cache.get(OWNERS[0]), lambda: cache.set("huge", 1, HUGE))
            names = OWNERS[1:20]
            then = await issued(*(lambda name=name: cache.get(name) for name in names))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
        wrong += wrong_owners([OWNERS[0], *names], [first[0], *then])
        if not isinstance(first[1], (bool, MemoryError, dscache.DscacheError)):
            wrong.append(f"set huge: {first[1]!r}")
    return {"wrong": wrong}


async def lost_write(cache: dscache.AsyncCache) -> Report:
    """Let memory end when the socket has taken a part of a huge record, and not the rest."""
    write = selector_events._SelectorSocketTransport.write
    failures = [1]

    def failing(transport: Any, data: bytes) -> None:
        if failures and len(data) > 1_000_000:
            failures.pop()
            raise MemoryError
        write(transport, data)

    selector_events._SelectorSocketTransport.write = failing  # type: ignore[method-assign]
    pending = [cache.set("huge", 1, HUGE)]
    while failures:
        await asyncio.sleep(0)
    # Without the rest of the first record, these commands would become its data.
    pending.append(cache.set("filler", 1, HUGE))
    pending += (cache.get(name) for name in OWNERS)
    written, _, *found = await results_of(pending)
    for _ in range(20):
        (stored,) = await issued(lambda: cache.get("huge"))
        if not isinstance(stored, BaseException):
            break
        await asyncio.sleep(0.1)
    wrong = wrong_owners(OWNERS, found)
    if isinstance(stored, BaseException):
        wrong.append(f"get huge: {stored!r}")
    elif stored is None and written is True:
        wrong.append("set huge returned True, and there is no such record")
    elif stored is not None and stored.raw != b'"' + HUGE.encode() + b'"':
        wrong.append("bytes of other commands are in the huge record")
    return {"wrong": wrong}


async def deep(cache: dscache.AsyncCache) -> Report:
    """Issue operations at the bottom of a deep stack, at depths around the limit."""
    wrong = []

    def at(depth: int, names: list[str]) -> list[Any]:
        if depth:
            return at(depth - 1, names)
        return [cache.get(name) for name in names]

    room = sys.getrecursionlimit() - len_of_stack()
    for less in range(0, 40, Size.stride):
        names = OWNERS[:32]
        pending: list[Any] = []
        try:
            pending = at(room - less, names)
        except RecursionError:
            names = []
        others = OWNERS[32:64]
        found = await results_of([*pending, *(cache.get(name) for name in others)])
        wrong += wrong_owners([*names, *others], found)
    return {"wrong": wrong}


def len_of_stack() -> int:
    frame = sys._getframe()
    size = 0
    while frame is not None:
        size += 1
        frame = frame.f_back  # type: ignore[assignment]
    return size


async def recursive(cache: dscache.AsyncCache) -> Report:
    """Let a coroutine await a read, and itself, until the stack ends."""

    async def endless(depth: int) -> Any:
        await cache.get(OWNERS[depth % 100])
        return await endless(depth + 1)

    try:
        async with asyncio.timeout(PATIENCE):
            await endless(0)
    except RecursionError:
        return {}
    except TimeoutError:
        return {"wrong": ["the cache has stopped"]}
    return {"wrong": ["the stack has no end"]}


async def signals(cache: dscache.AsyncCache) -> Report:
    """Let a signal handler raise repeatedly, wherever the cache is at that moment."""
    errors: list[BaseException] = [
        MemoryError("signal"),
        RecursionError("signal"),
        dscache.RecordError("signal"),
    ]
    wrong: list[str] = []
    armed = False
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    struck = [0, 0.0]

    def handler(*_: object) -> None:
        # Only within dscache's own frames: elsewhere the program is hit.
        frame = sys._getframe(1)
        now = time.monotonic()
        # One after the other: the handling of the first must not be struck as well.
        if armed and now > struck[1] + 0.05 and "/dscache/" in frame.f_code.co_filename:
            struck[0] += 1
            struck[1] = now
            raise errors[int(struck[0]) % len(errors)]

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.007)
    began = loop.time()
    turn = 0
    # Few strikes hit the cache on a machine that does something else.
    while (took := loop.time() - began) < Size.seconds or (struck[0] < STRIKES and took < STRIKING):
        names = OWNERS[turn % 60 : turn % 60 + 40]
        turn += 7
        armed = True
        pending: list[Any] = []
        for name in names:
            try:
                pending.append(cache.get(name))
            except Exception as error:
                pending.append(dscache.DscacheError(str(error)))
            with suppress(Exception):
                cache.set("s/" + name, 1, "x" * 2000).add_done_callback(_retrieve)
        found = await results_of(pending)
        armed = False
        shortages = (MemoryError, RecursionError)
        wrong += wrong_owners(
            names,
            [dscache.DscacheError() if isinstance(one, shortages) else one for one in found],
        )
    signal.setitimer(signal.ITIMER_REAL, 0)
    if struck[0] < STRIKES:
        wrong.append(f"the handler struck {struck[0]} times only")
    return {"wrong": wrong}


def _retrieve(future: asyncio.Future[Any]) -> None:
    future.cancelled() or future.exception()


async def finalizers(cache: dscache.AsyncCache) -> Report:
    """Let finalizers issue operations whenever the core's own allocations collect garbage."""
    pending: list[tuple[str, Any]] = []

    class Finalized:
        def __init__(self, number: int) -> None:
            self.number = number
            self.itself = self  # garbage that only the collector finds

        def __del__(self) -> None:
            name = OWNERS[self.number % 100]
            pending.append((name, cache.get(name)))
            if self.number % 3 == 0:
                cache.set(f"f/{name}", 1, self.number).add_done_callback(_retrieve)
            if self.number % 10 == 0:
                cache.get_bulk(OWNERS[:3]).add_done_callback(_retrieve)

    thresholds = gc.get_threshold()
    gc.set_threshold(3, 1, 1)
    try:
        for turn in range(Size.turns):
            own = []
            for i in range(50):
                Finalized(50 * turn + i)
                name = OWNERS[i]
                own.append((name, cache.get(name)))
                if i % 7 == 0:
                    cache.set(f"f/{name}", 2, i).add_done_callback(_retrieve)
            await asyncio.sleep(0)
            pending += own
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    found = await results_of(future for _, future in pending)
    wrong = wrong_owners([name for name, _ in pending], found)
    wrong += [repr(one) for one in found if isinstance(one, BaseException)]
    if len(pending) < Size.turns * 50 + 50:
        wrong.append(f"only {len(pending)} operations were issued")
    return {"wrong": wrong}


async def callbacks(cache: dscache.AsyncCache) -> Report:
    """Let every callback of the connection fail, one after the other."""
    from dscache.aio import connection

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    wrong: list[str] = []
    methods = [
        name
        for name, value in vars(connection.Connection).items()
        if callable(value) and not asyncio.iscoroutinefunction(value) and name != "__init__"
    ]
    for name in methods[:: max(1, Size.stride // 2)]:
        method = getattr(connection.Connection, name)
        if name in ("stats",):
            continue
        failures = [MemoryError(name)]

        def failing(*args: Any, method: Any = method, failures: Any = failures) -> Any:
            if failures:
                raise failures.pop()
            return method(*args)

        setattr(connection.Connection, name, failing)
        try:
            for _ in range(2):
                own = OWNERS[:20]
                found = await issued(*(lambda one=one: cache.get(one) for one in own))
                wrong += wrong_owners(
                    own,
                    [dscache.DscacheError() if isinstance(o, MemoryError) else o for o in found],
                )
                (kick,) = await issued(lambda: cache._topology.leave("a test"))
                del kick
                await asyncio.sleep(0.05)
        finally:
            setattr(connection.Connection, name, method)
        report = await after(cache)
        wrong += [f"after {name}: {report}"] if any(report.values()) else []
    return {"wrong": wrong}


FUNCTIONS = {
    one.__name__: one
    for one in (*(short_of_memory, lost_write, deep, recursive, signals, finalizers, callbacks),)
}
# Each with the loops that it runs on: lost_write replaces a method of asyncio's.
SCENES = [
    (scene, loop)
    for scene in FUNCTIONS
    for loop in ("asyncio", "uvloop")
    if (scene, loop) != ("lost_write", "uvloop")
]


async def run(scene: str, url: str) -> Report:
    host, port = url.removeprefix("redis://").split("/")[0].split(":")
    options = {
        "host": host,
        "port": int(port),
        "commandTimeout": TIMEOUT,
        "retryStrategy": {"cap": 100},
    }
    config = {"name": "redis", "options": options}
    async with dscache.AsyncCache.from_config(config) as cache:
        await cache.set_bulk({name: (1, {"owner": name}) for name in OWNERS})
        report = await FUNCTIONS[scene](cache)
        left = await after(cache)
        return {
            "wrong": [*report.get("wrong", ()), *left["wrong"], *left["failed"]][:10],
            "pending": left["pending"],
        }


if __name__ == "__main__":
    scene, loop_name, url, *form = sys.argv[1:]
    if form == ["long"]:
        Size.seconds, Size.stride, Size.turns = 5.0, 1, 60
    factory = uvloop.new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(run(scene, url))))
