"""Cache: the public API for servers with threads, or with greenlets."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar, cast, overload
from weakref import WeakSet

from . import _backend
from ._cache import CacheBase
from ._forks import after_fork_in_child
from ._limits import SCAN_COUNT, WATCH_PENDING
from ._locks import make_lock
from .blocking.changes import Changes
from .blocking.loading import Loads, SlowFetches
from .blocking.memory import MemoryPool
from .blocking.pool import Pool
from .config import Config
from .config.sources import Source
from .core import failures, typed
from .core.changes import OMITTED, check_arguments, check_change
from .core.condition import ANY, AnyVersion, IfVersion, IfVersions, IfVersionsHeld
from .core.fetch_terms import checked_names, is_async, no_load, not_plain
from .core.patches import patch_of
from .errors import BulkError, ConnectionLost, DscacheError, shorten

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .blocking.near_cache import NearFront
    from .blocking.scan import Scan
    from .blocking.watch import Watch
    from .core.pure import Record

_T = TypeVar("_T")


class _Run(Protocol):
    """Does one operation of a Pipeline, by its name; the caller knows the type of its result."""

    def __call__(self, operation: str, /, *arguments: Any) -> _T: ...  # type: ignore[type-var] # inferred from the caller


class Cache(CacheBase[Pool | MemoryPool]):
    """Records in Redis, for any number of threads.

    An operation is complete when its call returns. The calling thread sends it over a connection
    that it borrows, out of at most ``maxConnections``, and waits for the reply. On a cluster a
    thread borrows a connection to each node it needs.

    An operation raises RecordError for a bad name, version, ttl or data, RecordDamaged if the
    stored value isn't a record, UsageError if the cache is closed, ReplyError (Redis returned an
    error), DeadlineExceeded (no reply within ``commandTimeout``), ConnectError (no connection),
    ConnectionLost (lost before the reply), Overloaded (all connections are in use, and
    ``whenFull`` is error), or ProtocolError (an invalid reply). A bulk operation raises BulkError,
    which holds the results of the other records.
    """

    def __init__(
        self,
        source: Source | Config,
        credentials: CredentialProvider | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, credentials, **options)
        config = self._config
        if config.options.near_cache is not None and config.options.near_cache.shared:
            from .blocking.near_host import check_host  # few programs share theirs

            check_host(config)
        self._run: _Run | None = None
        self._near: NearFront | None = None
        self._changes = Changes(config.options.command_timeout / 1000)
        self._watches: WeakSet[Watch] = WeakSet()
        self._loads = Loads(config.options.ttl)
        self._quick_fetch: Callable[..., Any] | None = None
        # A signal handler can use the cache while its thread holds the lock.
        self._lock = make_lock()
        after_fork_in_child(self, Cache._reset_after_fork)

    @overload
    def get(self, name: str, *, type: None = None) -> Record | None: ...
    @overload
    def get(self, name: str, *, type: type[_T]) -> Record[_T] | None: ...
    @overload
    def get(self, name: str, *, type: Any) -> Record | None: ...
    def get(self, name: str, type: Any = None) -> Record | None:
        """Return a Record, or None if it doesn't exist or lacks one of its two keys.

        ``name`` is any text that isn't empty. With a ``type``, a ``msgspec.Struct``, dataclass or
        other type that msgspec decodes, the Record's ``data`` is of that type. Raises RecordError
        for a bad name, or if the stored value isn't a record or doesn't fit the type, and TypeError
        for a type that msgspec doesn't know.
        """
        # Not keyword-only: that would cost each call some hundred instructions.
        if type is not None:
            return self._typed_get(name, type)
        return (self._run or self._open())("get", name)

    def head(self, name: str) -> int | None:
        """Return the version of a record, an int, or None if it doesn't exist.

        Raises RecordError for a bad name, or if the stored value is no version.
        """
        return (self._run or self._open())("head", name)

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        *,
        ttl: int | timedelta | None = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> bool:
        """Write a record, version and data in one atomic step, and return True.

        ``name`` is any text that isn't empty, and ``version`` an int from 0 to 2^63-1. ``data`` is
        any value that msgspec encodes, or ``msgspec.Raw`` for text that is JSON already. ``ttl``
        is the record's lifetime in whole seconds or as a timedelta: None for the configured
        default, 0 for no expiry.

        With ``if_newer``, the record is written only if Redis holds a lower version or none. With
        ``if_version``, it is written only if Redis holds exactly that version; None stands for no
        record. Returns False if it isn't written.

        Raises RecordError for a bad argument or for both conditions, and ConnectionLost or
        DeadlineExceeded if a write may or may not have happened; with ``if_newer`` it is safe to
        repeat.
        """
        if if_newer:
            if if_newer != 1:
                raise failures.bad_if_newer(f"record {shorten(name)}", if_newer)
            if self._hot_paths:
                self._warn_of_hot_paths((name,))
        run = self._run or self._open()
        done: bool = run("set", name, version, data, ttl, if_newer, if_version)
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=False)
        return done

    def delete(self, name: str, *, if_version: int | AnyVersion = ANY) -> bool:
        """Remove a record, even a half or damaged one; return whether it existed.

        With ``if_version``, nothing is removed and False is returned unless Redis holds exactly
        that version. Raises RecordError for a bad name or version.
        """
        existed: bool = (self._run or self._open())("delete", name, if_version)
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=True)
        return existed

    @overload
    def get_bulk(self, names: Iterable[str], *, type: None = None) -> dict[str, Record]: ...
    @overload
    def get_bulk(self, names: Iterable[str], *, type: type[_T]) -> dict[str, Record[_T]]: ...
    @overload
    def get_bulk(self, names: Iterable[str], *, type: Any) -> dict[str, Record]: ...
    def get_bulk(self, names: Iterable[str], type: Any = None) -> dict[str, Record]:
        """Return the Records found by their names, in the order of ``names``.

        With a ``type``, the ``data`` of each Record is of that type, as of ``get``. Raises
        RecordError for a bad name; no record is read then. Raises BulkError if some records can't
        be read, or don't fit the type; it has their errors and the other records.
        """
        if type is not None:
            return self._typed_get_bulk(names, type)
        try:
            return (self._run or self._open())("get_bulk", names)
        except TypeError as error:
            failures.check_iterable("get_bulk", names, error)
            raise

    def head_bulk(self, names: Iterable[str]) -> dict[str, int]:
        """Return the versions of the records found, as a dict in the order of ``names``.

        Raises RecordError for a bad name; no version is read then. Raises BulkError if some
        versions can't be read; it has their errors and the other versions.
        """
        try:
            return (self._run or self._open())("head_bulk", names)
        except TypeError as error:
            failures.check_iterable("head_bulk", names, error)
            raise

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        *,
        ttl: int | timedelta | None = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> builtins.set[str]:
        """Write records ``{name: (version, data)}``; return the set of names not written.

        Each record is written atomically, but the bulk isn't: it is sent in commands of some
        hundred records. Without a condition all are written and the set is empty. ``ttl`` is the
        lifetime of all these records, as for ``set``. ``if_version`` maps each name to the version
        that Redis must hold, or to None.

        Raises RecordError for a bad record; no record is written then. Raises BulkError, which has
        the errors, if a write failed.
        """
        if if_newer:
            if if_newer != 1:
                raise failures.bad_if_newer("set_bulk", if_newer)
            if self._hot_paths:
                self._warn_of_hot_paths(records if isinstance(records, Mapping) else ())
        run = self._run or self._open()
        refused: builtins.set[str] = run("set_bulk", records, ttl, if_newer, if_version)
        if self._loads.checks.keeps_missing:
            self._end_notes(records, removed=False)
        return refused

    def delete_bulk(self, names: Iterable[str], *, if_version: IfVersionsHeld = ANY) -> int:
        """Remove records; return the number of records that existed.

        ``if_version`` maps each name to the version that Redis must hold; the number is that of the
        records removed then.

        Raises RecordError for a bad name; no record is removed then. Raises BulkError if some
        records can't be removed; it has their errors and the number of the others.
        """
        keeps_missing = self._loads.checks.keeps_missing
        try:
            if keeps_missing and not isinstance(names, str | bytes):
                names = list(names)
            number: int = (self._run or self._open())("delete_bulk", names, if_version)
        except TypeError as error:
            failures.check_iterable("delete_bulk", names, error)
            raise
        if keeps_missing:
            self._end_notes(names, removed=True)
        return number

    @overload
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = ...,
        ttl: int | timedelta | None = None,
        type: None = None,
    ) -> Record | None: ...
    @overload
    def update(
        self,
        name: str,
        change: Callable[[_T], Any],
        *,
        default: Any = ...,
        ttl: int | timedelta | None = None,
        type: type[_T],
    ) -> Record[_T] | None: ...
    @overload
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = ...,
        ttl: int | timedelta | None = None,
        type: Any,
    ) -> Record | None: ...
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = OMITTED,
        ttl: int | timedelta | None = None,
        type: Any = None,
    ) -> Record | None:
        """Change a record's data; return the Record written, or None if it was removed.

        ``change`` is called with the decoded data, a copy of its own, and returns the new data, or
        ``dscache.KEEP`` to leave the record as it is, or ``dscache.DELETE`` to remove it. The
        record is written with the next version, and only if no other writer was first; otherwise
        it is read again, and ``change`` is called again, until ``commandTimeout`` is over.
        A missing record has the data ``default``, if that is given, and is written with version 1.
        ``ttl`` is that of ``set``. With a ``type``, the data that ``change`` gets, and that of the
        result, are of that type, as of ``get``. Updates of one record by one cache wait for each
        other.

        No step begins after ``commandTimeout``; one that has begun has as much of its own. Raises
        what ``change`` raises, and nothing is written then; RecordMissing if the record doesn't
        exist and no default is given; DeadlineExceeded if other writers or the change took all of
        the time; RecordError if the record has the highest version; and ConnectionLost or
        DeadlineExceeded if the write may or may not have happened.
        """
        check_change("update", change)
        if type is not None:
            typed.check_type(type)
        name, text = check_arguments(name, default, ttl)
        run = self._changing_run()
        if self._hot_paths:
            self._warn_of_hot_paths((name,))
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=True)
        return self._changes.apply(run, "update", name, change, text, ttl, type=type)

    def patch(
        self,
        name: str,
        merge: Any = OMITTED,
        *,
        path: str | None = None,
        value: Any = OMITTED,
        default: Any = OMITTED,
        ttl: int | timedelta | None = None,
    ) -> Record:
        """Change part of a record's data; return the Record.

        ``merge`` is a JSON merge patch (RFC 7396): its members replace those of the record, objects
        are merged, and None removes a member. Or ``path`` names one value, such as ``a.b[0]``, as
        in deepstream's client: ``value`` replaces it, or it is removed if no value is given.
        Missing objects and lists on the way are created. ``default`` and ``ttl`` are those of
        ``update``. A patch that changes nothing writes nothing, unless it has a ``ttl``.

        Raises RecordError for a bad patch or path, or if the data has no place for the value, and
        the errors of ``update``.
        """
        name, text = check_arguments(name, default, ttl)
        change = patch_of(name, merge, path, value)
        run = self._changing_run()
        if self._hot_paths:
            self._warn_of_hot_paths((name,))
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=True)
        patched = self._changes.apply(run, "patch", name, change, text, ttl, ttl is None)
        return cast("Record", patched)  # a patch removes no record

    def _changing_run(self) -> _Run:
        """Return the function that executes the operations of a change.

        The near cache may be behind, and a write doesn't check all that depends on the data read.
        """
        run = self._run or self._open()
        return run if self._near is None else self._near.run_past

    def _end_notes(self, names: Iterable[str], *, removed: bool) -> None:
        """Remove the notes which remember that written or removed records don't exist."""
        notes = self._loads.checks.notes_after(names, removed=removed)
        if notes:
            with suppress(DscacheError):  # a note that stays ends by itself
                (self._run or self._open())("delete_bulk", notes)

    def _typed_get(self, name: str, type_: Any) -> Record | None:
        typed.check_type(type_)
        record: Record | None = (self._run or self._open())("get", name)
        return None if record is None else typed.with_type(record, type_)

    def _typed_get_bulk(self, names: Iterable[str], type_: Any) -> dict[str, Record]:
        typed.check_type(type_)
        records: Mapping[str, Record]
        errors: Mapping[str, Exception] = {}
        try:
            records = (self._run or self._open())("get_bulk", names)
        except BulkError as error:
            records, errors = error.result, error.errors
        except TypeError as error:
            failures.check_iterable("get_bulk", names, error)
            raise
        return typed.all_with_type(records, errors, type_)

    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[False] = False,
        count: int = SCAN_COUNT,
        cursor: str | None = None,
    ) -> Scan[str]: ...
    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[True],
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: None = None,
    ) -> Scan[Record]: ...
    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[True],
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: type[_T],
    ) -> Scan[Record[_T]]: ...
    @overload
    def scan(
        self,
        prefix: str = "",
        *,
        records: Literal[True],
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: Any,
    ) -> Scan[Record]: ...
    @overload
    def scan(
        self, prefix: str = "", *, records: bool, count: int = SCAN_COUNT, cursor: str | None = None
    ) -> Scan[str] | Scan[Record]: ...
    def scan(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        count: int = SCAN_COUNT,
        cursor: str | None = None,
        type: Any = None,
    ) -> Scan[Any]:
        """Iterate over all names that begin with a prefix, or over their Records.

        Every name that exists all the time is found, also while slots of a cluster move. A name
        that is written or deleted meanwhile may be found or not, and a name may be found twice.
        Names are those of version keys, so that a half record is found if it has one; with
        ``records``, the whole records alone are read, in bulk. ``count`` is about how many keys a
        server visits at a time. ``cursor`` is the ``cursor`` of an earlier scan, which goes on
        behind its last batch. The scan has a connection of its own, to one server at a time.

        Raises UsageError at the call for a bad argument. The iteration raises what operations
        raise, and BulkError if records can't be read; it may go on behind that.
        """
        from .blocking.scan import Scan  # most programs don't scan

        self._open()  # raises on a closed cache
        assert self._topology is not None
        return Scan(
            self._topology,
            self._config.options,
            self._credentials,
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
    ) -> Watch: ...
    @overload
    def watch(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        max_pending: int = WATCH_PENDING,
        type: type[_T],
    ) -> Watch[_T]: ...
    @overload
    def watch(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        max_pending: int = WATCH_PENDING,
        type: Any,
    ) -> Watch: ...
    def watch(
        self,
        prefix: str = "",
        *,
        records: bool = False,
        max_pending: int = WATCH_PENDING,
        type: Any = None,
    ) -> Watch[Any]:
        """Watch the records whose names begin with a prefix: ``with``, then ``for``.

        Each change has a ``kind``, the ``name`` and its present ``version``, with ``records`` also
        the ``record``. Several changes of a name that come faster than they are taken are one.
        After the last write, the last change of each name has its last version. A gap, in which
        changes may be missed, is a change of kind "gap", and "resumed" ends it. If more than
        ``max_pending`` names wait to be taken, they are dropped, with a gap. With a ``type``, the
        ``data`` of the records is of that type, and one that doesn't fit is "damaged".

        A thread for each primary takes the reports, over a connection of its own. The servers need
        client tracking: Redis 6 or newer. Raises UsageError at the call for a bad argument.
        Entering the block raises ConnectError if a primary can't be reached, and ReplyError if it
        refuses. The iteration raises ConnectionLost once the cache is closed.
        """
        from .blocking.watch import Watch  # most programs don't watch

        self._open()  # raises on a closed cache
        assert self._topology is not None
        opened = Watch(
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
    ) -> Record | None: ...
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
        type: type[_T],
    ) -> Record[_T] | None: ...
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
    ) -> Record | None: ...
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
    ) -> Record | None:
        """Return a record; if it is missing, ``load(name)`` makes it, once for all callers.

        ``load`` returns the data, or a ``Loaded`` with its version too, or None if there is
        nothing. However many threads and processes fetch a missing record, one load runs, in the
        thread of the first caller, and all get its result. A write by anybody else while the load
        runs is never overwritten, but returned.

        ``ttl`` is the lifetime of a loaded record, as for ``set``; ``jitter`` makes it differ by up
        to that part. After ``refresh_after`` one caller loads the record anew while all others
        still get it at once; up to 32 callers of a cache do so at a time. ``keep_missing`` is how
        long a load's None is remembered for all processes. All three are whole seconds or a
        timedelta. With a ``type``, the record's ``data`` is of that type, as of ``get``.

        Raises LoadError if the load of a missing record fails, RecordError for a bad argument,
        TypeError for a ``load`` that can't be called, and all errors of ``get`` and ``set``.
        """
        # An opened cache has a function of the core in this one's place.
        fetch = self._quick_fetch
        if fetch is None:
            self._open()
            fetch = self._quick_fetch
            assert fetch is not None
        record: Record | None = fetch(
            name,
            load,
            ttl=ttl,
            refresh_after=refresh_after,
            jitter=jitter,
            keep_missing=keep_missing,
            type=type,
        )
        return record

    @overload
    def fetch_bulk(
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
    def fetch_bulk(
        self,
        names: Iterable[str],
        load_many: Callable[[list[str]], Any],
        *,
        ttl: int | timedelta | None,
        refresh_after: int | timedelta | None = None,
        jitter: float = 0.1,
        keep_missing: int | timedelta | None = None,
        type: type[_T],
    ) -> dict[str, Record[_T]]: ...
    @overload
    def fetch_bulk(
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
    def fetch_bulk(
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
        """Return records; one ``load_many(missing names)`` makes the missing ones.

        ``load_many`` gets a list of names, and returns a mapping of name to data or ``Loaded``; a
        name without data has no record. A name that another caller loads already is waited for
        instead. The result maps the names found to Records, in the order of ``names``. The options
        are those of ``fetch``.

        Raises BulkError, which has the errors and the other records, if some can't be loaded.
        """
        if not callable(load_many):
            raise no_load("fetch_bulk", "load_many", load_many)
        if is_async(load_many):
            raise not_plain("fetch_bulk", "load_many")
        if type is not None:
            typed.check_type(type)
        terms = self._loads.checks.terms(ttl, refresh_after, jitter, keep_missing, "fetch_bulk")
        run = self._run or self._open()
        checked = checked_names("fetch_bulk", names)
        if type is None:
            return self._loads.fetch_bulk(run, checked, load_many, terms)
        errors: Mapping[str, Exception] = {}
        try:
            found = self._loads.fetch_bulk(run, checked, load_many, terms)
        except BulkError as error:
            found, errors = error.result, error.errors
        return typed.all_with_type(found, errors, type, "fetch_bulk")

    def when_ready(self) -> None:
        """Wait until the cache is connected.

        Raises ConnectError after ``connectTimeout``, ReplyError at once if the server refuses the
        login or the database (WRONGPASS, NOAUTH), and ConfigError if ``nodes`` belong to no
        cluster.
        """
        self._open()
        assert self._topology is not None
        self._topology.when_ready()
        if self._near is not None:
            self._near.when_ready()

    def stats(self) -> dict[str, Any]:
        stats = super().stats()
        if self._near is not None:
            stats["near_cache"] = self._near.stats()
        return stats

    stats.__doc__ = CacheBase.stats.__doc__

    def close(self) -> None:
        """Close, after other threads' operations have finished or ``closeTimeout`` is over.

        Later operations raise UsageError. A second call does nothing.
        """
        with self._lock:
            already, self._closed = self._closed, True
            self._run = None
            if self._quick_fetch is not None and self.fetch is self._quick_fetch:
                del self.__dict__["fetch"]
            self._quick_fetch = None
        if self._near is not None and not already:
            if self.__dict__.get("get") == self._near.core.get:  # and no other wrapper
                del self.__dict__["get"]
            self._near.close()
        if self._topology is not None and not already:
            for watch in list(self._watches):
                watch.end(ConnectionLost("the cache is closed"))
            self._topology.close()

    def __enter__(self) -> Self:
        try:
            self.when_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    _remedy = "use with, or call its close()"

    def _close_dropped(self, topology: Pool | MemoryPool) -> None:
        if self._near is not None:
            self._near.close()
        topology.close()  # doesn't wait: an operation under way would have kept the cache

    def _reset_after_fork(self) -> None:
        # The thread that held the lock may not exist in the child.
        self._lock = make_lock()
        self._changes.reset_after_fork()
        # The watches of the parent are its own.
        self._watches = WeakSet()
        self._loads.reset_after_fork()
        if self._near is not None:
            self._near.reset_after_fork()

    def _open(self) -> _Run:
        """Return the function that executes operations; it opens the pool at first."""
        with self._lock:
            if self._closed:
                raise failures.closed("cache")
            if self._topology is None:
                self._pid = os.getpid()
                options = self._config.options
                if self._config.name == "memory":
                    self._topology = MemoryPool(options)
                elif options.nodes:
                    from .blocking.cluster_pool import ClusterPool  # needed by clusters alone

                    self._topology = ClusterPool(self._config, self._credentials)
                elif options.sentinels:
                    from .blocking.sentinel_pool import SentinelPool

                    self._topology = SentinelPool(options, self._credentials)
                else:
                    self._topology = Pool(options, self._credentials)
                self._near = self._make_near()
            run: _Run = self._topology.run
            if self._near is not None:
                run = self._near.run
                if type(self).get is Cache.get:
                    # A hit takes about as long as this method's own call would.
                    self.__dict__.setdefault("get", self._near.core.get)
            if self._quick_fetch is None:
                near = None if self._near is None else self._near.core
                slow, checks = SlowFetches(run, self._loads), self._loads.checks
                self._quick_fetch = _backend.core.BlockingFetcher(run, near, checks, slow).quick()
                if getattr(self.fetch, "__func__", None) is Cache.fetch:
                    # A hit takes hardly longer than this method's own call would.
                    self.fetch = self._quick_fetch  # type: ignore[method-assign] # for this cache
            self._run = run
            return run

    def _make_near(self) -> NearFront | None:
        """Return the near cache, if there is one, and if primaries are read."""
        options = self._config.options
        if options.near_cache is None or not isinstance(self._topology, Pool):
            return None
        from .blocking.near_cache import NearFront  # most programs have none

        if options.nodes:
            if options.scale_reads in ("slave", "zone"):
                return None
            from .blocking.near_cluster import NearClusterFront

            return NearClusterFront(self._topology, self._config, self._credentials)
        if options.sentinels and options.role == "slave":
            return None
        if options.near_cache.shared:
            from .blocking.near_host import HostFront

            return HostFront(self._topology, options, self._credentials)
        return NearFront(self._topology, options, self._credentials)
