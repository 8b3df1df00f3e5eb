"""The settings and the bulk reads of a near cache, for both cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import BulkError
from . import constants as c
from . import failures
from .waiters import reject, resolve


@dataclass(slots=True, kw_only=True)
class NearSettings:
    """The settings of a NearCache; times are in seconds.

    ``max_records`` and ``max_bytes`` limit the size of the cache. The bytes are the text of records
    and names plus the overhead of caching them. ``prefixes`` restricts the cache to names that
    begin with one of them; () allows all. With ``serve_stale``, the last known record is served
    while its node is unreachable, marked as stale, but no longer than for ``max_age``. ``check`` is
    called before a read from another thread, and raises if that thread must not read.
    """

    key_prefix: str = ""
    hash_tag: bool = False
    clustered: bool = False
    timeout: float = 1.0
    max_records: int = c.NEAR_RECORDS
    max_bytes: int = c.NEAR_BYTES
    max_age: float = 60.0
    idle_limit: float = 1.0
    prefixes: tuple[str, ...] = ()
    serve_stale: bool = False
    check: Callable[[], object] | None = None


class BulkRead:
    """A bulk read: some records were cached, the others are awaited.

    ``found`` has the cached records or versions, and None for each other name. The pipeline settles
    this object as the waiter for the ``missing`` ones. Other callers may join their ``reads``.
    ``awaited`` has the names of the pending reads that this bulk has joined, and None for the read
    of the pipeline. A read settles again if its first settling raised.
    """

    __slots__ = (
        *("_awaited", "_errors", "_failure", "_found", "_kind", "_missing"),
        *("_near", "_reads", "_rest", "_waiter"),
    )

    def __init__(
        self,
        near: Any,
        kind: int,
        found: dict[str, Any],
        missing: list[str],
        reads: list[Any],
        waiter: Any,
        awaited: set[str | None],
    ) -> None:
        self._near = near
        self._kind = kind
        self._found = found
        self._missing = missing
        self._reads = reads
        self._waiter = waiter
        self._awaited = awaited
        self._rest: dict[str, Any] = {}
        self._errors: dict[str, Exception] = {}
        self._failure: Exception | None = None

    def set_result(self, found: Mapping[str, Any], /) -> None:
        self._take_all(found, {})

    def set_exception(self, error: Exception, /) -> None:
        if isinstance(error, BulkError):
            self._take_all(error.result, error.errors)
        else:
            self._failure = error
            self._take_all({}, dict.fromkeys(self._missing, error))

    def _take_all(self, found: Mapping[str, Any], errors: Mapping[str, Exception]) -> None:
        """Add the results and errors of the pipeline's read."""
        self._rest.update(found)
        self._errors.update(errors)
        self._near.settle_reads(self._reads, found, errors)
        self._count(None)

    def take(self, name: str, record: Any) -> None:
        """Add the result of a pending read that this bulk has joined."""
        self._rest[name] = record
        self._count(name)

    def take_error(self, name: str, error: Exception) -> None:
        """Add the error of a pending read that this bulk has joined."""
        self._errors[name] = error
        self._count(name)

    def _count(self, read: str | None) -> None:
        """Count a settled read; settle the waiter with the last one."""
        # One step, also for an exception: what is counted isn't counted again.
        self._awaited.discard(read)
        if not self._awaited:
            self._end()

    def _end(self) -> None:
        """Settle the waiter with the results and errors of all reads."""
        for name, error in list(self._errors.items()):
            if name not in self._rest and self._kind == c.GET and isinstance(error, failures.AWAY):
                known = self._near.last_known(name)
                if known is not None:
                    self._rest[name] = known
            if name in self._rest:
                del self._errors[name]
        cached = self._found
        found = {**cached, **self._rest}
        result = {name: value for name, value in found.items() if value is not None}
        if not self._errors:
            resolve(self._waiter, result)
            return
        failure = self._failure
        if failure is not None and len(self._errors) == len(cached):
            reject(self._waiter, lambda: failure)
        else:
            operation = c.OPERATIONS[self._kind] + "_bulk"
            reject(self._waiter, partial(BulkError, operation, self._errors, result))
