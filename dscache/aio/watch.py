"""A watch on an event loop: a connection to every primary, which reports the changes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self

from msgspec.structs import replace

from .._cache import warn_of_dropped
from ..config import Config, Options
from ..core import typed
from ..core.holder import Place
from ..core.record import DataT
from ..errors import BulkError, ConnectError, ConnectionLost, DscacheError, UsageError, shorten
from ..net.backoff import full_jitter
from ..net.watch import (
    CHECK_INTERVAL,
    LONGEST_PAUSE,
    PAUSE,
    Change,
    Changes,
    check_pushes,
    check_role,
    primaries_only,
)
from .connection import Connection
from .control import ControlConnection
from .lifecycle import LoopBound, close_dropped
from .memory import MemoryNode

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.pure import Record
    from .cluster import Cluster


@dataclass(frozen=True, slots=True)
class AsyncChange(Change[DataT]):
    """A change that an AsyncCache has heard of."""

    def read(self) -> Awaitable[Record[DataT] | None]:
        """Read the record as it is now, from its primary; the result is None without one."""
        assert self._read is not None
        found: Awaitable[Record[DataT] | None] = self._read(self.name)
        return found


class AsyncWatch(AsyncIterator[AsyncChange[DataT]]):
    """The changes of the records of a prefix, by ``async with`` and ``async for``.

    Made by ``AsyncCache.watch``. It listens from the beginning of the block to its end, and keeps
    its cache until then.
    """

    def __init__(
        self,
        cache: object,
        topology: MemoryNode | Connection | Cluster,
        config: Config,
        credentials: CredentialProvider | None,
        prefix: str,
        *,
        records: bool,
        max_pending: int,
        type: Any = None,
    ) -> None:
        self._cache = cache
        self._shown = f"{shorten(prefix)} at {config.address}"
        # Its tasks refer to this one alone, so that a watch that the program drops is noticed.
        self._watching: _Watching[DataT] = _Watching(
            topology,
            config,
            credentials,
            prefix,
            records=records,
            max_pending=max_pending,
            type=type,
        )

    @property
    def addresses(self) -> list[str]:
        """The addresses of the primaries that report changes."""
        return self._watching.addresses

    @property
    def skipped(self) -> int:
        """How many reports were left out so far, as the names in their keys are no UTF-8."""
        return self._watching.skipped

    async def __aenter__(self) -> Self:
        await self._watching.begin()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the watch, its connections and tasks; a second call does nothing."""
        await self.end(None)

    async def end(self, reason: Exception | None) -> None:
        """Close; an iteration under way raises the reason, or ends if it is None."""
        await self._watching.end(reason)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AsyncChange[DataT]:
        return await self._watching.next()

    def __repr__(self) -> str:
        return f"<AsyncWatch of {self._shown}>"

    def __del__(self) -> None:
        watching = self.__dict__.get("_watching")
        if watching is None or not watching.is_listening or sys.is_finalizing():
            return
        try:
            close_dropped(watching.loop, partial(watching.end, None))
        finally:
            self._cache = None  # the warning may be kept, and this object with it
            warn_of_dropped(self, "use async with, or await its close()")


