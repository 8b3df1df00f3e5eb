"""Records that all threads of a process share until Redis reports a change.

The pure twin of ``shared_near.pxi``.

Theory of operation
-------------------
Reads travel over any of the pooled connections, and reports of changes over one **link**, which a
thread of its own reads. So a report may arrive before the answer that it makes outdated, or behind
it, and the order on one connection proves nothing about the other.

**The link tracks in broadcast mode**, under the prefixes of the cache. With the other mode, the
pooled connections would be tracked and their reports redirected to the link. But a server forgets
the keys of a tracked connection when that connection ends, and a pooled connection may end
unnoticed: no thread reads an idle one. Its records would then change unreported while the link
is well. In broadcast mode a record depends on the link alone. The pooled connections stay as they
are, no connection has to be told of a new link, and the server keeps no table of keys. The price is
a message for each change of any key under the prefixes.

**The fence.** A read puts its entry, still empty, into the dict of entries *before* it is sent. A
report, a write and a flush drop the entry of the name from the dict, or end the **epoch** of all
entries. When the answer arrives, it is written into that entry, wherever the entry is. An entry
that was dropped meanwhile can't be found any more, so nothing has to be compared at that moment,
and no step can come in between. Let the server execute the read at the time *t*; the entry is in
the dict since before *t*.

- A change before *t*: the answer has it. Its report may drop the entry in vain.
- A change after *t*: the server sends its report over the link. It arrives after the entry was
  put into the dict, so it drops the entry, empty or filled.
- The link was lost, or another one began: the entry's epoch is over. An epoch begins once the
  server has confirmed the tracking, so a change after *t* is reported unless the link is lost.
- The link is dead and that isn't known yet, or its server or its thread is late: entries are only
  served while the server has answered a PING on the link that was sent within ``idle_limit``.
- FLUSHALL: the server reports it as a change of all keys, which begins a new epoch.
- The answer was of another server than the one that the link leads to: it isn't kept. Servers tell
  the id of their process, so a failover behind the same address is noticed as well. On a cluster,
  an answer counts if neither the slots nor the number of redirections have changed meanwhile.

**Own writes** are fenced from the call to the reply: no entry of the name is made in that time, and
the one at hand is dropped at either end. A read that is sent behind the reply sees the write. A
write without a reply may still be executed later, and is then reported like a write of another
client; before that, reads return the server's state.

**Never back in time.** Two threads that read one name at once share the empty entry, and the second
answer is compared with the first. If they differ, the entry is dropped, since it isn't known which
is newer. So is an entry that differs from the version that any other read has found.

**No lock over I/O.** A hit is one look-up in a dict. With the GIL, threads take turns at compiled
code, which needs no lock at all. In this module, a lock protects the counters and the order of the
entries for the length of a few statements. A signal handler may strike in between and use the cache
itself. Each step that decides which record is served is a single one: putting an entry into the
dict, dropping it, and filling it.

An exception may strike a thread anywhere. An entry that stays empty is harmless: the next read of
the name fills it. A write that never ends is one by the end of its SharedWrite.

After a fork, the child begins without entries, and with a link of its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

from .._locks import make_lock
from . import constants as c
from . import failures
from .near_cache import NEAR_ENTRY_BYTES, Epoch, NearStore, Reachability
from .near_node import NearNode
from .near_parts import NearSettings
from .record import Record, check_name
from .tracking import LIVE, OVER


class SharedEntry:
    """The state of one name: under way while ``cell`` is empty, else a record or a miss.

    ``cell`` holds the version and the text at most once: the first answer fills it.
    """

    __slots__ = (
        *("cell", "epoch", "expires", "is_pending", "moves", "name", "previous", "size", "slot"),
        "was_hit",
    )

    def __init__(
        self, name: str, epoch: Epoch, expires: float, size: int, slot: int, moves: int
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.expires = expires
        self.size = size
        self.slot = slot
        self.moves = moves
        self.was_hit = False
        self.is_pending = True  # counted as such
        self.cell: dict[None, tuple[int, bytes | None]] = {}
        self.previous: SharedEntry | None = None

    @property
    def raw(self) -> bytes | None:
        """The text of the record; None for a miss, and while the read is under way."""
        return self.cell[None][1] if self.cell else None

    @property
    def version(self) -> int:
        """The version of the record."""
        return self.cell[None][0]


class SharedWrite:
    """Writes under way: their names aren't cached until ``end``, or until the object is gone.

    It has no finalizer, as an exception that strikes there would be lost.
    """

    __slots__ = ("__weakref__", "_names", "_near", "_writes")

    def __init__(self, near: SharedNearCache, names: list[str]) -> None:
        self._near = near
        self._names = names
        self._writes = near.writes

    def end(self) -> None:
        """End the writes: reads that are sent from now on see them."""
        # After a fork, the child has other writes.
        if self._names and self._writes is self._near.writes:
            for name in self._names:
                self._near.end_write(name, self)
        self._names = []


class SharedNearCache(NearStore):
    """Records that threads have read, for all threads; ``settings`` are of NearSettings.

    ``read`` is called with the name and the type of a record that isn't cached, and returns it;
    ``read_head`` is called with the name, and returns the version.
    """

    def __init__(
        self,
        read: Callable[[str, Any], Any],
        read_head: Callable[[str], Any],
        **settings: Any,
    ) -> None:
        super().__init__(NearSettings(**settings))
        self._read = read
        self._read_head = read_head
        # Of the counters and of the order of the entries; a signal handler may use the cache.
        self._lock = make_lock()
        self._begin()

    def _begin(self) -> None:
        self._node: NearNode | None = None
        self._entries = OrderedDict()
        self._bytes = self._pending = 0
        # By name, the SharedWrites; those that were interrupted may be gone.
        self.writes: dict[str, set[ref[SharedWrite]]] = {}
        # The node of each slot of a cluster.
        self._owners: list[NearNode | None] = [None] * (c.SLOTS if self._settings.clustered else 0)

    # -- operations

    def get(self, name: str, type: Any = None) -> Any:
        """Return the Record, or None; ``data`` is of the ``type``, if there is one."""
        if type is None:
            entry, stale = self._look(name)
            if entry is not None:
                return self._record_of(entry, stale)
        return self._read(name, type)

    def head(self, name: str) -> Any:
        """Return the version, or None."""
        entry, stale = self._look(name)
        if entry is None or stale:
            return self._read_head(name)
        return None if entry.raw is None else entry.version

    def find(self, kind: int, names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
        """Return the cached Records or versions by name, and the names that aren't cached.

        The Records are in a dict of all the names in their order, with None for the others. Raises
        RecordError for a bad name.
        """
        if isinstance(names, (str, bytes)):
            raise failures.bad_names(c.OPERATIONS[kind] + "_bulk", names)
        found: dict[str, Any] = {}
        missing: list[str] = []
        for name in names:
            name = check_name(name)
            if name in found:
                continue
            entry, stale = self._look(name)
            if entry is None or (stale and kind == c.HEAD):
                found[name] = None
                missing.append(name)
            elif kind == c.GET:
                found[name] = self._record_of(entry, stale)
            else:
                found[name] = None if entry.raw is None else entry.version
        return found, missing

    # -- reads under way

    def begin_read(self, name: str) -> SharedEntry | None:
        """Return the entry that a read about to be sent will fill, or None if it may fill none."""
        self.count_misses(1)
        settings = self._settings
        if settings.prefixes and not name.startswith(settings.prefixes):
            return None
        size = NEAR_ENTRY_BYTES + len(name.encode())
        slot = 0
        node = self._node
        if settings.clustered:
            slot = self._encoder.slot(name)
            node = None if slot < 0 else self._owners[slot]
        epoch = None if node is None else node.epoch
        if epoch is None:
            return None
        with self._lock:
            if self._table() + size > settings.max_bytes or not settings.max_records:
                return None
            self._make_room(1, size)
            found: SharedEntry | None = self._entries.get(name)
            moves = self._moves[slot]
            if (
                found is not None
                and not found.cell
                and found.epoch is epoch
                and found.moves == moves
            ):
                # Of another read, which was sent earlier. A write that has begun meanwhile drops
                # it.
                return None if self._is_written(name) else found
            entry = SharedEntry(name, epoch, time.monotonic() + settings.max_age, size, slot, moves)
            if found is not None:
                previous = found if found.cell else found.previous
                if previous is not None and self._may_be_stale(previous):
                    entry.previous = previous
            # Without a call between the last look and the next lines, where a signal handler could
            # put in or drop another one.
            while name in self._entries:
                self.drop(name)
            self._entries[name] = entry
            self._bytes += size
            self._pending += 1
            # Behind that, or a write that has begun meanwhile would not have seen the entry.
            if self._is_written(name):
                self._remove(entry)
                return None
        return entry

    def settle(self, entry: SharedEntry, record: Record | None, is_of_owner: bool) -> None:
        """Take the result of a read: a record, or None without one.

        It is kept unless something concerned the name since ``begin_read``, or the answer wasn't
        of the server that reports its changes.
        """
        name = entry.name
        content = (0, None) if record is None else (record.version, record.raw)
        size = 0 if record is None else len(record.raw)
        with self._lock:
            if self._table() + entry.size + size > self._settings.max_bytes:
                is_of_owner = False
            else:
                self._make_room(0, size)
            found = self._entries.get(name)
            if found is not entry or not is_of_owner:
                self._counts["dropped_fills"] += 1
                self._compare(found, None if record is None else record.version)
                return
            if entry.cell.setdefault(None, content) != content:  # another thread was first
                self._remove(entry)
                return
            # Unless that thread had the same answer, or a signal handler has dropped it; without a
            # call from here on, where one could.
            if entry.is_pending and name in self._entries and self._entries[name] is entry:
                entry.previous = None
                entry.size += size
                self._bytes += size
                entry.is_pending = False
                self._pending -= 1

    def count_misses(self, count: int) -> None:
        """Count versions that are about to be read; ``begin_read`` counts records."""
        with self._lock:
            self._counts["misses"] += count

    def observe(self, name: str, version: int | None) -> None:
        """Drop an entry that differs from the version that a read has found, or None."""
        with self._lock:
            self._compare(self._entries.get(name), version)

    def last_known(self, name: str) -> Record | None:
        """Return the record to serve after a read of it has failed, or None."""
        entry = self._entries.get(name)
        if entry is not None and not entry.cell:
            entry = entry.previous
        if (
            entry is None
            or not self._may_be_stale(entry)
            or time.monotonic() >= entry.expires
            or entry.moves != self._moves[entry.slot]
        ):
            return None
        with self._lock:
            self._counts["stale"] += 1
        return self._record_of(entry, True)

    # -- writes under way

    def begin_write(self, names: list[str]) -> SharedWrite:
        """Drop the entries of names, and cache none of them until the SharedWrite has ended."""
        counted: list[str] = []
        write = SharedWrite(self, counted)
        for name in names:
            with self._lock:
                # In this order: whatever strikes here, what is counted is also ended.
                counted.append(name)
                self.writes.setdefault(name, set()).add(ref(write))
                self.drop(name)
        return write

    def end_write(self, name: str, write: SharedWrite) -> None:
        """End one write of a name; for SharedWrite, which may be interrupted and do it again."""
        with self._lock:
            under_way = self.writes.get(name)
            if under_way is not None:
                under_way.discard(ref(write))
                if not under_way:
                    self.writes.pop(name, None)
            self.drop(name)

    # -- for a NearNode

    def new_epoch(self, reach: Reachability, known: float) -> Epoch:
        """Return an epoch of a node that is up: all changes after ``known`` are reported."""
        epoch = Epoch(reach)
        epoch.known = known
        reach.up = True
        return epoch

    def confirm(self, epoch: Epoch, known: float) -> None:
        """Note that every change from before a time has been reported."""
        epoch.known = known

    def end_epoch(self, epoch: Epoch | None, reach: Reachability, state: int) -> Reachability:
        """End an epoch, or None; return the Reachability of the next one.

        OVER also ends all epochs before it: none of their records is served as stale.
        """
        if epoch is not None:
            epoch.state = state
        if state != OVER:
            return reach
        following = Reachability()
        following.up = reach.up
        reach.over = True
        return following

    def set_up(self, reach: Reachability, up: bool) -> None:
        """Note whether a node can be reached."""
        reach.up = up

    # -- for the owner of the cache

    def only_node(self) -> NearNode:
        """Return the NearNode of the only server."""
        self._node = self.node()
        return self._node

    def node(self) -> NearNode:
        """Return a NearNode for a node of a cluster."""
        return NearNode(self, Reachability())

    def route(self, owners: Iterable[tuple[int, NearNode | None]]) -> None:
        """Take over the nodes of slots: an iterable of slots with their NearNode, or None."""
        moved = False
        for slot, node in owners:
            if self._owners[slot] is not node:
                self._owners[slot] = node
                self._moves[slot] += 1
                moved = True
        if moved:
            self.count_flush("slots")

    def close(self) -> None:
        """Drop every record, and stop caching and serving records."""
        with self._lock:
            super().close()
            self._begin()

    def reset(self) -> None:
        """Drop every record, and forget the writes under way, as a forked child has none."""
        self._lock = make_lock()  # a thread that the child doesn't have may have had it
        self._begin()

    def stats(self) -> dict[str, Any]:
        """Return the counters, the flushes by reason, and the size of the cache."""
        counts = super().stats()
        counts["records"] -= self._pending
        return counts

    # -- helpers

    def drop(self, name: str) -> bool:
        """Drop the entry of a name; return whether there was one."""
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is None:
                return False
            self._bytes -= entry.size
            self._pending -= entry.is_pending
        return True

    def count_flush(self, reason: str) -> None:
        """Count an invalidation of many records."""
        with self._lock:
            super().count_flush(reason)

    def _is_written(self, name: str) -> bool:
        """Whether a write of a name is under way; forgets the writes that are gone."""
        under_way = self.writes.get(name)
        if under_way is None:
            return False
        for write in list(under_way):
            if write() is not None:
                return True
            under_way.discard(write)
        if not under_way:
            self.writes.pop(name, None)
        return False

    def _look(self, name: Any) -> tuple[SharedEntry | None, bool]:
        """Return the entry of a name if it may be served, and whether it may be outdated.

        Another thread may drop the entry at any moment. Nothing but the ``known`` of the epoch can
        make an entry servable again. So ``known`` is read before the last look at the dict: a drop
        that came before that ``known`` is then seen.
        """
        found: SharedEntry | None = self._entries.get(name) if type(name) is str else None
        entry = found if found is None or found.cell else found.previous
        if entry is None:
            return None, False
        epoch = entry.epoch
        known = epoch.known
        now = time.monotonic()
        if now >= entry.expires:
            self._remove(entry)
            return None, False
        if entry.moves != self._moves[entry.slot]:
            return None, False
        if epoch.state == LIVE:
            stale = False
            is_served = now - known <= self._settings.idle_limit
        else:  # a miss has no Record that could be marked as stale
            stale = True
            is_served = self._may_be_stale(entry) and not epoch.reach.up
        if not is_served or self._entries.get(name) is not found:
            return None, False
        entry.was_hit = True
        with self._lock:
            self._counts["stale" if stale else "hits"] += 1
        return entry, stale

    def _record_of(self, entry: SharedEntry, stale: bool) -> Record | None:
        version, raw = entry.cell[None]
        return None if raw is None else Record(entry.name, version, raw, stale)

    def _compare(self, entry: SharedEntry | None, version: int | None) -> None:
        """Drop an entry that may differ from the result of another read."""
        if entry is None:
            return
        cell = entry.cell.get(None)
        if cell is None or (None if cell[1] is None else cell[0]) != version:
            self._remove(entry)

    def _remove(self, entry: SharedEntry) -> None:
        if self._entries.get(entry.name) is entry:
            self.drop(entry.name)
