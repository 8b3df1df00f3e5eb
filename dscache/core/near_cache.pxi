# Records cached in the process until Redis reports a change; the compiled twin of
# ``near_cache.py``, which has the theory of operation. One difference: the entries form a linked
# list in their order, since a Python dict gives no immediate access to its oldest entry.

from asyncio import Future

from .core.near_parts import BulkRead, NearSettings
from .core.waiters import Part, arguments_of_future

cdef object _Future = Future
cdef object _set_result = Future.set_result
cdef tuple _NOTHING = ()

# Bytes of overhead per record, without the text of name and data and without the dict.
NEAR_ENTRY_BYTES = 208
cdef Py_ssize_t ENTRY_BYTES = NEAR_ENTRY_BYTES
cdef Py_ssize_t NO_TABLE = getsizeof({})
cdef Py_ssize_t NEAR_FENCES = c.NEAR_FENCES
cdef Py_ssize_t NEAR_SHARED = c.NEAR_SHARED
cdef object _AWAY = failures.AWAY


@cython.final
cdef class _Reachability:
    """The state of the connection to one node; ``up`` while connected.

    ``over`` is set when every record read from the node so far is known to be outdated.
    """

    cdef public bint up, over


@cython.final
cdef class _Epoch:
    """The period in which one connection is tracked.

    ``known`` is the time up to which every change is known here: Redis reports every change from
    before a command before it answers that command. The epoch follows one mark at a time instead
    of each command.
    """

    cdef _Reachability reach
    cdef public int state
    cdef public double known
    cdef Py_ssize_t _mark, _last_mark
    cdef double _sent, _last_sent

    def __cinit__(self, _Reachability reach):
        self.reach = reach
        self.state = LIVE
        self.known = dscache_monotonic()

    cdef inline void asked(self, Py_ssize_t mark) noexcept:
        """Record a sending of commands, all answered once ``mark`` commands are settled."""
        self._last_mark = mark
        self._last_sent = dscache_monotonic()
        if not self._mark:
            self._mark = mark
            self._sent = self._last_sent

    cdef inline void answered(self, Py_ssize_t settled) noexcept:
        """Record the number of settled commands."""
        if settled >= self._mark > 0:
            self.known = self._sent
            self._mark = self._last_mark if self._last_mark > settled else 0
            self._sent = self._last_sent


@cython.no_gc  # an entry is in no reference cycle
@cython.freelist(1024)
cdef class _Entry:
    """The cached state of one name: a record, or a miss (``raw`` is None)."""

    cdef str name
    cdef bytes raw
    cdef _Epoch epoch
    cdef long long version
    cdef double expires
    cdef Py_ssize_t size
    cdef unsigned int moves
    cdef int slot
    cdef bint was_hit
    # Neighbours in the order of the entries; the dict of entries keeps them alive.
    cdef PyObject* before
    cdef PyObject* after


