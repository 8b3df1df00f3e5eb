# Batches, bulks and those who wait for them; the compiled twin of ``_pure_batch.py``.


@cython.final
@cython.freelist(256)
cdef class _Write:
    """The content of one record to be written, and who waits for it."""

    cdef long long version
    cdef long long ttl
    cdef bytes text
    cdef bytes guard
    cdef object waiter  # a waiter, a list of them, or None in a bulk


@cython.final
cdef class _Overtaken:
    """The waiters of a refused write, as waiters of the write that overtook it.

    In the order they were issued the first was overwritten at once: it is done if the later one
    is. If that is a removal, they are done ``always``: both waiters, as the record was there.
    """

    cdef object _waiter
    cdef object _refusal
    cdef bint _always

    def __cinit__(self, waiter, refusal, bint always):
        self._waiter = waiter
        self._refusal = refusal
        self._always = always

    def set_result(self, done, /):
        if done or self._always:
            _tell(self._waiter, True)
        else:
            _fail(self._waiter, self._refusal)

    def set_exception(self, error, /):
        _fail(self._waiter, partial(copy, error))


@cython.final
cdef class _Bulk:
    """The outcome of one bulk operation, gathered from its slots."""

    cdef str operation
    cdef object waiter
    cdef object result
    cdef Py_ssize_t total
    cdef Py_ssize_t remaining
    cdef dict errors
    cdef list missing  # names to take out of a result that began as all names
    cdef bint over  # the waiter has its outcome

    def __cinit__(self, str operation, waiter, result, Py_ssize_t total):
        self.operation = operation
        self.waiter = waiter
        self.result = result
        self.total = total
        self.remaining = total
        self.errors = {}
        self.missing = []

    cdef int settle(self, Py_ssize_t count) except -1:
        """Count records that have their outcome; the last one settles the waiter."""
        self.remaining -= count
        if self.remaining or self.over:
            return 0
        self.over = True
        for name in self.missing:
            del self.result[name]
        if self.errors:
            error = c.bulk_failure(self.operation, self.errors, self.total, self.result)
            _fail(self.waiter, lambda: error)
        else:
            _tell(self.waiter, self.result)
        return 0


@cython.final
cdef class _Batch:
    """Records of one kind that go out together: the operations of a tick, or one bulk.

    ``records`` maps each name to its waiter, list of waiters or _Write. It is frozen into two
    lists when the first of it is sent. Records before ``answered`` are settled, those from
    there to ``sent`` are in flight, the others wait. ``serial`` tells the order of the batches;
    a repeat has its original's.
    """

    cdef int kind
    cdef double deadline
    cdef readonly long long serial
    cdef dict records
    cdef list names
    cdef list entries
    cdef Py_ssize_t sent
    cdef Py_ssize_t answered
    cdef _Bulk bulk
    cdef bint expired  # its waiters have been told; the replies are dropped
    cdef Py_ssize_t repeated  # records before it were sent before, on a connection that was lost
    cdef bint whole_script  # Redis has lost the script: send its text
    cdef bint alone  # one record a command, to find the one that is refused

    def __cinit__(self, int kind, double deadline, long long serial, dict records):
        self.kind = kind
        self.deadline = deadline
        self.serial = serial
        self.records = records

    cdef int freeze(self) except -1:
        if self.names is None:
            self.names = list(self.records)
            self.entries = list(self.records.values())
        return 0

    cdef inline bint over(self) noexcept:
        """Return whether nobody waits for it any more."""
        return self.expired or (self.bulk is not None and self.bulk.over)

    cdef inline Py_ssize_t waiting(self) noexcept:
        return PyDict_Size(self.records) - self.sent


# -- waiters


cdef list _with(earlier, waiter):
    """Return the waiters of one record, to which one more comes."""
    if type(earlier) is not list:
        return [earlier, waiter]
    (<list>earlier).append(waiter)
    return earlier


cdef int _tell(waiter, result) except -1:
    """Give a waiter, or each of a list, its result, unless it was cancelled."""
    if type(waiter) is list:
        for one in <list>waiter:
            _tell(one, result)
        return 0
    try:
        waiter.set_result(result)
    except InvalidStateError:
        pass
    return 0


cdef int _fail(waiter, make) except -1:
    """Give a waiter, or each of a list, an error of its own, unless it was cancelled."""
    if type(waiter) is list:
        for one in <list>waiter:
            _fail(one, make)
        return 0
    try:
        waiter.set_exception(make())
    except InvalidStateError:
        pass
    return 0
