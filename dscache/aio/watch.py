"""A watch on an event loop: a connection to every primary, which reports the changes."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from .._cache import warn_of_dropped
from ..config import Options
from ..core import typed
from ..core.record import DataT
from ..errors import ConnectError, ConnectionLost, DscacheError
from ..net.backoff import full_jitter
from ..net.watch import CHECK_INTERVAL, LONGEST_PAUSE, PAUSE, Change, check_pushes, check_role
from ..net.watching import WatchBase, Watching
from .connection import Connection
from .control import ControlConnection
from .lifecycle import LoopBound, close_dropped
from .memory import MemoryNode

if TYPE_CHECKING:
    from ..core.pure import Record
    from .cluster import Cluster


@dataclass(frozen=True, slots=True)
class AsyncChange(Change[DataT]):
    """A change that a watch of an AsyncCache reports."""

    def read(self) -> Awaitable[Record[DataT] | None]:
        """Read the record as it is now from its primary; the result is a Record, or None.

        It must be awaited, and raises the errors of ``AsyncCache.get``.
        """
        assert self._read is not None
        found: Awaitable[Record[DataT] | None] = self._read(self.name)
        return found


class _Watching(LoopBound, Watching[DataT]):
    """A watch whose tasks listen to the primaries, each to one."""

    _kind = AsyncChange
    _event = asyncio.Event
    _usage = "async with"
    _topology: MemoryNode | Connection | Cluster
    _found: deque[AsyncChange[DataT]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        LoopBound.__init__(self, "an AsyncCache")
        Watching.__init__(self, *arguments, **options)
        self._main: asyncio.Task[None] | None = None
        self._ready: dict[str, asyncio.Future[None]] = {}

    @property
    def is_closed(self) -> bool:  # type: ignore[override] # set by ``end`` alone
        return self._closed

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    # -- the block

    async def begin(self) -> None:
        self._check_owner()
        self._enter()
        try:
            await self._begin()
        except BaseException:
            await self.end(None)
            raise

    async def _begin(self) -> None:
        topology = self._topology
        if isinstance(topology, MemoryNode):
            await topology.when_ready()
            topology.pipeline.listen(self.changes.note_changed)
            return
        if self._of_primaries.options != self._options:
            # Its reads may be of replicas, or may fill a near cache.
            if isinstance(topology, Connection):
                self._private = Connection(self._of_primaries.options, self.credentials)
            else:
                self._private = topology.__class__(self._of_primaries, self.credentials)
            self._topology = topology = self._private
        await topology.when_ready()
        self._update()
        await asyncio.gather(*self._ready.values())
        self._main = asyncio.create_task(self._keep(), name="dscache watch")
        self._main.add_done_callback(self._on_failed)

    async def end(self, reason: Exception | None) -> None:
        if not self._closed:
            self._check_owner()
            self._closed, self._end = True, reason
            self._found.clear()
        self._news.set()
        if isinstance(self._topology, MemoryNode):
            self._topology.pipeline.forget(self.changes.note_changed)
        tasks = [*self._listening.values(), *([self._main] if self._main else [])]
        for task in tasks:
            task.cancel()
        for future in self._ready.values():
            future.cancel()
        if tasks:
            # Not for ever: an exception that strikes the event loop can keep a task from its end.
            await asyncio.wait(tasks, timeout=self._options.close_timeout / 1000)
        private, self._private = self._private, None
        if private is not None:
            await private.close()

    def _on_failed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._closed = True
            self._end = error if isinstance(error, Exception) else ConnectionLost(str(error))
            self._news.set()

    # -- the iteration

    async def next(self) -> AsyncChange[DataT]:
        found = self._found
        if not found:
            self._check_owner()
            holder = self._hold()
            try:
                while not found:
                    await self._find()
            finally:
                del holder
        return found.popleft()

    async def _find(self) -> None:
        """Take events or read some names, or wait for either."""
        if self._closed:
            raise self._end or StopAsyncIteration
        if names := self._look():
            await self._read_names(names)
        elif names is not None:
            await self._wait()

    async def _wait(self) -> None:
        """Wait for news; in memory, records end only when their time is looked at."""
        topology = self._topology
        memory = topology.pipeline if isinstance(topology, MemoryNode) else None
        # Not for ever: an exception can strike the call that wakes it.
        limit = CHECK_INTERVAL if memory is None else memory.seconds_to_expiry()
        try:
            async with asyncio.timeout(limit):
                await self._news.wait()
        except TimeoutError:
            if memory is not None:
                memory.expire()

    async def _read_names(self, names: list[str]) -> None:
        read = getattr(self._topology.pipeline, self.changes.operation)
        try:
            pause = self._settle(names, await read(names))
        except DscacheError as error:
            pause = self._settle(names, {}, error)
        if pause and not self._closed:
            await asyncio.sleep(pause)

    def _get(self, name: str) -> asyncio.Future[Record[DataT] | None]:
        operations: Any = self._topology.pipeline
        if self._type is None:
            future: asyncio.Future[Record[DataT] | None] = operations.get(name)
        else:
            future = self._loop.create_future()
            typed.get(operations, future, name, self._type)
        return future

    # -- the servers

    async def _keep(self) -> None:
        """Listen to the current primaries until cancelled."""
        while True:
            if self._listening:
                await asyncio.wait(
                    self._listening.values(),
                    timeout=CHECK_INTERVAL,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            else:
                await asyncio.sleep(CHECK_INTERVAL)
            for task in self._listening.values():
                if task.done():
                    task.result()
            self._update()

    def _update(self) -> None:
        """Listen to the current primaries, and to no others."""
        topology = self._topology
        assert not isinstance(topology, MemoryNode)
        if isinstance(topology, Connection):
            wanted = {self._options.address: self._of_primaries.options}
        else:
            wanted = {one.address: one for one in topology.primaries().values()}
        self._follow(wanted, is_first=self._main is None)

    def _listen_to(self, address: str, options: Options, *, is_first: bool) -> None:
        self._ready[address] = ready = self._loop.create_future()
        task = self._listening[address] = asyncio.create_task(
            self._listen(address, options, ready if is_first else None),
            name=f"dscache watches {address}",
        )
        task.add_done_callback(partial(_end_wait, ready))

    def _leave(self, listener: asyncio.Task[None]) -> None:
        listener.cancel()

    async def _listen(
        self, address: str, options: Options, ready: asyncio.Future[None] | None
    ) -> None:
        """Listen to one server, and connect again when it is lost.

        A failure before the reports have begun at first goes to ``ready``.
        """
        changes = self.changes
        topology = self._topology
        new_address = topology.new_address if isinstance(topology, Connection) else None
        must_be_primary = bool(options.sentinels) or not isinstance(self._topology, Connection)
        failures = 0
        while not self._closed:
            try:
                on_push = partial(changes.take_push, address)
                with closing(
                    await ControlConnection.open(options, on_push, self.credentials, new_address)
                ) as server:
                    hello, role = await server.execute_many(["HELLO"], ["ROLE"])
                    check_pushes(server.address, hello)
                    must_be_primary = check_role(
                        server.address, role, must_be_primary=must_be_primary
                    )
                    await server.execute(*changes.tracking)
                    failures = 0
                    if ready is not None and not ready.done():
                        ready.set_result(None)
                    else:
                        # Records are read again now: from this server, not from the one before.
                        self._check_place(server.address, options)
                    changes.resume(address)
                    while True:
                        await asyncio.wait([server.lost], timeout=CHECK_INTERVAL)
                        # Raises the reason if the server is lost or hangs.
                        (role,) = await server.execute_many(["ROLE"])
                        check_role(server.address, role, must_be_primary=must_be_primary)
                        self._check_place(server.address, options)
            except DscacheError as error:
                if ready is not None and not ready.done():
                    ready.set_exception(error)
                    return
                changes.lose(address, str(error))
                if not isinstance(self._topology, MemoryNode | Connection):
                    # Another node may be the primary by now; the next timer would be late.
                    self._topology.look_again()
            await asyncio.sleep(full_jitter(PAUSE, LONGEST_PAUSE, failures))
            failures += 1

    def _check_place(self, address: str, options: Options) -> None:
        """Raise ConnectError if the cache has left a server, as its Sentinels name another one.

        Such a server may be a primary still, cut off from the others.
        """
        topology = self._topology
        if options.sentinels and isinstance(topology, Connection) and topology.address != address:
            raise ConnectError(f"the Sentinels name another primary than {address}")


class AsyncWatch(WatchBase, AsyncIterator[AsyncChange[DataT]]):
    """The changes of the records of a prefix, by ``async with`` and ``async for``.

    Made by ``AsyncCache.watch``. It listens from the beginning of the block to its end, and keeps
    its cache from being dropped until then.
    """

    _made_with = _Watching
    _watching: _Watching[DataT]

    @property
    def addresses(self) -> list[str]:
        """The addresses of the primaries that report changes."""
        return self._watching.addresses

    async def __aenter__(self) -> Self:
        await self._watching.begin()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the watch, its connections and tasks; a second call does nothing.

        An iteration under way ends.
        """
        await self.end(None)

    async def end(self, reason: Exception | None) -> None:
        """Close; an iteration under way raises the reason, or ends if it is None."""
        await self._watching.end(reason)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AsyncChange[DataT]:
        return await self._watching.next()

    def __del__(self) -> None:
        watching = self.__dict__.get("_watching")
        if watching is None or not watching.is_listening or sys.is_finalizing():
            return
        try:
            close_dropped(watching.loop, partial(watching.end, None))
        finally:
            self._cache = None  # the warning may be kept, and this object with it
            warn_of_dropped(self, "use async with, or await its close()")


def _end_wait(ready: asyncio.Future[None], task: asyncio.Task[None]) -> None:
    """End the wait for the first reports of a task that has ended without any."""
    if ready.done():
        return
    error = None if task.cancelled() else task.exception()
    if error is None or isinstance(error, StopIteration):
        ready.cancel()
    else:
        ready.set_exception(error)
        ready.exception()  # a watch that was closed waits no more
