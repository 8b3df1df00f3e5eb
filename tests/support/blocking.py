"""A blocking cache with the interface of an asyncio one, and helpers for its tests."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import dscache
from tests.support.faults import FaultProxy

T = TypeVar("T")

# Seconds until something must have ended: far more than any machine needs, since it measures
# nothing.
PATIENCE = 60


def until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.001)


def strike(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an exception in a thread, as soon as it runs Python code."""
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    assert raise_in(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error)) == 1


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of ``work`` in that many threads, which run at once."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, range(count)))


def run_child(
    script: str, *arguments: str, backend: str, seconds: float = 4.5 * PATIENCE
) -> dict[str, Any]:
    """Return the JSON that a program of ``tests/programs`` prints within that many seconds.

    Raises AssertionError if it fails, or takes longer.
    """
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parents[1] / "programs" / script), *arguments],
            env={**os.environ, "DSCACHE_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stderr or b"")[-2000:].decode("utf-8", "replace")
        raise AssertionError(
            f"{' '.join((script, *arguments))} did not end within {seconds:g} s: {printed}"
        ) from None
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def options_of(where: str) -> dict[str, Any]:
    """Return the options for a URL, or parse options written as JSON."""
    options: dict[str, Any] = json.loads(where) if where.startswith("{") else {"url": where}
    return options


class BlockingCache:
    """A Cache with the methods of an AsyncCache; each call has completed when it returns."""

    def __init__(self, cache: dscache.Cache) -> None:
        self._cache = cache

    @classmethod
    def from_config(cls, source: Any, **arguments: Any) -> BlockingCache:
        return cls(dscache.Cache.from_config(source, **arguments))

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._cache, name)

        def call(*args: Any, **kwargs: Any) -> asyncio.Future[Any]:
            future = asyncio.get_running_loop().create_future()
            try:
                future.set_result(operation(*args, **kwargs))
            except dscache.RecordError as error:
                if "stored" not in str(error):
                    raise  # of the arguments, which AsyncCache refuses at the call
                future.set_exception(error)
            except dscache.DscacheError as error:
                if "the cache is closed" in str(error):
                    raise
                future.set_exception(error)
            return future

        return call

    @property
    def is_ready(self) -> bool:
        return self._cache.is_ready

    @property
    def description(self) -> str:
        return self._cache.description

    def stats(self) -> dict[str, Any]:
        return self._cache.stats()

    async def when_ready(self) -> None:
        self._cache.when_ready()

    async def close(self) -> None:
        self._cache.close()

    async def __aenter__(self) -> Self:
        self._cache.__enter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cache.__exit__(exc_type, exc, traceback)

    def __repr__(self) -> str:
        return repr(self._cache)


class ThreadedCache:
    """A Cache with the methods of an AsyncCache, each run by one of several threads.

    A driver of an AsyncCache therefore drives a Cache too, from as many threads at once.
    """

    def __init__(self, cache: dscache.Cache, threads: int) -> None:
        self.cache = cache
        self._threads = ThreadPoolExecutor(threads)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.cache, name)

        def call(*args: Any, **kwargs: Any) -> asyncio.Future[Any]:
            loop = asyncio.get_running_loop()
            return loop.run_in_executor(self._threads, partial(operation, *args, **kwargs))

        return call

    def stats(self) -> dict[str, Any]:
        return self.cache.stats()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.cache.__enter__)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self.cache.close)


class LoopThread:
    """An event loop in its own thread, for servers that fail on command beside a blocking cache."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine run in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a function called in the loop."""

        async def called() -> T:
            return function(*arguments)

        return self.run(called())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


class ProxyThread:
    """A FaultProxy in its own thread; its methods may be called from any other."""

    def __init__(self, host: str, port: int, **options: Any) -> None:
        self._thread = LoopThread()
        self.proxy: Any = None

        async def begin() -> FaultProxy:
            return await FaultProxy(host, port, **options).__aenter__()

        self.proxy = self._thread.run(begin())

    @property
    def url(self) -> str:
        url: str = self.proxy.url
        return url

    @property
    def connections(self) -> int:
        return self._thread.call(lambda: self.proxy.connections)

    def do(self, method: str, *arguments: Any) -> None:
        """Call a method of the proxy, and await the result if it is awaitable."""

        async def done() -> None:
            result = getattr(self.proxy, method)(*arguments)
            if result is not None:
                await result

        self._thread.run(done())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.run(self.proxy.__aexit__())
        self._thread.close()


class Model:
    """The expected state of one thread's records, which nothing else writes."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.names = [f"thread {number} record {n}" for n in range(5)]
        self.records: dict[str, tuple[int, Any]] = {}

    def step(self, cache: dscache.Cache) -> None:
        name = self.random.choice(self.names)
        version = self.random.randrange(10)
        data = [name, version]
        known = self.records.get(name)
        match self.random.randrange(10):
            case 0:
                assert cache.set(name, version, data) is True
                self.records[name] = version, data
            case 1:
                newer = known is None or version > known[0]
                assert cache.set(name, version, data, if_newer=True) is newer
                if newer:
                    self.records[name] = version, data
            case 2:
                assert cache.delete(name) is (self.records.pop(name, None) is not None)
            case 3:
                assert cache.head(name) == (None if known is None else known[0])
            case 4:
                found = {name: tuple(it) for name, it in cache.get_bulk(self.names).items()}
                assert found == self.records
            case 5:
                news = {name: (version, [name, version]) for name in self.names[:3]}
                assert cache.set_bulk(news, ttl=1000) == set()
                self.records |= news
            case 6:
                heads = {name: version for name, (version, _) in self.records.items()}
                assert cache.head_bulk(self.names) == heads
            case _:
                record = cache.get(name)
                assert (None if record is None else tuple(record)) == known
