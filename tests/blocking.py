"""A blocking cache in the shape of an asyncio one, and what tests of it need beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import dscache
from faults import FaultProxy

T = TypeVar("T")

# Until something must have ended: far more than any machine needs, as it is no measurement.
PATIENCE = 60


class BlockingCache:
    """A Cache with the methods of an AsyncCache: each has ended when its call returns."""

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
                    raise  # of the arguments, which the other one refuses at the call
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


class LoopThread:
    """An event loop in a thread of its own, for what fails on command beside a blocking cache."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine returns there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a function returns there."""

        async def called() -> T:
            return function(*arguments)

        return self.run(called())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


class ProxyThread:
    """A FaultProxy in a thread of its own; its methods may be called from any other."""

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
        """Call a method of the proxy, and await it if it is to be awaited."""

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
