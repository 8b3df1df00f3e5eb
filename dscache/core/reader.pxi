# Received data: limits of lengths, and replies read in place; the compiled twin of ``reader.py``.


cdef object _INCOMPLETE = object()
# The reply to an MGET that was read where it lay, and half a record in it.
cdef object _IN_PLACE = object()
cdef object _HALF = object()


# -- checking the lengths in received data


cdef inline bint is_text(unsigned char mark) noexcept:
    return mark == 36 or mark == 61 or mark == 33  # $ = !


cdef inline bint is_aggregate(unsigned char mark) noexcept:
    return mark == 42 or mark == 126 or mark == 62 or mark == 37 or mark == 124  # * ~ > % |


@cython.final
cdef class _LengthGuard:
    """Checks the lengths that a server announces, across any number of reads."""

    cdef long long _max_reply_bytes
    cdef Py_ssize_t _skip  # rest of a text that began earlier, and of its line end
    cdef unsigned char _mark  # the first byte of a line that began earlier, else 0
    cdef int _header_size
    cdef int _digits
    cdef bint _is_length
    cdef bint _ends
    cdef long long _announced
    # Number of elements missing from the innermost incomplete array; below one outside of arrays.
    # ``_outer`` is the stack of these numbers for the levels around that array, outermost first.
    cdef long long _left
    cdef long long[MAX_DEPTH] _outer
    cdef int _depth

    def __cinit__(self, long long max_reply_bytes):
        self._max_reply_bytes = max_reply_bytes

    cdef int inspect(self, const unsigned char* at, Py_ssize_t size, str address) except -1:
        """Check the announced lengths in received data, before hiredis allocates memory for them.

        Otherwise a few bytes from a hostile server could take all memory. Raises ProtocolError.
        """
        cdef const unsigned char* end = at + size
        cdef const unsigned char* ahead
        cdef long long length
        cdef unsigned char byte
        while at < end:
            if self._skip:
                size = min(self._skip, end - at)
                self._skip -= size
                at += size
                continue
            byte = at[0]
            # Fast path: nearly every value is a text that arrived in one piece with its header.
            if byte == 36 and not self._mark and end - at > 8:
                ahead = at + 1
                length = 0
                while 48 <= ahead[0] <= 57 and ahead - at < 6:
                    length = length * 10 + ahead[0] - 48
                    ahead += 1
                if ahead > at + 1 and ahead[0] == 13 and ahead[1] == 10:
                    if length + 4 <= end - ahead and length <= self._max_reply_bytes:
                        at = ahead + length + 4
                        self._left -= 1
                        if self._left == 0:
                            self._close()
                        continue
            if not self._mark:
                at += 1
                if byte != 10:
                    self._mark = byte
                    self._header_size = self._digits = 0
                    self._announced = 0
                    self._is_length = is_text(byte) or is_aggregate(byte)
                    self._ends = False
            elif not self._is_length:
                at = <const unsigned char*>memchr(at, 10, end - at)
                if at == NULL:
                    break
                at += 1
                self._mark = 0
                self._count()
            else:
                at += 1
                self._header_size += 1
                if byte == 10:
                    self._check_length(address)
                    self._mark = 0
                elif byte == 13:
                    self._ends = True
                elif self._ends or not 48 <= byte <= 57 or self._header_size > HEADER_BYTES:
                    self._is_length = False  # hiredis refuses invalid RESP
                else:
                    self._digits += 1
                    if self._digits <= 18:
                        self._announced = self._announced * 10 + byte - 48
                    else:
                        self._announced = 1_000_000_000_000_000_000
        return 0

    cdef int _check_length(self, str address) except -1:
        cdef bint text = is_text(self._mark)
        cdef long long limit = self._max_reply_bytes if text else MAX_ELEMENTS
        if self._digits == 0 or self._header_size - 1 > HEADER_BYTES:
            self._count()
            return 0
        if self._announced > limit:
            raise failures.too_long(address, self._announced, limit, text)
        if text:
            self._skip = self._announced + 2
        elif self._announced:
            self._open(address)
            return 0
        self._count()
        return 0

    cdef int _open(self, str address) except -1:
        """Enter an array, set or push, or a map or attributes, which have two elements per pair."""
        cdef long long total
        cdef int i
        if self._mark == 37 or self._mark == 124:  # % |
            self._announced *= 2
        if self._depth == MAX_DEPTH:
            raise failures.too_deep(address)
        total = self._announced + max(self._left, 0)
        for i in range(1, self._depth):
            total += self._outer[i]
        if total > MAX_ELEMENTS:
            raise failures.too_long(address, total, MAX_ELEMENTS)
        self._outer[self._depth] = self._left
        self._depth += 1
        self._left = self._announced
        return 0

    cdef inline void _count(self) noexcept:
        """Count an element that has arrived, or a text with a known length."""
        self._left -= 1
        if self._left == 0:
            self._close()

    cdef void _close(self) noexcept:
        """Leave the complete arrays; each counts as an element of the array around it."""
        while self._left == 0 and self._depth:
            self._depth -= 1
            self._left = self._outer[self._depth] - 1


