"""A scan on an event loop, over the connections that its cache has already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Self

from ..config import Options
from ..core import failures
from ..errors import BulkError, DscacheError
from ..net.finds import Finds, Item, MemoryScan, check_arguments
from ..net.scan import KeyScan, Names, NameScan, Pause, Reply, Request
from .connection import Connection
from .lifecycle import LoopBound
from .memory import MemoryNode

if TYPE_CHECKING:
    from .cluster import Cluster


class ScanDriver(LoopBound):
    """Takes the steps of a scan, over the connections that its cache has already."""

    def __init__(
        self, topology: MemoryNode | Connection | Cluster, is_closed: Callable[[], bool]
    ) -> None:
        super().__init__("an AsyncCache")
        self._topology = topology
        self._has_begun = False
        self._is_closed = is_closed

    def _where(self) -> tuple[Any, ...]:
        """Return the arguments of a KeyScan that lead it to the nodes of a cluster."""
        cluster = self._topology
        if isinstance(cluster, MemoryNode | Connection):
            return ()

        def owner(slot: int) -> str | None:
            node = cluster.owner(slot)
            return None if node is None else node.info.shown

        return owner, cluster.look_again

    async def advance(self, finds: Finds[Any]) -> bool:
        """Find the next names; return False at the end."""
        self._check_cache()
        if not self._has_begun:
            await self._topology.when_ready()
            self._has_begun = True
        reply: Reply | None = None
        error: Exception | None = None
        while True:
            step = finds.next_step(reply, error)
            reply = error = None
            if not isinstance(step, Request | Pause):
                return isinstance(step, Names)
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                continue
            try:
                reply = await self._ask(step)
            except (OSError, DscacheError) as failure:
                self._check_cache()
                error = failure

    async def _ask(self, request: Request) -> Reply:
        topology = self._topology
        assert not isinstance(topology, MemoryNode)
        if isinstance(topology, Connection):
            node = topology
        else:
            node = topology.nodes.open(topology.state.node_at(request.node))
        self._check_cache()
        if not node.is_ready:
            await node.when_ready()
        return Reply(node.link, await node.ask(*request.commands))

    def _check_cache(self) -> None:
        if self._is_closed():
            raise failures.closed("cache")


class AsyncScan(ScanDriver, AsyncIterator[Item]):
    """The names or Records of a prefix, by ``async for``; made by ``AsyncCache.scan``.

    It has no connection and no task of its own, so an iteration may stop anywhere. An exception
    doesn't end it: the next step continues after the last names that were found.
    """

    def __init__(
        self,
        topology: MemoryNode | Connection | Cluster,
        options: Options,
        is_closed: Callable[[], bool],
        prefix: str,
        *,
        records: bool,
        count: int,
        cursor: str | None,
        type: Any = None,
    ) -> None:
        super().__init__(topology, is_closed)
        check_arguments(prefix, count, cursor, type, records=records)
        scan: NameScan | MemoryScan
        if isinstance(topology, MemoryNode):
            scan = MemoryScan(topology.pipeline.names, prefix, count, cursor)
        else:
            scan = NameScan(options, prefix, count, cursor, *self._where())
        self._finds: Finds[Item] = Finds(scan, records=records, type=type)

    @property
    def cursor(self) -> str:
        """The text with which another scan continues after the last complete batch: str.

        Pass it as ``cursor`` to ``scan`` with the same prefix, servers and key layout.
        """
        return self._finds.cursor()

    @property
    def skipped(self) -> int:
        """The number of keys left out so far, because the names in them aren't UTF-8: int."""
        return self._finds.scan.skipped

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        finds = self._finds
        if not finds.ready:
            self._check_owner()
            holder = finds.enter()
            try:
                await self._find()
            finally:
                del holder
        return finds.ready.popleft()

    async def _find(self) -> None:
        """Find the next items; raises StopAsyncIteration if there are none."""
        finds = self._finds
        while True:
            finds.raise_error()
            if finds.ready:
                return
            if finds.unread:
                await self._read(finds.next_names())
                continue
            try:
                if not await self.advance(finds):
                    raise StopAsyncIteration
            except BaseException:
                finds.restart()
                raise

    async def _read(self, names: list[str]) -> None:
        self._check_cache()
        # Past a near cache, whose records count as used when they are read.
        pipeline: Any = self._topology.pipeline
        try:
            self._finds.add_records(names, await pipeline.get_bulk(names))
        except BulkError as error:
            self._finds.add_records(names, error.result, error)


class Pages(ScanDriver):
    """The keys or names that a scan finds, in pages, and the cursor behind each page."""

    def __init__(
        self,
        topology: Connection | Cluster,
        make: Callable[..., KeyScan],
        options: Options,
        text: Any,
        count: int,
        cursor: str | None = None,
    ) -> None:
        super().__init__(topology, lambda: False)
        self._scan = make(options, text, count, cursor, *self._where())
        self._finds: Finds[Any] = Finds(self._scan, records=False)

    async def next(self) -> tuple[list[Any], str, int] | None:
        """Return a page, the cursor behind it and the number of keys visited; None at the end."""
        if not await self.advance(self._finds):
            return None
        page = list(self._finds.ready)
        self._finds.ready.clear()
        return page, self._scan.cursor_behind(), self._scan.visited
