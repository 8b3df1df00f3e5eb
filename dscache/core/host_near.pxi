# Records that all processes of a host share until Redis reports a change. ``blocking/near_host.py``
# has the theory of operation. This exists in the compiled core alone: Python has no atomic loads.

# Bytes that a segment takes for each record beside its text.
cdef Py_ssize_t HOST_ENTRY_BYTES = 2 * 64 + 8
# A record that is larger than this share of the cache isn't kept.
cdef Py_ssize_t HOST_SHARE = 16
# How often the lock is asked for: by a read, which can do without, and by all others.
cdef int SOME_TRIES = 30
cdef int MANY_TRIES = 120
# Names that are dropped under one lock.
cdef Py_ssize_t HOST_DROPS = 128

# Whether this machine has the atomic operations that a segment needs.
HOST_NEAR_SUPPORTED = bool(HN_SUPPORTED)


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class _HostEntry:
    """The node that a read fills, if it is still that of the read then."""

    cdef str name
    cdef uint32_t index
    cdef uint64_t ticket
    cdef long serial


@cython.final
cdef class HostNearCache:
    """Records that the processes of a host have read, for all; ``settings`` as of NearSettings.

    ``read`` and ``read_head`` are called for a record that isn't cached, as by a SharedNearCache.
    Nothing is cached before ``attach``.
    """

    cdef dscache_mutex _mutex  # of the fields from here on, as in a SharedNearCache
    cdef object _read, _read_head
    cdef _Encoder _encoder
    cdef hn_map _map
    cdef uint32_t _max_nodes, _max_blocks
    cdef Py_ssize_t _largest
    cdef int64_t _max_age, _idle_limit
    cdef tuple _prefixes
    cdef dict _writes
    cdef bint _leads
    cdef long _serial  # of the attachment
    cdef uint64_t _session  # whose server is also that of this process
    cdef unsigned long long _hits, _misses, _invalidations, _dropped_fills
    cdef dict _flushes

    def __cinit__(self, *_, **__):
        self._map.base = NULL
        self._writes = {}
        self._flushes = {}

    def __dealloc__(self):
        hn_close(&self._map)

    def __init__(self, read, read_head, **settings):
        chosen = NearSettings(**settings)
        self._read = read
        self._read_head = read_head
        self._encoder = _Encoder.__new__(_Encoder, chosen.key_prefix, chosen.hash_tag)
        self._max_age = <int64_t>(chosen.max_age * 1e9)
        self._idle_limit = <int64_t>(chosen.idle_limit * 1e9)
        self._prefixes = chosen.prefixes
        room = max(chosen.max_bytes - HN_HEADER, 0)
        nodes = max(1, min(chosen.max_records, room // HOST_ENTRY_BYTES, 2**31))
        self._max_nodes = nodes
        self._max_blocks = max(1, min((room - <Py_ssize_t>hn_size(nodes, 0)) // 64, 2**32 - 2))
        self._largest = min(chosen.max_bytes // HOST_SHARE, <Py_ssize_t>HN_LARGEST)

    # -- the segment

    def create(self, int data, uint64_t seed, uint64_t number):
        """Make a new file, which no other process knows of yet; return whether there was room."""
        return hn_create(data, self._max_nodes, self._max_blocks, seed, number)

    @property
    def size(self):
        """The size of the file."""
        return hn_size(self._max_nodes, self._max_blocks)

    def attach(self, int data, int lock):
        """Begin to use a file, whose changes the other file locks; return whether it fits."""
        cdef bint fits
        dscache_lock(&self._mutex)
        self._detach()
        fits = hn_open(&self._map, data, lock, self._max_nodes, self._max_blocks)
        if fits and not hn_fits(&self._map):
            self._detach()
            fits = False
        dscache_unlock(&self._mutex)
        return fits

    def detach(self):
        """Leave the file; entries of reads under way aren't filled any more."""
        dscache_lock(&self._mutex)
        self._detach()
        dscache_unlock(&self._mutex)

    cdef void _detach(self) noexcept:
        if self._map.base != NULL and self._leads and self._map.pid == getpid():
            hn_end_epoch(&self._map)
        self._serial += 1
        self._session = 0
        self._leads = False
        hn_close(&self._map)

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

    cdef _HostEntry _begin_read(self, str name):
        cdef Py_ssize_t size = 0
        cdef const char* text
        cdef hn_node* node
        cdef _HostEntry entry
        self._misses += 1
        if self._map.base == NULL or (self._prefixes and not name.startswith(self._prefixes)):
            return None
        text = utf8_of(name, &size)
        if size > self._largest or hn_acquire(self._map.at + HN_AT_EPOCH) & 1:
            return None
        entry = _HostEntry.__new__(_HostEntry)
        # From here on no Python code runs, so no other thread does.
        if self._map.base == NULL or name in self._writes:
            return None
        if not hn_lock(&self._map, SOME_TRIES):
            return None
        node = hn_reserve(&self._map, text, <uint32_t>size, hn_now() + self._max_age)
        if node != NULL:
            entry.index = <uint32_t>(node - self._map.nodes)
            entry.ticket = node.ticket
        hn_unlock(&self._map)
        if node == NULL:
            return None
        entry.name = name
        entry.serial = self._serial
        return entry

    def settle(self, _HostEntry entry not None, Record record, bint is_of_owner):
        """Take the result of a read: a record, or None without one.

        It is kept unless something concerned the name since ``begin_read``, or the answer wasn't
        of the server that reports its changes.
        """
        dscache_lock(&self._mutex)
        try:
            self._settle(entry, record, is_of_owner)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _settle(self, _HostEntry entry, Record record, bint is_of_owner) except -1:
        cdef Py_ssize_t size = 0, raw_size = 0
        cdef const char* text = utf8_of(entry.name, &size)
        cdef const char* raw = NULL
        cdef int64_t version = -1
        cdef bint is_kept = False
        if self._map.base == NULL:
            self._dropped_fills += 1
            return 0
        if record is not None:
            version = record.version
            raw = PyBytes_AS_STRING(record.raw)
            raw_size = PyBytes_GET_SIZE(record.raw)
        if not self._lock():
            self._dropped_fills += 1
            return 0
        if is_of_owner and entry.serial == self._serial and raw_size + size <= self._largest:
            is_kept = hn_fill(
                &self._map,
                entry.index,
                entry.ticket,
                text,
                <uint32_t>size,
                version,
                raw,
                <uint32_t>raw_size,
            )
        if not is_kept:
            hn_compare(&self._map, text, <uint32_t>size, version)
            self._dropped_fills += 1
        hn_unlock(&self._map)
        return 0

    def count_misses(self, Py_ssize_t count):
        """Count versions that are about to be read; ``begin_read`` counts records."""
        dscache_lock(&self._mutex)
        self._misses += count
        dscache_unlock(&self._mutex)

    def observe(self, str name not None, version):
        """Drop an entry that differs from the version that a read has found, or None."""
        dscache_lock(&self._mutex)
        try:
            self._observe(name, version)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _observe(self, str name, version) except -1:
        cdef int64_t number = -1 if version is None else version
        cdef Py_ssize_t size = 0
        cdef const char* text = utf8_of(name, &size)
        if self._map.base == NULL or size > self._largest:
            return 0
        if not self._lock():
            return 0
        hn_compare(&self._map, text, <uint32_t>size, number)
        hn_unlock(&self._map)
        return 0

    def last_known(self, str name not None):
        """Return None: records of a host aren't served after a failure."""
        return None

    # -- writes under way

    def begin_write(self, list names not None):
        """Drop the entries of names, and serve none of them until the SharedWrite has ended."""
        cdef SharedWrite write = SharedWrite.__new__(SharedWrite, self, self._writes)
        dscache_lock(&self._mutex)
        try:
            for name in names:
                write.begin(name)
            self._drop(write._names)
        finally:
            dscache_unlock(&self._mutex)
        return write

    def end_writes(self, list names, writes):
        """End writes, unless they were of the parent of a forked child."""
        dscache_lock(&self._mutex)
        try:
            if writes is self._writes:
                # In this order: a name that isn't counted any more has no entry from before the
                # write.
                self._drop(names)
                for name in names:
                    uncount_write(self._writes, name)
        finally:
            dscache_unlock(&self._mutex)

    # -- what the server reports, for the process that hears of it

    @property
    def leads(self):
        """Whether this process hears of the changes, and may pass them on."""
        return self._leads

    @leads.setter
    def leads(self, bint leads):
        dscache_lock(&self._mutex)
        if (leads or self._leads) and self._map.base != NULL:
            hn_end_epoch(&self._map)  # that of another process, or its own
        self._leads = leads
        dscache_unlock(&self._mutex)

    def begin_epoch(self, bytes identity not None, double known):
        """Begin to cache: the server reports every change after ``known``."""
        if PyBytes_GET_SIZE(identity) > HN_IDENTITY:
            raise ValueError(f"the identity of a server is too long: {len(identity)} bytes")
        dscache_lock(&self._mutex)
        if self._leads and self._map.base != NULL:
            hn_begin_epoch(
                &self._map,
                PyBytes_AS_STRING(identity),
                <uint32_t>PyBytes_GET_SIZE(identity),
                <int64_t>(known * 1e9),
            )
            self._session = hn_load(self._map.at + HN_AT_SESSION)
        dscache_unlock(&self._mutex)

    def end_epoch(self, str reason not None):
        """End all entries; ``reason`` is that of the flush."""
        dscache_lock(&self._mutex)
        try:
            if self._leads and self._map.base != NULL and hn_end_epoch(&self._map):
                self._count_flush(reason)
        finally:
            dscache_unlock(&self._mutex)

    def confirm(self, double known):
        """Note that every change from before a time has been reported."""
        dscache_lock(&self._mutex)
        if self._leads and self._map.base != NULL:
            hn_release(self._map.at + HN_AT_KNOWN, <uint64_t><int64_t>(known * 1e9))
        dscache_unlock(&self._mutex)

    def take_keys(self, list keys):
        """Drop the entries of changed keys, or all if ``keys`` is None."""
        dscache_lock(&self._mutex)
        try:
            self._take_keys(keys)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _take_keys(self, list keys) except -1:
        cdef list names
        if not self._leads:
            return 0
        if keys is None:
            self._flush("flushall")
            return 0
        names = []
        for key in keys:
            name = self._encoder.name_of(<bytes>key) if type(key) is bytes else None
            if name is not None:
                names.append(name)
        self._invalidations += self._drop(names)
        return 0

    # -- what each process knows of the server

    @property
    def is_live(self):
        """Whether the server reports its changes to a process of the host."""
        cdef uint64_t epoch = 1
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            epoch = hn_acquire(self._map.at + HN_AT_EPOCH)
        dscache_unlock(&self._mutex)
        return not epoch & 1

    @property
    def session(self):
        """The number of the connection that reports changes."""
        cdef uint64_t session = 0
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            session = hn_acquire(self._map.at + HN_AT_SESSION)
        dscache_unlock(&self._mutex)
        return session

    @property
    def identity(self):
        """The identity of the server that reports its changes, or None."""
        cdef uint64_t session = 0
        cdef bytes found
        dscache_lock(&self._mutex)
        try:
            found = self._identity(&session)
        finally:
            dscache_unlock(&self._mutex)
        return None if found is None else found.decode("utf-8", "surrogateescape")

    def vouches(self, bytes identity not None):
        """Whether the answers of a server may be kept: it is the one that reports its changes.

        Records are served here once that is known.
        """
        cdef uint64_t session = 0
        dscache_lock(&self._mutex)
        try:
            if self._identity(&session) != identity:
                return False
            self._session = session
            return True
        finally:
            dscache_unlock(&self._mutex)

    def doubt(self):
        """Have the connection that reports changes made anew: another server has answered."""
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            hn_release(self._map.at + HN_AT_DOUBT, hn_acquire(self._map.at + HN_AT_SESSION))
        dscache_unlock(&self._mutex)

    @property
    def is_doubted(self):
        """Whether a process doubts that the server is the right one."""
        cdef bint is_doubted
        dscache_lock(&self._mutex)
        is_doubted = self._map.base != NULL and (
            hn_acquire(self._map.at + HN_AT_DOUBT) == hn_acquire(self._map.at + HN_AT_SESSION)
        )
        dscache_unlock(&self._mutex)
        return is_doubted

    # -- for the owner of the cache

    def close(self):
        """Stop caching and serving records."""
        self.detach()

    def reset(self):
        """Leave the file, and forget the writes under way, as a forked child has none."""
        dscache_renew(&self._mutex)  # a thread that the child doesn't have may have had it
        self.detach()
        self._writes = {}

    def flush(self, str reason not None):
        """Drop every record of all processes."""
        dscache_lock(&self._mutex)
        try:
            if self._map.base != NULL:
                self._flush(reason)
        finally:
            dscache_unlock(&self._mutex)

    def count_flush(self, str reason not None):
        """Count an invalidation of many records."""
        dscache_lock(&self._mutex)
        try:
            self._count_flush(reason)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _count_flush(self, str reason) except -1:
        self._flushes[reason] = self._flushes.get(reason, 0) + 1
        return 0

    def stats(self):
        """Return the counters, the flushes by reason, and the size of the cache."""
        cdef uint64_t records = 0, taken = 0
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            records = hn_load(self._map.at + HN_AT_USED_NODES)
            taken = HN_HEADER + 64 * (
                hn_load(self._map.at + HN_AT_NODES_KEPT)
                + hn_load(self._map.at + HN_AT_BLOCKS_KEPT)
            ) + hn_size(self._max_nodes, 0) - HN_HEADER - 64 * <uint64_t>self._max_nodes
            records -= min(records, hn_load(self._map.at + HN_AT_PENDING))
        dscache_unlock(&self._mutex)
        return {
            "hits": self._hits,
            "misses": self._misses,
            "joins": 0,
            "stale": 0,
            "invalidations": self._invalidations,
            "evictions": self._map.evictions,
            "dropped_fills": self._dropped_fills,
            "flushes": dict(self._flushes),
            "records": records,
            "bytes": taken,
        }

    # -- helpers

    cdef inline bint _look(self, name, hn_found* found):
        """Find the node of a name that may be served, if ``hn_is_still`` confirms it at the end."""
        cdef Py_ssize_t size = 0
        cdef const char* text
        if type(name) is not str or self._map.base == NULL:
            return False
        if self._writes and name in self._writes:
            return False
        try:
            text = utf8_of(name, &size)
        except UnicodeEncodeError:
            return False
        return size <= self._largest and hn_look(
            &self._map, text, <uint32_t>size, self._idle_limit, self._session, found
        )

    cdef inline object _take(self, name):
        """Return the cached Record, None for a missing one, or _UNDECODED if it isn't cached."""
        dscache_lock(&self._mutex)
        try:
            return self._take_still(name)
        finally:
            dscache_unlock(&self._mutex)

    cdef inline object _take_still(self, name):
        cdef hn_found found
        cdef bytes raw
        cdef hn_place place
        if not self._look(name, &found):
            return _UNDECODED
        if found.raw_size == HN_MISSING:
            if not hn_is_still(&self._map, &found):
                return _UNDECODED
            self._hits += 1
            return None
        place = found.place
        raw = PyBytes_FromStringAndSize(NULL, found.raw_size)
        if not hn_read(&self._map, &place, PyBytes_AS_STRING(raw), found.raw_size) or (
            not hn_is_still(&self._map, &found)
        ):
            return _UNDECODED
        self._hits += 1
        return _record(name, found.version, raw)

    cdef inline object _take_version(self, name):
        """Return the cached version as ``_take`` does the Record."""
        dscache_lock(&self._mutex)
        try:
            return self._version_still(name)
        finally:
            dscache_unlock(&self._mutex)

    cdef object _version_still(self, name):
        cdef hn_found found
        if not self._look(name, &found) or not hn_is_still(&self._map, &found):
            return _UNDECODED
        self._hits += 1
        return None if found.raw_size == HN_MISSING else found.version

    cdef bytes _identity(self, uint64_t* session):
        """Return the identity of the server, and its session; None while there is none."""
        cdef char text[1024]
        cdef int64_t size = -1
        if self._map.base != NULL:
            size = hn_identity(&self._map, text, session)
        return None if size < 0 else text[:size]

    cdef bint _lock(self) except -1:
        """Take the lock, or drop every record; return whether the lock is taken."""
        if hn_lock(&self._map, MANY_TRIES):
            return True
        self._flush("busy")
        return False

    cdef int _flush(self, str reason) except -1:
        hn_flush(&self._map)
        self._count_flush(reason)
        return 0

    cdef Py_ssize_t _drop(self, list names) except -1:
        """Drop the entries of names, or all if there is no lock; return how many there were."""
        cdef Py_ssize_t size = 0, i = 0, end, count = 0
        cdef const char* text
        cdef list texts = []
        if self._map.base == NULL:
            return 0
        for name in names:
            try:
                utf8_of(name, &size)  # which the name keeps
            except UnicodeEncodeError:
                continue  # such names have no entries
            if size <= self._largest:
                texts.append(name)
        while i < PyList_GET_SIZE(texts):
            if self._map.base == NULL:
                break
            if not self._lock():
                break
            end = min(i + HOST_DROPS, PyList_GET_SIZE(texts))
            while i < end:
                text = utf8_of(<object>PyList_GET_ITEM(texts, i), &size)
                count += hn_drop(&self._map, text, <uint32_t>size)
                i += 1
            hn_unlock(&self._map)
        return count
