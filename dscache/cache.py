"""AsyncCache: the public API for asyncio servers."""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, TypeVar, cast, overload
from weakref import WeakSet

from . import _backend
from ._cache import CacheBase
from ._limits import SCAN_COUNT, WATCH_PENDING
from .aio.changes import Changes
from .aio.connection import Connection
from .aio.lifecycle import AsyncResource, close_dropped, running_loop
from .aio.loading import Loads, SlowFetches
from .aio.memory import MemoryNode
from .config import Config
from .config.sources import NO_SOURCE, Source
from .core import failures, typed
from .core.changes import check_arguments, check_change
from .core.condition import ANY, AnyVersion, IfVersion, IfVersions, IfVersionsHeld
from .core.fetch_terms import checked_names, no_load
from .core.markers import KEEP, OMITTED, Omitted, Ttl
from .core.patches import patch_of
from .errors import BulkError, ConfigError, ConnectionLost, UsageError, shorten

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .aio.cluster import Cluster
    from .aio.scan import AsyncScan
    from .aio.watch import AsyncWatch
    from .core.pure import Record

T = TypeVar("T")

Topology: TypeAlias = "MemoryNode | Connection | Cluster"
"""The connections of a cache, opened on the running event loop."""


class _Operations(Protocol):
    """The operations of a Pipeline, a Router, a NearCache or a MemoryPipeline."""

    def get(self, name: str) -> asyncio.Future[Record | None]: ...
    def head(self, name: str) -> asyncio.Future[int | None]: ...
    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: Ttl,
        if_newer: bool,
        if_version: IfVersion,
    ) -> asyncio.Future[bool]: ...
    def delete(self, name: str, if_version: IfVersion) -> asyncio.Future[bool]: ...
    def get_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, Record]]: ...
    def head_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, int]]: ...
    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        ttl: Ttl,
        if_newer: bool,
        if_version: IfVersions,
    ) -> asyncio.Future[builtins.set[str]]: ...
    def delete_bulk(
        self, names: Iterable[str], if_version: IfVersionsHeld
    ) -> asyncio.Future[int]: ...
    def read(self, name: str, waiter: Any) -> None: ...
    def read_bulk(self, kind: int, names: Iterable[str], waiter: Any) -> None: ...


_COROUTINES: Final = {"update": "AsyncCache.update", "patch": "AsyncCache.patch"}


