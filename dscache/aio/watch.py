"""A watch on an event loop: a connection to every primary, which reports the changes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from msgspec.structs import replace

from ..config import Config, Options
from ..core.holder import Place
from ..errors import BulkError, ConnectError, ConnectionLost, DscacheError, UsageError
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
from .lifecycle import LoopBound
from .memory import MemoryNode

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.pure import Record
    from .cluster import Cluster


@dataclass(frozen=True, slots=True)
class AsyncChange(Change):
    """A change that an AsyncCache has heard of."""

    def read(self) -> Awaitable[Record | None]:
        """Read the record as it is now, from its primary; the result is None without one."""
        assert self._read is not None
        found: Awaitable[Record | None] = self._read(self.name)
        return found


class AsyncWatch(LoopBound, AsyncIterator[AsyncChange]):
    """The changes of the records of a prefix, by ``async with`` and ``async for``.

    Made by ``AsyncCache.watch``. It listens from the beginning of the block to its end.
    """

    def __init__(
        self,
        topology: MemoryNode | Connection | Cluster,
        config: Config,
        credentials: CredentialProvider | None,
        prefix: str,
        *,
        records: bool,
        max_pending: int,
    ) -> None:
        super().__init__("an AsyncCache")
        self._topology = topology
        self._options = options = config.options
        self._credentials = credentials
        self._private: Connection | Cluster | None = None
        self._of_primaries = replace(config, options=primaries_only(options))
        self._news = asyncio.Event()
        self._changes = Changes(
            options,
            prefix,
            self._news.set,
            records=records,
            max_pending=max_pending,
            read=self._get,
            kind=AsyncChange,
        )
        self._found: deque[AsyncChange] = deque()
        self._place = Place()  # of the one consumer
        self._failures = 0
        self._end: Exception | None = None
        self._main: asyncio.Task[None] | None = None
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._has_begun = False

    @property
    def addresses(self) -> list[str]:
        """The addresses of the primaries that report changes."""
        return list(self._listening)

    # -- the block

    async def __aenter__(self) -> Self:
        self._check_owner()
        if self._has_begun or self._closed:
            raise UsageError("a watch is entered once; call watch() again")
        self._has_begun = True
        try:
            await self._begin()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

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
                self._private = type(topology)(self._of_primaries, self._credentials)
            self._topology = topology = self._private
        await topology.when_ready()
        self._update()
        await asyncio.gather(*self._ready.values())
        self._main = asyncio.create_task(self._keep(), name="dscache watch")
        self._main.add_done_callback(self._on_failed)

    async def close(self) -> None:
        """End the watch, its connections and tasks; a second call does nothing."""
        await self.end(None)

    async def end(self, reason: Exception | None) -> None:
        """Close; an iteration under way raises the reason, or ends if it is None."""
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

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AsyncChange:
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
            with suppress(TimeoutError):  # an exception can strike the call that wakes it
                async with asyncio.timeout(CHECK_INTERVAL):
                    await self._news.wait()

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

    def _get(self, name: str) -> asyncio.Future[Record | None]:
        future: asyncio.Future[Record | None] = self._topology.pipeline.get(name)
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