cdef class _NearStore:
    """The entries of a near cache, within their limits, and its counters."""

    cdef _Encoder _encoder
    cdef bint _clustered
    cdef Py_ssize_t _max_records, _max_bytes
    cdef double _max_age, _idle_limit
    cdef tuple _prefixes
    cdef bint _serve_stale
    cdef dict _entries
    cdef _Entry _ends  # before the first entry and after the last one
    cdef Py_ssize_t _bytes
    cdef unsigned int* _moves  # number of moves of each slot
    cdef unsigned long long _hits, _misses, _joins, _stale, _invalidations, _evictions
    cdef unsigned long long _dropped_fills
    cdef dict _flushes

    def __cinit__(self, *_, **__):
        self._moves = <unsigned int*>PyMem_Malloc(SLOTS * sizeof(unsigned int))
        if self._moves == NULL:
            raise MemoryError
        memset(self._moves, 0, SLOTS * sizeof(unsigned int))
        self._entries = {}
        self._ends = _Entry.__new__(_Entry)
        self._ends.before = self._ends.after = <PyObject*>self._ends
        self._flushes = {}

    def __dealloc__(self):
        PyMem_Free(self._moves)

    cdef int _configure(self, chosen) except -1:
        self._encoder = _Encoder.__new__(_Encoder, chosen.key_prefix, chosen.hash_tag)
        self._clustered = chosen.clustered
        self._max_records = chosen.max_records
        self._max_bytes = chosen.max_bytes
        self._max_age = chosen.max_age
        self._idle_limit = chosen.idle_limit
        self._prefixes = chosen.prefixes
        self._serve_stale = chosen.serve_stale
        return 0

    # -- for the owner of the cache

    def slots_moved(self, slots):
        """Invalidate the records of slots that another node serves now."""
        cdef int slot
        cdef bint moved = False
        for slot in slots:
            if not 0 <= slot < SLOTS:
                raise IndexError(slot)
            self._moves[slot] += 1
            moved = True
        if moved:
            self.count_flush("slots")

    def close(self):
        """Drop every record, and stop caching and serving records."""
        self._ends.before = self._ends.after = <PyObject*>self._ends
        self._entries.clear()
        self._bytes = 0
        self._max_records = 0
        self._serve_stale = False

    def stats(self):
        """Return the counters, the flushes by reason, and the size of the cache."""
        return {
            "hits": self._hits,
            "misses": self._misses,
            "joins": self._joins,
            "stale": self._stale,
            "invalidations": self._invalidations,
            "evictions": self._evictions,
            "dropped_fills": self._dropped_fills,
            "flushes": dict(self._flushes),
            "records": PyDict_Size(self._entries),
            "bytes": self._bytes + self._table(),
        }

    # -- the entries

    cdef bint drop(self, str name) except -1:
        """Drop the entry of a name; return whether there was one."""
        cdef PyObject* found = PyDict_GetItem(self._entries, name)
        if found == NULL:
            return False
        cdef _Entry entry = <_Entry>found
        unlink(entry)
        del self._entries[name]
        self._bytes -= entry.size
        return True

    cpdef bint invalidate(self, keys) except -1:
        """Drop the records of changed keys; return True if all keys changed (``keys`` is None)."""
        if keys is None:
            return True
        for key in <list>keys:
            name = self._encoder.name_of(<bytes>key) if type(key) is bytes else None
            if name is not None and self.drop(name):
                self._invalidations += 1
        return False

    cpdef int count_flush(self, str reason) except -1:
        """Count an invalidation of many records."""
        self._flushes[reason] = self._flushes.get(reason, 0) + 1
        return 0

    cdef inline bint _may_be_stale(self, _Entry entry) noexcept:
        return self._serve_stale and entry.raw is not None and not entry.epoch.reach.over

    cdef int _append(self, _Entry entry) noexcept:
        """Append an entry to the linked list."""
        cdef PyObject* last = self._ends.before
        entry.before = last
        entry.after = <PyObject*>self._ends
        (<_Entry>last).after = <PyObject*>entry
        self._ends.before = <PyObject*>entry
        return 0

    cdef Py_ssize_t _table(self) except -1:
        """Return the bytes of the dict of entries, which grows and shrinks in steps."""
        return <Py_ssize_t>getsizeof(self._entries) - NO_TABLE

    cdef int _make_room(self, Py_ssize_t records, Py_ssize_t size) except -1:
        cdef _Entry entry
        # Other threads may have hits meanwhile, without the lock.
        cdef Py_ssize_t chances = PyDict_Size(self._entries)
        while self._ends.after != <PyObject*>self._ends and (
            PyDict_Size(self._entries) + records > self._max_records
            or self._bytes + self._table() + size > self._max_bytes
        ):
            entry = <_Entry>self._ends.after
            if read_flag(entry.was_hit) and entry.epoch.state == LIVE and chances > 0:
                chances -= 1
                write_flag(entry.was_hit, False)
                unlink(entry)
                self._append(entry)
                continue
            self.drop(entry.name)
            self._evictions += 1
        return 0


