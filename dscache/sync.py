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
from .config.sources import NO_SOURCE, Source
from .core import failures, typed
from .core.changes import check_arguments, check_change
from .core.condition import ANY, AnyVersion, IfVersion, IfVersions, IfVersionsHeld
from .core.fetch_terms import checked_names, is_async, no_load, not_plain
from .core.markers import KEEP, OMITTED, Ttl
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

    An operation is complete when its call returns. The calling thread borrows a connection, out of
    at most ``maxConnections``, sends the operation and waits for the reply. On a cluster it borrows
    a connection to each node that it needs.

    An operation raises one of these:

    - RecordError: a bad name, version, ttl or data
    - RecordDamaged: the stored value isn't a record
    - UsageError: a closed cache
    - Overloaded: all connections are in use, and ``whenFull`` is error
    - ReplyError: Redis returned an error
    - DeadlineExceeded: no reply within ``commandTimeout``, which is in milliseconds from the call
    - ConnectError: no connection, or a server that can't be used; nothing was sent
    - ConnectionLost: the connection was lost, or the cache closed, before the reply
    - ProtocolError: an invalid reply
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
        """Read a record; return a Record, or None if one of its keys or both are missing.

        ``name`` is any text that isn't empty. ``type`` is a ``msgspec.Struct``, a dataclass or
        another type that msgspec decodes. The Record's ``data`` is then of that type.

        Raises RecordError for a bad name, TypeError for a type that msgspec doesn't know, and
        RecordDamaged if the stored value isn't a record, or doesn't fit the type.
        """
        # Not keyword-only: that would cost each call some hundred instructions.
        if type is not None:
            return self._typed_get(name, type)
        return (self._run or self._open())("get", name)

    def head(self, name: str) -> int | None:
        """Read the version of a record; return an int, or None if there is no such record.

        If one of its two keys is missing, the record counts as missing. Raises RecordError for a
        bad name, and RecordDamaged if the stored text isn't a version.
        """
        return (self._run or self._open())("head", name)

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        *,
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> bool:
        """Write a record; return True, or False if its condition doesn't hold.

        Both keys of the record are written in one atomic step, unless they lie on two nodes of a
        cluster. ``name`` is any text that isn't empty, and ``version`` an int from 0 to 2^63-1.
        ``data`` is any value that msgspec encodes, a pydantic model, or ``msgspec.Raw`` for text
        that is JSON already. Bytes become base64 text.

        ``ttl`` is the record's lifetime in whole seconds or as a timedelta: None for the configured
        default, 0 for no expiry. With a condition, ``dscache.KEEP`` keeps the lifetime that the
        record has; this needs Redis 7.0.

        With ``if_newer``, the record is written only if Redis holds a lower version or no record.
        With ``if_version``, it is written only if Redis holds exactly that version; None stands for
        no record. A write with ``if_newer`` is safe to repeat.

        Raises RecordError for a bad argument, or if both conditions are given. A record whose keys
        lie on two nodes allows no condition, and raises RecordError too.

        If the write may have happened, the call raises ConnectionLost or DeadlineExceeded, and the
        text says so. If there is a condition and the stored text isn't a version, the call raises
        RecordDamaged.
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
        """Remove a record; return whether it existed.

        A damaged record is removed too. So is a record with only one of its two keys, which counts
        as missing. With ``if_version``, the record is removed only if Redis holds exactly that
        version. Otherwise False is returned.

        Raises RecordError for a bad name or version, and RecordDamaged if ``if_version`` is given
        and the stored text isn't a version.
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
        """Read records; return a dict of the Records found by name, in the order of ``names``.

        With a ``type``, the ``data`` of each Record is of that type, as in ``get``.

        Raises RecordError for a bad name; no record is read then. Raises TypeError for a type that
        msgspec doesn't know. If some records can't be read, or don't fit the type, the call raises
        BulkError. The error has the other records as its ``result``.
        """
        if type is not None:
            return self._typed_get_bulk(names, type)
        try:
            return (self._run or self._open())("get_bulk", names)
        except TypeError as error:
            failures.check_iterable("get_bulk", names, error)
            raise

    def head_bulk(self, names: Iterable[str]) -> dict[str, int]:
        """Read versions; return a dict of the versions found by name, in the order of ``names``.

        Raises RecordError for a bad name; no version is read then. If some versions can't be read,
        the call raises BulkError. The error has the other versions as its ``result``.
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
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> builtins.set[str]:
        """Write records ``{name: (version, data)}``; return the set of names not written.

        Each record is written as ``set`` does. The bulk as a whole isn't atomic, because it is sent
        in commands of up to 256 records. The set is empty if there is no condition. ``ttl`` is
        the lifetime of all these records. ``if_version`` maps each name to the version that Redis
        must hold, or to None for no record.

        Raises RecordError for a bad record; no record is written then. If some records can't be
        written, the call raises BulkError. Its ``result`` is the set of other names not written.
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

        Damaged records are removed too. So are records with only one of their two keys, which don't
        count. ``if_version`` maps each name to the version that Redis must hold. A record with
        another version stays, and doesn't count.

        Raises RecordError for a bad name; no record is removed then. If some records can't be
        removed, the call raises BulkError. Its ``result`` is the number of the others.
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
        ttl: Ttl = None,
        type: None = None,
    ) -> Record | None: ...
    @overload
    def update(
        self,
        name: str,
        change: Callable[[_T], Any],
        *,
        default: Any = ...,
        ttl: Ttl = None,
        type: type[_T],
    ) -> Record[_T] | None: ...
    @overload
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = ...,
        ttl: Ttl = None,
        type: Any,
    ) -> Record | None: ...
    def update(
        self,
        name: str,
        change: Callable[[Any], Any],
        *,
        default: Any = OMITTED,
        ttl: Ttl = None,
        type: Any = None,
    ) -> Record | None:
        """Change a record's data; return the Record afterwards, or None if there is none.

        ``change`` gets a copy of the decoded data. It returns the new data, ``dscache.KEEP`` to
        leave the record as it is, or ``dscache.DELETE`` to remove it. None is data too: the record
        becomes null, and a warning is logged once.

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

        No step begins after ``commandTimeout``. A step that has begun gets its own
        ``commandTimeout``.

        Raises RecordError for a bad name, default or ttl, and TypeError for a ``change`` that can't
        be called. The update fails with one of these:

        - the exception of ``change``: nothing is written then
        - RecordMissing: the record doesn't exist, and there is no default
        - DeadlineExceeded: other writers or ``change`` took all of the time
        - RecordDamaged: the stored value isn't a record, or doesn't fit the type
        - RecordError: the new data can't be encoded or doesn't fit the type, or the record has the
          highest version
        - UsageError: ``change`` is async, or updates the same record
        - ConnectionLost, DeadlineExceeded: the write may have happened; the text says so
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
        ttl: Ttl = None,
    ) -> Record:
        """Change part of a record's data; return the Record.

        Pass either ``merge`` or ``path``:

        - ``merge`` is a JSON merge patch (RFC 7396). Its members replace the record's members.
          Objects are merged, and None removes a member.
        - ``path`` names one value, such as ``a.b[0]``, in the syntax of deepstream's client.
          ``value`` replaces it. Without a ``value`` it is removed. Missing objects and lists on the
          way are created.

        ``default`` and ``ttl`` are as for ``update``. A patch that changes nothing writes nothing,
        unless its ``ttl`` is a lifetime.

        Raises RecordError for a bad patch or path, or if the data has no place for the value. The
        call also raises the errors of ``update``.
        """
        name, text = check_arguments(name, default, ttl)
        change = patch_of(name, merge, path, value)
        run = self._changing_run()
        if self._hot_paths:
            self._warn_of_hot_paths((name,))
        if self._loads.checks.keeps_missing:
            self._end_notes((name,), removed=True)
        if_changed = ttl is None or ttl is KEEP
        patched = self._changes.apply(run, "patch", name, change, text, ttl, if_changed)
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
        if isinstance(names, (str, bytes)):
            raise failures.bad_names("get_bulk", names)
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

        The prefix isn't a pattern: a ``*`` in it stands for itself.

        The scan finds every name that exists from its beginning to its end, also while slots of a
        cluster move. The scan may find or miss a name that is written or deleted meanwhile. It may
        find a name twice. If only one key of a record exists, the scan finds the name if that is
        the version key.

        With ``records``, the records are read in bulk. A record with only one key is left out. With
        a ``type``, which needs ``records``, their ``data`` is of that type. ``count``, from 1 to
        100,000, is roughly the number of keys that a server visits at a time. ``cursor`` is the
        ``cursor`` of an earlier scan. The new scan begins after the last batch of the earlier one.
        The scan has a connection of its own, to one server at a time.

        Raises UsageError at the call for a bad argument, and TypeError for a type that msgspec
        doesn't know. The iteration raises the errors of ``get``, and BulkError for records that
        can't be read. The next step continues after an error.
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

        The prefix isn't a pattern: a ``*`` in it stands for itself.

        A change of a record has a ``kind``, the ``name`` and its present ``version``. With
        ``records`` it has the ``record`` too. If a name changes several times before its change is
        taken, the changes become one. The last change of a name has the record's last version,
        unless a gap is reported.

        After a change of kind "gap", the watch may miss changes, until a change of kind "resumed".
        If more than ``max_pending`` names wait to be taken, they are dropped, and a gap is
        reported. With a ``type``, the ``data`` of the records is of that type. If a record doesn't
        fit, its change has the kind "damaged".

        A thread for each primary takes the reports, over a connection of its own. The servers need
        client tracking: Redis 6 or newer. Raises UsageError at the call for a bad argument, and
        TypeError for a type that msgspec doesn't know. Entering the block raises ConnectError if a
        primary can't be reached, and ReplyError if a primary refuses. The iteration raises
        ConnectionLost once the cache is closed.
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
        """Read a record, or load it if it is missing; return a Record, or None.

        If the record is missing, ``load(name)`` is called. It returns the data, a ``Loaded`` with
        data and version, or None if there is nothing to load. One load runs, in the thread of the
        first caller, however many threads and processes fetch the record. All of them get its
        result. If another program writes the record while the load runs, that record stays, and is
        the result.

        ``ttl`` is the lifetime of a loaded record, as for ``set``. ``jitter`` is the share by which
        it varies at random. After ``refresh_after``, one caller loads the record anew while all
        others still get the old record at once. Up to 32 callers of a cache do so at a time.
        ``keep_missing`` is how long all processes remember that a load returned None. All three
        times are whole seconds or a timedelta. With a ``type``, the record's ``data`` is of that
        type, as of ``get``.

        Raises RecordError for a bad argument, TypeError for a ``load`` that can't be called or is a
        coroutine function, and LoadError if the load of a missing record fails, or has failed a
        moment ago. The call also raises the errors of ``get`` and ``set``.
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
        """Read records, or load the missing ones together; return a dict of the Records by name.

        ``load_many`` gets a list of the missing names that no other caller is loading. It returns a
        mapping of name to data or ``Loaded``. A name that is left out has no record. The result has
        the names found, in the order of ``names``. The options are those of ``fetch``.

        Raises RecordError for a bad argument, TypeError for a ``load_many`` that can't be called or
        is a coroutine function, and BulkError if some records can't be read or loaded. The
        BulkError has the other records as its ``result``.
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
        """Wait until the cache is connected: on a cluster, to every primary that can be reached.

        Raises ConnectError after ``connectTimeout``, ReplyError at once if the server refuses the
        login or the database (WRONGPASS, NOAUTH), and ConfigError if ``nodes`` belong to no
        cluster, or the cluster doesn't have the ``db``.
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
        """Close the cache, once all operations have finished or ``closeTimeout`` is over.

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
                topology = self._make_topology()
                near = self._make_near(topology)
                if self._closed:
                    raise failures.closed("cache")
                if self._topology is None:  # no signal handler has opened it meanwhile
                    # In this order: no exception or fork in between leaves the pool alone.
                    self._near = near
                    self._topology = topology
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

    def _make_topology(self) -> Pool | MemoryPool:
        """Return the connections to the server or the cluster, or the records in memory."""
        options = self._config.options
        if self._config.name == "memory":
            return MemoryPool(options)
        if options.nodes:
            from .blocking.cluster_pool import ClusterPool  # needed by clusters alone

            return ClusterPool(self._config, self._credentials)
        if options.sentinels:
            from .blocking.sentinel_pool import SentinelPool

            return SentinelPool(options, self._credentials)
        return Pool(options, self._credentials)

    def _make_near(self, topology: Pool | MemoryPool) -> NearFront | None:
        """Return the near cache, if there is one, and if primaries are read."""
        options = self._config.options
        if options.near_cache is None or not isinstance(topology, Pool):
            return None
        from .blocking.near_cache import NearFront  # most programs have none

        if options.nodes:
            if options.scale_reads in ("slave", "zone"):
                return None
            from .blocking.near_cluster import NearClusterFront

            return NearClusterFront(topology, self._config, self._credentials)
        if options.sentinels and options.role == "slave":
            return None
        if options.near_cache.shared:
            from .blocking.near_host import HostFront

            return HostFront(topology, options, self._credentials)
        return NearFront(topology, options, self._credentials)
