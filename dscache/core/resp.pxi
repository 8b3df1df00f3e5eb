# RESP of commands and replies; the compiled twin of ``resp.py``.


# -- slots of a cluster


# CRC16 (XMODEM) of each byte.
cdef unsigned short CRC[256]


cdef void fill_crc() noexcept:
    cdef unsigned int byte, bit, crc
    for byte in range(256):
        crc = byte << 8
        for bit in range(8):
            crc = (crc << 1) ^ (0x1021 if crc & 0x8000 else 0)
        CRC[byte] = crc & 0xFFFF


fill_crc()


cdef inline unsigned short add_to_crc(unsigned short crc, unsigned char byte) noexcept:
    return <unsigned short>(crc << 8) ^ CRC[(crc >> 8) ^ byte]


cdef int slot_of_text(const char* key, Py_ssize_t size) noexcept:
    """Return the slot of a key, which may be empty."""
    cdef const char* start = <const char*>memchr(key, 123, size)  # "{"
    cdef const char* end
    cdef unsigned short crc = 0
    cdef Py_ssize_t i
    if start != NULL:
        start += 1
        end = <const char*>memchr(start, 125, key + size - start)  # "}"
        if end != NULL and end > start:
            key = start
            size = end - start
    for i in range(size):
        crc = add_to_crc(crc, key[i])
    return crc % SLOTS


def slot_of_key(bytes key not None):
    """Return the slot of a key, computed from its hash tag if it has a nonempty one."""
    return slot_of_text(PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))


# State of the hash tag of keys after the text before a name. If the tag ``is_over``, all names have
# the slot ``slot``, or -1 if each key has its own. If the tag ``is_open``, it goes on in the name,
# and ``is_empty`` says whether it has no bytes yet. Otherwise a tag may begin in the name.
cdef struct Opening:
    bint is_over
    int slot
    bint is_open
    bint is_empty
    unsigned short crc  # of the bytes in the tag so far


cdef Opening opening_of(bytes text):
    cdef Opening opening
    before, brace, tag = text.partition(c.TAG_OPEN)
    opening.is_over = c.TAG_CLOSE in tag
    opening.slot = -1
    opening.is_open = brace != b""
    opening.is_empty = tag == b""
    opening.crc = 0
    if opening.is_over and not tag.startswith(c.TAG_CLOSE):
        opening.slot = slot_of_key(text)
    for byte in <bytes>tag:
        opening.crc = add_to_crc(opening.crc, byte)
    return opening


# -- writing into the output buffer: each function returns the place of the next byte

# Bytes around a text: the mark, up to 20 digits and the two line ends.
cdef enum:
    ROOM_AROUND = 32


cdef inline char* put_bytes(char* at, const char* text, Py_ssize_t size) noexcept:
    memcpy(at, text, size)
    return at + size


cdef inline char* put_end(char* at) noexcept:
    at[0] = 13
    at[1] = 10
    return at + 2


cdef inline char* put_digits(char* at, unsigned long long number) noexcept:
    cdef char backwards[20]
    cdef int size = 0
    while number > 9:
        backwards[size] = <char>(48 + number % 10)
        number //= 10
        size += 1
    at[0] = <char>(48 + number)
    at += 1
    while size:
        size -= 1
        at[0] = backwards[size]
        at += 1
    return at


cdef inline char* put_length(char* at, char mark, Py_ssize_t length) noexcept:
    at[0] = mark
    return put_end(put_digits(at + 1, length))


