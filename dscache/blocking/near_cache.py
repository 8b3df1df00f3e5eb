"""The near cache of a Cache: its operations, in front of the pool's.

A hit is a call into the core and nothing else. The pool does misses and writes, as it does without
a near cache. This module tells the core of each, before and after. The theory of operation stands
in ``core/shared_near.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .. import _backend
from .._locks import make_lock
from ..config import Options
from ..core import constants as c
from ..core import typed
from ..core.failures import AWAY
from ..errors import BulkError
from .connector import on_renewal
from .foreign_errors import raise_foreign
from .near_link import NearConnection, NearLink
from .pool import Asked, Pool

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.record import Record

# The part of ``commandTimeout`` for which the first operation of a process waits for the link, so
# that the answers of the first operations can be kept already.
_SHARE: Final = 0.1


class NearFront:
    """The operations of a Pool, with a near cache before them."""

    def __init__(
        self, pool: Pool, options: Options, credentials: CredentialProvider | None
    ) -> None:
        self._pool = pool
        self._options = options
        self._credentials = credentials
        self._closed = False
        self._lock = make_lock()
        self.core = self._make_core()
        self._begin()
        self._operations: dict[str, Callable[..., Any]] = {
            "get": self.core.get,
            "head": self.core.head,
            "get_bulk": partial(self._read_bulk, c.GET),
            "head_bulk": partial(self._read_bulk, c.HEAD),
            "set": partial(self._write, "set"),
            "delete": partial(self._write, "delete"),
            "set_bulk": self._set_bulk,
            "delete_bulk": self._delete_bulk,
        }
        on_renewal(credentials, self._renew, options.address)
        pool.on_moved(self._follow_server)

    def _make_core(self) -> Any:
        """Return the entries and the rules for them."""
        make = _backend.core.SharedNearCache
        return make(self._get, self._head, **self._options.for_near_cache())

    # -- operations

    def run(self, operation: str, *arguments: Any) -> Any:
        """Do one operation of a Pipeline, by its name; return its result or raise its error."""
        mine = self._operations.get(operation)
        return self._pool.run(operation, *arguments) if mine is None else mine(*arguments)

    def run_past(self, operation: str, *arguments: Any) -> Any:
        """Do one operation, as ``run`` does, but let no entry answer a ``get``."""
        if operation == "get":
            return self._get(arguments[0], None)
        return self.run(operation, *arguments)

    def _get(self, name: str, type_: Any) -> Any:
        """Read a record that isn't cached, or one of a type."""
        if type_ is not None:
            typed.check_type(type_)
            record = self.core.get(name)
            return None if record is None else typed.with_type(record, type_)
        name = _backend.core.check_name(name)
        self._check()
        stamp = self._stamp()
        operation = Asked("get")
        entry = self.core.begin_read(name)
        try:
            record = self._pool.run(operation, name)
        except AWAY as error:
            raise_foreign(error)
            record = self.core.last_known(name)
            if record is None:
                raise
            return record
        if entry is None:
            self.core.observe(name, None if record is None else record.version)
        else:
            self.core.settle(entry, record, self._is_of_owner(operation, stamp))
        return record

    def _head(self, name: str) -> Any:
        name = _backend.core.check_name(name)
        self._check()
        self.core.count_misses(1)
        version = self._pool.run("head", name)
        self.core.observe(name, version)
        return version

    def _read_bulk(self, kind: int, names: Iterable[str]) -> dict[str, Any]:
        found, missing = self.core.find(kind, names)
        if not missing and found:
            # All are cached, though some may be known not to exist.
            return {name: value for name, value in found.items() if value is not None}
        self._check()
        read = self._get_missing if kind == c.GET else self._head_missing
        errors: dict[str, Exception] = {}
        failure: Exception | None = None
        try:
            found.update(read(missing))
        except BulkError as error:
            raise_foreign(error)
            found.update(error.result)
            errors = dict(error.errors)
        except AWAY as error:
            raise_foreign(error)
            failure = error
            errors = dict.fromkeys(missing, failure)
        if kind == c.GET:
            for name, reason in list(errors.items()):
                known = self.core.last_known(name) if isinstance(reason, AWAY) else None
                if known is not None:
                    found[name] = known
                    del errors[name]
        result = {name: value for name, value in found.items() if value is not None}
        try:
            if failure is not None and len(errors) == len(found):
                raise failure
            if errors:
                raise BulkError(c.OPERATIONS[kind] + "_bulk", errors, result)
        finally:
            # Their tracebacks hold this frame: break the cycle.
            del failure, errors
        return result

    def _get_missing(self, names: list[str]) -> dict[str, Any]:
        stamp = self._stamp()
        entries = [self.core.begin_read(name) for name in names]
        operation = Asked("get_bulk")
        connects = self._pool.connects
        failed: Mapping[str, object] = {}
        found: Mapping[str, Record] = {}
        try:
            result: dict[str, Any] = self._pool.run(operation, names)
            found = result
        except BulkError as error:
            found, failed = error.result, error.errors
            raise
        except BaseException:
            failed = dict.fromkeys(names)
            raise
        finally:
            # Before and behind a reconnection, two servers may have answered parts of it.
            is_whole = self._pool.connects <= (connects or 1)
            is_of_owner = is_whole and self._is_of_owner(operation, stamp)
            for name, entry in zip(names, entries, strict=True):
                if name in failed:
                    continue
                record = found.get(name)
                if entry is None:
                    self.core.observe(name, None if record is None else record.version)
                else:
                    self.core.settle(entry, record, is_of_owner)
        return result

    def _head_missing(self, names: list[str]) -> dict[str, int]:
        self.core.count_misses(len(names))
        try:
            found: dict[str, int] = self._pool.run("head_bulk", names)
        except BulkError as error:
            self._observe(names, error.result, error.errors)
            raise
        self._observe(names, found, {})
        return found

    def _observe(
        self, names: list[str], found: Mapping[str, int], failed: Mapping[str, Exception]
    ) -> None:
        for name in names:
            if name not in failed:
                self.core.observe(name, found.get(name))

    def _write(self, operation: str, name: str, *arguments: Any) -> Any:
        name = _backend.core.check_name(name)
        self._check()
        write = self.core.begin_write([name])
        try:
            return self._pool.run(operation, name, *arguments)
        finally:
            write.end()

    def _set_bulk(self, records: Mapping[str, Any], *arguments: Any) -> Any:
        if isinstance(records, Mapping):
            records = dict(records.items())
        return self._write_bulk("set_bulk", records, *arguments)

    def _delete_bulk(self, names: Iterable[str], *arguments: Any) -> Any:
        if not isinstance(names, (str, bytes)):
            names = list(names)
        return self._write_bulk("delete_bulk", names, *arguments)

    def _write_bulk(self, operation: str, names: Any, *arguments: Any) -> Any:
        self._check()
        # Of bad names there are no entries, and the pool refuses them.
        write = self.core.begin_write([name for name in names if type(name) is str])
        try:
            return self._pool.run(operation, names, *arguments)
        finally:
            write.end()

    # -- the links

    def _begin(self) -> None:
        self._started = False
        self._links: list[NearLink] = []

    def _make_links(self) -> list[NearLink]:
        """Return the links to begin with."""
        node = self._node = self.core.only_node()
        return [
            NearLink(
                self._options,
                self._credentials,
                node,
                on_connected=self._leave_strangers,
                pool=self._pool,
            )
        ]

    def _leave_strangers(self, connection: NearConnection) -> None:
        self._pool.leave_strangers(connection.identity or "")

    def _stamp(self) -> object:
        """Return the state before a read, for ``_is_of_owner`` to compare with."""
        return None

    def _is_of_owner(self, operation: Asked, stamp: object) -> bool:
        """Whether an answer is of the server that reports its changes."""
        node = self._node
        identity = operation.identity
        if identity == node.identity:
            return True
        if identity is not None and node.is_live:
            for link in self._links:
                link.restart("another server answers")
        return False

    def _check(self) -> None:
        """Start the links at the first use. Raises the error of a server that refuses."""
        if not self._started:
            self._start()
        for link in self._links:
            if link.refusal is not None:
                raise link.refusal("nearCache")

    def _start(self) -> None:
        with self._lock:
            if self._started or self._closed:
                return
            self._links = self._links or self._make_links()
            for link in self._links:
                link.start()
            self._started = True
        for link in self._links:
            link.wait(self._options.command_timeout / 1000 * _SHARE)

    def _follow_server(self) -> None:
        """Have the links follow the server to its new address."""
        for link in self._links:
            link.restart("the server has moved")

    def _renew(self) -> None:
        """Have the links log in anew: there are new credentials."""
        for link in self._links:
            link.renew()

    def when_ready(self) -> None:
        """Wait until the changes are reported, or it is known that they aren't.

        Raises the server's error if it refuses and ``nearCache.required`` is set.
        """
        self._start()
        limit = time.monotonic() + self._options.connect_timeout / 1000
        for link in self._links:
            link.wait(max(limit - time.monotonic(), 0))
        self._check()

    # -- the end

    def stats(self) -> dict[str, Any]:
        """Return the counters of the near cache."""
        counts: dict[str, Any] = self.core.stats()
        return counts

    def close(self) -> None:
        """End the links, and keep nothing any more."""
        with self._lock:
            self._closed = True
            links = self._links
        self.core.close()
        for link in links:
            link.stop()
        for link in links:
            link.join()

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child, without the parent's sockets and entries."""
        self._lock = make_lock()
        links = self._links
        self.core.reset()
        self._begin()
        for link in links:
            link.leave()
