# The choice of a pipeline for each operation on a cluster; the compiled twin of ``router.py``.


@cython.final
cdef class Router:
    """The operations of a Pipeline, each passed to the pipeline of the node that serves its slot.

    ``owners`` holds the pipeline of each slot, and ``readers`` the pipeline for reads. Both begin
    with ``pipeline`` in every slot, and the caller that knows the nodes updates them. ``apart`` has
    the same operations for records with their two keys in different slots.
    """

    cdef public list owners
    cdef public list readers
    cdef object _create_waiter
    cdef object _apart
    cdef _Encoder _encoder
    cdef long long _split

    def __init__(
        self,
        create_waiter,
        Pipeline pipeline not None,
        apart,
        *,
        str key_prefix="",
        bint hash_tag=False,
    ):
        self.owners = [pipeline] * SLOTS
        self.readers = [pipeline] * SLOTS
        self._create_waiter = create_waiter
        self._apart = apart
        self._encoder = _Encoder.__new__(_Encoder, key_prefix, hash_tag)

    # -- operations on one record

    def get(self, name):
        """Queue a read; its waiter gets the Record, or None."""
        cdef str key = check_name(name)
        cdef int slot = self._encoder.slot(key)
        if slot < 0:
            return self._apart.get(key)
        return (<Pipeline?>self.readers[slot])._join(GET, key)

    def head(self, name):
        """Queue a read of the version; its waiter gets the int, or None."""
        cdef str key = check_name(name)
        cdef int slot = self._encoder.slot(key)
        if slot < 0:
            return self._apart.head(key)
        return (<Pipeline?>self.readers[slot])._join(HEAD, key)

    def set(self, name, version, data, ttl=None, if_newer=False, if_version=ANY):
        """Queue a write; its waiter gets True, or False if its condition doesn't hold."""
        cdef str key = check_name(name)
        cdef int slot = self._encoder.slot(key)
        if slot < 0:
            return self._apart.set(key, version, data, ttl, if_newer, if_version)
        return (<Pipeline?>self.owners[slot])._put(key, version, data, ttl, if_newer, if_version)

    def delete(self, name, if_version=ANY):
        """Queue a removal; its waiter gets whether the record existed."""
        cdef str key = check_name(name)
        cdef int slot = self._encoder.slot(key)
        if slot < 0:
            return self._apart.delete(key, if_version)
        cdef Pipeline pipeline = <Pipeline?>self.owners[slot]
        if if_version is ANY:
            return pipeline._join(DELETE, key)
        return pipeline._remove_if(key, if_version)

    # -- bulk operations

    def get_bulk(self, names):
        """Queue a read of many records; its waiter gets a dict of the records found."""
        return self._bulk(GET, _unique("get_bulk", names))

    def head_bulk(self, names):
        """Queue a read of many versions; its waiter gets a dict of the versions found."""
        return self._bulk(HEAD, _unique("head_bulk", names))

    def set_bulk(self, records, ttl=None, if_newer=False, if_version=ANY):
        """Queue a write of many records; its waiter gets the set of names not written."""
        cdef dict writes = {}
        cdef long long write_ttl = 0
        cdef Py_ssize_t size = 0
        # All pipelines have the same limits and the same default.
        cdef Pipeline pipeline = <Pipeline?>self.owners[0]
        make_writes(pipeline.ttl, records, ttl, if_newer, if_version, writes, &write_ttl, &size)
        return self._bulk(_kind_of(write_ttl, if_newer or if_version is not ANY), writes)

    def delete_bulk(self, names, if_version=ANY):
        """Queue a removal of many records; its waiter gets the number of records removed."""
        cdef dict unique = _unique("delete_bulk", names)
        if if_version is ANY:
            return self._bulk(DELETE, unique)
        return self._bulk(DELETE_IF, make_removals(unique, if_version))

    # -- reads for the near cache

    def read(self, str name not None, waiter, int kind=GET):
        """Queue a GET or HEAD, of which ``waiter`` gets the Record or the version, or None."""
        cdef int slot = self._encoder.slot(name)
        if slot < 0:
            self._apart.read(name, waiter, kind)
        else:
            if type(waiter) is _PendingRead:
                (<_PendingRead>waiter).slot = slot  # for ``fill``
            (<Pipeline?>self.readers[slot])._join(kind, name, waiter)

    def read_bulk(self, int kind, names, waiter):
        """Queue a GET or HEAD of many records; ``waiter`` gets a dict of all found."""
        self._bulk(kind, dict.fromkeys(names), waiter)

    # -- for callers that know the nodes

    def stats(self):
        """Return the correction to add to the summed counters of the nodes.

        Each node with a part of a bulk counts one operation, but the bulk is only one.
        """
        return {"operations": -self._split}

    def slot_of(self, name):
        """Return the slot of both keys of a record, or -1 if their slots differ."""
        return self._encoder.slot(check_name(name))

    cpdef target_of(self, int kind, str name):
        """Return the pipeline for an operation of that kind on a record, or on a key."""
        cdef bint reads = kind == GET or kind == HEAD or kind == READ_KEY
        return (self.readers if reads else self.owners)[self._encoder.slot_of(kind, name)]

    def publish(self, topic, bytes opening not None, message, bint sharded):
        """Queue a message; its waiter gets the number of connections that Redis sent it to."""
        cdef long long number = topic_of(topic, message)
        cdef char digits[20]
        cdef int slot = slot_of_text(digits, put_digits(digits, number) - digits)
        return (<Pipeline?>self.owners[slot])._publish(number, opening, message, sharded)

    def admit_keys(self, int kind, sizes):
        """Raise Overloaded, or another error if a node can't accept commands of these keys.

        ``sizes`` maps each key to the bytes of text to be written to it.
        """
        cdef dict totals = {}
        cdef Pipeline pipeline
        for key, size in sizes.items():
            target = self.target_of(kind, key)
            totals[target] = totals.get(target, 0) + size
        for pipeline, total in totals.items():
            pipeline.check_capacity(total)
        for pipeline in totals:
            pipeline.notify_pending()

    cdef object _bulk(self, int kind, dict records, waiter=None):
        cdef list pipelines = self.readers if kind <= HEAD else self.owners
        cdef bint writes = SET <= kind <= DELETE_IF
        cdef dict parts = {}  # records by pipeline
        cdef dict sizes = {}  # bytes of text by pipeline
        cdef dict apart = {}
        cdef dict part
        cdef object last = None
        cdef Py_ssize_t size
        cdef int slot
        cdef Pipeline pipeline
        for name, entry in records.items():
            slot = self._encoder.slot(<str>name)
            if slot < 0:
                PyDict_SetItem(apart, name, entry)
                continue
            if pipelines[slot] is not last:
                last = <Pipeline?>pipelines[slot]
                part = <dict>PyDict_SetDefault(parts, last, {})
            PyDict_SetItem(part, name, entry)
        if apart:
            self._apart.check_bulk(kind, apart)
        for pipeline, part in parts.items():
            # A bulk that one pipeline refuses must not be queued in the others.
            size = 0
            if writes:
                for entry in part.values():
                    size += PyBytes_GET_SIZE((<_Write>entry).text)
            sizes[pipeline] = size
            pipeline.check_capacity(size)
        for pipeline in parts:
            pipeline.notify_pending()
        if not records:
            (<Pipeline?>pipelines[0]).check_capacity(0)
            (<Pipeline?>pipelines[0]).notify_pending()
        if waiter is None:
            waiter = self._create_waiter()
        cdef _Bulk bulk = _new_bulk(kind, records, waiter, True)
        self._split += PyDict_Size(parts) - 1
        if not records:
            waiter.set_result(bulk.result)
        for pipeline, part in parts.items():
            pipeline.add_part(bulk, kind, part, sizes[pipeline])
        for name, entry in apart.items():
            self._apart.join_bulk(bulk, kind, name, entry)
        return waiter
