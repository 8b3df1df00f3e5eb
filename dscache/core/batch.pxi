# Batches, bulks and their waiters; the compiled twin of ``batch.py``.


# One sequence of numbers for all pipelines, so that batches keep their order across nodes.
cdef long long last_serial = 0
# Number of the last recount of pending operations, by any pipeline.
cdef long long last_count = 0


@cython.final
@cython.freelist(1024)
cdef class _Write:
    """The content of one record to be written, and its waiters."""

    cdef readonly long long version
    cdef readonly long long ttl
    cdef readonly bytes text
    cdef readonly bytes guard
    cdef public object waiter  # a waiter, a list of them, or None in a bulk


@cython.final
cdef class _Command:
    """An encoded command of one key, and the waiter for its reply."""

    cdef bytes text
    cdef readonly object waiter

    def __cinit__(self, bytes text, waiter):
        self.text = text
        self.waiter = waiter


@cython.final
cdef class _Bulk:
    """The outcome of one bulk operation, gathered from its slots.

    A ``shared`` bulk has a batch on each of several nodes. A failure that ends one batch doesn't
    affect the records of the others.
    """

    cdef readonly str operation
    cdef readonly object waiter
    cdef public object result
    cdef readonly Py_ssize_t total
    cdef public Py_ssize_t remaining
    cdef readonly dict errors
    cdef readonly list missing  # names to remove from a result that began with all names
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
        """Count records that have an outcome; the last one settles the waiter.

        If settling the waiter raises, ``settle(0)`` tries again.
        """
        self.remaining -= count
        if not (self.remaining or self.over):
            outcomes.finish(self)
        return 0

    take = outcomes.take
    take_error = outcomes.take_error


@cython.final
cdef class _Batch:
    """Records of one kind that are sent together: the operations of a tick, or one bulk.

    ``records`` maps each name to its waiter, list of waiters, _Write or _Command. It is frozen
    into two lists when its first record is sent. Records before ``answered`` are settled, records
    from there to ``sent`` are in flight, and the others are queued. ``serial`` orders the batches
    of all nodes; a repeat has the serial of its original.
    """

    cdef readonly int kind
    cdef public double deadline
    cdef readonly long long serial  # assigned when the batch is queued
    cdef public dict records
    cdef public list names
    cdef public list entries
    cdef public Py_ssize_t sent
    cdef public Py_ssize_t answered
    cdef public Py_ssize_t failed  # records before this index were rejected when the batch failed
    cdef long long count  # the number of the last recount that included this batch
    cdef readonly _Bulk bulk
    cdef public bint expired  # its waiters have their outcome; further replies are dropped
    cdef public Py_ssize_t repeated  # records before this index were sent on a lost connection
    cdef public bint whole_script  # Redis has lost the script: send the text of the script
    cdef public bint one_per_command  # one record a command, to find the refused one
    cdef public bint counted  # counts as one pending operation; only for a bulk
    cdef short* hash_slots  # slots of the names, on a cluster; NULL for a single name
    # "address: error text" of each redirection; outside a cluster, the text of the last refusal.
    cdef public tuple redirections
    cdef public bint asking  # the node serves these slots only after ASKING
    cdef public object target  # the pipeline that a redirection names, for one sending
    cdef public int losses  # how often the server cut the connection while it was under way

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
        """Sort records by slot; records that were sent before stay ahead of the others."""
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
        """Sort the records; ``order`` holds 2 * ``size`` indices, and ``size`` keys behind them."""
        cdef unsigned short* keys = <unsigned short*>(order + 2 * size)
        cdef Py_ssize_t i
        for i in range(size):
            keys[i] = encoder.slot(<str>PyList_GET_ITEM(self.names, i)) + 1
            if i >= self.repeated:
                keys[i] |= FRESH
        sort_by_key(keys, size, order + size, order)
        # No comprehensions: the code that Cython 3.3 generates for them releases an item twice when
        # memory runs out.
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
        """Return a batch of some of the records, with the age and the state of this one."""
        cdef _Batch part = _Batch.__new__(_Batch, self.kind, self.deadline, self.serial, records)
        part.bulk = self.bulk
        part.repeated = repeated
        part.whole_script = self.whole_script
        part.one_per_command = self.one_per_command
        part.redirections = self.redirections
        part.asking = self.asking
        part.losses = self.losses
        return part

    def ask(self, target):
        """Direct the batch to ``target``, this once with ASKING before each command."""
        self.target = target
        self.asking = True

    def settled(self):
        """Return whether this batch has its outcome, or was sent on as another batch."""
        return self.abandoned() or self.answered >= PyDict_Size(self.records)

    cpdef Py_ssize_t text_size(self) except -1:
        """Return the bytes of text in unanswered records; if abandoned, only in the sent ones."""
        cdef Py_ssize_t i, last, size = 0
        cdef PyObject* entry
        if not (SET <= self.kind <= DELETE_IF or self.kind >= READ_KEY):
            return 0
        # An abandoned batch sends no more records.
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
        """Return whether no waiter is left for the outcome of this batch."""
        return self.expired or (self.bulk is not None and self.bulk.over)

    cpdef Py_ssize_t waiting(self) noexcept:
        return PyDict_Size(self.records) - self.sent


# Bit of a sort key: the record was not sent before. The other bits are the slot plus one, or 0.
cdef enum:
    FRESH = 0x8000


cdef void sort_by_key(
    const unsigned short* keys, Py_ssize_t size, unsigned int* spare, unsigned int* order
) noexcept:
    """Fill ``order`` with the indices of the keys in ascending order; equal keys keep their order.

    A radix sort: by the low byte of each key, then by the high one.
    """
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
    """Give a waiter, or each of a list, the result, unless it was cancelled."""
    if type(waiter) is list:
        for one in <list>waiter:
            _resolve(one, result)
        return 0
    try:
        waiter.set_result(result)
    except InvalidStateError:
        pass
    return 0
