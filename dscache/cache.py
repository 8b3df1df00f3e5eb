"""AsyncCache: the public API for asyncio servers."""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from . import _backend
from ._cache import CacheBase
from .aio.connection import Connection
from .aio.lifecycle import AsyncResource, close_dropped, running_loop
from .aio.loading import Loads
from .aio.memory import MemoryNode
from .config import Config
from .core.condition import ANY, AnyVersion, IfVersion, IfVersions, IfVersionsHeld
from .core.pipeline import unique
from .errors import ConnectionLost, UsageError

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .aio.cluster import Cluster
    from .core.pure import Record

Topology: TypeAlias = "MemoryNode | Connection | Cluster"
"""The connections of a cache, opened on the running event loop."""


class _Operations(Protocol):
    """The operations of a Pipeline, a Router, a NearCache or a MemoryPipeline."""

    def get(self, name: str) -> Awaitable[Record | None]: ...
    def head(self, name: str) -> Awaitable[int | None]: ...
    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: int | None,
        if_newer: bool,
        if_version: IfVersion,
    ) -> asyncio.Future[bool]: ...
    def delete(self, name: str, if_version: IfVersion) -> asyncio.Future[bool]: ...
    def get_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, Record]]: ...
    def head_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, int]]: ...
    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        ttl: int | None,
        if_newer: bool,
        if_version: IfVersions,
    ) -> asyncio.Future[builtins.set[str]]: ...
    def delete_bulk(
        self, names: Iterable[str], if_version: IfVersionsHeld
    ) -> asyncio.Future[int]: ...


