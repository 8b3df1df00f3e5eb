"""The changes that a watch has heard of and its caller hasn't taken yet, for both caches.

Servers report changed keys by client tracking in broadcast mode, without their values. The caller
of a watch reads the versions when it asks for the next change. So several changes of one name that
came while it was busy are one. This module does no I/O, and any thread may use it.

Theory of operation
-------------------
A change is read behind the report of it, and reports of later changes make the name pending again.
So the last change of a name that the caller gets has the last version, unless reports were lost.

A loss of reports is an event, and so is their return. An event is given behind the changes that
were read before it, and before the changes that are read after it. So a caller that reads all names
again at each RESUMED and FLUSHED, and then goes on, ends with the servers' records.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, Literal

from msgspec.structs import replace as replaced

from .._interruptions import raise_interruption
from .._locks import make_lock
from ..config import Options
from ..core import typed
from ..core.failures import check_prefix, check_switch
from ..core.keys import KeyLayout, names_with
from ..core.record import DataT
from ..errors import BulkError, RecordError, ReplyError, UsageError, shorten

if TYPE_CHECKING:
    from ..core.pure import Record

_logger = logging.getLogger("dscache")

Kind = Literal["changed", "deleted", "damaged", "flushed", "gap", "resumed"]

CHANGED: Final = "changed"
DELETED: Final = "deleted"
DAMAGED: Final = "damaged"
FLUSHED: Final = "flushed"
GAP: Final = "gap"
RESUMED: Final = "resumed"

CHECK_INTERVAL: Final = 1.0
"""Seconds between two checks of the primaries, and of the role of each."""
PAUSE: Final = 0.05
"""The first limit of the pause before the next attempt to connect, in seconds."""
LONGEST_PAUSE: Final = 2.0
# Names in one request for versions.
_BATCH: Final = 1000
# Events that wait; a server that comes and goes makes two each time.
_MOST_EVENTS: Final = 1000
_MOST_PENDING: Final = 10_000_000
# Error replies that end by themselves.
_PASSING: Final = frozenset(("LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "TRYAGAIN"))


@dataclass(frozen=True, slots=True)
class Change(Generic[DataT]):
    """A change of a record, of all records, or of the watch itself.

    ``kind`` is one of these:

    - "changed": the record ``name`` was written
    - "deleted": the record ``name`` is gone
    - "damaged": the record can't be read, for the ``reason``
    - "flushed": the server ``node`` has removed all its records
    - "gap": from now on, the watch may miss changes, for the ``reason``
    - "resumed": the watch reports changes again
    """

    kind: Kind
    name: str = ""
    """The name of the record; empty for a change that isn't of one record."""
    version: int | None = None
    """The version as it was read after the report of the change."""
    record: Record[DataT] | None = None
    """The record as it was read after the report of the change, if the watch reads records."""
    node: str = ""
    """The server's address for "gap", "resumed" and "flushed"; empty if all servers are meant."""
    reason: str = ""
    """The reason of a gap, or of damage, in words."""
    _read: Callable[[str], Any] | None = field(default=None, repr=False, compare=False)

    @property
    def is_loss(self) -> bool:
        """Whether a copy of the records must be read again, after "resumed" and "flushed": bool."""
        return self.kind in (RESUMED, FLUSHED)


