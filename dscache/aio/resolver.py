"""What an attempt to connect needs of the machine, got without the event loop and its executor.

A look-up of a host may take half a minute where no name server answers, and can't be stopped. In
the loop's executor, which is the program's as well, one more for each attempt would soon take
every thread. So a cache has a few threads of its own, and what is under way is shared by all who
want it. They are daemons, for which no program that ends has to wait.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import ssl

    from ..config.tls import Tls

T = TypeVar("T")

# Where one name of a cluster is never answered for, others still are.
_LOOK_UPS: Final = 4

Found = tuple[int, int, int, Any]
"""An address as ``socket`` takes it: family, type, protocol and what ``connect`` is given."""


class Resolver:
    """The addresses of hosts and the contexts of TLS for one cache, on the event loop that runs."""

    def __init__(self) -> None:
        self._hosts = _Threads(_LOOK_UPS, "dscache looks up a host")
        self._files = _Threads(1, "dscache reads the files of TLS")

    async def look_up(self, host: str, port: int, family: int = 0) -> list[Found]:
        """Return the addresses of a host, which is asked for at most once at a time.

        Raises OSError, or UnicodeError for what can be no name of a host.
        """
        try:
            # A number needs nobody's answer.
            found = _addresses(host, family, socket.AI_NUMERICHOST)
        except socket.gaierror:
            key = host, family
            found = await self._hosts.run(key, partial(_addresses, host, family))
        # The port is put in here: the nodes of a cluster may differ in nothing else.
        return [(*kind, (its_host, port, *rest)) for *kind, (its_host, _, *rest) in found]

    async def connect(self, host: str, port: int, family: int = 0) -> socket.socket:
        """Return a socket that is connected to a host, of whose addresses each is tried in turn.

        Raises OSError.
        """
        failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        for found in await self.look_up(host, port, family):
            try:
                return await _connected(*found)
            except OSError as error:
                failure = error
        raise failure

    async def tls_context(self, tls: Tls) -> ssl.SSLContext:
        """Return the context of TLS as its files are now. Raises ConfigError if they are bad."""
        return await self._files.run(tls, tls.context)


class _Threads:
    """At most ``limit`` threads that do what the event loop should not wait for."""

    def __init__(self, limit: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._name = name
        self._running = 0
        self._due: deque[Hashable] = deque()
        self._works: dict[Hashable, tuple[asyncio.Future[Any], Callable[[], Any]]] = {}

    async def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, or raise what it raises.

        What goes on under the same key is waited for instead. Who is cancelled doesn't end it.
        """
        if key not in self._works:
            future = self._loop.create_future()
            future.add_done_callback(_retrieve)
            self._works[key] = future, work
            self._due.append(key)
        self._go_on()
        outcome: T = await asyncio.shield(self._works[key][0])
        return outcome

    def _go_on(self) -> None:
        while self._due and self._running < self._limit:
            key = self._due[0]
            _, work = self._works[key]
            thread = threading.Thread(
                target=self._work, args=(key, work), name=self._name, daemon=True
            )
            thread.start()  # it may fail, where there are too many: then the next attempt tries
            self._due.popleft()
            self._running += 1

    def _work(self, key: Hashable, work: Callable[[], Any]) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:  # whoever waits is told
            failure = error
        # The loop may be closed by now, and the cache with it.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended, key, result, failure)

    def _ended(self, key: Hashable, result: Any, failure: BaseException | None) -> None:
        self._running -= 1
        future, _ = self._works.pop(key)
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


async def _connected(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    host, *rest = address
    if family == socket.AF_INET6:
        # The zone is in the address's fourth part too, and loops look up a host that has one.
        address = (host.partition("%")[0], *rest)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Look at an outcome for which nobody may wait any more, so that nobody complains of it."""
    if not future.cancelled():
        future.exception()