@cython.final
cdef class NearCache(_NearStore):
    """The operations of a Pipeline or Router (``inner``), with a cache of the records read.

    The waiter of a hit is done already: awaiting it doesn't yield to the event loop.

    ``settings`` are the fields of NearSettings.
    """

    cdef object _check
    cdef unsigned long _thread  # the thread the cache is bound to, or 0
    cdef object _create_waiter
    cdef dict _of_future  # the arguments of asyncio.Future, or None for other waiters
    cdef object _inner
    cdef double _join_period
    cdef dict _pending
    cdef dict _fences
    cdef long long _floor
    cdef long _live

    def __cinit__(self, *_, **__):
        self._pending = {}
        self._fences = {}

    def __init__(self, create_waiter, inner, **settings):
        chosen = NearSettings(**settings)
        self._configure(chosen)
        self._check = chosen.check
        self._thread = 0 if chosen.check is None else dscache_thread()
        self._create_waiter = create_waiter
        self._of_future = arguments_of_future(create_waiter)
        self._inner = inner
        self._join_period = chosen.timeout / 20

    # -- operations on one record

    def get(self, name, type=None):
        """Read one record; its waiter gets the Record, or None.

        With a ``type``, the Record's data is of that type.
        """
        if type is not None:
            waiter = self._create_waiter()
            typed.get(self, waiter, check_name(name), type)
            return waiter
        self._stay()
        cdef bint stale = False
        cdef _Entry entry = self._look(name, &stale)
        if entry is None:
            return self._read(check_name(name), self._create_waiter())
        return self._done(_record_of(entry, stale))

    def head(self, name):
        """Read one version; its waiter gets the int, or None."""
        self._stay()
        cdef bint stale = False
        cdef _Entry entry = self._look(name, &stale)
        if entry is None or stale:
            self._misses += 1
            waiter = self._create_waiter()
            self._inner.read(check_name(name), waiter, HEAD)
            return waiter
        return self._done(None if entry.raw is None else entry.version)

    cdef object _done(self, result):
        """Return a waiter that is done."""
        if self._of_future is None:
            waiter = self._create_waiter()
            waiter.set_result(result)
            return waiter
        return dscache_done(
            <PyObject*>_Future,
            <PyObject*>_NOTHING,
            <PyObject*>self._of_future,
            <PyObject*>_set_result,
            <PyObject*>result,
        )

    def set(self, name, version, data, ttl=None, if_newer=False, if_version=ANY):
        """Queue a write; its waiter gets True, or False if its condition doesn't hold."""
        waiter = self._inner.set(name, version, data, ttl, if_newer, if_version)
        self.add_fence(check_name(name))
        return waiter

    def delete(self, name, if_version=ANY):
        """Queue a removal; its waiter gets whether the record existed."""
        waiter = self._inner.delete(name, if_version)
        self.add_fence(check_name(name))
        return waiter

    # -- reads for another waiter

    def read(self, str name not None, waiter):
        """Queue a read; ``waiter`` gets the Record, or None, at once if the record was cached."""
        self._stay()
        cdef bint stale = False
        cdef _Entry entry = self._look(name, &stale)
        if entry is None:
            self._read(name, waiter)
        else:
            _resolve(waiter, _record_of(entry, stale))

    def read_bulk(self, int kind, names, waiter):
        """Queue a GET or HEAD of the records not cached; ``waiter`` gets a dict of all found."""
        self._bulk(kind, names, waiter)

    # -- bulk operations

    def get_bulk(self, names):
        """Queue a read of the records not cached; its waiter gets a dict of all records found."""
        return self._bulk(GET, names)

    def head_bulk(self, names):
        """Queue a read of the versions not cached; its waiter gets a dict of all versions found."""
        return self._bulk(HEAD, names)

    def set_bulk(self, records, ttl=None, if_newer=False, if_version=ANY):
        """Queue a write of many records; its waiter gets the set of names not written."""
        if isinstance(records, (dict, Mapping)):
            records = dict(records.items())
        waiter = self._inner.set_bulk(records, ttl, if_newer, if_version)
        for name in records:
            self.add_fence(check_name(name))
        return waiter

    def delete_bulk(self, names, if_version=ANY):
        """Queue a removal of many records; its waiter gets the number of records removed."""
        if not isinstance(names, (str, bytes)):
            names = list(names)
        waiter = self._inner.delete_bulk(names, if_version)
        for name in names:
            self.add_fence(check_name(name))
        return waiter

    cdef inline int _stay(self) except -1:
        """Call ``check``, which may raise, if the thread has changed. ``inner`` checks writes."""
        if self._thread and self._thread != dscache_thread():
            self._check()
            self._thread = dscache_thread()  # the event loop runs there now
        return 0

    # -- for the pipelines

    cdef int fill(
        self,
        Pipeline pipeline,
        _Epoch epoch,
        long long serial,
        str name,
        long long version,
        bytes raw,
        int slot,
    ) except -1:
        """Cache the result of a read: a record, or a miss if ``raw`` is None.

        ``serial`` states when the read was issued. ``slot`` is the slot of the name, or -1 if the
        caller hasn't computed it.
        """
        cdef PyObject* fence
        cdef Py_ssize_t size = 0
        cdef _Entry entry
        if self._prefixes and not name.startswith(self._prefixes):
            return 0
        # From here on no Python code runs that could write this name, such as a finalizer.
        entry = _Entry.__new__(_Entry)
        fence = PyDict_GetItem(self._fences, name) if self._fences else NULL
        if serial < self._floor or (fence != NULL and serial < <long long><object>fence):
            self._dropped_fills += 1
            return 0
        if not self._clustered:
            slot = 0
        else:
            if slot < 0:
                slot = self._encoder.slot(name)
            # Replies of replicas and of former owners are not cached.
            if self._inner.owners[slot] is not pipeline:
                self._dropped_fills += 1
                return 0
        utf8_of(name, &size)
        size += ENTRY_BYTES + (0 if raw is None else PyBytes_GET_SIZE(raw))
        self.drop(name)
        if self._table() + size > self._max_bytes or not self._max_records:
            return 0
        self._make_room(1, size)
        entry.name = name
        entry.raw = raw
        entry.epoch = epoch
        entry.version = version
        entry.expires = dscache_monotonic() + self._max_age
        entry.size = size
        entry.slot = slot
        entry.moves = self._moves[slot]
        entry.was_hit = False
        PyDict_SetItem(self._entries, name, entry)
        self._append(entry)
        self._bytes += size
        self._make_room(0, 0)  # the table may have grown
        return 0

    cdef int add_fence(self, str name) except -1:
        """Drop a record that this process writes, and keep older reads from restoring it."""
        self.drop(name)
        if self._pending:
            self._pending.pop(name, None)
        if PyDict_Size(self._fences) >= NEAR_FENCES:
            self._floor = dscache_current(last_serial)
            self._fences.clear()
        PyDict_SetItem(self._fences, name, dscache_current(last_serial))
        return 0

    cpdef int count_flush(self, str reason) except -1:
        """Count an invalidation of many records, and let no caller join the reads pending now."""
        self._pending.clear()
        self._flushes[reason] = self._flushes.get(reason, 0) + 1
        return 0

    cpdef int count_live(self, long change) noexcept:
        """Add ``change`` to the number of tracked connections."""
        self._live += change
        return 0

    cpdef Record last_known(self, str name):
        """Return the record to serve while its node is unreachable, or None."""
        cdef PyObject* found = PyDict_GetItem(self._entries, name)
        if found == NULL:
            return None
        cdef _Entry entry = <_Entry>found
        if not self._may_be_stale(entry) or dscache_monotonic() >= entry.expires:
            return None
        self._stale += 1
        return _record_of(entry, True)

    cdef int end_read(self, _PendingRead read) except -1:
        """Remove a pending read, so that no more callers join it."""
        if self._pending.get(read.name) is read:
            del self._pending[read.name]
        return 0

    # -- for BulkRead

    def settle_reads(self, list reads not None, found, errors):
        """Give the callers that joined the reads of a bulk the results of their names."""
        cdef _PendingRead read
        for read in reads:
            if read.name in errors:
                read.set_exception(errors[read.name])
            else:
                read.set_result(_another(found.get(read.name)) if read.waiters else None)

    # -- helpers

    cdef inline _Entry _look(self, name, bint* stale):
        """Return the entry of a name if it may be served, and whether it may be outdated."""
        cdef PyObject* found = PyDict_GetItem(self._entries, name) if type(name) is str else NULL
        if found == NULL:
            return None
        cdef _Entry entry = <_Entry>found
        cdef _Epoch epoch = entry.epoch
        cdef double now = dscache_monotonic()
        if now >= entry.expires:
            self.drop(name)
        elif entry.moves == self._moves[entry.slot]:
            if epoch.state == LIVE:
                if now - epoch.known <= self._idle_limit:
                    entry.was_hit = True
                    self._hits += 1
                    return entry
            # A miss has no Record that could be marked as stale.
            elif self._may_be_stale(entry) and not epoch.reach.up:
                self._stale += 1
                stale[0] = True
                return entry
        return None

    cdef object _read(self, str name, waiter):
        # The waiter exists: creating it may run Python code that ends or begins pending reads.
        cdef double now = dscache_monotonic()
        cdef _PendingRead read = self._joinable(name, now)
        if read is None:
            read = _PendingRead.__new__(_PendingRead, self, name, now + self._join_period)
            read.waiters.append(waiter)
            self._inner.read(name, read)
            PyDict_SetItem(self._pending, name, read)
            self._misses += 1
        else:
            read.waiters.append(waiter)
            self._joins += 1
        return waiter

    cdef _PendingRead _joinable(self, str name, double now):
        """Return the pending read of a name if callers may still join it."""
        cdef PyObject* found = PyDict_GetItem(self._pending, name) if self._live else NULL
        if found == NULL or now >= (<_PendingRead>found).joinable_until:
            return None
        return <_PendingRead>found

    cdef object _bulk(self, int kind, names, waiter=None):
        cdef dict found = {}
        cdef dict result = {}
        cdef list missing = []
        cdef list joined = []
        cdef list reads = []
        cdef set awaited
        cdef double now = dscache_monotonic()
        cdef bint stale
        cdef _Entry entry
        cdef _PendingRead read
        cdef bint is_asked
        cdef str key
        self._stay()
        if isinstance(names, (str, bytes)):
            raise failures.bad_names(f"{c.OPERATIONS[kind]}_bulk", names)
        for name in names:
            key = check_name(name)
            if key in found:
                continue
            stale = False
            entry = self._look(key, &stale)
            if entry is None or (stale and kind == HEAD):
                PyDict_SetItem(found, key, None)  # keeps the place of the name in the result
                read = self._joinable(key, now) if kind == GET else None
                if read is None:
                    missing.append(key)
                else:
                    joined.append(read)
            elif kind == GET:
                PyDict_SetItem(found, key, _record_of(entry, stale))
            else:
                PyDict_SetItem(found, key, None if entry.raw is None else entry.version)
        if waiter is None:
            waiter = self._create_waiter()
        is_asked = bool(missing) or not found
        if not is_asked and not joined:
            # No comprehension, for the reason in ``_Batch._group``.
            for key, value in found.items():
                if value is not None:
                    PyDict_SetItem(result, key, value)
            _resolve(waiter, result)
            return waiter
        if kind == GET and PyList_GET_SIZE(missing) <= NEAR_SHARED:
            for key in missing:
                read = _PendingRead.__new__(_PendingRead, self, key, now + self._join_period)
                reads.append(read)
        awaited = {None} if is_asked else set()
        for read in joined:
            awaited.add(read.name)
        bulk = BulkRead(self, kind, found, missing, reads, waiter, awaited)
        if is_asked:
            self._inner.read_bulk(kind, missing, bulk)
        self._misses += PyList_GET_SIZE(missing)
        self._joins += PyList_GET_SIZE(joined)
        for read in joined:
            read.waiters.append(Part(bulk, read.name))
        for read in reads:
            PyDict_SetItem(self._pending, read.name, read)
        return waiter

