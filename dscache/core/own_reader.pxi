# Replies of RESP2 and RESP3 read without hiredis, as the objects that hiredis would make of them.


@cython.final
cdef class _Push(list):
    """A push, where hiredis isn't imported."""


# A push differs from an array in its class alone.
cdef object _PUSH = _Push
cdef object hiredis = None
cdef tuple _NO_RESP = ()
# Whether pipelines that are made from now on read replies without hiredis.
cdef bint has_own_reader = False

READER = ""


def _choose_reader(str name not None):
    """Let pipelines that are made from now on read replies with "hiredis" or the "own" reader."""
    global hiredis, has_own_reader, READER, _NO_RESP, _PUSH
    if name not in ("hiredis", "own"):
        raise ValueError(f'the reader must be "hiredis" or "own", not {name!r}')
    if name == "hiredis" and hiredis is None:
        import hiredis
        _NO_RESP = (hiredis.HiredisError, *failures.NO_RESP)
        _PUSH = hiredis.PushNotification
    has_own_reader = name == "own"
    READER = name


# hiredis would switch the GIL on for the whole process, by being imported.
_choose_reader("hiredis" if getattr(sys, "_is_gil_enabled", lambda: True)() else "own")


# -- the texts of single values


cdef enum:
    MAX_DOUBLE = 325  # characters of a number, as for hiredis


cdef const char* line_end(const char* at, const char* end) noexcept:
    """Return the address of the first line end, or NULL."""
    while end - at >= 2:
        at = <const char*>memchr(at, 13, end - at - 1)
        if at == NULL or at[1] == 10:
            return at
        at += 1
    return NULL


cdef inline const char* read_number(const char* at, const char* end, long long* number) noexcept:
    """Read a natural number and its line end; return the address behind, or NULL.

    Fast, but without a sign, and without numbers of more than 18 digits.
    """
    cdef const char* start = at
    cdef long long value = 0
    while at < end and 48 <= at[0] <= 57:
        if at - start == 18:
            return NULL
        value = 10 * value + at[0] - 48
        at += 1
    if end - at < 2 or at[0] != 13 or at[1] != 10 or at == start:
        return NULL
    if start[0] == 48 and at - start > 1:
        return NULL
    number[0] = value
    return at + 2


cdef bint is_number(const char* text, Py_ssize_t size, long long* number) noexcept:
    """Return whether a text is an integer in its only form, which may have a minus."""
    cdef unsigned long long value = 0
    cdef unsigned long long limit = 9_223_372_036_854_775_807
    cdef Py_ssize_t i
    cdef bint negative = size > 0 and text[0] == 45  # "-"
    if negative:
        text += 1
        size -= 1
        limit += 1
    if size < 1 or size > 19 or (text[0] == 48 and (negative or size > 1)):
        return False
    for i in range(size):
        if not 48 <= text[i] <= 57:
            return False
        value = 10 * value + text[i] - 48
    if value > limit:
        return False
    number[0] = <long long>(0 - value if negative else value)
    return True


cdef inline bint has_digits_only(const char* text, Py_ssize_t size) noexcept:
    cdef Py_ssize_t i
    for i in range(size):
        if not 48 <= text[i] <= 57:
            return False
    return True


cdef inline bint is_word(const char* text, Py_ssize_t size, const char* word) noexcept:
    """Return whether a text is a word of three lower-case letters, in any case."""
    return size == 3 and (
        text[0] | 32 == word[0] and text[1] | 32 == word[1] and text[2] | 32 == word[2]
    )


cdef bint is_double(const char* at, const char* end, bint* is_zero) noexcept:
    """Return whether a text is a decimal fraction, which may have a minus and an exponent."""
    cdef Py_ssize_t digits = 0
    cdef bint has_point = False
    is_zero[0] = True
    if at < end and at[0] == 45:  # "-"
        at += 1
    while at < end and (48 <= at[0] <= 57 or (at[0] == 46 and not has_point)):  # "."
        if at[0] == 46:
            has_point = True
        else:
            digits += 1
            if at[0] != 48:
                is_zero[0] = False
        at += 1
    if digits == 0 or at == end:
        return digits > 0
    if at[0] | 32 != 101:  # "e"
        return False
    at += 1
    if at < end and (at[0] == 43 or at[0] == 45):  # "+" or "-"
        at += 1
    return at < end and has_digits_only(at, end - at)


