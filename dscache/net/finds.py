"""The names and Records that a scan has found, and the scan of a cache in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Generic, TypeVar, cast

from ..core import typed
from ..core.failures import check_prefix, check_switch, of_call
from ..core.holder import Holder, Place
from ..core.keys import names_with
from ..errors import BulkError, UsageError, shorten
from .scan import KeyScan, Names, Pause, Reply, Request, Steps, pack, unpack

_MOST_COUNT: Final = 100_000
# Records and bytes that one read of records asks for.
_RECORDS, _BYTES = 256, 4 << 20

Item = TypeVar("Item")


class MemoryScan:
    """A scan of the names in a cache in memory, in their order."""

    skipped = 0

    def __init__(
        self, names: Callable[[], list[str]], prefix: str, count: int, cursor: str | None
    ) -> None:
        self._names = names
        self._prefix = prefix
        self._count = count
        self._said = f"memory {prefix}"
        self._last = unpack(cursor, self._said, str) if cursor is not None else ""

    def cursor(self) -> str:
        """Return the cursor of the names so far."""
        return pack(self._said, self._last)

    def steps(self) -> Steps:
        """Yield the names."""
        matching = names_with(self._prefix, self._names())
        names = sorted(name for name in matching if name > self._last)
        for first in range(0, len(names), self._count):
            some = names[first : first + self._count]
            yield Names(some)
            self._last = some[-1]


class Finds(Generic[Item]):
    """The names or Records that a scan has found and its caller hasn't taken yet.

    A driver calls ``next_step`` and does what the step says. After an exception of any kind it
    calls ``restart``: the scan then goes on behind the last names that were found.
    """

    def __init__(self, scan: KeyScan | MemoryScan, *, records: bool, type: Any = None) -> None:
        self.cursor = scan.cursor
        self.scan = scan
        self.ready: deque[Item] = deque()
        self.unread: list[str] = []
        """Names of records that are still to be read."""
        self._place = Place()  # of the caller that waits for the next item; none may join it
        self._steps = scan.steps()
        self._records = records
        self._type = type
        self._error: BulkError | None = None
        self._batch = _RECORDS

    def next_step(
        self, reply: Reply | None, error: Exception | None
    ) -> Request | Pause | Names | None:
        """Return the next step after the reply to a request, or its error; None at the end."""
        try:
            step = self._steps.send(reply) if error is None else self._steps.throw(error)
        except StopIteration:
            return None
        if isinstance(step, Names):
            if self._records:
                self.unread = [*step.names]
            else:
                self.ready.extend(cast("list[Item]", step.names))
        return step

    def restart(self) -> None:
        """Begin the steps anew, behind the names that were found."""
        self._steps = self.scan.steps()

    def next_names(self) -> list[str]:
        """Return the names of the records to read next; empty if there are none."""
        return self.unread[: self._batch]

    def add_records(
        self, names: list[str], found: Mapping[str, Any], error: BulkError | None = None
    ) -> None:
        """Add the records with these names that were read, and the error of the others."""
        if error is not None:
            of_call(error, "scan")
        records = found
        if self._type is not None:
            try:
                errors = {} if error is None else error.errors
                records = typed.all_with_type(found, errors, self._type, "scan")
            except BulkError as misfits:
                records, error = misfits.result, misfits
        self.ready.extend(cast("Iterable[Item]", records.values()))
        self._error = error
        if found:
            size = sum(len(record.raw) for record in found.values())
            self._batch = max(min(_RECORDS, _BYTES * len(found) // (size + 1)), 1)
        # Last: after an exception before it, the records are read again, and none is missed.
        del self.unread[: len(names)]

    def raise_error(self) -> None:
        """Raise the error of records that could not be read, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def enter(self) -> Holder:
        """Return the object held until there is an item; raises UsageError if it is taken."""
        holder = self._place.take()
        if holder is None:
            raise UsageError("this scan is in use already; call scan() once per consumer")
        return holder


def check_arguments(
    prefix: object, count: object, cursor: object, type: Any, *, records: bool
) -> None:
    """Raise UsageError for a bad argument of ``scan``, and TypeError for an unknown type."""
    check_switch("scan", "records", records)
    if type is not None:
        typed.check_type(type)
        if not records:
            raise UsageError("scan: a type is that of records; give records=True as well")
    check_prefix("scan", prefix)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_COUNT:
        raise UsageError(f"scan: count must be an int from 1 to {_MOST_COUNT}: {shorten(count)}")
    if not isinstance(cursor, str | None):
        raise UsageError(f"scan: cursor must be the cursor of a scan, not {shorten(cursor)}")
