# Records, and the checks of their names, versions and data; the compiled twin of ``record.py``.


# A value that no JSON has. It lives for ever, so that threads need not count its references,
# which all of them would do in one place.
cdef object _UNDECODED = ...
cdef object _encode_json_into = json_text.encode_json_into
cdef object _decode_json = msgspec.json.Decoder().decode


@cython.final
@cython.no_gc  # only a caller can create a cycle, by putting a record into its data
@cython.freelist(1024)
cdef class Record:
    """One record as Redis held it: immutable, with its JSON decoded on first access.

    ``name`` is its name, and ``version`` an int from 0 to 2^63-1. ``raw`` is the JSON text exactly
    as stored, in bytes. ``stale`` is true only for a last known record that a near cache returned
    while Redis was away. A record unpacks: ``version, data = record``.

    The ``data`` of a record that was read with ``type=User`` is a User, and the record is a
    ``Record[User]``. Copies and pickles keep the type. Records are equal if name, version and text
    are equal.
    """

    cdef readonly str name
    cdef readonly long long version
    cdef readonly bytes raw
    cdef readonly bint stale
    cdef object _data
    cdef object _type  # of the data, or None

    __class_getitem__ = classmethod(GenericAlias)

    def __init__(
        self, str name not None, long long version, bytes raw not None, bint stale=False, type=None
    ):
        self.name = name
        self.version = version
        self.raw = raw
        self.stale = stale
        self._data = _UNDECODED
        self._type = type

    @property
    def data(self):
        """The decoded JSON: decoded on first access, then cached, and shared with no other call.

        Raises RecordDamaged if the stored text isn't valid JSON, or doesn't fit the record's type.
        """
        cdef PyObject* known = dscache_load(data_of_record(self))
        if known != <PyObject*>_UNDECODED:
            return <object>known
        if self._type is not None:
            data = json_text.decode_as(self.name, self.version, self.raw, self._type)
        else:
            try:
                data = _decode_json(self.raw)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                raise_interruption(error)
                data = json_text.decode_tolerantly(self.name, self.version, self.raw)
        # Another thread may have decoded it too: the first data is that of all.
        return dscache_settle(data_of_record(self), <PyObject*>_UNDECODED, <PyObject*>data)

    def decode(self, type, /):
        """Return the data as ``type``: a ``msgspec.Struct``, dataclass or other supported type.

        Each call decodes anew. Raises RecordDamaged, with the path of the mismatch, if the data
        doesn't fit, or if the text isn't valid JSON. Raises TypeError for a type that msgspec
        doesn't know.
        """
        return json_text.decode_as(self.name, self.version, self.raw, type)

    def __iter__(self):
        return iter((self.version, self.data))

    def __eq__(self, other):
        if not isinstance(other, Record):
            return NotImplemented
        cdef Record record = other
        return (
            self.version == record.version
            and self.name == record.name
            and self.raw == record.raw
        )

    def __hash__(self):
        return hash((self.version, self.name, self.raw))

    def __repr__(self):
        stale = ", stale=True" if self.stale else ""
        return f"Record({shorten(self.name)}, {self.version}, {shorten(self.raw)}{stale})"

    def __reduce__(self):
        from ._backend import make_record
        fields = (self.name, self.version, self.raw, self.stale)
        return (make_record, fields if self._type is None else (*fields, self._type))

    def __setattr__(self, name, value):
        raise AttributeError(f"a Record is immutable: {name} can't be set")

    def __delattr__(self, name):
        raise AttributeError(f"a Record is immutable: {name} can't be deleted")


cdef extern from *:
    """
    #define dscache_data_of(owner) (&(owner)->_data)
    """
    PyObject** data_of_record "dscache_data_of"(Record record) noexcept


cdef inline Record _record(str name, long long version, bytes raw):
    cdef Record record = Record.__new__(Record)
    record.name = name
    record.version = version
    record.raw = raw
    record.stale = False
    record._data = _UNDECODED
    return record


# -- checks and texts


cdef inline const char* utf8_of(text, Py_ssize_t* size) except NULL:
    """Return the UTF-8 of a str, valid as long as the str; raises UnicodeEncodeError."""
    if PyUnicode_IS_COMPACT_ASCII(text):
        size[0] = PyUnicode_GET_LENGTH(text)
        return PyUnicode_DATA(text)
    return PyUnicode_AsUTF8AndSize(text, size)


cpdef str check_name(name):
    """Return the name as an exact str, or raise RecordError."""
    cdef Py_ssize_t size = 0
    if type(name) is not str:
        if not isinstance(name, str):
            raise failures.bad_name(name)
        name = str.__str__(name)
    try:
        utf8_of(name, &size)
    except UnicodeEncodeError:
        raise failures.bad_name(name) from None
    if size == 0:
        raise failures.bad_name(name)
    return name


