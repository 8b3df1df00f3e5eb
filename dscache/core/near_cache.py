"""Records cached in the process until Redis reports a change; the pure twin of ``near_cache.pxi``.

Theory of operation
-------------------
A server that tracks a connection (RESP3, ``CLIENT TRACKING``) pushes an invalidation over the same
connection when a key that was read over it changes. Replies and pushes arrive in the order of that
one stream, and the parser handles both: a reply fills the cache, a push drops the keys it names.

A cached record is valid under four conditions, which each lookup checks:

1. The **epoch** of the record is live: the connection that read it is up, and has been tracked
   since. A lost connection, a FLUSHALL or a new login ends the epoch and all its records.
2. The server has answered a command that was sent within the last ``idle_limit`` seconds. Every
   invalidation from before that command has then arrived. Incoming bytes alone don't prove this: a
   slow link may have more bytes in transit.
3. On a cluster, the slot of the record has not moved. After a move, another node sends the
   invalidations.
4. The record is younger than ``max_age``.

**Own writes.** A read that is older than a write of the same name may be answered after the write
was issued, and must not restore the old record. Each write leaves a **fence**, the current serial,
and a read older than the fence fills nothing. Later callers don't join such a read.

**One read for all.** Callers that miss the same name share one **pending read**. A caller that
joins a read already sent may get the value from just before the call. A near cache allows for that
much: the time that a message takes. A read that has been pending for a twentieth of the time limit
accepts no more callers, since its deadline is earlier than theirs.

When full, the cache evicts entries in the order of arrival. An entry hit in the meantime stays for
another round.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from sys import getsizeof
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from . import constants as c
from . import failures, typed
from .batch import latest_serial
from .condition import ANY, IfVersion, IfVersions, IfVersionsHeld
from .markers import Ttl
from .near_parts import BulkRead, NearSettings
from .record import Record, check_name
from .resp import Encoder
from .tracking import LIVE
from .waiters import Part, reject, resolve

if TYPE_CHECKING:
    from .pipeline import Pipeline

# Bytes of overhead per record, without the text of name and data and without the dict.
NEAR_ENTRY_BYTES: Final = 290
_NO_TABLE: Final = getsizeof(OrderedDict())


class Reachability:
    """The state of the connection to one node; ``up`` while connected.

    ``over`` is set when every record read from the node so far is known to be outdated.
    """

    __slots__ = ("over", "up")

    def __init__(self) -> None:
        self.up = False
        self.over = False


class Epoch:
    """The period in which one connection is tracked.

    ``known`` is the time up to which every change is known here: Redis reports every change from
    before a command before it answers that command. The epoch follows one mark at a time instead
    of each command.
    """

    __slots__ = ("_last_mark", "_last_sent", "_mark", "_sent", "known", "reach", "state")

    def __init__(self, reach: Reachability) -> None:
        self.reach = reach
        self.state = LIVE
        self.known = time.monotonic()
        self._mark = self._last_mark = 0
        self._sent = self._last_sent = 0.0

    def asked(self, mark: int) -> None:
        """Record a sending of commands, all answered once ``mark`` commands are settled."""
        self._last_mark, self._last_sent = mark, time.monotonic()
        if not self._mark:
            self._mark, self._sent = mark, self._last_sent

    def answered(self, settled: int) -> None:
        """Record the number of settled commands."""
        if settled >= self._mark > 0:
            self.known = self._sent
            self._mark = self._last_mark if self._last_mark > settled else 0
            self._sent = self._last_sent


class Entry:
    """The cached state of one name: a record, or a miss (``raw`` is None)."""

    __slots__ = ("epoch", "expires", "moves", "raw", "size", "slot", "version", "was_hit")

    def __init__(
        self, version: int, raw: bytes | None, epoch: Epoch, expires: float, size: int
    ) -> None:
        self.version = version
        self.raw = raw
        self.epoch = epoch
        self.expires = expires
        self.size = size
        self.slot = 0
        self.moves = 0
        self.was_hit = False


class NearStore:
    """The entries of a near cache, within their limits, and its counters."""

    def __init__(self, settings: NearSettings) -> None:
        self._settings = settings
        self._encoder = Encoder(settings.key_prefix, settings.hash_tag)
        self._entries: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0
        # Number of moves of each slot.
        self._moves = array("L", bytes(array("L").itemsize * c.SLOTS))
        self._counts = dict.fromkeys(
            ("hits", "misses", "joins", "stale", "invalidations", "evictions", "dropped_fills"), 0
        )
        self._flushes: dict[str, int] = {}

    # -- for the owner of the cache

    def slots_moved(self, slots: Iterable[int]) -> None:
        """Invalidate the records of slots that another node serves now."""
        moved = 0
        for slot in slots:
            self._moves[slot] += 1
            moved += 1
        if moved:
            self.count_flush("slots")

    def close(self) -> None:
        """Drop every record, and stop caching and serving records."""
        self._entries.clear()
        self._bytes = 0
        self._settings.max_records = 0
        self._settings.serve_stale = False

    def stats(self) -> dict[str, Any]:
        """Return the counters, the flushes by reason, and the size of the cache."""
        return {
            **self._counts,
            "flushes": dict(self._flushes),
            "records": len(self._entries),
            "bytes": self._bytes + self._table(),
        }

    # -- the entries

    def drop(self, name: str) -> bool:
        """Drop the entry of a name; return whether there was one."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return False
        self._bytes -= entry.size
        return True

    def invalidate(self, keys: list[Any] | None) -> bool:
        """Drop the records of changed keys; return True if all keys changed (``keys`` is None)."""
        if keys is None:
            return True
        for key in keys:
            name = self._encoder.name_of(key) if type(key) is bytes else None
            if name is not None and self.drop(name):
                self._counts["invalidations"] += 1
        return False

    def count_flush(self, reason: str) -> None:
        """Count an invalidation of many records."""
        self._flushes[reason] = self._flushes.get(reason, 0) + 1

    def _may_be_stale(self, entry: Any) -> bool:
        return self._settings.serve_stale and entry.raw is not None and not entry.epoch.reach.over

    def _record(self, name: str, entry: Entry, stale: bool) -> Record | None:
        return None if entry.raw is None else Record(name, entry.version, entry.raw, stale)

    def _table(self) -> int:
        """Return the bytes of the dict of entries, which grows and shrinks in steps."""
        return getsizeof(self._entries) - _NO_TABLE

    def _make_room(self, records: int, size: int) -> None:
        entries = self._entries
        while entries and (
            len(entries) + records > self._settings.max_records
            or self._bytes + self._table() + size > self._settings.max_bytes
        ):
            oldest = _oldest(entries)
            if oldest is None:
                return
            name, entry = oldest
            if entry.was_hit and entry.epoch.state == LIVE:
                entry.was_hit = False
                try:
                    entries.move_to_end(name)
                except KeyError:
                    if name in entries:  # then it is an error of the handler
                        raise
                continue
            self._counts["evictions"] += self.drop(name)