# -- reading replies


# Result of a comparison with an expected text: all of it, a beginning, or something else.
cdef enum Presence:
    WHOLE, BEGUN, OTHER


cdef inline Presence presence(
    const char* at, const char* end, const char* wanted, Py_ssize_t size
) noexcept:
    """Return how much of the expected text has arrived at ``at``."""
    if end - at >= size:
        return WHOLE if memcmp(at, wanted, size) == 0 else OTHER
    return BEGUN if memcmp(at, wanted, end - at) == 0 else OTHER


cdef struct Value:
    const char* text  # NULL for a null
    Py_ssize_t size
    const char* end  # start of the next value


cdef inline Presence read_value(const char* at, const char* end, Value* value) noexcept:
    """Read a text or a null as hiredis does; return OTHER for input that hiredis might refuse."""
    cdef const char* digits
    cdef Py_ssize_t size = 0
    cdef Presence found
    value.text = NULL
    value.size = 0
    if at == end:
        return BEGUN
    if at[0] != 36:  # "$"
        value.end = at + 3
        return presence(at, end, b"_\r\n", 3)
    digits = at + 1
    if digits < end and digits[0] == 45:  # "-"
        value.end = at + 5
        return presence(at, end, b"$-1\r\n", 5)
    at = digits
    while at < end and 48 <= at[0] <= 57:
        size = 10 * size + at[0] - 48
        at += 1
        if at - digits > 9:
            return OTHER
    if at == end:
        return BEGUN
    if at == digits or (digits[0] == 48 and at > digits + 1):
        return OTHER
    found = presence(at, end, b"\r\n", 2)
    if found != WHOLE:
        return found
    value.text = at + 2
    value.size = size
    value.end = value.text + size + 2
    if value.end > end:
        return BEGUN
    return presence(value.text + size, end, b"\r\n", 2)