# -- the reader


cdef struct Aggregate:
    PyObject* members  # the list or dict, which is part of the reply
    long long missing  # number of elements; those of a map are keys and values
    bint is_map


@cython.final
cdef class _OwnReader:
    """Reads one reply after the other, from data in pieces of any size.

    Takes no memory for a text or an element before it arrives. Its objects and its refusals are
    those of hiredis, so that one reader can stand in for the other.
    """

    cdef object _reply  # the outermost value, or _INCOMPLETE
    cdef Aggregate[MAX_DEPTH] _open  # the incomplete aggregates, outermost first
    cdef int _depth
    cdef char* _held  # what has arrived of a line or text
    cdef Py_ssize_t _held_size, _capacity
    cdef unsigned char _mark  # of the text that is incomplete
    cdef Py_ssize_t _missing  # bytes of that text and its line end; 0 if there is none
    cdef bint _busy  # also after an error

    def __cinit__(self):
        self._reply = _INCOMPLETE

    def __dealloc__(self):
        PyMem_Free(self._held)

    cdef int begin(self, long long count) except -1:
        """Begin an array of which only so many elements, the last ones, are to be read."""
        return self._enter(42, count, "")

    cdef object next(self, const char** position, const char* end, str address):
        """Return the next reply, or _INCOMPLETE if all data belongs to one that goes on.

        Moves ``position`` past the data that was read. Raises ProtocolError for invalid RESP, and
        whenever it is called after an error.
        """
        cdef const char* at = position[0]
        cdef object reply
        if self._busy:
            raise failures.invalid_reply(address, "an earlier reply could not be read")
        self._busy = True
        while at < end:
            at = self._read(at, end, address)
            if self._depth == 0 and self._reply is not _INCOMPLETE:
                break
        self._busy = False
        position[0] = at
        if self._depth:
            return _INCOMPLETE
        reply = self._reply
        self._reply = _INCOMPLETE
        return reply

    # -- one value at a time

    cdef const char* _read(self, const char* at, const char* end, str address) except NULL:
        """Read a value, the header of an aggregate, or what there is of them; return its end."""
        cdef unsigned char mark = at[0]
        cdef long long number
        cdef const char* line
        cdef const char* after
        if self._missing:
            return self._continue_text(at, end, address)
        if self._held_size:
            return self._continue_line(at, end, address)
        if mark == 36 or mark == 42 or mark == 58:  # $ * :
            after = read_number(at + 1, end, &number)
            if after != NULL:
                if mark == 36:
                    return self._begin_text(mark, number, after, end, address)
                if mark == 42:
                    self._enter(mark, number, address)
                else:
                    self._add(number, address)
                return after
        line = at + 1
        after = line_end(line, end)
        if after != NULL:
            return self._read_line(mark, line, after - line, after + 2, end, address)
        if memchr(b"$*:+-_,#(=%~>|", mark, 14) == NULL:
            raise not_a_type(address, mark)
        self._hold(at, end - at)
        return end

    cdef const char* _continue_line(
        self, const char* at, const char* end, str address
    ) except NULL:
        """Read more of a line of which a part is held."""
        cdef const char* after = NULL
        cdef Py_ssize_t size
        if self._held[self._held_size - 1] == 13 and at[0] == 10:
            after = at + 1
        elif (after := line_end(at, end)) != NULL:
            after += 2
        if after == NULL:
            self._hold(at, end - at)
            return end
        self._hold(at, after - at)
        size = self._held_size
        self._held_size = 0
        after = self._read_line(
            <unsigned char>self._held[0], self._held + 1, size - 3, after, end, address
        )
        self._release()
        return after

    cdef const char* _read_line(
        self,
        unsigned char mark,
        const char* line,
        Py_ssize_t size,
        const char* after,
        const char* end,
        str address,
    ) except NULL:
        """Read a line, and the text that it announces from ``after`` on."""
        cdef long long number = 0
        if mark == 36 or mark == 61:  # $ =
            if not is_number(line, size, &number):
                raise failures.invalid_reply(address, "Bad bulk string length")
            if number < -1:
                raise failures.invalid_reply(address, "Bulk string length out of range")
            if number >= 0:
                return self._begin_text(mark, number, after, end, address)
            self._add(None, address)
        elif is_aggregate(mark):
            if not is_number(line, size, &number):
                raise failures.invalid_reply(address, "Bad multi-bulk length")
            if number == -1:
                self._add(None, address)
            else:
                self._enter(mark, number, address)
        else:
            self._add(value_of(mark, line, size, address), address)
        return after

    cdef const char* _begin_text(
        self, unsigned char mark, long long size, const char* at, const char* end, str address
    ) except NULL:
        """Read a text that begins at ``at``, or its beginning."""
        if size <= end - at - 2:
            self._add(text_of(mark, at, size, address), address)
            return at + size + 2  # hiredis doesn't look at the line end either
        if size > PY_SSIZE_T_MAX // 4:
            raise failures.invalid_reply(address, "Bulk string length out of range")
        self._mark = mark
        self._missing = size + 2 - (end - at)
        self._hold(at, end - at)
        return end

    cdef const char* _continue_text(
        self, const char* at, const char* end, str address
    ) except NULL:
        cdef Py_ssize_t size = min(self._missing, end - at)
        self._hold(at, size)
        self._missing -= size
        if self._missing == 0:
            self._add(
                text_of(self._mark, self._held, self._held_size - 2, address), address
            )
            self._held_size = 0
            self._release()
        return at + size

    # -- memory for what has arrived in part

    cdef int _hold(self, const char* text, Py_ssize_t size) except -1:
        cdef Py_ssize_t capacity
        cdef char* held
        if size == 0:
            return 0
        if self._held_size + size > self._capacity:
            capacity = max(2 * self._capacity, self._held_size + size, 256)
            held = <char*>PyMem_Realloc(self._held, capacity)
            if held == NULL:
                raise MemoryError
            self._held = held
            self._capacity = capacity
        memcpy(self._held + self._held_size, text, size)
        self._held_size += size
        return 0

    cdef void _release(self) noexcept:
        """Give back the memory of a large text, if nothing else is held in it by now."""
        if self._held_size == 0 and self._capacity > READ_BUFFER_BYTES:
            PyMem_Free(self._held)
            self._held = NULL
            self._capacity = 0

    # -- building the reply

    cdef int _enter(self, unsigned char mark, long long count, str address) except -1:
        """Add an empty aggregate, to which the next values are added."""
        cdef object members
        cdef bint is_map = mark == 37  # "%"
        cdef Aggregate* entered
        if count < 0 or count > MAX_ELEMENTS:
            raise failures.invalid_reply(address, "Multi-bulk length out of range")
        if self._depth == MAX_DEPTH and count:
            raise failures.too_deep(address)
        if is_map:
            members = {}
        elif mark == 62:  # ">"
            members = _PUSH()
        else:
            members = []
        if count == 0:
            return self._add(members, address)
        self._attach(members, address)
        entered = &self._open[self._depth]
        entered.members = <PyObject*>members
        entered.missing = 2 * count if is_map or mark == 124 else count  # "|"
        entered.is_map = is_map
        self._depth += 1
        return 0

    cdef int _add(self, value, str address) except -1:
        """Add a complete value, and leave the aggregates that are complete with it."""
        self._attach(value, address)
        while self._depth and self._open[self._depth - 1].missing == 0:
            self._depth -= 1
        return 0

    cdef int _attach(self, value, str address) except -1:
        cdef Aggregate* around
        if self._depth == 0:
            self._reply = value
            return 0
        around = &self._open[self._depth - 1]
        if around.is_map:
            add_to_map(<dict>around.members, value, around.missing % 2 == 0, address)
        else:
            (<list>around.members).append(value)
        around.missing -= 1
        return 0


