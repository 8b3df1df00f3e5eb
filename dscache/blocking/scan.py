"""A scan in the calling thread, over a connection of its own to each server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

from .._forks import after_fork_in_child
from ..config import Options
from ..core import failures
from ..errors import BulkError, DscacheError, UsageError
from ..net.finds import Finds, Item, MemoryScan, check_arguments
from ..net.scan import Names, NameScan, Pause, Reply, Request
from .control import ControlConnection
from .memory import MemoryPool
from .pool import Pool

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


class Scan(Iterator[Item]):
    """The names or Records of a prefix, by ``for``; made by ``Cache.scan``.

    It opens a connection to each server in turn. It closes the connection at the end of the
    iteration, in ``close``, or when it is dropped. An exception doesn't end it: the next step
    continues after the last names that were found.
    """

    def __init__(
        self,
        topology: Pool | MemoryPool,
        options: Options,
        provider: CredentialProvider | None,
        is_closed: Callable[[], bool],
        prefix: str,
        *,
        records: bool,
        count: int,
        cursor: str | None,
        type: Any = None,
    ) -> None:
        check_arguments(prefix, count, cursor, type, records=records)
        self._topology = topology
        self._has_begun = False
        self._options = options
        self._provider = provider
        self._is_closed = is_closed
        self._pid = os.getpid()
        self._node = ""
        self._server: ControlConnection | None = None
        self._options_at: Callable[[str], Options] | None = None
        scan: NameScan | MemoryScan
        if isinstance(topology, MemoryPool):
            scan = MemoryScan(topology.names, prefix, count, cursor)
        elif options.nodes:
            from .cluster_pool import ClusterPool

            assert isinstance(topology, ClusterPool)
            self._options_at = topology.options_at
            scan = NameScan(options, prefix, count, cursor, topology.owner, topology.look_again)
        else:
            scan = NameScan(options, prefix, count, cursor)
        self._finds: Finds[Item] = Finds(scan, records=records, type=type)
        after_fork_in_child(self, Scan._reset_after_fork)

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

    def close(self) -> None:
        """Close the connection; an iteration that continues opens another one."""
        server, self._server = self._server, None
        if server is not None:
            server.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.__dict__.get("_server") is not None and self._pid == os.getpid():
            self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        finds = self._finds
        if not finds.ready:
            if self._pid != os.getpid():
                raise UsageError("a scan can't be used after a fork; begin one in the child")
            holder = finds.enter()
            try:
                self._find()
            finally:
                del holder
        return finds.ready.popleft()

    def _find(self) -> None:
        """Find the next items; raises StopIteration if there are none."""
        finds = self._finds
        while True:
            finds.raise_error()
            if finds.ready:
                return
            if finds.unread:
                self._read(finds.next_names())
                continue
            try:
                if not self._advance():
                    raise StopIteration
            except BaseException:
                self.close()
                finds.restart()
                raise

    def _advance(self) -> bool:
        """Find the next names; return False at the end."""
        self._check_cache()
        if not self._has_begun:
            self._topology.when_ready()
            self._has_begun = True
        reply: Reply | None = None
        error: Exception | None = None
        while True:
            step = self._finds.next_step(reply, error)
            reply = error = None
            if not isinstance(step, Request | Pause):
                return isinstance(step, Names)
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                continue
            self._check_cache()
            try:
                reply = self._ask(step)
            except (OSError, DscacheError) as failure:
                self.close()
                error = failure

    def _ask(self, request: Request) -> Reply:
        server = self._server
        if server is None or self._node != request.node:
            self.close()
            options = self._options
            if self._options_at is not None:
                options = self._options_at(request.node)
            self._node = request.node
            server = self._server = ControlConnection(options)
            assert isinstance(self._topology, Pool)
            server.connect(self._provider, self._topology.new_address)
        return Reply(server, server.request(*request.commands))

    def _check_cache(self) -> None:
        if self._is_closed():
            raise failures.closed("cache")

    def _read(self, names: list[str]) -> None:
        self._check_cache()
        try:
            found: dict[str, Any] = self._topology.run("get_bulk", names)
            self._finds.add_records(names, found)
        except BulkError as error:
            self._finds.add_records(names, error.result, error)

    def _reset_after_fork(self) -> None:
        """Leave the socket to the parent, in a forked child."""
        server, self._server = self._server, None
        if server is not None:
            server.leave()