def _oldest(entries: OrderedDict[str, Any]) -> tuple[str, Any] | None:
    """Return the first name and entry, or None.

    A signal handler may drop entries behind any call. None comes between the two steps of a loop.
    """
    for oldest in entries.items():
        return oldest
    return None


class NearCache(NearStore):
    """The operations of a Pipeline or Router (``inner``), with a cache of the records read.

    The waiter of a hit is done already: awaiting it doesn't yield to the event loop.

    ``settings`` are the fields of NearSettings.
    """

    def __init__(self, create_waiter: Callable[[], Any], inner: Any, **settings: Any) -> None:
        super().__init__(NearSettings(**settings))
        self._thread = get_ident()
        self._create_waiter = create_waiter
        self._inner = inner
        self._pending: dict[str, PendingRead] = {}
        self._join_period = self._settings.timeout / 20
        self._fences: dict[str, int] = {}
        self._floor = 0
        self._live = 0

    # -- operations on one record

    def get(self, name: str, type: Any = None) -> Any:
        """Read one record; its waiter gets the Record, or None.

        With a ``type``, the Record's data is of that type.
        """
        if type is not None:
            waiter = self._create_waiter()
            typed.get(self, waiter, check_name(name), type)
            return waiter
        self._stay()
        entry, stale = self._look(name)
        if entry is None:
            return self._read(check_name(name), self._create_waiter())
        return self._done(self._record(name, entry, stale))

    def head(self, name: str) -> Any:
        """Read one version; its waiter gets the int, or None."""
        self._stay()
        entry, stale = self._look(name)
        if entry is None or stale:
            self._counts["misses"] += 1
            waiter = self._create_waiter()
            self._inner.read(check_name(name), waiter, c.HEAD)
            return waiter
        return self._done(None if entry.raw is None else entry.version)

    def _done(self, result: Any) -> Any:
        """Return a waiter that is done."""
        waiter = self._create_waiter()
        waiter.set_result(result)
        return waiter

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> Any:
        """Queue a write; its waiter gets True, or False if its condition doesn't hold."""
        waiter = self._inner.set(name, version, data, ttl, if_newer, if_version)
        self.add_fence(check_name(name))
        return waiter

    def delete(self, name: str, if_version: IfVersion = ANY) -> Any:
        """Queue a removal; its waiter gets whether the record existed."""
        waiter = self._inner.delete(name, if_version)
        self.add_fence(check_name(name))
        return waiter

    # -- reads for another waiter

    def read(self, name: str, waiter: Any) -> None:
        """Queue a read; ``waiter`` gets the Record, or None, at once if the record was cached."""
        self._stay()
        entry, stale = self._look(name)
        if entry is None:
            self._read(name, waiter)
        else:
            resolve(waiter, self._record(name, entry, stale))

    def read_bulk(self, kind: int, names: Iterable[str], waiter: Any) -> None:
        """Queue a GET or HEAD of the records not cached; ``waiter`` gets a dict of all found."""
        self._bulk(kind, names, waiter)

    # -- bulk operations

    def get_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of the records not cached; its waiter gets a dict of all records found."""
        return self._bulk(c.GET, names)

    def head_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of the versions not cached; its waiter gets a dict of all versions found."""
        return self._bulk(c.HEAD, names)

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> Any:
        """Queue a write of many records; its waiter gets the set of names not written."""
        if isinstance(records, Mapping):
            records = dict(records.items())
        waiter = self._inner.set_bulk(records, ttl, if_newer, if_version)
        for name in records:
            self.add_fence(check_name(name))
        return waiter

    def delete_bulk(self, names: Iterable[str], if_version: IfVersionsHeld = ANY) -> Any:
        """Queue a removal of many records; its waiter gets the number of records removed."""
        if not isinstance(names, (str, bytes)):
            names = list(names)
        waiter = self._inner.delete_bulk(names, if_version)
        for name in names:
            self.add_fence(check_name(name))
        return waiter

    def _stay(self) -> None:
        """Call ``check``, which may raise, if the thread has changed. ``inner`` checks writes."""
        if self._settings.check is not None and self._thread != get_ident():
            self._settings.check()
            self._thread = get_ident()  # the event loop runs there now

    # -- for the pipelines

    def fill(
        self,
        pipeline: Pipeline,
        epoch: Epoch,
        serial: int,
        name: str,
        version: int,
        raw: Any,
        slot: int,
    ) -> None:
        """Cache the result of a read: a record, or a miss if ``raw`` is None.

        ``serial`` states when the read was issued. ``slot`` is the slot of the name, or -1 if the
        caller hasn't computed it.
        """
        if self._settings.prefixes and not name.startswith(self._settings.prefixes):
            return
        entry = Entry(version, raw, epoch, time.monotonic() + self._settings.max_age, 0)
        # Garbage collection may have run a finalizer that wrote this name. So the fences are read
        # after the entry is created.
        if serial < self._floor or serial < self._fences.get(name, 0):
            self._counts["dropped_fills"] += 1
            return
        if not self._settings.clustered:
            slot = 0
        else:
            if slot < 0:
                slot = self._encoder.slot(name)
            # Replies of replicas and of former owners are not cached.
            if self._inner.owners[slot] is not pipeline:
                self._counts["dropped_fills"] += 1
                return
        size = NEAR_ENTRY_BYTES + len(name.encode()) + (0 if raw is None else len(raw))
        self.drop(name)
        if self._table() + size > self._settings.max_bytes or not self._settings.max_records:
            return
        self._make_room(1, size)
        entry.size = size
        entry.slot = slot
        entry.moves = self._moves[slot]
        self._entries[name] = entry
        self._bytes += size
        self._make_room(0, 0)  # the table may have grown

    def add_fence(self, name: str) -> None:
        """Drop a record that this process writes, and keep older reads from restoring it."""
        self.drop(name)
        self._pending.pop(name, None)
        if len(self._fences) >= c.NEAR_FENCES:
            self._floor = latest_serial()
            self._fences.clear()
        self._fences[name] = latest_serial()

    def count_flush(self, reason: str) -> None:
        """Count an invalidation of many records, and let no caller join the reads pending now."""
        self._pending.clear()
        super().count_flush(reason)

    def count_live(self, change: int) -> None:
        """Add ``change`` to the number of tracked connections."""
        self._live += change

    def last_known(self, name: str) -> Record | None:
        """Return the record to serve while its node is unreachable, or None."""
        entry = self._entries.get(name)
        if entry is None or not self._may_be_stale(entry) or time.monotonic() >= entry.expires:
            return None
        self._counts["stale"] += 1
        return self._record(name, entry, True)

    def end_read(self, read: PendingRead) -> None:
        """Remove a pending read, so that no more callers join it."""
        if self._pending.get(read.name) is read:
            del self._pending[read.name]

    # -- for BulkRead

    def settle_reads(
        self,
        reads: list[PendingRead],
        found: Mapping[str, Record],
        errors: Mapping[str, Exception],
    ) -> None:
        """Give the callers that joined the reads of a bulk the results of their names."""
        for read in reads:
            if read.name in errors:
                read.set_exception(errors[read.name])
            else:
                read.set_result(_another(found.get(read.name)) if read.waiters else None)

    # -- helpers

    def _look(self, name: Any) -> tuple[Entry | None, bool]:
        """Return the entry of a name if it may be served, and whether it may be outdated."""
        entry = self._entries.get(name) if type(name) is str else None
        if entry is None:
            return None, False
        now = time.monotonic()
        if now >= entry.expires:
            self.drop(name)
        elif entry.moves == self._moves[entry.slot]:
            epoch = entry.epoch
            if epoch.state == LIVE:
                if now - epoch.known <= self._settings.idle_limit:
                    entry.was_hit = True
                    self._counts["hits"] += 1
                    return entry, False
            # A miss has no Record that could be marked as stale.
            elif self._may_be_stale(entry) and not epoch.reach.up:
                self._counts["stale"] += 1
                return entry, True
        return None, False

    def _read(self, name: str, waiter: Any) -> Any:
        now = time.monotonic()
        read = self._joinable(name, now)
        if read is None:
            read = PendingRead(self, name, now + self._join_period)
            read.waiters.append(waiter)
            self._inner.read(name, read)
            self._pending[name] = read
            self._counts["misses"] += 1
        else:
            read.waiters.append(waiter)
            self._counts["joins"] += 1
        return waiter

    def _joinable(self, name: str, now: float) -> PendingRead | None:
        """Return the pending read of a name if callers may still join it."""
        read = self._pending.get(name)
        return read if read is not None and now < read.joinable_until and self._live else None

    def _bulk(self, kind: int, names: Iterable[str], waiter: Any = None) -> Any:
        self._stay()
        if isinstance(names, (str, bytes)):
            raise failures.bad_names(c.OPERATIONS[kind] + "_bulk", names)
        found: dict[str, Any] = {}
        missing: list[str] = []
        joined: list[PendingRead] = []
        now = time.monotonic()
        for name in names:
            name = check_name(name)
            if name in found:
                continue
            entry, stale = self._look(name)
            if entry is None or (stale and kind == c.HEAD):
                found[name] = None  # keeps the place of the name in the result
                read = self._joinable(name, now) if kind == c.GET else None
                if read is None:
                    missing.append(name)
                else:
                    joined.append(read)
            elif kind == c.GET:
                found[name] = self._record(name, entry, stale)
            else:
                found[name] = None if entry.raw is None else entry.version
        if waiter is None:
            waiter = self._create_waiter()
        is_asked = bool(missing) or not found
        if not is_asked and not joined:
            resolve(waiter, {name: value for name, value in found.items() if value is not None})
            return waiter
        reads: list[PendingRead] = []
        if kind == c.GET and len(missing) <= c.NEAR_SHARED:
            reads += (PendingRead(self, name, now + self._join_period) for name in missing)
        awaited: set[str | None] = {None} if is_asked else set()
        awaited.update(read.name for read in joined)
        bulk = BulkRead(self, kind, found, missing, reads, waiter, awaited)
        if is_asked:
            self._inner.read_bulk(kind, missing, bulk)
        self._counts["misses"] += len(missing)
        self._counts["joins"] += len(joined)
        for read in joined:
            read.waiters.append(Part(bulk, read.name))
        for read in reads:
            self._pending[read.name] = read
        return waiter


class PendingRead:
    """A pending read of one name: the waiter that the pipeline resolves, for all its callers."""

    __slots__ = ("_near", "joinable_until", "name", "slot", "waiters")

    def __init__(self, near: NearCache, name: str, joinable_until: float) -> None:
        self._near = near
        self.name = name
        self.joinable_until = joinable_until
        self.slot = -1  # not known yet
        self.waiters: list[Any] = []

    def set_result(self, record: Record | None, /) -> None:
        self._near.end_read(self)
        for waiter in self.waiters:
            resolve(waiter, record)
            record = _another(record)

    def set_exception(self, error: Exception, /) -> None:
        self._near.end_read(self)
        for waiter in self.waiters:
            known = self._near.last_known(self.name) if isinstance(error, failures.AWAY) else None
            if known is None:
                reject(waiter, partial(failures.copy_error, error))
            else:
                resolve(waiter, known)


def _another(record: Record | None) -> Record | None:
    """Return a copy of the record, for another caller."""
    return None if record is None else Record(record.name, record.version, record.raw)
