# Records that all threads of a process share until Redis reports a change; the compiled twin of
# ``shared_near.py``, which has the theory of operation. With the GIL no lock is needed: threads
# take turns at Python code, and no method runs any between a check and the step that depends on it.
# Without the GIL, a cache has a lock for the length of such a method; a critical section of CPython
# would not do, since it ends wherever its thread has to wait. Plain hits do without the lock.

from .core.near_node import NearNode

cdef int OVER = tracking.OVER


@cython.final
@cython.no_gc  # an entry is in no reference cycle
cdef class _SharedEntry(_Entry):
    """An entry of several threads; it isn't ``filled`` while its first read is under way."""

    cdef bint filled
    # The entry that it replaced, which may still be served as stale.
    cdef _SharedEntry previous


@cython.final
cdef class SharedWrite:
    """Writes under way: their names aren't cached until ``end``, or until the object is gone."""

    cdef object _near  # a SharedNearCache or a HostNearCache
    cdef list _names
    cdef dict _writes

    def __cinit__(self, near, dict writes):
        self._near = near
        self._names = []
        self._writes = writes

    cdef int begin(self, str name) except -1:
        # In this order: whatever strikes here, what is counted is also ended.
        self._names.append(name)
        self._writes[name] = self._writes.get(name, 0) + 1
        return 0

    def end(self):
        """End the writes: reads that are sent from now on see them."""
        cdef list names = self._names
        self._names = []
        if names:
            self._near.end_writes(names, self._writes)

    def __del__(self):
        self.end()


cdef int uncount_write(dict writes, name) except -1:
    left = writes.get(name, 0) - 1
    if left > 0:
        writes[name] = left
    else:
        writes.pop(name, None)
    return 0