cdef int add_to_map(dict pairs, value, bint is_key, str address) except -1:
    """Add a key, for which None stands first, or the value of the last key.

    hiredis does it so, too: of a key that comes twice, the first value may become None.
    """
    if is_key:
        try:
            pairs[value] = None
        except TypeError as error:
            raise failures.invalid_reply(address, error) from error
    else:
        pairs[pairs.popitem()[0]] = value
    return 0


cdef bytes text_of(unsigned char mark, const char* text, Py_ssize_t size, str address):
    if mark == 61:  # "=": three letters and a colon stand before a verbatim text
        if size < 4 or text[3] != 58:
            raise failures.invalid_reply(
                address,
                "Verbatim string 4 bytes of content type are missing or incorrectly encoded.",
            )
        text += 4
        size -= 4
    return PyBytes_FromStringAndSize(text, size)


cdef object value_of(unsigned char mark, const char* line, Py_ssize_t size, str address):
    """Return the value that stands on one line."""
    cdef long long number
    cdef Py_ssize_t minus
    if mark == 43 or mark == 45:  # + -
        if memchr(line, 13, size) != NULL or memchr(line, 10, size) != NULL:
            raise failures.invalid_reply(address, "Bad simple string value")
        if mark == 43:
            return PyBytes_FromStringAndSize(line, size)
        return ReplyError(line[:size].decode("utf-8", "replace"))
    if mark == 58:  # ":"
        if not is_number(line, size, &number):
            raise failures.invalid_reply(address, "Bad integer value")
        return number
    if mark == 95:  # "_"
        if size:
            raise failures.invalid_reply(address, "Bad nil value")
        return None
    if mark == 35:  # "#"; hiredis takes a zero byte for false
        if size != 1 or memchr(b"tTfF\0", line[0], 5) == NULL:
            raise failures.invalid_reply(address, "Bad bool value")
        return line[0] | 32 == 116  # "t"
    if mark == 40:  # "("; for hiredis the digits alone are a text
        minus = size > 0 and line[0] == 45
        if not has_digits_only(line + minus, size - minus):
            raise failures.invalid_reply(address, "Bad bignum value")
        return PyBytes_FromStringAndSize(line, size)
    if mark == 44:  # ","
        return double_of(line, size, address)
    raise not_a_type(address, mark)