class AsyncCache(CacheBase[Topology], AsyncResource):
    """Records in Redis, for one asyncio event loop.

    Every operation returns an ``asyncio.Future``. It is issued at the call, in the order of the
    calls, whether or not it is awaited. All operations of one tick of the loop are sent together.
    Only ``fetch`` and ``fetch_bulk`` are coroutine functions, whose calls do nothing unawaited.
    With a near cache (``nearCache``), ``get`` and ``head`` return a coroutine instead of a Future.
    It must be awaited once; the operation is still issued at the call.

    An operation raises at the call: RecordError for a bad name, version, ttl or data,
    ConnectionLost if the cache is closed, UsageError on another event loop. Its future can fail
    with ReplyError (Redis returned an error), DeadlineExceeded (no reply within
    ``commandTimeout``), ConnectError (no connection), ConnectionLost (lost before the reply),
    ProtocolError (an invalid reply), or RecordError (the stored value is no record). A bulk
    operation fails with BulkError, which holds the results of the other records.
    """

    def __init__(self, config: Config, credentials: CredentialProvider | None = None) -> None:
        super().__init__(config, credentials)
        self._pipeline: _Operations | None = None
        self._loads = Loads(config.options.ttl)

    def get(self, name: str) -> Awaitable[Record | None]:
        """Read a record; the result is a Record, or None if it doesn't exist or lacks one key.

        ``name`` is any text that isn't empty. Raises RecordError at the call for a bad name. The
        future fails with RecordError if the stored value is no record.
        """
        return (self._pipeline or self._open()).get(name)

    def head(self, name: str) -> Awaitable[int | None]:
        """Read the version of a record; the result is an int, or None if it doesn't exist.

        Raises RecordError at the call for a bad name. The future fails with RecordError if the
        stored value is no version.
        """
        return (self._pipeline or self._open()).head(name)

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        *,
        ttl: int | None = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> asyncio.Future[bool]:
        """Write a record, version and data in one atomic step; the result is True.

        ``name`` is any text that isn't empty, and ``version`` an int from 0 to 2^63-1. ``data`` is
        any value that msgspec encodes, or ``msgspec.Raw`` for text that is JSON already; it is
        encoded at the call. ``ttl`` is the record's lifetime in seconds: None for the configured
        default, 0 for no expiry. With ``if_newer``, nothing is written and the result is False if
        Redis holds this version or a higher one. With ``if_version``, nothing is written and the
        result is False unless Redis holds exactly that version, or no record if it is None.

        Raises RecordError at the call for a bad argument, or for both conditions. If a write may or
        may not have happened, the future fails with ConnectionLost or DeadlineExceeded; with
        ``if_newer`` it is safe to repeat.
        """
        return (self._pipeline or self._open()).set(name, version, data, ttl, if_newer, if_version)

    def delete(self, name: str, *, if_version: int | AnyVersion = ANY) -> asyncio.Future[bool]:
        """Remove a record, even a half or damaged one; the result is whether it existed.

        With ``if_version``, nothing is removed and the result is False unless Redis holds exactly
        that version. Raises RecordError at the call for a bad name or version.
        """
        return (self._pipeline or self._open()).delete(name, if_version)

    def get_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, Record]]:
        """Read records; the result maps the names found to Records, in the order of ``names``.

        Raises RecordError at the call for a bad name; no record is read then. The future fails
        with BulkError if some records can't be read; it has their errors and the other records.
        """
        return (self._pipeline or self._open()).get_bulk(names)

    def head_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, int]]:
        """Read versions; the result maps the names found to versions, in the order of ``names``.

        Raises RecordError at the call for a bad name; no version is read then. The future fails
        with BulkError if some versions can't be read; it has their errors and the other versions.
        """
        return (self._pipeline or self._open()).head_bulk(names)

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        *,
        ttl: int | None = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> asyncio.Future[builtins.set[str]]:
        """Write records ``{name: (version, data)}``; the result is the set of names not written.

        Each record is written atomically, but the bulk isn't: it is sent in commands of some
        hundred records. Without a condition all are written and the set is empty. ``ttl`` is the
        lifetime of all these records in seconds. ``if_version`` maps each name to the version that
        Redis must hold, or to None.

        Raises RecordError at the call for a bad record; no record is written then. The future
        fails with BulkError, which has the errors, if a write failed.
        """
        return (self._pipeline or self._open()).set_bulk(records, ttl, if_newer, if_version)

    def delete_bulk(
        self, names: Iterable[str], *, if_version: IfVersionsHeld = ANY
    ) -> asyncio.Future[int]:
        """Remove records; the result is the number of records that existed.

        ``if_version`` maps each name to the version that Redis must hold; the result is the number
        of records removed then.

        Raises RecordError at the call for a bad name; no record is removed then. The future fails
        with BulkError if some records can't be removed; it has their errors and the number of
        the others.
        """
        return (self._pipeline or self._open()).delete_bulk(names, if_version)

    async def fetch(
        self,
        name: str,
        load: Callable[[str], Any],
        *,
        ttl: int | None,
        refresh_after: int | None = None,
        jitter: float = 0.1,
        keep_missing: int | None = None,
    ) -> Record | None:
        """Read a record; if it is missing, ``load(name)`` makes it, once for all callers.

        ``load`` returns the data, or a ``Loaded`` with its version too, or None if there is
        nothing; it may be a coroutine function. However many tasks, threads and processes fetch a
        missing record, one load runs, and all get its result. A cancelled caller ends no load. A
        write by anybody else while the load runs is never overwritten, but returned.

        ``ttl`` is the lifetime of a loaded record in seconds, as for ``set``; ``jitter`` makes it
        differ by up to that part. After ``refresh_after`` seconds one load runs in the background
        while everybody still gets the record at once. ``keep_missing`` is the number of seconds
        for which a load's None is remembered for all processes.

        Raises LoadError if the load fails and there is no record, RecordError for a bad argument,
        and all errors of ``get`` and ``set``.
        """
        checks = self._loads.checks
        terms = checks.known.get((ttl, refresh_after, jitter, keep_missing))
        if terms is None:
            terms = checks.terms(ttl, refresh_after, jitter, keep_missing)
        entry = self._pipeline or self._open()
        if refresh_after is None or checks.recent.get(name, 0.0) > monotonic():
            record = await entry.get(name)
            if record is not None:
                return record
            found: Record | None = await self._loads.load(entry, str(name), load, terms)
        else:
            found = await self._loads.fetch(entry, _backend.core.check_name(name), load, terms)
        return found

    async def fetch_bulk(
        self,
        names: Iterable[str],
        load_many: Callable[[list[str]], Any],
        *,
        ttl: int | None,
        refresh_after: int | None = None,
        jitter: float = 0.1,
        keep_missing: int | None = None,
    ) -> dict[str, Record]:
        """Read records; one ``load_many(missing names)`` makes those that are missing.

        ``load_many`` gets a list of names, and returns a mapping of name to data or ``Loaded``; a
        name without data has no record. It may be a coroutine function. A name that another caller
        loads already is waited for instead. The result maps the names found to Records, in the
        order of ``names``. The options are those of ``fetch``.

        Raises BulkError, which has the errors and the other records, if some can't be loaded.
        """
        given = ttl, refresh_after, jitter, keep_missing
        terms = self._loads.checks.known.get(given) or self._loads.checks.terms(*given)
        entry = self._pipeline or self._open()
        checked = list(unique("fetch_bulk", names))
        return await self._loads.fetch_bulk(entry, checked, load_many, terms)

    async def when_ready(self) -> None:
        """Wait until the cache is connected.

        Raises ConnectError after ``connectTimeout``, and ReplyError at once if the server refuses
        the login or the database (WRONGPASS, NOAUTH).
        """
        await (self._topology or self._begin()).when_ready()

    async def close(self) -> None:
        """Close, after pending operations have finished or ``closeTimeout`` is over.

        A second call does nothing. Raises UsageError on another event loop.
        """
        self._closed = True
        self._pipeline = None
        self.__dict__.pop("get", None)
        try:
            if self._topology is not None:
                if self._loop is asyncio.get_running_loop() and self._pid == os.getpid():
                    await self._loads.close(self._config.options.close_timeout / 1000)
                await self._topology.close()
        except UsageError:
            self._closed = False  # the call of another loop or process closes nothing
            raise

    _remedy = "use async with, or await its close()"

    def _close_dropped(self, topology: Topology) -> None:
        close_dropped(self._loop, topology.close)

    def _begin(self) -> Topology:
        """Bind the cache to the running event loop and start connecting."""
        if self._closed:
            raise ConnectionLost("the cache is closed")
        self._loop = running_loop("an AsyncCache")
        self._pid = os.getpid()
        if self._config.name == "memory":
            self._topology = MemoryNode(self._config.options)
        elif self._config.options.nodes:
            from .aio.cluster import Cluster  # most caches don't need it; the import takes time

            self._topology = Cluster(self._config, self._credentials)
        else:
            self._topology = Connection(self._config.options, self._credentials)
        return self._topology

    def _open(self) -> _Operations:
        if self._closed:
            raise ConnectionLost("the cache is closed")
        pipeline: _Operations = (self._topology or self._begin()).entry
        self._pipeline = pipeline
        if self._config.options.near_cache is not None:
            # A hit takes about as long as this method's own call would.
            self.__dict__.setdefault("get", pipeline.get)
        return pipeline