cpdef long long check_version(str name, version) except -1:
    """Return the version as an int, or raise RecordError."""
    cdef int overflow = 0
    cdef long long number
    if not isinstance(version, int) or isinstance(version, bool):
        raise failures.bad_version(name, version)
    number = PyLong_AsLongLongAndOverflow(version, &overflow)
    if overflow or number < 0:
        raise failures.bad_version(name, version)
    return number


@cython.final
@cython.no_gc
cdef class _Scratch:
    """A buffer for the text of data, and the view that keeps msgspec from enlarging it."""

    cdef bytearray text
    cdef object view


cpdef bytes encode_data(str name, data):
    """Return the JSON text of a record's data, or raise RecordError."""
    # Encode into a reused buffer: msgspec's own has to grow and shrink for each text, so that 123
    # bytes take 650 ns instead of 550. It is taken away meanwhile: neither another thread nor
    # the code of a user's own type that is being encoded may use the buffer.
    #
    # The buffer is also what bounds size and depth, at no cost: msgspec can't write beyond it, so
    # that a value that leads to its parts on 2**n paths fills it and no more, and a text of up to
    # 1000 bytes has no 1001 levels. Longer texts are looked through.
    cdef object taken = dscache_take_scratch(<PyObject*>None)
    cdef _Scratch scratch = _new_scratch() if taken is None else <_Scratch>taken
    cdef bytearray written = scratch.text
    cdef bytes text
    cdef Py_ssize_t size
    try:
        _encode_json_into(data, written)
        size = PyByteArray_GET_SIZE(written)
        if size > MAX_DATA_DEPTH and is_too_deep(PyByteArray_AS_STRING(written), size):
            raise RecursionError
        text = PyBytes_FromStringAndSize(PyByteArray_AS_STRING(written), size)
    except BufferError as error:
        raise_interruption(error)
        if not json_text.is_overflow(error):
            return json_text.encode_tolerantly(name, data)
        return _encode_long(name, data)
    except Exception as error:  # msgspec passes on any exception of a user's own type
        raise_interruption(error)
        return json_text.encode_tolerantly(name, data)
    finally:
        # msgspec has set the size to that of the text.
        Py_SET_SIZE(written, DATA_BUFFER)
        dscache_give_scratch(<PyObject*>scratch)
    if not text:
        raise failures.empty_raw(name)
    return text


cdef _Scratch _new_scratch():
    cdef _Scratch scratch = _Scratch.__new__(_Scratch)
    scratch.text = PyByteArray_FromStringAndSize(NULL, DATA_BUFFER)
    scratch.view = memoryview(scratch.text)
    return scratch


cdef bytes _encode_long(str name, data):
    """Return a text that is longer than the first buffer."""
    cdef bytearray text
    try:
        for size in c.DATA_BUFFERS[1:]:
            text = PyByteArray_FromStringAndSize(NULL, size)
            if json_text.encode_within(data, text):
                if is_too_deep(PyByteArray_AS_STRING(text), PyByteArray_GET_SIZE(text)):
                    break
                return bytes(text)
            if size == c.DATA_BUFFERS[1]:
                tolerant_json.check_bounds(data, c.DATA_CONTAINERS)
    except Exception as error:
        raise_interruption(error)  # any other is raised again below, with its path
    return json_text.encode_tolerantly(name, data)


cdef bint is_too_deep(const char* text, Py_ssize_t size) noexcept:
    """Return whether a text is nested beyond the bound."""
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t depth = 0
    # One loop that the compiler makes a few instructions of for 16 bytes, and all that most texts
    # need. It counts brackets within strings too.
    for i in range(size):
        depth += (text[i] == c"[") | (text[i] == c"{")
    if depth <= MAX_DATA_DEPTH:
        return False
    depth = 0
    i = 0
    while i < size:
        if text[i] == c'"':
            i += 1
            while i < size and text[i] != c'"':
                i += 2 if text[i] == c"\\" else 1
        elif text[i] == c"[" or text[i] == c"{":
            depth += 1
            if depth > MAX_DATA_DEPTH:
                return True
        elif text[i] == c"]" or text[i] == c"}":
            depth -= 1
        i += 1
    return False


cpdef long long parse_version(bytes text) noexcept:
    """Return the version written in decimal digits, or -1 if the text is no version."""
    return version_of(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))


cdef long long version_of(const char* text, Py_ssize_t size) noexcept:
    cdef unsigned long long version = 0
    cdef unsigned int digit
    cdef Py_ssize_t i
    if size == 0:
        return -1
    for i in range(size):
        digit = <unsigned int>text[i] - 48
        # MAX_VERSION // 10, after which the last digit may be up to 7. Without the suffix, the
        # number would be a Python int.
        if digit > 9 or version > 922337203685477580ULL or (
            version == 922337203685477580ULL and digit > 7
        ):
            return -1
        version = version * 10 + digit
    return <long long>version
