"""AsyncCache: the public API for asyncio servers."""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import Awaitable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from . import _backend
from .aio.lifecycle import AsyncResource, running_loop
from .aio.topology import Topology, open_topology
from .config import Config, load
from .errors import ConnectionLost, UsageError

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .core.pure import Record


class AsyncCache(AsyncResource):
    """Records in Redis, for one asyncio event loop.

    Every operation returns an ``asyncio.Future``: it is issued at the call, in the order of the
    calls, whether or when it is awaited. All operations of one tick of the loop travel together.
    With a near cache (``nearCache``), ``get`` and ``head`` return a coroutine, to be awaited once,
    in place of the Future; they are issued at the call all the same.

    An operation raises at the call: RecordError for a bad name, version, ttl or data,
    ConnectionLost if the cache is closed, UsageError on another event loop. Its future may end
    in ReplyError (Redis said no), DeadlineExceeded (``commandTimeout`` is over), ConnectError or
    ConnectionLost (no connection, or lost before the answer), ProtocolError, RecordError (what
    is stored is no record), or for the bulk forms BulkError, which holds the others' result.
    """

    def __init__(self, config: Config, credentials: CredentialProvider | None = None) -> None:
        self._config = config
        self._credentials = credentials
        self._topology: Topology | None = None
        self._pipeline: Any = None
        self._closed = False

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        credentials: CredentialProvider | None = None,
    ) -> Self:
        """Return a cache as a file, a mapping or a URL configures it.

        ``source`` is the path of deepstream's YAML or JSON file, a mapping of the same shape, a
        URL (``redis://``, ``rediss://``, ``unix://``) or ``host:port``. It connects when it is
        first used, or entered by ``async with``. ``credentials`` is a provider as redis-py has
        them, asked before each connection, and in place of the configured username and
        password. Raises ConfigError.
        """
        return cls(load(source), credentials)

    def get(self, name: str) -> Awaitable[Record | None]:
        """Return the Record of that name, or None if there is none, or half of one.

        ``name`` is any text that isn't empty. Ends in RecordError if what Redis holds is no
        record, and raises it at the call for a bad name.
        """
        return (self._pipeline or self._open()).get(name)  # type: ignore[no-any-return]

    def head(self, name: str) -> Awaitable[int | None]:
        """Return the version of the record of that name, an int, or None if there is none.

        Ends in RecordError if what Redis holds is no version, and raises it at the call for a
        bad name.
        """
        return (self._pipeline or self._open()).head(name)  # type: ignore[no-any-return]

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        *,
        ttl: int | None = None,
        if_newer: bool = False,
    ) -> asyncio.Future[bool]:
        """Write a record: version and data in one atomic step. Returns True.

        ``name`` is any text that isn't empty, and ``version`` an int from 0 to 2^63-1. ``data`` is
        anything msgspec encodes, or ``msgspec.Raw`` for text that is JSON already; it is encoded
        at the call. ``ttl`` is the record's lifetime in seconds: None for the configured default,
        0 for none. With ``if_newer``, returns False and writes nothing if Redis holds that version
        or a higher one. Raises RecordError at the call if one of them is none of that. Ends in
        ConnectionLost or DeadlineExceeded if a plain write may or may not have happened, which
        ``if_newer`` makes harmless to repeat.
        """
        return (self._pipeline or self._open()).set(  # type: ignore[no-any-return]
            name, version, data, ttl, if_newer
        )

    def delete(self, name: str) -> asyncio.Future[bool]:
        """Remove a record, whole, half or damaged; return whether there was one.

        Raises RecordError at the call for a bad name.
        """
        return (self._pipeline or self._open()).delete(name)  # type: ignore[no-any-return]

    def get_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, Record]]:
        """Return the records found, by name, in the order of ``names``.

        Raises RecordError at the call for a bad name, and then asks for none of them. Ends in
        BulkError if some can't be read: it has their errors, and the records of the others.
        """
        return (self._pipeline or self._open()).get_bulk(names)  # type: ignore[no-any-return]

    def head_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, int]]:
        """Return the versions of the records found, by name, in the order of ``names``.

        Raises RecordError at the call for a bad name, and then asks for none of them. Ends in
        BulkError if some can't be read: it has their errors, and the versions of the others.
        """
        return (self._pipeline or self._open()).head_bulk(names)  # type: ignore[no-any-return]

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        *,
        ttl: int | None = None,
        if_newer: bool = False,
    ) -> asyncio.Future[builtins.set[str]]:
        """Write records, given as ``{name: (version, data)}``; return the names not written.

        Each record is atomic, the bulk is not: it goes out in commands of some hundred records.
        Without ``if_newer`` all are written, and the set is empty. ``ttl`` is in seconds, and
        holds for all of them. Raises RecordError at the call for a bad record, and then writes
        none. Ends in BulkError if some were not written for another reason: it has their errors.
        """
        return (self._pipeline or self._open()).set_bulk(  # type: ignore[no-any-return]
            records, ttl, if_newer
        )

    def delete_bulk(self, names: Iterable[str]) -> asyncio.Future[int]:
        """Remove records; return how many there were.

        Raises RecordError at the call for a bad name, and then removes none. Ends in BulkError if
        some could not be removed: it has their errors, and the number of the others.
        """
        return (self._pipeline or self._open()).delete_bulk(names)  # type: ignore[no-any-return]

    @property
    def is_ready(self) -> bool:
        """Whether operations go to the server at once."""
        return self._topology is not None and self._topology.is_ready

    @property
    def description(self) -> str:
        """What this cache is and where its records are, in one line and without passwords."""
        server = self._topology.server if self._topology is not None else ""
        return _backend.described(f"{self._config.name} cache", self._config.address, server)

    def stats(self) -> dict[str, Any]:
        """Return counters since the cache was opened; before that, nothing.

        Calls: ``operations``. Records: ``records`` (all that were answered), ``reads``, of these
        ``hits misses`` and ``halves`` (a miss of which Redis held one key), ``damaged writes
        not_newer deletes``, ``failed`` (their call ended in an error), ``overloaded`` (calls that
        were refused). Traffic: ``batches sent mean_batch`` (records a batch), ``commands flushes
        bytes_out bytes_in``. Now: ``queued in_flight`` records, ``pending`` operations and
        ``pending_bytes``, ``connections``. Connections so far: ``connects reconnections
        redirections last_loss``. ``latency`` has its ``bounds`` in seconds, and of each operation
        ``count``, ``sum`` in seconds and ``buckets``, from the call to the answer. On a cluster
        also ``refreshes``, and ``nodes`` with the counters of each. With a near
        cache ``near_cache``: its ``hits misses joins stale invalidations evictions
        dropped_fills``, ``flushes`` by their reason, and what is kept, ``records`` and ``bytes``.
        """
        return {} if self._topology is None else self._topology.stats()

    async def when_ready(self) -> None:
        """Wait until the cache is ready to serve.

        Raises ConnectError if it isn't within ``connectTimeout``, and at once what the server
        says if it refuses (ReplyError: WRONGPASS, NOAUTH, no such database).
        """
        await (self._topology or self._begin()).when_ready()

    async def close(self) -> None:
        """Finish what was issued, within ``closeTimeout``, and close; the second time, nothing."""
        self._closed = True
        self._pipeline = None
        self.__dict__.pop("get", None)
        try:
            if self._topology is not None:
                await self._topology.close()
        except UsageError:
            self._closed = False  # another loop, or process, has closed nothing
            raise

    def __repr__(self) -> str:
        return f"<AsyncCache {self._config.name} at {self._config.address}>"

    def _begin(self) -> Topology:
        """Bind the cache to the running event loop, and begin to connect."""
        if self._closed:
            raise ConnectionLost("the cache is closed")
        running_loop("an AsyncCache")
        self._topology = open_topology(self._config, self._credentials)
        return self._topology

    def _open(self) -> Any:
        if self._closed:
            raise ConnectionLost("the cache is closed")
        self._pipeline = (self._topology or self._begin()).entry
        if self._config.options.near_cache is not None:
            # A hit takes no longer than one more call on the way to it.
            self.__dict__.setdefault("get", self._pipeline.get)
        return self._pipeline
