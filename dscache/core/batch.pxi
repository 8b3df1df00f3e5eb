# Batches, bulks and their waiters; the compiled twin of ``batch.py``.


# One row of numbers for all pipelines, so that batches keep their order when they change nodes.
cdef long long last_serial = 0
# The number of the last time that a pipeline counted what is pending.
cdef long long last_count = 0


@cython.final
@cython.freelist(1024)
cdef class _Write:
    """The content of one record to be written, and its waiters."""

    cdef readonly long long version
    cdef readonly long long ttl
    cdef readonly bytes text
    cdef bytes guard
    cdef public object waiter  # a waiter, a list of them, or None in a bulk


@cython.final
cdef class _Command:
    """A command of one key, ready to be sent, and the waiter for its reply."""

    cdef bytes text
    cdef readonly object waiter

    def __cinit__(self, bytes text, waiter):
        self.text = text
        self.waiter = waiter


@cython.final
cdef class _Bulk:
    """The outcome of one bulk operation, gathered from its slots.

    A ``shared`` bulk has a batch on each of several nodes. A failed batch doesn't change the
    records of the others.
    """

    cdef readonly str operation
    cdef readonly object waiter
    cdef object result
    cdef readonly Py_ssize_t total
    cdef public Py_ssize_t remaining
    cdef readonly dict errors
    cdef readonly list missing  # names to take out of a result that began as all names
    cdef public bint over  # the waiter has its outcome
    cdef public bint shared

    def __cinit__(self, str operation, waiter, result, Py_ssize_t total, bint shared):
        self.operation = operation
        self.waiter = waiter
        self.result = result
        self.shared = shared
        self.total = total
        self.remaining = total
        self.errors = {}
        self.missing = []

    cpdef int settle(self, Py_ssize_t count) except -1:
        """Count records that have their outcome; the last one settles the waiter.

        If that raises, ``settle(0)`` tries once more.
        """
        self.remaining -= count
        if not (self.remaining or self.over):
            self._finish()
        return 0

    cdef int _finish(self) except -1:
        for name in self.missing:
            self.result.pop(name, None)
        if self.errors:
            error = c.bulk_failure(self.operation, self.errors, self.total, self.result)
            _reject(self.waiter, lambda: error)
        else:
            _resolve(self.waiter, self.result)
        self.over = True
        return 0

    def take(self, int kind, str name, result):
        """Take the result of one record, as its single operation would have given it."""
        if kind == DELETE:
            self.result += result
        elif kind == GET and result is None:
            self.missing.append(name)
        elif kind <= HEAD and result is not None:
            self.result[name] = result
        self.settle(1)

    def take_error(self, int kind, str name, error):
        """Take the error of one record."""
        self.errors[name] = error
        if kind == GET:
            self.missing.append(name)
        self.settle(1)