@cython.final
cdef class SharedNearCache(_NearStore):
    """Records that threads have read, for all threads; ``settings`` are of NearSettings.

    ``read`` is called with the name and the type of a record that isn't cached, and returns it;
    ``read_head`` is called with the name, and returns the version.
    """

    cdef dscache_mutex _mutex
    cdef dscache_tally _hits_without_lock
    cdef object _read, _read_head
    cdef dict _writes
    cdef object _node
    cdef list _owners  # the NearNode of each slot of a cluster, or None
    cdef Py_ssize_t _pending

    def __init__(self, read, read_head, **settings):
        self._configure(NearSettings(**settings))
        self._read = read
        self._read_head = read_head
        self._writes = {}
        self._owners = [None] * SLOTS if self._clustered else None

    # -- operations

    def get(self, name, type=None):
        """Return the Record, or None; ``data`` is of the ``type``, if there is one."""
        if type is None:
            found = self._take(name)
            if found is not _UNDECODED:
                return found
        return self._read(name, type)

    def head(self, name):
        """Return the version, or None."""
        found = self._take_version(name)
        return self._read_head(name) if found is _UNDECODED else found

    def find(self, int kind, names):
        """Return the cached Records or versions by name, and the names that aren't cached.

        The Records are in a dict of all the names in their order, with None for the others. Raises
        RecordError for a bad name.
        """
        cdef dict found = {}
        cdef list missing = []
        cdef str key
        if isinstance(names, (str, bytes)):
            raise failures.bad_names(f"{c.OPERATIONS[kind]}_bulk", names)
        for name in names:
            key = check_name(name)
            if key in found:
                continue
            value = self._take(key) if kind == GET else self._take_version(key)
            if value is _UNDECODED:
                value = None
                missing.append(key)
            PyDict_SetItem(found, key, value)
        return found, missing

    # -- reads under way

    def begin_read(self, str name not None):
        """Return the entry that a read about to be sent will fill, or None if it may fill none."""
        dscache_lock(&self._mutex)
        try:
            return self._begin_read(name)
        finally:
            dscache_unlock(&self._mutex)

    cdef _SharedEntry _begin_read(self, str name):
        cdef object node
        cdef _Epoch epoch
        cdef _SharedEntry entry, found
        cdef Py_ssize_t size = 0
        cdef int slot = 0
        self._misses += 1
        if self._prefixes and not name.startswith(self._prefixes):
            return None
        if self._clustered:
            slot = self._encoder.slot(name)
            node = None if slot < 0 else self._owners[slot]
        else:
            node = self._node
        if node is None or node.epoch is None:
            return None
        utf8_of(name, &size)
        size += ENTRY_BYTES
        if self._table() + size > self._max_bytes or not self._max_records:
            return None
        self._make_room(1, size)
        entry = _SharedEntry.__new__(_SharedEntry)
        # From here on no Python code runs, so no other thread does.
        if self._clustered:
            node = self._owners[slot]
        epoch = None if node is None else node.epoch
        if epoch is None or not self._max_records or name in self._writes:
            return None
        found = self._current(name)
        if found is not None:
            if not found.filled and found.epoch is epoch and found.moves == self._moves[slot]:
                return found  # of another read, which was sent earlier
            entry.previous = found if found.filled else found.previous
            found.previous = None
            if entry.previous is not None and not self._may_be_stale(entry.previous):
                entry.previous = None
            self.drop(name)
        entry.name = name
        entry.epoch = epoch
        entry.expires = dscache_monotonic() + self._max_age
        entry.size = size
        entry.slot = slot
        entry.moves = self._moves[slot]
        PyDict_SetItem(self._entries, name, entry)
        self._append(entry)
        self._bytes += size
        self._pending += 1
        return entry

    def settle(self, _SharedEntry entry not None, Record record, bint is_of_owner):
        """Take the result of a read: a record, or None without one.

        It is kept unless something concerned the name since ``begin_read``, or the answer wasn't
        of the server that reports its changes.
        """
        dscache_lock(&self._mutex)
        try:
            self._settle(entry, record, is_of_owner)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _settle(self, _SharedEntry entry, Record record, bint is_of_owner) except -1:
        cdef Py_ssize_t size = 0 if record is None else PyBytes_GET_SIZE(record.raw)
        cdef str name = entry.name
        cdef _SharedEntry found
        if self._table() + entry.size + size > self._max_bytes:
            is_of_owner = False
        else:
            self._make_room(0, size)
        # From here on no Python code runs.
        found = self._current(name)
        if found is not entry or not is_of_owner:
            self._dropped_fills += 1
            self._compare(found, record is not None, 0 if record is None else record.version)
            return 0
        if entry.filled:  # by another thread
            if record is None:
                if entry.raw is not None:
                    self._remove(entry)
            elif entry.raw is None or entry.version != record.version or entry.raw != record.raw:
                self._remove(entry)
            return 0
        if record is not None:
            entry.raw = record.raw
            entry.version = record.version
        entry.previous = None
        write_flag(entry.filled, True)  # after all that a hit without the lock reads
        entry.size += size
        self._bytes += size
        self._pending -= 1
        return 0

    def count_misses(self, Py_ssize_t count):
        """Count versions that are about to be read; ``begin_read`` counts records."""
        dscache_lock(&self._mutex)
        self._misses += count
        dscache_unlock(&self._mutex)

    def observe(self, str name not None, version):
        """Drop an entry that differs from the version that a read has found, or None."""
        cdef long long number = 0 if version is None else version
        dscache_lock(&self._mutex)
        try:
            self._compare(self._current(name), version is not None, number)
        finally:
            dscache_unlock(&self._mutex)

    def last_known(self, str name not None):
        """Return the record to serve after a read of it has failed, or None."""
        dscache_lock(&self._mutex)
        try:
            return self._last_known(name)
        finally:
            dscache_unlock(&self._mutex)

    cdef Record _last_known(self, str name):
        cdef _SharedEntry entry = self._current(name)
        if entry is not None and not entry.filled:
            entry = entry.previous
        if (
            entry is None
            or not self._may_be_stale(entry)
            or dscache_monotonic() >= entry.expires
            or entry.moves != self._moves[entry.slot]
        ):
            return None
        self._stale += 1
        return _record_of(entry, True)

    # -- writes under way

    def begin_write(self, list names not None):
        """Drop the entries of names, and cache none of them until the SharedWrite has ended."""
        cdef SharedWrite write = SharedWrite.__new__(SharedWrite, self, self._writes)
        cdef str name
        dscache_lock(&self._mutex)
        try:
            for name in names:
                write.begin(name)
                self.drop(name)
        finally:
            dscache_unlock(&self._mutex)
        return write

    def end_writes(self, list names, writes):
        """End writes, unless they were of the parent of a forked child."""
        dscache_lock(&self._mutex)
        try:
            if writes is self._writes:
                for name in names:
                    uncount_write(self._writes, name)
                    self.drop(name)
        finally:
            dscache_unlock(&self._mutex)

    # -- for a NearNode: without the GIL, hits may read these fields without the lock

    def new_epoch(self, _Reachability reach not None, double known):
        """Return an epoch of a node that is up: all changes after ``known`` are reported."""
        cdef _Epoch epoch = _Epoch.__new__(_Epoch, reach)
        epoch.known = known
        self.set_up(reach, True)
        return epoch

    def confirm(self, _Epoch epoch not None, double known):
        """Note that every change from before a time has been reported."""
        dscache_lock(&self._mutex)
        write_double(epoch.known, known)
        dscache_unlock(&self._mutex)

    def end_epoch(self, _Epoch epoch, _Reachability reach not None, int state):
        """End an epoch, or None; return the Reachability of the next one.

        OVER also ends all epochs before it: none of their records is served as stale.
        """
        cdef _Reachability following = reach
        if state == OVER:
            following = _Reachability.__new__(_Reachability)
        dscache_lock(&self._mutex)
        if epoch is not None:
            write_int(epoch.state, state)
        if state == OVER:
            following.up = reach.up
            reach.over = True
        dscache_unlock(&self._mutex)
        return following

    cpdef int set_up(self, _Reachability reach, bint up) except -1:
        """Note whether a node can be reached."""
        dscache_lock(&self._mutex)
        reach.up = up
        dscache_unlock(&self._mutex)
        return 0

    cpdef bint invalidate(self, keys) except -1:
        """Drop the records of changed keys; return True if all keys changed (``keys`` is None)."""
        dscache_lock(&self._mutex)
        try:
            return _NearStore.invalidate(self, keys)
        finally:
            dscache_unlock(&self._mutex)

    cpdef int count_flush(self, str reason) except -1:
        """Count an invalidation of many records."""
        dscache_lock(&self._mutex)
        try:
            return _NearStore.count_flush(self, reason)
        finally:
            dscache_unlock(&self._mutex)

    # -- for the owner of the cache

    def only_node(self):
        """Return the NearNode of the only server."""
        node = self.node()
        dscache_lock(&self._mutex)
        self._node = node
        dscache_unlock(&self._mutex)
        return node

    def node(self):
        """Return a NearNode for a node of a cluster."""
        return NearNode(self, _Reachability.__new__(_Reachability))

    def route(self, owners):
        """Take over the nodes of slots: an iterable of slots with their NearNode, or None."""
        cdef int slot
        cdef bint moved = False
        cdef list pairs = list(owners)  # which runs Python code
        dscache_lock(&self._mutex)
        try:
            for slot, node in pairs:
                if self._owners[slot] is not node:
                    self._owners[slot] = node
                    write_unsigned(self._moves[slot], self._moves[slot] + 1)
                    moved = True
            if moved:
                _NearStore.count_flush(self, "slots")
        finally:
            dscache_unlock(&self._mutex)

    def close(self):
        """Drop every record, and stop caching and serving records."""
        dscache_lock(&self._mutex)
        try:
            _NearStore.close(self)
            self._pending = 0
            self._node = None
            self._owners = [None] * SLOTS if self._clustered else None
        finally:
            dscache_unlock(&self._mutex)

    def reset(self):
        """Drop every record, and forget the writes under way, as a forked child has none."""
        dscache_renew(&self._mutex)  # a thread that the child doesn't have may have had it
        self._ends.before = self._ends.after = <PyObject*>self._ends
        self._entries = {}
        self._bytes = self._pending = 0
        self._writes = {}
        self._node = None
        self._owners = [None] * SLOTS if self._clustered else None

    def stats(self):
        """Return the counters, the flushes by reason, and the size of the cache."""
        dscache_lock(&self._mutex)
        try:
            counts = _NearStore.stats(self)
            counts["hits"] += dscache_total(&self._hits_without_lock)
            counts["records"] -= self._pending
        finally:
            dscache_unlock(&self._mutex)
        return counts

    # -- helpers

    cdef inline object _take(self, name):
        """Return the cached Record, None for a missing one, or _UNDECODED if it isn't cached."""
        cdef bint stale = False
        cdef _SharedEntry entry
        if LOCK_FREE:
            entry = self._hit(name)
            if entry is not None:
                return _record_of(entry, False)
        dscache_lock(&self._mutex)
        try:
            entry = self._look(name, &stale)
            return _UNDECODED if entry is None else _record_of(entry, stale)
        finally:
            dscache_unlock(&self._mutex)

    cdef object _take_version(self, name):
        """Return the cached version as ``_take`` does the Record; a stale one isn't cached."""
        cdef bint stale = False
        cdef _SharedEntry entry
        if LOCK_FREE:
            entry = self._hit(name)
            if entry is not None:
                return None if entry.raw is None else entry.version
        dscache_lock(&self._mutex)
        try:
            entry = self._look(name, &stale)
            if entry is None or stale:
                return _UNDECODED
            return None if entry.raw is None else entry.version
        finally:
            dscache_unlock(&self._mutex)

    cdef inline _SharedEntry _hit(self, name):
        """Return the entry of a name if it is a hit that needs no lock, or None.

        A hit writes to nothing that threads share but its entry. So it borrows the dict and the
        epoch: counting references to them is a write too. Two threads that each read 50 names of
        their own by ``get_bulk`` have 1.58 of the hits of one, and had 0.83 of them with the lock.

        Nothing but the ``known`` of the epoch can make an entry servable again. So ``known`` is
        read before all that may have ended the entry: a drop that came before that ``known`` is
        then seen in the end.
        """
        cdef _SharedEntry entry
        cdef double now
        if type(name) is not str:
            return None
        found = dscache_value_of(<PyObject*>self._entries, <PyObject*>name, <PyObject*>None)
        if found is None:
            return None
        entry = <_SharedEntry>found
        if not read_flag(entry.filled):
            return None
        now = dscache_monotonic()
        if (
            now >= entry.expires
            or now - read_double(entry.epoch.known) > self._idle_limit
            or read_int(entry.epoch.state) != LIVE
            or entry.moves != read_unsigned(self._moves[entry.slot])
            or not read_flag(entry.filled)
        ):
            return None
        if not read_flag(entry.was_hit):
            write_flag(entry.was_hit, True)
        dscache_count(&self._hits_without_lock)
        return entry

    cdef inline _SharedEntry _current(self, name):
        cdef PyObject* found = PyDict_GetItem(self._entries, name) if type(name) is str else NULL
        return None if found == NULL else <_SharedEntry>found

    cdef inline _SharedEntry _look(self, name, bint* stale):
        """Return the entry of a name if it may be served, and whether it may be outdated."""
        cdef _SharedEntry entry = self._current(name)
        cdef _Epoch epoch
        cdef double now
        if entry is None:
            return None
        if not entry.filled:
            entry = entry.previous
            if entry is None:
                return None
        epoch = entry.epoch
        now = dscache_monotonic()
        if now >= entry.expires:
            if self._current(name) is entry:
                self._remove(entry)
        elif entry.moves == self._moves[entry.slot]:
            if epoch.state == LIVE:
                if now - epoch.known <= self._idle_limit:
                    write_flag(entry.was_hit, True)
                    self._hits += 1
                    return entry
            # A miss has no Record that could be marked as stale.
            elif self._may_be_stale(entry) and not epoch.reach.up:
                self._stale += 1
                stale[0] = True
                return entry
        return None

    cdef int _compare(self, _SharedEntry entry, bint exists, long long version) except -1:
        """Drop an entry that may differ from the result of another read."""
        if entry is None:
            return 0
        if not entry.filled or exists != (entry.raw is not None) or (
            exists and entry.version != version
        ):
            self._remove(entry)
        return 0

    cdef int _remove(self, _SharedEntry entry) except -1:
        self.drop(entry.name)
        return 0

    cdef bint drop(self, str name) except -1:
        """Drop the entry of a name; return whether there was one."""
        cdef PyObject* found = PyDict_GetItem(self._entries, name)
        if found == NULL:
            return False
        cdef _SharedEntry entry = <_SharedEntry>found
        unlink(entry)
        del self._entries[name]
        self._bytes -= entry.size
        self._pending -= not entry.filled
        write_flag(entry.filled, False)  # for a hit that has found it before
        return True