@cython.final
cdef class _Encoder:
    """Writes the commands of batches, with the keys of one layout."""

    cdef bytes _opening  # text before a name in its keys
    cdef bytes _opening_for_brace  # the same, before a name that begins with "}"
    cdef bytes _closing  # text between a name and the suffix
    cdef Opening _tag
    cdef Opening _tag_for_brace
    cdef char* _out
    cdef Py_ssize_t _size
    cdef Py_ssize_t _capacity

    def __cinit__(self, str key_prefix, bint hash_tag):
        cdef bytes prefix = key_prefix.encode()
        self._out = NULL
        self._opening = prefix + c.TAG_OPEN if hash_tag else prefix
        self._opening_for_brace = prefix + c.TAG_FOR_BRACE if hash_tag else prefix
        self._closing = c.TAG_CLOSE if hash_tag else b""
        self._tag = opening_of(self._opening)
        self._tag_for_brace = opening_of(self._opening_for_brace)

    def __dealloc__(self):
        PyMem_Free(self._out)

    cdef int slot(self, str name) except -2:
        """Return the slot of both keys of a record, or -1 if their slots differ."""
        cdef Py_ssize_t size = 0
        cdef const char* text = utf8_of(name, &size)
        cdef bint with_brace = text[0] == 125  # "}"
        cdef Opening* tag = &self._tag_for_brace if with_brace else &self._tag
        if tag.is_over:
            return tag.slot
        cdef Py_ssize_t i = 0
        cdef const char* brace
        if not tag.is_open:
            brace = <const char*>memchr(text, 123, size)  # "{"
            if brace == NULL:
                return -1
            i = brace + 1 - text
        cdef Py_ssize_t start = i
        cdef unsigned short crc = tag.crc
        while i < size and text[i] != 125:
            crc = add_to_crc(crc, text[i])
            i += 1
        if i == size and (with_brace or PyBytes_GET_SIZE(self._closing) == 0):
            return -1  # the tag has no end
        if i == start and tag.is_empty:
            return -1  # the tag is empty
        return crc % SLOTS

    cdef str name_of(self, bytes key):
        """Return the name of the record that a key belongs to, or None for a key of no record.

        A key belongs to a record exactly if ``KeyLayout.keys`` returns it for the record's name.
        """
        if not key.endswith((c.VERSION_SUFFIX, c.DATA_SUFFIX)):
            return None
        cdef bytes text = None
        # Names that begin with "}" have a different tag; without tags both openings are equal.
        if key.startswith(self._opening_for_brace + c.TAG_CLOSE):
            text = key[len(self._opening_for_brace) : -SUFFIX_SIZE]
        elif key.startswith(self._opening) and key[:-SUFFIX_SIZE].endswith(self._closing):
            text = key[len(self._opening) : -SUFFIX_SIZE - len(self._closing)]
            if self._closing and text.startswith(c.TAG_CLOSE):
                return None  # such a name has the other tag
        try:
            return text.decode() or None if text is not None else None
        except UnicodeDecodeError:
            return None

    cdef inline int slot_of(self, int kind, str name) except -2:
        """Return the slot of the record, or of the single key, of an operation of this kind."""
        cdef Py_ssize_t size = 0
        if kind < READ_KEY:
            return self.slot(name)
        cdef const char* key = utf8_of(name, &size)
        return slot_of_text(key, size)

    cdef inline void begin(self) noexcept:
        """Discard output that was written but not taken."""
        self._size = 0

    cdef inline Py_ssize_t size(self) noexcept:
        """Return the number of bytes written so far."""
        return self._size

    cdef bytes take(self):
        """Return the output written so far."""
        cdef bytes output = PyBytes_FromStringAndSize(self._out, self._size)
        if self._capacity > 4 * COMMAND_BYTES:  # free the memory of one huge record
            PyMem_Free(self._out)
            self._out = NULL
            self._capacity = 0
        return output

    cdef Py_ssize_t encode(self, _Batch batch, bint has_msetex) except -1:
        """Append the next command of a batch, and return its record count.

        Removals, heads and operations on single keys have commands for each record instead.
        """
        cdef int kind = batch.kind
        cdef Py_ssize_t first = batch.sent
        cdef Py_ssize_t last = PyList_GET_SIZE(batch.names)
        cdef Py_ssize_t limit = COMMAND_RECORDS
        cdef Py_ssize_t i, start, size = 0
        cdef bint msetex = kind == SET_TTL and has_msetex
        cdef _Write write
        if SET_TTL <= kind <= DELETE_IF and not msetex:
            limit = SCRIPT_RECORDS
        if batch.one_per_command:
            limit = 1
        if last > first + limit:
            last = first + limit
        if SET <= kind <= DELETE_IF:
            for i in range(first, last):
                write = <_Write>PyList_GET_ITEM(batch.entries, i)
                size += PyBytes_GET_SIZE(write.text)
                if size > COMMAND_BYTES or (
                    msetex and write.ttl != (<_Write>PyList_GET_ITEM(batch.entries, first)).ttl
                ):
                    last = i if i > first else first + 1
                    break
        if batch.hash_slots != NULL:
            for i in range(first + 1, last):
                if batch.hash_slots[i] != batch.hash_slots[first]:
                    last = i
                    break
        cdef Py_ssize_t count = last - first
        cdef bint asking = batch.asking
        if kind == GET:
            self._put_asking(asking)
            self._put_header(1 + 2 * count, b"$4\r\nMGET\r\n")
            for i in range(first, last):
                self._put_keys(<str>PyList_GET_ITEM(batch.names, i))
        elif kind == HEAD:
            for i in range(first, last):
                if asking:
                    # While a slot migrates, a key that has not arrived yet looks like a missing
                    # one. A command of both keys is refused instead. If the node serves EXISTS,
                    # both keys are here for the GET.
                    self._put_asking(True)
                    self._put_header(3, b"$6\r\nEXISTS\r\n")
                    self._put_keys(<str>PyList_GET_ITEM(batch.names, i))
                    self._put_asking(True)
                self._put_header(2, b"$3\r\nGET\r\n")
                start = self._size
                size = self._put_key(<str>PyList_GET_ITEM(batch.names, i))
                if not asking:
                    self._put_header(2, b"$4\r\nTYPE\r\n")
                    self._put_key_of_data(start, size)
        elif kind == SET or msetex:
            self._put_asking(asking)
            if msetex:
                self._put_header(4 + 4 * count, b"$6\r\nMSETEX\r\n")
                self._put_number(2 * count)
            else:
                self._put_header(1 + 4 * count, b"$4\r\nMSET\r\n")
            for i in range(first, last):
                self._put_record(
                    <str>PyList_GET_ITEM(batch.names, i),
                    <_Write>PyList_GET_ITEM(batch.entries, i),
                )
            if msetex:
                self._put_text(b"EX")
                self._put_number((<_Write>PyList_GET_ITEM(batch.entries, first)).ttl)
        elif kind == DELETE:
            for i in range(first, last):
                self._put_asking(asking)
                self._put_header(3, b"$3\r\nDEL\r\n")
                self._put_keys(<str>PyList_GET_ITEM(batch.names, i))
        elif kind >= READ_KEY:
            for i in range(first, last):
                self._put_asking(asking)
                self._put_bytes((<_Command>PyList_GET_ITEM(batch.entries, i)).text)
        else:
            self._put_asking(asking)
            self._put_script(batch, count)
            for i in range(first, last):
                self._put_keys(<str>PyList_GET_ITEM(batch.names, i))
            for i in range(first, last):
                self._put_arguments(<_Write>PyList_GET_ITEM(batch.entries, i), i < batch.repeated)
        return count

    cdef int _put_script(self, _Batch batch, Py_ssize_t count) except -1:
        if batch.whole_script:
            self._put_header(3 + 6 * count, b"$4\r\nEVAL\r\n")
            self._put_text(scripts.SET_SCRIPT)
        else:
            self._put_header(3 + 6 * count, b"$7\r\nEVALSHA\r\n")
            self._put_text(scripts.SET_SCRIPT_SHA)
        self._put_number(2 * count)
        return 0

    cdef int _put_record(self, str name, _Write write) except -1:
        """Append both keys of a record, each followed by its value."""
        cdef Py_ssize_t start = self._size
        cdef Py_ssize_t size = self._put_key(name)
        self._put_number(write.version)
        self._put_key_of_data(start, size)
        self._put_text(write.text)
        return 0

    cdef int _put_arguments(self, _Write write, bint repeated) except -1:
        self._put_number(write.version)
        self._put_text(write.text)
        self._put_number(write.ttl)
        if repeated and write.guard is not UNGUARDED:
            self._put_text(condition.repeat_of(write.guard))
        else:
            self._put_text(write.guard)
        return 0

    cdef int _put_keys(self, str name) except -1:
        """Append both keys of a record."""
        cdef Py_ssize_t start = self._size
        self._put_key_of_data(start, self._put_key(name))
        return 0

    cdef int _put_key_of_data(self, Py_ssize_t start, Py_ssize_t size) except -1:
        """Append a copy of the version key at ``start``, with the last letter of a data key."""
        self._reserve(size)
        memcpy(self._out + self._size, self._out + start, size)
        self._size += size
        self._out[self._size - 3] = SUFFIX_OF_DATA
        return 0

    cdef Py_ssize_t _put_key(self, str name) except -1:
        """Append the key of a record's version, and return the number of bytes appended."""
        cdef Py_ssize_t size = 0
        cdef const char* text = utf8_of(name, &size)
        cdef bytes opening = self._opening
        cdef bytes closing = self._closing
        if text[0] == 125:  # "}"
            opening = self._opening_for_brace
            closing = b""
        cdef Py_ssize_t length = (
            PyBytes_GET_SIZE(opening) + size + PyBytes_GET_SIZE(closing) + SUFFIX_SIZE
        )
        cdef char* start = self._reserve(length + ROOM_AROUND)
        cdef char* at = put_length(start, 36, length)  # "$"
        at = put_bytes(at, PyBytes_AS_STRING(opening), PyBytes_GET_SIZE(opening))
        at = put_bytes(at, text, size)
        at = put_bytes(at, PyBytes_AS_STRING(closing), PyBytes_GET_SIZE(closing))
        at[0] = 95  # "_"
        at[1] = SUFFIX_OF_VERSION
        at = put_end(at + SUFFIX_SIZE)
        self._size += at - start
        return at - start

    cdef int _put_header(self, Py_ssize_t length, bytes command) except -1:
        """Append the beginning of a command: the number of its parts, and the first part."""
        cdef char* start = self._reserve(PyBytes_GET_SIZE(command) + ROOM_AROUND)
        cdef char* at = put_length(start, 42, length)  # "*"
        at = put_bytes(at, PyBytes_AS_STRING(command), PyBytes_GET_SIZE(command))
        self._size += at - start
        return 0

    cdef inline int _put_asking(self, bint asking) except -1:
        return self._put_bytes(ASKING) if asking else 0

    cdef int _put_bytes(self, bytes text) except -1:
        """Append text that is encoded as RESP already."""
        cdef char* start = self._reserve(PyBytes_GET_SIZE(text))
        put_bytes(start, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        self._size += PyBytes_GET_SIZE(text)
        return 0

    cdef int _put_text(self, bytes text) except -1:
        cdef Py_ssize_t size = PyBytes_GET_SIZE(text)
        cdef char* start = self._reserve(size + ROOM_AROUND)
        cdef char* at = put_length(start, 36, size)
        at = put_end(put_bytes(at, PyBytes_AS_STRING(text), size))
        self._size += at - start
        return 0

    cdef int _put_number(self, unsigned long long number) except -1:
        cdef char digits[20]
        cdef int size = put_digits(digits, number) - digits
        cdef char* start = self._reserve(size + ROOM_AROUND)
        cdef char* at = put_length(start, 36, size)
        at = put_end(put_bytes(at, digits, size))
        self._size += at - start
        return 0

    cdef inline char* _reserve(self, Py_ssize_t size) except NULL:
        """Reserve memory for the next ``size`` bytes, and return its address."""
        if self._size + size > self._capacity:
            self._grow(size)
        return self._out + self._size

    cdef int _grow(self, Py_ssize_t size) except -1:
        cdef Py_ssize_t capacity = max(2 * self._capacity, self._size + size, 4096)
        cdef char* out = <char*>PyMem_Realloc(self._out, capacity)
        if out == NULL:
            raise MemoryError
        self._out = out
        self._capacity = capacity
        return 0


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
            raise failures.too_long(address, self._announced, limit)
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
    hiredis, the replies to 1000 reads take 83 us instead of 106.
    """

    cdef bytearray _storage
    cdef object _buffer
    cdef Py_ssize_t _start, _end  # unread part of the storage
    cdef bint _delegated  # hiredis has the beginning of the next reply
    cdef object _reader, _gets, _has_data
    cdef list _found  # records of the reply to an MGET, so far
    cdef Py_ssize_t _count  # number of records in that reply

    def __cinit__(self):
        self.reset()

    cdef int reset(self) except -1:
        """Discard a reply that arrived in part: the next bytes come from a new connection."""
        self._start = self._end = 0
        self._delegated = False
        self._found = None
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
        if self._start < self._end:
            self._delegate()
        try:
            reply = self._gets()
        except failures.NO_RESP as error:
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

    cdef int _delegate(self) except -1:
        """Give hiredis the unread data; the rest of an array becomes an array of its own."""
        if self._found is not None and not self._delegated:
            self._reader.feed(b"*%d\r\n" % (2 * (self._count - PyList_GET_SIZE(self._found))))
        self._reader.feed(self._buffer, self._start, self._end - self._start)
        self._start = self._end = 0
        self._delegated = True
        return 0