@cython.final
cdef class _Batch:
    """Records of one kind that go out together: the operations of a tick, or one bulk.

    ``records`` maps each name to its waiter, list of waiters, _Write or _Command. It is frozen
    into two lists when the first of it is sent. Records before ``answered`` are settled, the
    next ones up to ``sent`` are in flight, and the rest wait. ``serial`` tells the order of the
    batches, on all nodes; a repeat has its original's.
    """

    cdef readonly int kind
    cdef readonly double deadline
    cdef readonly long long serial  # given when it is queued
    cdef public dict records
    cdef public list names
    cdef public list entries
    cdef public Py_ssize_t sent
    cdef public Py_ssize_t answered
    cdef public Py_ssize_t failed  # records before it were told of the failure that ends the batch
    cdef long long count  # of ``last_count``, when it was counted
    cdef readonly _Bulk bulk
    cdef public bint expired  # its waiters have been told; the replies are dropped
    cdef public Py_ssize_t repeated  # records before it were sent on a connection that was lost
    cdef public bint whole_script  # Redis has lost the script: send its text
    cdef public bint one_per_command  # one record a command, to find the one that is refused
    cdef public bint counted  # as one pending operation, if it is of a bulk
    cdef short* hash_slots  # of the names, on a cluster; NULL if there is but one
    cdef public tuple redirections  # of each: the node and its error text
    cdef public bint asking  # the node has these slots only for those who ask
    cdef public object target  # the pipeline that it was redirected to for this once

    def __cinit__(self, int kind, double deadline, long long serial, dict records):
        self.kind = kind
        self.deadline = deadline
        self.serial = serial
        self.records = records
        self.redirections = ()

    def __dealloc__(self):
        PyMem_Free(self.hash_slots)

    cpdef int freeze(self) except -1:
        cdef list names
        if self.names is None:
            names = PyDict_Keys(self.records)
            self.entries = PyDict_Values(self.records)
            self.names = names
        return 0

    cdef int group(self, _Encoder encoder) except -1:
        """Group the records by slot; records sent before stay in front of the others."""
        cdef Py_ssize_t size = PyList_GET_SIZE(self.names)
        if size < 2:
            return 0
        cdef unsigned int* order = <unsigned int*>PyMem_Malloc(
            size * (2 * sizeof(unsigned int) + sizeof(unsigned short))
        )
        cdef short* hash_slots = <short*>PyMem_Malloc(size * sizeof(short))
        try:
            if order == NULL or hash_slots == NULL:
                raise MemoryError
            self._group(encoder, size, order, hash_slots)
            self.hash_slots, hash_slots = hash_slots, NULL
        finally:
            PyMem_Free(order)
            PyMem_Free(hash_slots)
        return 0

    cdef int _group(
        self, _Encoder encoder, Py_ssize_t size, unsigned int* order, short* hash_slots
    ) except -1:
        """Do so; there is room for twice as many of ``order``, and for as many keys behind."""
        cdef unsigned short* keys = <unsigned short*>(order + 2 * size)
        cdef Py_ssize_t i
        for i in range(size):
            keys[i] = encoder.slot(<str>PyList_GET_ITEM(self.names, i)) + 1
            if i >= self.repeated:
                keys[i] |= FRESH
        sort_by_key(keys, size, order + size, order)
        # No comprehensions: what Cython 3.3 makes of them releases an item twice if memory ends.
        cdef list names = []
        cdef list entries = []
        for i in range(size):
            names.append(<object>PyList_GET_ITEM(self.names, order[i]))
            entries.append(<object>PyList_GET_ITEM(self.entries, order[i]))
        self.names = names
        self.entries = entries
        for i in range(size):
            hash_slots[i] = (keys[order[i]] & ~FRESH) - 1
        return 0

    cpdef _Batch part(self, dict records, Py_ssize_t repeated):
        """Return a batch of some of its records, which is as old and knows as much."""
        cdef _Batch part = _Batch.__new__(_Batch, self.kind, self.deadline, self.serial, records)
        part.bulk = self.bulk
        part.repeated = repeated
        part.whole_script = self.whole_script
        part.one_per_command = self.one_per_command
        part.redirections = self.redirections
        part.asking = self.asking
        return part

    def ask(self, target):
        """Let it go to ``target``, and this once as one that asks."""
        self.target = target
        self.asking = True

    def settled(self):
        """Return whether this batch has its outcome, be it that it was sent on as another one."""
        return self.abandoned() or self.answered >= PyDict_Size(self.records)

    cpdef Py_ssize_t text_size(self) except -1:
        """Return the bytes of text in pending records: not answered, nor abandoned and unsent."""
        cdef Py_ssize_t i, last, size = 0
        cdef PyObject* entry
        if not (SET <= self.kind <= SET_IF_NEWER or self.kind >= READ_KEY):
            return 0
        # An abandoned record that was not sent never will be.
        last = self.sent if self.abandoned() else PyDict_Size(self.records)
        if self.names is None:
            i = 0
            while last and PyDict_Next(self.records, &i, NULL, &entry):
                size += size_of_text(<object>entry)
            return size
        for i in range(self.answered, last):
            size += size_of_text(<object>PyList_GET_ITEM(self.entries, i))
        return size

    cpdef bint abandoned(self) noexcept:
        """Return whether no caller waits for this batch any more."""
        return self.expired or (self.bulk is not None and self.bulk.over)

    cpdef Py_ssize_t waiting(self) noexcept:
        return PyDict_Size(self.records) - self.sent


# In a key to sort by: not sent before. The other bits are one more than the slot, or none.
cdef enum:
    FRESH = 0x8000


cdef void sort_by_key(
    const unsigned short* keys, Py_ssize_t size, unsigned int* spare, unsigned int* order
) noexcept:
    """Fill ``order`` with the places of the keys from the lowest to the highest, equal ones in
    their order: by the low half of each, then by the high one."""
    cdef unsigned int low[256]
    cdef unsigned int high[256]
    cdef unsigned int low_start = 0
    cdef unsigned int high_start = 0
    cdef unsigned int count
    cdef Py_ssize_t i
    memset(low, 0, sizeof(low))
    memset(high, 0, sizeof(high))
    for i in range(size):
        low[keys[i] & 255] += 1
        high[keys[i] >> 8] += 1
    for i in range(256):
        count = low[i]
        low[i] = low_start
        low_start += count
        count = high[i]
        high[i] = high_start
        high_start += count
    for i in range(size):
        spare[low[keys[i] & 255]] = i
        low[keys[i] & 255] += 1
    for i in range(size):
        count = keys[spare[i]] >> 8
        order[high[count]] = spare[i]
        high[count] += 1


cdef inline Py_ssize_t size_of_text(entry) noexcept:
    """Return the bytes of text in a _Write or _Command."""
    if type(entry) is _Command:
        return PyBytes_GET_SIZE((<_Command>entry).text)
    return PyBytes_GET_SIZE((<_Write>entry).text)


# -- waiters


cdef int _resolve(waiter, result) except -1:
    """Give a waiter, or each of a list, its result, unless it was cancelled."""
    if type(waiter) is list:
        for one in <list>waiter:
            _resolve(one, result)
        return 0
    try:
        waiter.set_result(result)
    except InvalidStateError:
        pass
    return 0


cdef int _reject(waiter, make) except -1:
    """Give a waiter, or each of a list, an error of its own, unless it was cancelled."""
    if type(waiter) is list:
        for one in <list>waiter:
            _reject(one, make)
        return 0
    try:
        waiter.set_exception(make())
    except InvalidStateError:
        pass
    return 0