class AsyncCache(CacheBase[Topology], AsyncResource):
    """Records in Redis, for one asyncio event loop.

    An operation begins at the call, in the order of the calls, and returns an ``asyncio.Future`` of
    its result. It takes effect even if the future is never awaited. All operations of one turn of
    the loop (a tick) are sent together. If a near cache has the record, the future is done at once.

    ``update``, ``patch`` and ``fetch_bulk`` return a coroutine instead, which does nothing until it
    is awaited.

    An operation raises at the call:

    - RecordError: a bad name, version, ttl or data
    - UsageError: the cache is closed, or belongs to another event loop, thread or process
    - Overloaded: ``maxPending`` or ``maxPendingBytes`` is reached, and ``whenFull`` is error

    Its future fails with one of these:

    - ReplyError: Redis returned an error
    - DeadlineExceeded: no reply within ``commandTimeout``, which is in milliseconds from the call
    - ConnectError: no connection, or a server that can't be used; nothing was sent
    - ConnectionLost: the connection was lost, or the cache closed, before the reply
    - ProtocolError: an invalid reply
    - RecordDamaged: the stored value isn't a record
    - BulkError: some records of a bulk failed; ``errors`` has the errors, and ``result`` the other
      results
    """

    def __init__(
        self,
        source: Source | Config = NO_SOURCE,
        credentials: CredentialProvider | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, credentials, **options)
        config = self._config
        if config.options.near_cache is not None and config.options.near_cache.shared:
            raise ConfigError(
                f"{config.source}: nearCache: shared is for Cache; leave it out, and each process "
                "with an AsyncCache has a near cache of its own"
            )
        self._pipeline: _Operations | None = None
        self._changes = Changes(config.options.command_timeout / 1000)
        self._watches: WeakSet[AsyncWatch] = WeakSet()
        self._loads = Loads(config.options.ttl)
        self._quick_fetch: Callable[..., Any] | None = None

    @overload
    def get(self, name: str, *, type: None = None) -> asyncio.Future[Record | None]: ...
    @overload
    def get(self, name: str, *, type: type[T]) -> asyncio.Future[Record[T] | None]: ...
    @overload
    def get(self, name: str, *, type: Any) -> asyncio.Future[Record | None]: ...
    def get(self, name: str, type: Any = None) -> asyncio.Future[Record | None]:
        """Read a record; the result is a Record, or None if one of its keys or both are missing.

        ``name`` is any text that isn't empty. ``type`` is a ``msgspec.Struct``, a dataclass or
        another type that msgspec decodes. The Record's ``data`` is then of that type.

        Raises RecordError at the call for a bad name, and TypeError for a type that msgspec doesn't
        know. The future fails with RecordDamaged if the stored value isn't a record, or doesn't fit
        the type.
        """
        # Not keyword-only: that would cost each call some hundred instructions.
        if type is not None:
            return self._typed_get(name, type)
        return (self._pipeline or self._open()).get(name)

    def head(self, name: str) -> asyncio.Future[int | None]:
        """Read the version of a record; the result is an int, or None if there is no such record.

        If one of its two keys is missing, the record counts as missing. Raises RecordError at the
        call for a bad name. The future fails with RecordDamaged if the stored text isn't a version.
        """
        return (self._pipeline or self._open()).head(name)

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        *,
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> asyncio.Future[bool]:
        """Write a record; the result is True, or False if its condition doesn't hold.

        Both keys of the record are written in one atomic step, unless they lie on two nodes of a
        cluster. ``name`` is any text that isn't empty, and ``version`` an int from 0 to 2^63-1.
        ``data`` is any value that msgspec encodes, a pydantic model, or ``msgspec.Raw`` for text
        that is JSON already. Bytes become base64 text. The data is encoded at the call.

        ``ttl`` is the record's lifetime in whole seconds or as a timedelta: None for the configured
        default, 0 for no expiry. With a condition, ``dscache.KEEP`` keeps the lifetime that the
        record has; this needs Redis 7.0.

        With ``if_newer``, the record is written only if Redis holds a lower version or no record.
        With ``if_version``, it is written only if Redis holds exactly that version; None stands for
        no record. A write with ``if_newer`` is safe to repeat.

        Raises RecordError at the call for a bad argument, or if both conditions are given. A record
        whose keys lie on two nodes allows no condition, and raises RecordError too.

        If the write may have happened, the future fails with ConnectionLost or DeadlineExceeded,
        and the text says so. If there is a condition and the stored text isn't a version, the
        future fails with RecordDamaged.
        """
        if if_newer:
            if if_newer != 1:
                raise failures.bad_if_newer(f"record {shorten(name)}", if_newer)
            if self._hot_paths:
                self._warn_of_hot_paths((name,))
        operations = self._pipeline or self._open()
        done = operations.set(name, version, data, ttl, if_newer, if_version)
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=False)
        return done

    def delete(self, name: str, *, if_version: int | AnyVersion = ANY) -> asyncio.Future[bool]:
        """Remove a record; the result is whether it existed.

        A damaged record is removed too. So is a record with only one of its two keys, which counts
        as missing. With ``if_version``, the record is removed only if Redis holds exactly that
        version. Otherwise the result is False.

        Raises RecordError at the call for a bad name or version. The future fails with
        RecordDamaged if ``if_version`` is given and the stored text isn't a version.
        """
        done = (self._pipeline or self._open()).delete(name, if_version)
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=True)
        return done

    @overload
    def get_bulk(
        self, names: Iterable[str], *, type: None = None
    ) -> asyncio.Future[dict[str, Record]]: ...
    @overload
    def get_bulk(
        self, names: Iterable[str], *, type: type[T]
    ) -> asyncio.Future[dict[str, Record[T]]]: ...
    @overload
    def get_bulk(self, names: Iterable[str], *, type: Any) -> asyncio.Future[dict[str, Record]]: ...
    def get_bulk(self, names: Iterable[str], type: Any = None) -> asyncio.Future[dict[str, Record]]:
        """Read records; the result maps the names found to Records, in the order of ``names``.

        With a ``type``, the ``data`` of each Record is of that type, as in ``get``.

        Raises RecordError at the call for a bad name; no record is read then. Raises TypeError at
        the call for a type that msgspec doesn't know. If some records can't be read, or don't fit
        the type, the future fails with BulkError. The error has the other records as its
        ``result``.
        """
        if type is not None:
            return self._typed_get_bulk(names, type)
        try:
            return (self._pipeline or self._open()).get_bulk(names)
        except TypeError as error:
            failures.check_iterable("get_bulk", names, error)
            raise

    def head_bulk(self, names: Iterable[str]) -> asyncio.Future[dict[str, int]]:
        """Read versions; the result maps the names found to versions, in the order of ``names``.

        Raises RecordError at the call for a bad name; no version is read then. If some versions
        can't be read, the future fails with BulkError. The error has the other versions as its
        ``result``.
        """
        try:
            return (self._pipeline or self._open()).head_bulk(names)
        except TypeError as error:
            failures.check_iterable("head_bulk", names, error)
            raise

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        *,
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> asyncio.Future[builtins.set[str]]:
        """Write records ``{name: (version, data)}``; the result is the set of names not written.

        Each record is written as ``set`` does. The bulk as a whole isn't atomic, because it is sent
        in commands of up to 256 records. The set is empty if there is no condition. ``ttl`` is
        the lifetime of all these records. ``if_version`` maps each name to the version that Redis
        must hold, or to None for no record.

        Raises RecordError at the call for a bad record; no record is written then. If some records
        can't be written, the future fails with BulkError. Its ``result`` is the set of other names
        not written.
        """
        if if_newer:
            if if_newer != 1:
                raise failures.bad_if_newer("set_bulk", if_newer)
            if self._hot_paths:
                self._warn_of_hot_paths(records if isinstance(records, Mapping) else ())
        done = (self._pipeline or self._open()).set_bulk(records, ttl, if_newer, if_version)
        if self._loads.checks.keeps_missing:
            self._end_notes(records, removed=False)
        return done

    def delete_bulk(
        self, names: Iterable[str], *, if_version: IfVersionsHeld = ANY
    ) -> asyncio.Future[int]:
        """Remove records; the result is the number of records that existed.

        Damaged records are removed too. So are records with only one of their two keys, which don't
        count. ``if_version`` maps each name to the version that Redis must hold. A record with
        another version stays, and doesn't count.

        Raises RecordError at the call for a bad name; no record is removed then. If some records
        can't be removed, the future fails with BulkError. Its ``result`` is the number of the
        others.
        """
        keeps_missing = self._loads.checks.keeps_missing
        try:
            if keeps_missing and not isinstance(names, str | bytes):
                names = list(names)
            done = (self._pipeline or self._open()).delete_bulk(names, if_version)
        except TypeError as error:
            failures.check_iterable("delete_bulk", names, error)
            raise
        if keeps_missing:
            self._end_notes(names, removed=True)
        return done

    @overload
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = ...,
        ttl: Ttl = None,
        type: None = None,
    ) -> Coroutine[Any, Any, Record | None]: ...
    @overload
    def update(
        self,
        name: str,
        change: Callable[[T], Any],
        *,
        default: Any = ...,
        ttl: Ttl = None,
        type: type[T],
    ) -> Coroutine[Any, Any, Record[T] | None]: ...
    @overload
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = ...,
        ttl: Ttl = None,
        type: Any,
    ) -> Coroutine[Any, Any, Record | None]: ...
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = OMITTED,
        ttl: Ttl = None,
        type: Any = None,
    ) -> Coroutine[Any, Any, Record | None]:
        """Change a record's data; the result is the Record afterwards, or None if there is none.

        ``change`` gets a copy of the decoded data. It returns the new data, ``dscache.KEEP`` to
        leave the record as it is, or ``dscache.DELETE`` to remove it. None is data too: the record
        becomes null, and a warning is logged once. It may be a coroutine function.

        The new data is written with the next version, and only if no other writer was first.
        Otherwise the record is read again and ``change`` is called again, until ``commandTimeout``
        is over. So ``change`` may be called several times.

        If the record doesn't exist, ``change`` gets ``default``, and the new data is written with
        version 1. ``ttl`` is as for ``set``: ``dscache.KEEP`` keeps the record's lifetime, and
        without a ``ttl`` it ends.

        With a ``type``, ``change`` gets data of that type, and so does the result. The update then
        removes members that the type doesn't name. If the returned data or the ``default`` doesn't
        fit the type, the update fails with RecordError, and nothing is written. Data of
        ``msgspec.Raw`` isn't checked.

        Updates of one record by one cache run one after the other.

        The result is a coroutine, which must be awaited. No step begins after ``commandTimeout``. A
        step that has begun gets its own ``commandTimeout``.

        Raises RecordError at the call for a bad name, default or ttl, and TypeError for a
        ``change`` that can't be called. The update fails with one of these:

        - the exception of ``change``: nothing is written then
        - RecordMissing: the record doesn't exist, and there is no default
        - DeadlineExceeded: other writers or ``change`` took all of the time
        - RecordDamaged: the stored value isn't a record, or doesn't fit the type
        - RecordError: the new data can't be encoded or doesn't fit the type, or the record has the
          highest version
        - UsageError: ``change`` updates the same record
        - ConnectionLost, DeadlineExceeded: the write may have happened; the text says so
        """
        check_change("update", change)
        if type is not None:
            typed.check_type(type)
        name, text = check_arguments(name, default, ttl)
        return self._change("update", name, change, text, ttl, type=type)

    def patch(
        self,
        name: str,
        merge: Any = OMITTED,
        *,
        path: str | None = None,
        value: Any = OMITTED,
        default: Any = OMITTED,
        ttl: Ttl = None,
    ) -> Coroutine[Any, Any, Record]:
        """Change part of a record's data; the result is the Record.

        Pass either ``merge`` or ``path``:

        - ``merge`` is a JSON merge patch (RFC 7396). Its members replace the record's members.
          Objects are merged, and None removes a member.
        - ``path`` names one value, such as ``a.b[0]``, in the syntax of deepstream's client.
          ``value`` replaces it. Without a ``value`` it is removed. Missing objects and lists on the
          way are created.

        ``default`` and ``ttl`` are as for ``update``. A patch that changes nothing writes nothing,
        unless its ``ttl`` is a lifetime. The result is a coroutine, which must be awaited.

        Raises RecordError at the call for a bad patch or path. The patch fails with RecordError if
        the data has no place for the value, and with the errors of ``update``.
        """
        name, text = check_arguments(name, default, ttl)
        change = patch_of(name, merge, path, value)
        if_changed = ttl is None or ttl is KEEP
        patched = self._change("patch", name, change, text, ttl, if_changed)
        return cast("Coroutine[Any, Any, Record]", patched)  # a patch removes no record

    def _end_notes(self, names: Iterable[str], *, removed: bool) -> None:
        """Remove the notes which remember that written or removed records don't exist."""
        notes = self._loads.checks.notes_after(names, removed=removed)
        if notes:
            # In the tick's batch. A note that stays ends by itself.
            self._open().delete_bulk(notes, ANY).add_done_callback(_ignore)

    def _typed_get(self, name: str, type_: Any) -> asyncio.Future[Record | None]:
        operations = self._pipeline or self._open()
        name = _backend.core.check_name(name)
        waiter = self._loop.create_future()
        typed.get(operations, waiter, name, type_)
        return waiter

    def _typed_get_bulk(
        self, names: Iterable[str], type_: Any
    ) -> asyncio.Future[dict[str, Record]]:
        operations = self._pipeline or self._open()
        try:
            checked = typed.checked(_backend.core.check_name, names)
        except TypeError as error:
            failures.check_iterable("get_bulk", names, error)
            raise
        waiter = self._loop.create_future()
        typed.get_bulk(operations, waiter, checked, type_)
        return waiter

    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[False] = False,
        count: int = SCAN_COUNT,
        cursor: str | None = None,
    ) -> AsyncScan[str]: ...
    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[True],
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: None = None,
    ) -> AsyncScan[Record]: ...
    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[True],
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: type[T],
    ) -> AsyncScan[Record[T]]: ...
    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[True],
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: Any,
    ) -> AsyncScan[Record]: ...
    @overload
    def scan(
        self, prefix: str = "", *, records: bool, count: int = SCAN_COUNT, cursor: str | None = None
    ) -> AsyncScan[str] | AsyncScan[Record]: ...
    def scan(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: Any = None,
    ) -> AsyncScan[Any]:
        """Iterate by ``async for`` over all names that begin with a prefix, or their Records.

        The prefix isn't a pattern: a ``*`` in it stands for itself.

        The scan finds every name that exists from its beginning to its end, also while slots of a
        cluster move. The scan may find or miss a name that is written or deleted meanwhile. It may
        find a name twice. If only one key of a record exists, the scan finds the name if that is
        the version key.

        With ``records``, the records are read in bulk. A record with only one key is left out. With
        a ``type``, which needs ``records``, their ``data`` is of that type. ``count``, from 1 to
        100,000, is roughly the number of keys that a server visits at a time. ``cursor`` is the
        ``cursor`` of an earlier scan. The new scan begins after the last batch of the earlier one.

        Raises UsageError at the call for a bad argument, and TypeError for a type that msgspec
        doesn't know. The iteration raises the errors of ``get``, and BulkError for records that
        can't be read. The next step continues after an error.
        """
        from .aio.scan import AsyncScan  # most programs don't scan

        self._open()  # raises on a closed cache
        assert self._topology is not None
        return AsyncScan(
            self._topology,
            self._config.options,
            lambda: self._closed,
            prefix,
            records=records,
            count=count,
            cursor=cursor,
            type=type,
        )

    @overload
    def watch(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        max_pending: int = WATCH_PENDING,
        type: None = None,
    ) -> AsyncWatch: ...
    @overload
    def watch(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        max_pending: int = WATCH_PENDING,
        type: type[T],
    ) -> AsyncWatch[T]: ...
    @overload
    def watch(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        max_pending: int = WATCH_PENDING,
        type: Any,
    ) -> AsyncWatch: ...
    def watch(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        max_pending: int = WATCH_PENDING,
        type: Any = None,
    ) -> AsyncWatch[Any]:
        """Watch the records whose names begin with a prefix: ``async with``, then ``async for``.

        The prefix isn't a pattern: a ``*`` in it stands for itself.

        A change of a record has a ``kind``, the ``name`` and its present ``version``. With
        ``records`` it has the ``record`` too. If a name changes several times before its change is
        taken, the changes become one. The last change of a name has the record's last version,
        unless a gap is reported.

        After a change of kind "gap", the watch may miss changes, until a change of kind "resumed".
        If more than ``max_pending`` names wait to be taken, they are dropped, and a gap is
        reported. With a ``type``, the ``data`` of the records is of that type. If a record doesn't
        fit, its change has the kind "damaged".

        The servers need client tracking: Redis 6 or newer. Raises UsageError at the call for a bad
        argument, and TypeError for a type that msgspec doesn't know. Entering the block raises
        ConnectError if a primary can't be reached, and ReplyError if a primary refuses. The
        iteration raises ConnectionLost once the cache is closed.
        """
        from .aio.watch import AsyncWatch  # most programs don't watch

        self._open()  # raises on a closed cache
        assert self._topology is not None
        opened = AsyncWatch(
            self,
            self._topology,
            self._config,
            self._credentials,
            prefix,
            records=records,
            max_pending=max_pending,
            type=type,
        )
        self._watches.add(opened)
        return opened

    @overload
    def fetch(
        self,
        name: str,
        load: Callable[[str], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: None = None,
    ) -> asyncio.Future[Record | None]: ...
    @overload
    def fetch(
        self,
        name: str,
        load: Callable[[str], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: type[T],
    ) -> asyncio.Future[Record[T] | None]: ...
    @overload
    def fetch(
        self,
        name: str,
        load: Callable[[str], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: Any,
    ) -> asyncio.Future[Record | None]: ...
    def fetch(
        self,
        name: str,
        load: Callable[[str], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: Any = None,
    ) -> asyncio.Future[Record | None]:
        """Read a record, or load it if it is missing; the result is a Record, or None.

        If the record is missing, ``load(name)`` is called. It returns the data, a ``Loaded`` with
        data and version, or None if there is nothing to load. It may be a coroutine function. One
        load runs, however many tasks, threads and processes fetch the record. All of them get its
        result. If another program writes the record while the load runs, that record stays, and is
        the result.

        ``ttl`` is the lifetime of a loaded record, as for ``set``. ``jitter`` is the share by which
        it varies at random. After ``refresh_after``, one load runs in the background while all
        callers still get the old record at once. A cache runs up to 32 such loads at a time, and
        the others wait. ``keep_missing`` is how long all processes remember that a load returned
        None. All three times are whole seconds or a timedelta. With a ``type``, the record's
        ``data`` is of that type, as of ``get``.

        Cancelling the future doesn't end the load. Raises RecordError at the call for a bad
        argument, and TypeError for a ``load`` that can't be called. The future fails with LoadError
        if the load of a missing record fails, or has failed a moment ago. The future also fails
        with the errors of ``get`` and ``set``.
        """
        # An opened cache has a function of the core in this one's place.
        fetch = self._quick_fetch
        if fetch is None:
            self._open()
            fetch = self._quick_fetch
            assert fetch is not None
        fetched: asyncio.Future[Record | None] = fetch(
            name,
            load,
            ttl=ttl,
            refresh_after=refresh_after,
            jitter=jitter,
            keep_missing=keep_missing,
            type=type,
        )
        return fetched

    @overload
    async def fetch_bulk(
        self,
        names: Iterable[str],
        load_many: Callable[[list[str]], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: None = None,
    ) -> dict[str, Record]: ...
    @overload
    async def fetch_bulk(
        self,
        names: Iterable[str],
        load_many: Callable[[list[str]], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: type[T],
    ) -> dict[str, Record[T]]: ...
    @overload
    async def fetch_bulk(
        self,
        names: Iterable[str],
        load_many: Callable[[list[str]], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: Any,
    ) -> dict[str, Record]: ...
    async def fetch_bulk(
        self,
        names: Iterable[str],
        load_many: Callable[[list[str]], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: Any = None,
    ) -> dict[str, Record]:
        """Read records, or load the missing ones together; the result maps the names to Records.

        ``load_many`` gets a list of the missing names that no other caller is loading. It returns a
        mapping of name to data or ``Loaded``, and may be a coroutine function. A name that is left
        out has no record. The result has the names found, in the order of ``names``. The options
        are those of ``fetch``.

        Raises RecordError for a bad argument, TypeError for a ``load_many`` that can't be called,
        and BulkError if some records can't be read or loaded. The BulkError has the other records
        as its ``result``.
        """
        if not callable(load_many):
            raise no_load("fetch_bulk", "load_many", load_many)
        if type is not None:
            typed.check_type(type)
        terms = self._loads.checks.terms(ttl, refresh_after, jitter, keep_missing, "fetch_bulk")
        entry = self._pipeline or self._open()
        checked = checked_names("fetch_bulk", names)
        reads = self._loads.fetch_bulk(entry, checked, load_many, terms)
        if type is None:
            return await reads
        errors: Mapping[str, Exception] = {}
        try:
            found = await reads
        except BulkError as error:
            found, errors = error.result, error.errors
        return typed.all_with_type(found, errors, type, "fetch_bulk")

    async def when_ready(self) -> None:
        """Wait until the cache is connected: on a cluster, to every primary that can be reached.

        Raises ConnectError after ``connectTimeout``, ReplyError at once if the server refuses the
        login or the database (WRONGPASS, NOAUTH), and ConfigError if ``nodes`` belong to no
        cluster, or the cluster doesn't have the ``db``.
        """
        topology = None if self._closed else self._topology
        await (topology or self._begin()).when_ready()

    async def close(self) -> None:
        """Close the cache, once pending operations have finished or ``closeTimeout`` is over.

        Later operations raise UsageError. A second call does nothing. Raises UsageError on another
        event loop.
        """
        self._closed = True
        self._pipeline = None
        self.__dict__.pop("get", None)
        if self._quick_fetch is not None and self.fetch is self._quick_fetch:
            del self.__dict__["fetch"]
        self._quick_fetch = None
        try:
            for watch in list(self._watches):
                await watch.end(ConnectionLost("the cache is closed"))
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
            raise failures.closed("cache")
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

    def _change(
        self,
        operation: str,
        name: str,
        change: Callable[[Any], Any],
        default: bytes | Omitted,
        ttl: Ttl,
        if_changed: bool = False,
        type: Any = None,
    ) -> Coroutine[Any, Any, Record | None]:
        writer = self._pipeline or self._open()
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=True)
        assert self._topology is not None
        if self._hot_paths:
            self._warn_of_hot_paths((name,))
        # A near cache may be behind. A write doesn't check all that depends on the data read.
        reader = self._topology.pipeline
        changing = self._changes.apply(
            self._loop, reader, writer, operation, name, change, default, ttl, if_changed, type
        )
        # Which Python names if the caller forgets to await it.
        changing.__qualname__ = _COROUTINES[operation]  # type: ignore[attr-defined] # not in typing
        return changing

    def _open(self) -> _Operations:
        if self._closed:
            raise failures.closed("cache")
        pipeline: _Operations = (self._topology or self._begin()).entry
        if self._quick_fetch is None:
            slow = SlowFetches(self._loop, pipeline, self._loads)
            create_waiter, checks = self._loop.create_future, self._loads.checks
            self._quick_fetch = _backend.core.Fetcher(pipeline, create_waiter, checks, slow).quick()
            if getattr(self.fetch, "__func__", None) is AsyncCache.fetch:
                # A hit takes hardly longer than this method's own call would.
                self.fetch = self._quick_fetch  # type: ignore[method-assign] # for this cache
        self._pipeline = pipeline
        if self._config.options.near_cache is not None:
            # A hit takes about as long as this method's own call would.
            self.__dict__.setdefault("get", pipeline.get)
        return pipeline


def _ignore(ended: asyncio.Future[Any]) -> None:
    """Take the outcome of an operation on which nothing depends."""
    if not ended.cancelled():
        ended.exception()
