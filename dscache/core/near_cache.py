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

from ..errors import BulkError
from . import constants as c
from .batch import serials
from .record import Record, check_name
from .resp import Encoder
from .waiters import reject, resolve

if TYPE_CHECKING:
    from .pipeline import Pipeline

# Bytes of overhead per record, without the text of name and data and without the dict.
NEAR_ENTRY_BYTES: Final = 290
_NO_TABLE: Final = getsizeof(OrderedDict())

_UNKNOWN: Final = object()

# An epoch is live while its connection is tracked, lost after the connection is lost, and over when
# its records are known to be outdated.
LIVE, LOST, OVER = range(3)


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


class NearCache:
    """The operations of a Pipeline or Router (``inner``), with a cache of the records read.

    ``get`` and ``head`` return a coroutine in place of a waiter: awaiting a hit doesn't yield to
    the event loop. Both are issued at the call, like every other operation.

    ``max_records`` and ``max_bytes`` limit the size of the cache. The bytes are the text of records
    and names plus the overhead of caching them. ``max_age``, ``idle_limit`` and ``timeout`` are in
    seconds. ``prefixes`` restricts the cache to names that begin with one of them; () allows all.
    With ``serve_stale``, the last known record is served while its node is unreachable, marked as
    stale, but no longer than for ``max_age``. ``check`` is called before a read from another
    thread, and raises if that thread must not read.
    """

    def __init__(
        self,
        create_waiter: Callable[[], Any],
        inner: Any,
        *,
        key_prefix: str = "",
        hash_tag: bool = False,
        clustered: bool = False,
        timeout: float = 1.0,
        max_records: int = c.NEAR_RECORDS,
        max_bytes: int = c.NEAR_BYTES,
        max_age: float = 60.0,
        idle_limit: float = 1.0,
        prefixes: tuple[str, ...] = (),
        serve_stale: bool = False,
        check: Callable[[], object] | None = None,
    ) -> None:
        self._check = check
        self._thread = get_ident()
        self._create_waiter = create_waiter
        self._inner = inner
        self._encoder = Encoder(key_prefix, hash_tag)
        self._clustered = clustered
        self._boarding = timeout / 20
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._idle_limit = idle_limit
        self._prefixes = prefixes
        self._serve_stale = serve_stale
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0
        self._flights: dict[str, PendingRead] = {}
        self._fences: dict[str, int] = {}
        self._floor = 0
        # Number of moves of each slot.
        self._moves = array("L", bytes(array("L").itemsize * c.SLOTS))
        self._live = 0
        self._counts = dict.fromkeys(
            ("hits", "misses", "joins", "stale", "invalidations", "evictions", "dropped_fills"), 0
        )
        self._flushes: dict[str, int] = {}

    # -- operations on one record

    def get(self, name: str) -> Any:
        """Return a coroutine that returns the Record, or None."""
        self._stay()
        entry, stale = self._look(name)
        if entry is None:
            return _later(self._read(check_name(name)))
        return _now(self._record(name, entry, stale))

    def head(self, name: str) -> Any:
        """Return a coroutine that returns the version, or None."""
        self._stay()
        entry, stale = self._look(name)
        if entry is None or stale:
            self._counts["misses"] += 1
            return _later(self._inner.head(name))
        return _now(None if entry.raw is None else entry.version)

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: int | None = None,
        if_newer: bool = False,
    ) -> Any:
        """Queue a write; its waiter gets True, or False if ``if_newer`` rejects the version."""
        waiter = self._inner.set(name, version, data, ttl, if_newer)
        self.touch(check_name(name))
        return waiter

    def delete(self, name: str) -> Any:
        """Queue a removal; its waiter gets whether the record existed."""
        waiter = self._inner.delete(name)
        self.touch(check_name(name))
        return waiter

    # -- bulk operations

    def get_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of the records not cached; its waiter gets a dict of all records found."""
        self._stay()
        return self._bulk(c.GET, names)

    def head_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of the versions not cached; its waiter gets a dict of all versions found."""
        self._stay()
        return self._bulk(c.HEAD, names)

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        ttl: int | None = None,
        if_newer: bool = False,
    ) -> Any:
        """Queue a write of many records; its waiter gets the set of names not written."""
        if isinstance(records, Mapping):
            records = dict(records.items())
        waiter = self._inner.set_bulk(records, ttl, if_newer)
        for name in records:
            self.touch(check_name(name))
        return waiter

    def delete_bulk(self, names: Iterable[str]) -> Any:
        """Queue a removal of many records; its waiter gets the number of records removed."""
        if not isinstance(names, (str, bytes)):
            names = list(names)
        waiter = self._inner.delete_bulk(names)
        for name in names:
            self.touch(check_name(name))
        return waiter

    def _stay(self) -> None:
        """Call ``check``, which may raise, if the thread has changed. ``inner`` checks writes."""
        if self._check is not None and self._thread != get_ident():
            self._check()
            self._thread = get_ident()  # the event loop runs there now

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
        self._max_records = 0
        self._serve_stale = False

    def stats(self) -> dict[str, Any]:
        """Return the counters, the flushes by reason, and the size of the cache."""
        return {
            **self._counts,
            "flushes": dict(self._flushes),
            "records": len(self._entries),
            "bytes": self._bytes + self._table(),
        }

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
        if self._prefixes and not name.startswith(self._prefixes):
            return
        entry = Entry(version, raw, epoch, time.monotonic() + self._max_age, 0)
        # Garbage collection may have run a finalizer that wrote this name. So the fences are read
        # after the entry is created.
        if serial < self._floor or serial < self._fences.get(name, 0):
            self._counts["dropped_fills"] += 1
            return
        if not self._clustered:
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
        if self._table() + size > self._max_bytes or not self._max_records:
            return
        self._make_room(1, size)
        entry.size = size
        entry.slot = slot
        entry.moves = self._moves[slot]
        self._entries[name] = entry
        self._bytes += size
        self._make_room(0, 0)  # the table may have grown

    def drop(self, name: str) -> bool:
        """Drop the entry of a name; return whether there was one."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return False
        self._bytes -= entry.size
        return True

    def touch(self, name: str) -> None:
        """Drop a record that this process writes, and keep older reads from restoring it."""
        self.drop(name)
        self._flights.pop(name, None)
        if len(self._fences) >= c.NEAR_FENCES:
            self._floor = serials.last
            self._fences.clear()
        self._fences[name] = serials.last

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
        """Count an invalidation of many records, and let no caller join the reads pending now."""
        self._flights.clear()
        self._flushes[reason] = self._flushes.get(reason, 0) + 1

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

    def landed(self, flight: PendingRead) -> None:
        """Remove a pending read, so that no more callers join it."""
        if self._flights.get(flight.name) is flight:
            del self._flights[flight.name]

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
                if now - epoch.known <= self._idle_limit:
                    entry.was_hit = True
                    self._counts["hits"] += 1
                    return entry, False
            # A miss has no Record that could be marked as stale.
            elif self._may_be_stale(entry) and not epoch.reach.up:
                self._counts["stale"] += 1
                return entry, True
        return None, False

    def _may_be_stale(self, entry: Entry) -> bool:
        return self._serve_stale and entry.raw is not None and not entry.epoch.reach.over

    def _record(self, name: str, entry: Entry, stale: bool) -> Record | None:
        return None if entry.raw is None else Record(name, entry.version, entry.raw, stale)

    def _read(self, name: str) -> Any:
        waiter = self._create_waiter()
        now = time.monotonic()
        flight = self._boarding_flight(name, now)
        if flight is None:
            flight = PendingRead(self, name, now + self._boarding)
            flight.waiters.append(waiter)
            self._inner.read(name, flight)
            self._flights[name] = flight
            self._counts["misses"] += 1
        else:
            flight.waiters.append(waiter)
            self._counts["joins"] += 1
        return waiter

    def _boarding_flight(self, name: str, now: float) -> PendingRead | None:
        """Return the pending read of a name if callers may still join it."""
        flight = self._flights.get(name)
        return flight if flight is not None and now < flight.boarding_ends and self._live else None

    def _bulk(self, kind: int, names: Iterable[str]) -> Any:
        if isinstance(names, (str, bytes)):
            raise c.bad_names(c.OPERATIONS[kind] + "_bulk", names)
        found: dict[str, Any] = {}
        missing: list[str] = []
        flights: list[PendingRead] = []
        now = time.monotonic()
        for name in names:
            name = check_name(name)
            if name in found:
                continue
            entry, stale = self._look(name)
            if entry is None or (stale and kind == c.HEAD):
                found[name] = _UNKNOWN
                flight = self._boarding_flight(name, now) if kind == c.GET else None
                if flight is None:
                    missing.append(name)
                else:
                    flights.append(flight)
            elif kind == c.GET:
                found[name] = self._record(name, entry, stale)
            else:
                found[name] = None if entry.raw is None else entry.version
        waiter = self._create_waiter()
        gathering = BulkRead(self, kind, found, waiter)
        if kind == c.GET and len(missing) <= c.NEAR_SHARED:
            gathering.flights += (PendingRead(self, name, now + self._boarding) for name in missing)
        # An extra count keeps the bulk from ending before all of its reads are counted.
        gathering.awaited = 1
        if missing or not found:
            gathering.awaited += 1
            self._inner.read_bulk(kind, missing, gathering)
        self._counts["misses"] += len(missing)
        self._counts["joins"] += len(flights)
        for flight in flights:
            part = Part(gathering, flight.name)
            gathering.awaited += 1
            flight.waiters.append(part)
        for flight in gathering.flights:
            self._flights[flight.name] = flight
        gathering.come(False)
        return waiter

    def _table(self) -> int:
        """Return the bytes of the dict of entries, which grows and shrinks in steps."""
        return getsizeof(self._entries) - _NO_TABLE

    def _make_room(self, records: int, size: int) -> None:
        entries = self._entries
        while entries and (
            len(entries) + records > self._max_records
            or self._bytes + self._table() + size > self._max_bytes
        ):
            name, entry = next(iter(entries.items()))
            if entry.was_hit and entry.epoch.state == LIVE:
                entry.was_hit = False
                entries.move_to_end(name)
                continue
            self.drop(name)
            self._counts["evictions"] += 1


class PendingRead:
    """A pending read of one name: the waiter that the pipeline resolves, for all its callers."""

    __slots__ = ("_near", "boarding_ends", "name", "waiters")

    def __init__(self, near: NearCache, name: str, boarding_ends: float) -> None:
        self._near = near
        self.name = name
        self.boarding_ends = boarding_ends
        self.waiters: list[Any] = []

    def set_result(self, record: Record | None, /) -> None:
        self._near.landed(self)
        for waiter in self.waiters:
            resolve(waiter, record)
            record = _another(record)

    def set_exception(self, error: Exception, /) -> None:
        self._near.landed(self)
        for waiter in self.waiters:
            known = self._near.last_known(self.name) if isinstance(error, c.AWAY) else None
            if known is None:
                reject(waiter, partial(c.copy_error, error))
            else:
                resolve(waiter, known)


class BulkRead:
    """A bulk read: some records were cached, the others are awaited.

    The pipeline settles this object as the waiter for the records to be read. Other callers may
    join the reads of these records.
    """

    __slots__ = (
        "_errors",
        "_failure",
        "_found",
        "_is_read",
        "_kind",
        "_near",
        "_rest",
        "_waiter",
        "awaited",
        "flights",
    )

    def __init__(self, near: NearCache, kind: int, found: dict[str, Any], waiter: Any) -> None:
        self._near = near
        self._kind = kind
        self._found = found
        self._waiter = waiter
        self._rest: dict[str, Any] = {}
        self._errors: dict[str, Exception] = {}
        self._failure: Exception | None = None
        self.awaited = 0
        self.flights: list[PendingRead] = []
        self._is_read = False  # the read of the pipeline is settled

    def set_result(self, found: Mapping[str, Any], /) -> None:
        self._rest.update(found)
        for flight in self.flights:
            flight.set_result(_another(found.get(flight.name)))
        self._come()

    def set_exception(self, error: Exception, /) -> None:
        found: Mapping[str, Any] = {}
        if isinstance(error, BulkError):
            found = error.result
            errors = dict(error.errors)
        else:
            self._failure = error
            missing = (name for name, known in self._found.items() if known is _UNKNOWN)
            errors = dict.fromkeys(missing, error)
        self._errors.update(errors)
        self._rest.update(found)
        for flight in self.flights:
            if flight.name in errors:
                flight.set_exception(errors[flight.name])
            else:
                flight.set_result(_another(found.get(flight.name)))
        self._come()

    def take(self, name: str, record: Record | None, again: bool) -> None:
        """Add the result of a pending read that this bulk has joined."""
        self._rest[name] = record
        self.come(again)

    def take_error(self, name: str, error: Exception, again: bool) -> None:
        """Add the error of a pending read that this bulk has joined."""
        self._errors[name] = error
        self.come(again)

    def _come(self) -> None:
        again, self._is_read = self._is_read, True
        self.come(again)

    def come(self, again: bool) -> None:
        """Count a settled read. A read settles ``again`` if its first settling raised."""
        self.awaited -= not again
        if not self.awaited:
            self._end()

    def _end(self) -> None:
        """Settle the waiter with the results and errors of all reads."""
        for name in self._rest:
            self._errors.pop(name, None)
        for name, error in list(self._errors.items()):
            known = None
            if self._kind == c.GET and isinstance(error, c.AWAY):
                known = self._near.last_known(name)
            if known is not None:
                self._rest[name] = known
                del self._errors[name]
        result: dict[str, Any] = {}
        for name, known in self._found.items():
            value = self._rest.get(name) if known is _UNKNOWN else known
            if value is not None:
                result[name] = value
        failure = self._failure
        is_served = self._rest or any(
            getattr(known, "stale", False) for known in self._found.values()
        )
        if not self._errors:
            resolve(self._waiter, result)
        elif failure is not None and not is_served:
            reject(self._waiter, lambda: failure)
        else:
            operation = c.OPERATIONS[self._kind] + "_bulk"
            reject(self._waiter, partial(BulkError, operation, self._errors, result))


class Part:
    """The waiter for one name of a bulk read, on a pending read that the bulk has joined."""

    __slots__ = ("_gathering", "_has_come", "_name")

    def __init__(self, gathering: BulkRead, name: str) -> None:
        self._gathering = gathering
        self._name = name
        self._has_come = False

    def set_result(self, record: Record | None, /) -> None:
        again, self._has_come = self._has_come, True
        self._gathering.take(self._name, record, again)

    def set_exception(self, error: Exception, /) -> None:
        again, self._has_come = self._has_come, True
        self._gathering.take_error(self._name, error, again)


def _another(record: Record | None) -> Record | None:
    """Return a copy of the record, for another caller."""
    return None if record is None else Record(record.name, record.version, record.raw)


async def _now(result: Any) -> Any:
    return result


async def _later(waiter: Any) -> Any:
    return await waiter