class _Watching(LoopBound, Generic[DataT]):
    """Changes that a watch has heard of, and the tasks that listen for them."""

    def __init__(
        self,
        topology: MemoryNode | Connection | Cluster,
        config: Config,
        credentials: CredentialProvider | None,
        prefix: str,
        *,
        records: bool,
        max_pending: int,
        type: Any = None,
    ) -> None:
        super().__init__("an AsyncCache")
        self._topology = topology
        self._options = options = config.options
        self._credentials = credentials
        self._private: Connection | Cluster | None = None
        self._of_primaries = replace(config, options=primaries_only(options))
        self._news = asyncio.Event()
        self._type = type
        self._changes = Changes(
            options,
            prefix,
            self._news.set,
            records=records,
            max_pending=max_pending,
            read=self._get,
            kind=AsyncChange,
            as_type=type,
        )
        self._found: deque[AsyncChange[DataT]] = deque()
        self._place = Place()  # of the one consumer
        self._failures = 0
        self._end: Exception | None = None
        self._main: asyncio.Task[None] | None = None
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._has_begun = False

    @property
    def addresses(self) -> list[str]:
        return list(self._listening)

    @property
    def skipped(self) -> int:
        """How many reports were left out so far, as the names in their keys are no UTF-8."""
        return self._changes.skipped

    @property
    def is_listening(self) -> bool:
        """Whether it has begun, and must be closed in this process."""
        return self._has_begun and not self._closed and self._pid == os.getpid()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    # -- the block

    async def begin(self) -> None:
        self._check_owner()
        if self._has_begun or self._closed:
            raise UsageError("a watch is entered once; call watch() again")
        self._has_begun = True
        try:
            await self._begin()
        except BaseException:
            await self.end(None)
            raise

    async def _begin(self) -> None:
        topology = self._topology
        if isinstance(topology, MemoryNode):
            await topology.when_ready()
            topology.pipeline.listeners.append(self._changes.note_changed)
            return
        if self._of_primaries.options != self._options:
            # Its reads may be of replicas, or may fill a near cache.
            if isinstance(topology, Connection):
                self._private = Connection(self._of_primaries.options, self._credentials)
            else:
                self._private = topology.__class__(self._of_primaries, self._credentials)
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
            self._topology.pipeline.forget(self._changes.note_changed)
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
            if not self._has_begun:
                raise UsageError("use async with cache.watch(...) as changes, and iterate over it")
            holder = self._place.take()
            if holder is None:
                raise UsageError("this watch is in use already; call watch() once per consumer")
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
        self._news.clear()
        self._changes.move_events(self._found)
        if self._found:
            return
        if names := self._changes.take_names():
            await self._read_names(names)
        else:
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
        changes = self._changes
        pipeline: Any = self._topology.pipeline
        try:
            try:
                found = changes.changes_of(names, await getattr(pipeline, changes.operation)(names))
            except BulkError as error:
                found = changes.changes_of(names, error.result, error)
        except DscacheError:
            # The loss of a server is an event of its own. The names are read once it is back.
            changes.back(names)
            changes.finish()
            if not self._closed:
                await asyncio.sleep(full_jitter(PAUSE, LONGEST_PAUSE, self._failures))
            self._failures += 1
            return
        if not self._closed:
            self._found.extend(found)  # type: ignore[arg-type] # made by ``kind``
        changes.finish()
        if found:
            self._failures = 0
        else:
            await asyncio.sleep(full_jitter(PAUSE, LONGEST_PAUSE, self._failures))
            self._failures += 1

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
        listening = self._listening
        departed = listening.keys() - wanted.keys()
        is_first = self._main is None
        for address in wanted.keys() - listening.keys():
            if not is_first:
                self._changes.lose(address, "it has become a primary of the cluster")
            self._ready[address] = ready = self._loop.create_future()
            task = listening[address] = asyncio.create_task(
                self._listen(address, wanted[address], ready if is_first else None),
                name=f"dscache watches {address}",
            )
            task.add_done_callback(partial(_end_wait, ready))
        # Behind the gaps of the new primaries, which have these servers' records now.
        for address in departed:
            listening.pop(address).cancel()
            self._changes.leave(address, "it is no longer a primary of the cluster")

    async def _listen(
        self, address: str, options: Options, ready: asyncio.Future[None] | None
    ) -> None:
        """Listen to one server, and connect again when it is lost.

        A failure before the reports have begun at first goes to ``ready``.
        """
        changes = self._changes
        must_be_primary = bool(options.sentinels) or not isinstance(self._topology, Connection)
        failures = 0
        while not self._closed:
            try:
                on_push = partial(changes.take_push, address)
                with closing(
                    await ControlConnection.open(options, on_push, self._credentials)
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
