# Commands as RESP, with the slots of their keys; the compiled twin of ``resp.py``.


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
            self._put_script(batch, first, last)
        return count

    cdef int _put_script(self, _Batch batch, Py_ssize_t first, Py_ssize_t last) except -1:
        """Append the call of the script for some records, with their keys and arguments."""
        cdef Py_ssize_t count = last - first
        cdef bint is_shared = have_one_guard(batch, first, last)
        cdef Py_ssize_t words = 3 + (4 * count + 2 if is_shared else 6 * count)
        cdef _Write write
        cdef Py_ssize_t i
        if batch.whole_script:
            self._put_header(words, b"$4\r\nEVAL\r\n")
            self._put_text(scripts.SET_SCRIPT)
        else:
            self._put_header(words, b"$7\r\nEVALSHA\r\n")
            self._put_text(scripts.SET_SCRIPT_SHA)
        self._put_number(2 * count)
        for i in range(first, last):
            self._put_keys(<str>PyList_GET_ITEM(batch.names, i))
        for i in range(first, last):
            write = <_Write>PyList_GET_ITEM(batch.entries, i)
            self._put_number(write.version)
            self._put_text(write.text)
            if not is_shared or i == last - 1:
                if write.ttl == KEPT_TTL:
                    self._put_text(b"-1")
                else:
                    self._put_number(write.ttl)
                self._put_text(sent_guard(write, i < batch.repeated))
        return 0

    cdef int _put_record(self, str name, _Write write) except -1:
        """Append both keys of a record, each followed by its value."""
        cdef Py_ssize_t start = self._size
        cdef Py_ssize_t size = self._put_key(name)
        self._put_number(write.version)
        self._put_key_of_data(start, size)
        self._put_text(write.text)
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


cdef bint have_one_guard(_Batch batch, Py_ssize_t first, Py_ssize_t last) except -1:
    """Return whether some records of a batch have the same ttl and the same guard."""
    cdef _Write write = <_Write>PyList_GET_ITEM(batch.entries, first)
    cdef long long ttl = write.ttl
    cdef bytes guard = sent_guard(write, first < batch.repeated)
    cdef Py_ssize_t i
    for i in range(first + 1, last):
        write = <_Write>PyList_GET_ITEM(batch.entries, i)
        if write.ttl != ttl or sent_guard(write, i < batch.repeated) != guard:
            return False
    return True


cdef bytes sent_guard(_Write write, bint repeated):
    """Return the guard of a record, which in a repeat is another one."""
    if repeated and write.guard is not UNGUARDED:
        return condition.repeat_of(write.guard)
    return write.guard
