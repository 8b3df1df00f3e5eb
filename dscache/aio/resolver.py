"""Host look-ups and TLS files in threads of the cache's own, and the connecting of sockets.

A look-up of a host may take half a minute where no name server answers, and can't be stopped. In
the loop's executor, which the program uses too, one more for each attempt would soon take every
thread. So a cache has a few threads of its own, and callers share the look-up under way. The
threads are daemons: a program that ends doesn't wait for them.
"""

from __future__ import annotations

import asyncio
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..net.sockets import Found, SocketConnect

if TYPE_CHECKING:
    import ssl

    from ..config.tls import Tls

T = TypeVar("T")

# Several, so that one name that is never resolved doesn't hold up the other nodes of a cluster.
_LOOK_UPS: Final = 4


class Resolver:
    """Host look-ups and TLS contexts for one cache, on the event loop that runs."""

    def __init__(self) -> None:
        self._hosts = Threads(_LOOK_UPS, "dscache looks up a host")
        self._files = Threads(1, "dscache reads the files of TLS")

    async def look_up(self, host: str, port: int, family: int = 0) -> list[Found]:
        """Return the addresses of a host; at most one look-up of a host runs at a time.

        Raises OSError, or UnicodeError for a text that can't be a host.
        """
        try:
            # A numeric address needs no name server.
            found = _addresses(host, family, socket.AI_NUMERICHOST)
        except socket.gaierror:
            key = host, family
            found = await self._hosts.run(key, partial(_addresses, host, family))
        # The port isn't part of the look-up: the nodes of a cluster may differ in nothing else.
        return [(*kind, (its_host, port, *rest)) for *kind, (its_host, _, *rest) in found]

    async def tls_context(self, tls: Tls) -> ssl.SSLContext:
        """Return the TLS context of the files as they are; raises ConfigError if one is bad."""
        return await self._files.run(tls, tls.context)


async def connect_to(
    addresses: Iterable[Found], holder: SocketConnect | None = None
) -> socket.socket:
    """Return a socket that is connected to the first of the addresses that accepts.

    Raises the OSError of ``SocketConnect.connect``. Of a ``holder``, ``tried`` then says more.
    """
    holder = holder or SocketConnect()
    try:
        for events in holder.connect(addresses):
            await _until_ready(holder.sock, events, holder.wake_at)
    except BaseException:
        holder.close()
        raise
    return holder.detach()


async def _until_ready(sock: socket.socket, events: int, wake_at: float) -> None:
    """Wait until a socket has the events, or until ``wake_at`` of ``time.monotonic``."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    is_read = events == select.POLLIN
    timer: asyncio.TimerHandle | None = None
    try:
        if wake_at < math.inf:
            timer = loop.call_later(max(wake_at - time.monotonic(), 0), _set_ready, ready)
        (loop.add_reader if is_read else loop.add_writer)(sock, _set_ready, ready)
        await ready
    finally:
        if timer is not None:
            timer.cancel()
        (loop.remove_reader if is_read else loop.remove_writer)(sock)


class Threads:
    """At most ``limit`` threads for blocking calls."""

    def __init__(self, limit: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._name = name
        self._running = 0
        self._due: deque[Hashable] = deque()
        self._works: dict[Hashable, tuple[asyncio.Future[Any], Callable[[], Any]]] = {}

    async def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """Return the result of ``work``, or raise its error.

        Callers under the same key share the work under way. It goes on when they are cancelled,
        and the next call takes its result.
        """
        if key not in self._works:
            future = self._loop.create_future()
            future.add_done_callback(_retrieve)
            self._works[key] = future, work
            self._due.append(key)
        self._go_on()
        shared = self._works[key]
        try:
            outcome: T = await asyncio.shield(shared[0])
            return outcome
        finally:
            if shared[0].done() and self._works.get(key) is shared:
                del self._works[key]

    def _go_on(self) -> None:
        while self._due and self._running < self._limit:
            key = self._due[0]
            _, work = self._works[key]
            thread = threading.Thread(
                target=self._work, args=(key, work), name=self._name, daemon=True
            )
            thread.start()  # may fail if there are too many; the next attempt tries again
            self._due.popleft()
            self._running += 1

    def _work(self, key: Hashable, work: Callable[[], Any]) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = work()
        except StopIteration as error:  # no future takes it
            failure = RuntimeError(repr(error))
        except BaseException as error:  # raised again in the caller
            failure = error
        # The loop may be closed by now, and the cache with it.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended, key, result, failure)

    def _ended(self, key: Hashable, result: Any, failure: BaseException | None) -> None:
        self._running -= 1
        future, _ = self._works[key]
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)
        # Nothing that waits is of use to a cache that is closed, but soon done for any other.
        with suppress(RuntimeError):
            self._go_on()


def _addresses(host: str, family: int, flags: int = 0) -> list[tuple[Any, ...]]:
    infos = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM, 0, flags)
    return [(kind, type_, protocol, address) for kind, type_, protocol, _, address in infos]


def _set_ready(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Retrieve an exception, which asyncio would log if every caller has been cancelled."""
    if not future.cancelled():
        future.exception()