class Changes:
    """The pending names and events of a watch on a prefix.

    ``on_news`` is called when there is something to take, and must not block. A driver calls
    ``move_events``, and then ``take_names`` if there are no events. It gives the results of its
    reads to ``changes_of``, and names that could not be read to ``back``. Then it calls ``finish``.
    """

    def __init__(
        self,
        options: Options,
        prefix: str,
        on_news: Callable[[], object],
        *,
        records: bool,
        max_pending: int,
        read: Callable[[str], Any],
        kind: type[Change],
        as_type: Any = None,
    ) -> None:
        check_arguments(prefix, max_pending)
        check_switch("watch", "records", records)
        if as_type is not None:
            typed.check_type(as_type)
        layout = KeyLayout(options.key_prefix, options.hash_tag)
        starts = [start for start in layout.starts(prefix) if start]
        self.tracking: list[bytes | str | int] = [
            *("CLIENT", "TRACKING", "ON", "BCAST"),
            *(word for start in starts for word in ("PREFIX", start)),
        ]
        self.operation = "get_bulk" if records else "head_bulk"
        """How the names are read."""
        self._records = records
        self._type = as_type
        self._name_of = layout.name_of
        self._layout = layout
        self.skipped = 0
        """The number of reports left out, of keys whose names aren't UTF-8."""
        self._prefix = prefix
        self._on_news = on_news
        self._max_pending = max_pending
        self._batch = max(min(_BATCH, options.max_pending // 4), 1)
        self._read = read
        self._kind = kind
        self._lock = make_lock()
        self._names: dict[str, None] = {}
        self._taken: list[str] = []
        self._events: deque[Change] = deque()
        # The servers that report no changes, each with the reason.
        self._lost: dict[str, str] = {}

    # -- from the servers

    def take_push(self, node: str, push: list[Any]) -> None:
        """Take a server's push: the changed keys, or None after a flush."""
        if len(push) != 2 or push[0] != b"invalidate":
            return
        keys = push[1]
        if keys is None:
            self._add_event(self._kind(FLUSHED, node=node))
            return
        names = dict.fromkeys(map(self._name_of, keys))
        if None in names:
            self._note_skipped(keys)
        self.note_changed(names)

    def _note_skipped(self, keys: Iterable[bytes]) -> None:
        """Count the keys of names that are no UTF-8, which no operation can read."""
        skipped = [key for key in keys if self._layout.is_no_text(key)]
        if skipped and not self.skipped:
            _logger.warning(
                "watch: the name in key %s is no UTF-8, so that no operation can read its record; "
                "watch leaves such names out, and counts them in skipped",
                shorten(skipped[0]),
            )
        self.skipped += len(skipped)

    def note_changed(self, names: Iterable[str | None]) -> None:
        """Take the names of records that have changed, of any prefix."""
        self.back(names_with(self._prefix, names))

    def back(self, names: Iterable[str]) -> None:
        """Make names pending, to be read."""
        with self._lock:
            self._names.update(dict.fromkeys(names))
            if len(self._names) > self._max_pending:
                self._names.clear()
                reason = f"more than {self._max_pending:,} names were pending (max_pending)"
                self._add_event(self._kind(GAP, reason=reason))
                self._add_event(self._kind(RESUMED))
            is_news = bool(self._names)
        if is_news:
            self._on_news()

    def lose(self, node: str, reason: str) -> None:
        """Note that a server reports no changes, unless that is noted already."""
        with self._lock:
            if node not in self._lost:
                self._lost[node] = reason
                self._add_event(self._kind(GAP, node=node, reason=reason))

    def resume(self, node: str) -> None:
        """Note that a server reports changes, after it was lost."""
        with self._lock:
            if node in self._lost:
                del self._lost[node]
                self._add_event(self._kind(RESUMED, node=node))

    def leave(self, node: str, reason: str) -> None:
        """Note that a server holds no records of the watch any more."""
        with self._lock:
            self.lose(node, reason)
            # The records are at other servers, whose gaps end by themselves.
            self.resume(node)

    def _add_event(self, event: Change) -> None:
        with self._lock:
            if len(self._events) < _MOST_EVENTS:
                self._events.append(event)
            else:
                kind = self._kind
                dropped = kind(GAP, reason=f"{_MOST_EVENTS} events were pending")
                # The gaps that have not ended are told again behind it.
                gaps = [kind(GAP, node=node, reason=why) for node, why in self._lost.items()]
                self._events = deque([dropped, kind(RESUMED), *gaps])
        self._on_news()

    # -- to the caller

    # An exception may strike anywhere. So each event or name is added to its new place before it is
    # removed from the old one: it may be given twice, and is never lost.

    def move_events(self, found: deque[Any]) -> None:
        """Move the waiting events behind the changes that were read before them."""
        with self._lock:
            found.extend(self._events)
            self._events.clear()

    def take_names(self) -> list[str]:
        """Return some names to read; empty if none are pending.

        Names are given again unless ``finish`` has been called for them.
        """
        with self._lock:
            names = self._names
            for name in self._taken:
                names.setdefault(name)
            self._taken = taken = list(islice(names, self._batch))
            for name in taken:
                del names[name]
            return taken

    def finish(self) -> None:
        """Forget the names that were taken, as they have been read or put back."""
        self._taken = []

    def changes_of(
        self, names: Iterable[str], found: Mapping[str, Any], error: BulkError | None = None
    ) -> list[Change]:
        """Return the changes of names that were read; names to be read again become pending."""
        errors = {} if error is None else error.errors
        kind, read = self._kind, self._read
        changes: list[Change] = []
        again: list[str] = []
        for name in names:
            one = found.get(name)
            if name in errors:
                reason = errors[name]
                if is_final(reason):
                    changes.append(kind(DAMAGED, name, reason=str(reason), _read=read))
                else:
                    again.append(name)
            elif one is None:
                changes.append(kind(DELETED, name, _read=read))
            elif self._records:
                changes.append(self._changed(name, one))
            else:
                changes.append(kind(CHANGED, name, one, _read=read))
        if again:
            self.back(again)
        return changes

    def _changed(self, name: str, record: Record) -> Change:
        if self._type is not None:
            try:
                record = typed.with_type(record, self._type)
            except Exception as error:  # msgspec passes on any exception of a user's own type
                raise_interruption(error)
                return self._kind(DAMAGED, name, reason=str(error), _read=self._read)
        return self._kind(CHANGED, name, record.version, record, _read=self._read)


def is_final(error: Exception) -> bool:
    """Return whether reading a record again would fail in the same way."""
    if isinstance(error, ReplyError):
        return error.code not in _PASSING
    return isinstance(error, RecordError)


def primaries_only(options: Options) -> Options:
    """Return options of a cache that reads from primaries, and without a near cache.

    A replica may not have a change yet that its primary has reported.
    """
    return replaced(options, scale_reads="master", role="master", near_cache=None)


def check_role(address: str, role: object, *, must_be_primary: bool) -> bool:
    """Return whether a server is a primary, by its reply to ROLE; True if it doesn't tell.

    Raises ReplyError if it must be one and isn't. A server outside Sentinels and clusters may be
    a replica by intention, as long as it was no primary before.
    """
    is_primary = not isinstance(role, list) or not role or role[0] == b"master"
    if must_be_primary and not is_primary:
        raise ReplyError(f"{address} has become a replica")
    return is_primary


def check_pushes(address: str, hello: object) -> None:
    """Raise ReplyError unless the reply to HELLO says that the connection has RESP3."""
    if isinstance(hello, dict):
        return
    needs = "it can't report changes; watch needs Redis 6 or newer, without a proxy before it"
    if isinstance(hello, ReplyError):
        raise ReplyError(
            hello.message, context=f"watch: without HELLO, {address} has no RESP3, so {needs}"
        )
    raise ReplyError(f"{address} has no RESP3, so {needs}")


def check_arguments(prefix: object, max_pending: object) -> None:
    """Raise UsageError for a bad argument of ``watch``."""
    check_prefix("watch", prefix)
    is_int = isinstance(max_pending, int) and not isinstance(max_pending, bool)
    if not is_int or not 1 <= max_pending <= _MOST_PENDING:  # type: ignore[operator] # is_int
        raise UsageError(
            f"watch: max_pending must be an int from 1 to {_MOST_PENDING}: {shorten(max_pending)}"
        )