@cython.final
cdef class _Replies:
    """Parses replies: to MGET and MSET in place, all others and unusual ones with hiredis.

    hiredis copies received data, and makes an object of each value and a list of them. Without
    hiredis, the replies to 1000 reads take 83 us instead of 106. Where hiredis may not be imported,
    an _OwnReader stands in for it.
    """

    cdef bytearray _storage
    cdef object _buffer
    cdef Py_ssize_t _start, _end  # unread part of the storage
    cdef bint _delegated  # hiredis or the own reader has the beginning of the next reply
    cdef object _reader, _gets, _has_data
    cdef _OwnReader _own  # None if hiredis reads
    cdef list _found  # records of the reply to an MGET, so far
    cdef Py_ssize_t _count  # number of records in that reply

    def __cinit__(self):
        if has_own_reader:
            self._own = _OwnReader.__new__(_OwnReader)
        self.reset()

    cdef int reset(self) except -1:
        """Discard a reply that arrived in part: the next bytes come from a new connection."""
        self._start = self._end = 0
        self._delegated = False
        self._found = None
        if self._own is not None:
            self._own = _OwnReader.__new__(_OwnReader)
            return 0
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE, replyError=ReplyError)
        self._gets = self._reader.gets
        self._has_data = self._reader.has_data
        return 0

    cdef object buffer(self):
        """Return the free part of the buffer, for received data; it is never empty."""
        cdef bytearray storage
        if self._storage is None:  # allocated late: some pipelines never read
            storage = bytearray(READ_BUFFER_BYTES)
            self._buffer = memoryview(storage)
            self._storage = storage
        return self._buffer[self._end :] if self._end else self._buffer

    cdef Py_ssize_t room(self) noexcept:
        return 0 if self._storage is None else PyByteArray_GET_SIZE(self._storage) - self._end

    cdef const unsigned char* arrive(self, Py_ssize_t size) noexcept:
        """Accept ``size`` bytes that were put into the buffer, and return their address."""
        cdef char* at = PyByteArray_AS_STRING(self._storage) + self._end
        self._end += size
        return <const unsigned char*>at

    cdef Py_ssize_t put(self, const char* text, Py_ssize_t size) except -1:
        """Copy as much of a text into the buffer as fits, and return the number of bytes."""
        self.buffer()
        size = min(size, self.room())
        memcpy(<char*>self.arrive(size), text, size)
        return size

    cdef object next(self, _Batch batch, Py_ssize_t count, str address):
        """Return the next reply, or _INCOMPLETE.

        The reply to an MGET or MSET of ``count`` records of ``batch`` may be parsed in place.
        Raises ProtocolError for invalid RESP.
        """
        cdef object reply
        cdef Presence found = OTHER
        if not self._delegated:
            if batch is not None and batch.kind == SET:
                found = self._take(b"+OK\r\n", 5)
            elif batch is not None and batch.kind == GET:
                found = self._read_records(batch, count)
            if found == WHOLE:
                return OK if batch.kind == SET else _IN_PLACE
            if self._start == self._end:
                self._start = self._end = 0
                return _INCOMPLETE
            if found == BEGUN:
                self._keep()
                if self.room():
                    return _INCOMPLETE
        if self._own is not None:
            return self._read_otherwise(address)
        if self._start < self._end:
            self._delegate()
        try:
            reply = self._gets()
        except _NO_RESP as error:
            failures.raise_invalid_resp(address, error)
        if reply is not _INCOMPLETE and not self._has_data():
            self._delegated = False
        return reply

    cdef list take_found(self):
        """Return the results parsed in place from the reply to an MGET, from the first record on.

        Each is a Record, None, _HALF, or the bytes of an invalid version.
        """
        cdef list found = self._found
        self._found = None
        return [] if found is None else found

    cdef Presence _take(self, const char* wanted, Py_ssize_t size) noexcept:
        """Consume a text, if it comes next."""
        cdef const char* at = PyByteArray_AS_STRING(self._storage) + self._start
        cdef Presence found = presence(at, at + self._end - self._start, wanted, size)
        if found == WHOLE:
            self._start += size
        return found

    cdef Presence _read_records(self, _Batch batch, Py_ssize_t count) except *:
        """Read the records of an MGET's reply that have arrived."""
        cdef char header[ROOM_AROUND]
        cdef Presence found
        cdef Value stored, raw
        cdef const char* at
        cdef const char* end = PyByteArray_AS_STRING(self._storage) + self._end
        cdef Py_ssize_t i
        cdef long long version
        cdef str name
        if self._found is None:
            found = self._take(header, put_length(header, 42, 2 * count) - header)  # "*"
            if found != WHOLE:
                return found
            self._found = []
            self._count = count
        at = PyByteArray_AS_STRING(self._storage) + self._start
        for i in range(PyList_GET_SIZE(self._found), count):
            found = read_value(at, end, &stored)
            if found == WHOLE:
                found = read_value(stored.end, end, &raw)
            if found != WHOLE:
                break
            if stored.text != NULL and raw.text != NULL:
                version = version_of(stored.text, stored.size)
                if version < 0:
                    self._found.append(PyBytes_FromStringAndSize(stored.text, stored.size))
                else:
                    name = <str>PyList_GET_ITEM(batch.names, batch.answered + i)
                    self._found.append(
                        _record(name, version, PyBytes_FromStringAndSize(raw.text, raw.size))
                    )
            elif stored.text == NULL and raw.text == NULL:
                self._found.append(None)
            else:
                self._found.append(_HALF)
            at = raw.end
        self._start = at - PyByteArray_AS_STRING(self._storage)
        return found

    cdef void _keep(self) noexcept:
        """Move an incomplete value to the beginning of the buffer, so that the rest can follow."""
        cdef char* storage = PyByteArray_AS_STRING(self._storage)
        if self._start:
            self._end -= self._start
            memmove(storage, storage + self._start, self._end)
            self._start = 0

    cdef object _read_otherwise(self, str address):
        """Return the next reply, or _INCOMPLETE, by the own reader."""
        cdef const char* storage = PyByteArray_AS_STRING(self._storage)
        cdef const char* at = storage + self._start
        # Held here: an error reply runs Python code as it is made, which may reset all of this.
        cdef _OwnReader own = self._own
        if self._found is not None and not self._delegated:
            own.begin(2 * (self._count - PyList_GET_SIZE(self._found)))
        self._delegated = True
        cdef object reply = own.next(&at, storage + self._end, address)
        if own is not self._own:
            raise failures.invalid_reply(address, "its connection ended while it was read")
        self._start = at - storage
        if reply is _INCOMPLETE:
            self._start = self._end = 0
        else:
            self._delegated = False
        return reply

    cdef int _delegate(self) except -1:
        """Give hiredis the unread data; the rest of an array becomes an array of its own."""
        if self._found is not None and not self._delegated:
            self._reader.feed(b"*%d\r\n" % (2 * (self._count - PyList_GET_SIZE(self._found))))
        self._reader.feed(self._buffer, self._start, self._end - self._start)
        self._start = self._end = 0
        self._delegated = True
        return 0