cdef inline void unlink(_Entry entry) noexcept:
    (<_Entry>entry.before).after = entry.after
    (<_Entry>entry.after).before = entry.before


cdef inline Record _record_of(_Entry entry, bint stale):
    if entry.raw is None:
        return None
    cdef Record record = _record(entry.name, entry.version, entry.raw)
    record.stale = stale
    return record


@cython.final
cdef class _PendingRead:
    """A pending read of one name: the waiter that the pipeline resolves, for all its callers."""

    cdef NearCache _near
    cdef str name
    cdef double joinable_until
    cdef int slot  # -1 while it isn't known
    cdef list waiters

    def __cinit__(self, NearCache near, str name, double joinable_until):
        self._near = near
        self.slot = -1
        self.name = name
        self.joinable_until = joinable_until
        self.waiters = []

    def set_result(self, Record record, /):
        self._near.end_read(self)
        for waiter in self.waiters:
            _resolve(waiter, record)
            record = _another(record)

    def set_exception(self, error, /):
        cdef Record known
        self._near.end_read(self)
        for waiter in self.waiters:
            known = self._near.last_known(self.name) if isinstance(error, _AWAY) else None
            if known is None:
                _reject(waiter, partial(failures.copy_error, error))
            else:
                _resolve(waiter, known)


cdef inline Record _another(Record record):
    """Return a copy of the record, for another caller."""
    return None if record is None else _record(record.name, record.version, record.raw)