cdef object double_of(const char* line, Py_ssize_t size, str address):
    cdef char text[MAX_DOUBLE + 1]
    cdef char* rest = NULL
    cdef Py_ssize_t minus = size > 0 and line[0] == 45
    cdef bint is_zero = True
    cdef double number
    if size > MAX_DOUBLE:
        raise failures.invalid_reply(address, "Double value is too large")
    if is_word(line + minus, size - minus, b"inf"):
        return -INFINITY if minus else INFINITY
    if is_word(line + minus, size - minus, b"nan"):
        return NAN
    if is_double(line, line + size, &is_zero):
        memcpy(text, line, size)
        text[size] = 0
        number = PyOS_string_to_double(text, &rest, NULL)
        # Beyond the range of a double, it is infinite or zero.
        if rest == text + size and -INFINITY < number < INFINITY and (number != 0.0 or is_zero):
            return number
    raise failures.invalid_reply(address, "Bad double value")


cdef object not_a_type(str address, unsigned char mark):
    """Return the error for a byte that begins no value, which is shown as in C."""
    cdef str shown = chr(mark)
    if mark in b"\n\r\t\a\b":
        shown = {10: "\\n", 13: "\\r", 9: "\\t", 7: "\\a", 8: "\\b"}[mark]
    elif mark in b'\\"':
        shown = f"\\{shown}"
    elif not 32 <= mark <= 126:
        shown = f"\\x{mark:02x}"
    return failures.invalid_reply(address, f'Protocol error, got "{shown}" as reply type byte')
