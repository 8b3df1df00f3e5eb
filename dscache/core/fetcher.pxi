# The calls of ``fetch`` up to a hit; the compiled twin of ``fetcher.py``, which tells what they do.
#
# Programs call a builtin function that gets its arguments as an array. Of a call in a program's
# text, the names of its options are always the same tuple, and mostly their values are the same
# objects. So the options of a call are found by comparing pointers, where parsing and checking them
# would take as long as the near cache takes for a hit.

from .core import fetch_terms

cdef extern from "Python.h":
    ctypedef struct PyMethodDef:
        const char* ml_name
        void* ml_meth
        int ml_flags
        const char* ml_doc
    int METH_FASTCALL
    int METH_KEYWORDS
    object PyCFunction_New(PyMethodDef* method, object owner)
    object PyObject_Vectorcall(object function, PyObject** given, size_t count, PyObject* names)
    Py_ssize_t PyTuple_GET_SIZE(object values) noexcept
    PyObject* PyTuple_GET_ITEM(object values, Py_ssize_t i) noexcept
    object PyContext_CopyCurrent()
    # These take pointers, as Cython would count a reference for each object that they are given.
    Py_ssize_t PySet_GET_SIZE(PyObject* values) noexcept
    bint PyCallable_Check(PyObject* function) noexcept
    bint PyFunction_Check(PyObject* function) noexcept
    PyObject* PyFunction_GET_CODE(PyObject* function) noexcept
    bint PyMethod_Check(PyObject* method) noexcept
    PyObject* PyMethod_GET_FUNCTION(PyObject* method) noexcept
    bint PyUnicode_CheckExact(PyObject* value) noexcept

cdef extern from *:
    """
    /* The last character of a text, or 0 if it is empty. */
    static inline Py_UCS4 dscache_last_of(PyObject *text) {
        Py_ssize_t size = PyUnicode_GET_LENGTH(text);
        if (size == 0) {
            return 0;
        }
        if (PyUnicode_IS_COMPACT_ASCII(text)) {
            return ((const Py_UCS1 *)((PyASCIIObject *)text + 1))[size - 1];
        }
        return PyUnicode_READ_CHAR(text, size - 1);
    }
    """
    Py_UCS4 dscache_last_of(PyObject* text) noexcept

cdef enum:
    KNOWN_CALLS = 64  # a power of two

cdef str _NOTE_SUFFIX = fetch_terms.NOTE_SUFFIX
cdef Py_UCS4 _NOTE_END = _NOTE_SUFFIX[-1]


@cython.final
cdef class _Call:
    """The checked options of calls that give the same objects under the same names."""

    cdef object names
    cdef tuple values
    cdef object terms
    cdef object type
    cdef bint ages  # whether records are refreshed

    cdef inline bint fits(self, PyObject** given, PyObject* names) noexcept:
        """Return whether options, with their names, are those of this call."""
        cdef Py_ssize_t i
        if <PyObject*>self.names != names:
            return False
        for i in range(PyTuple_GET_SIZE(self.values)):
            if PyTuple_GET_ITEM(self.values, i) != given[i]:
                return False
        return True


@cython.final
cdef class _Calls:
    """The calls that a program makes again and again, by their options."""

    cdef object _checks
    cdef list _known
    cdef dict _recent
    cdef set _missing

    def __cinit__(self, checks):
        self._checks = checks
        self._known = [_Call.__new__(_Call)] * KNOWN_CALLS
        self._recent = checks.recent
        self._missing = checks.missing

    cdef inline _Call find(self, PyObject** given, Py_ssize_t count, PyObject* names):
        """Return the call with these arguments, or None."""
        cdef _Call call
        if count != 2 or names == NULL:
            return None
        # Threads of a Cache replace each other's calls.
        call = <_Call>dscache_item_of(self._known, (<size_t>names >> 4) & (KNOWN_CALLS - 1))
        return call if call.fits(given + 2, names) else None

    cdef tuple learn(self, PyObject** given, Py_ssize_t count, PyObject* names):
        """Return the name, the load and the call of arguments, which are known from then on."""
        cdef tuple parsed = PyObject_Vectorcall(self.fetch, given, count, names)
        cdef _Call call = parsed[2]
        cdef list values = []
        cdef Py_ssize_t i
        if count == 2 and names != NULL:
            for i in range(PyTuple_GET_SIZE(<object>names)):
                values.append(<object>given[2 + i])
            call.values = tuple(values)
            call.names = <object>names
            self._known[(<size_t>names >> 4) & (KNOWN_CALLS - 1)] = call
        return parsed

    def fetch(
        self,
        name,
        load,
        *,
        ttl,
        refresh_after=None,
        jitter=0.1,
        keep_missing=None,
        type=None,
    ):
        """Return the arguments, with the options as a _Call; named as errors are to name it."""
        cdef _Call call = _Call.__new__(_Call)
        call.terms = self._checks.terms(ttl, refresh_after, jitter, keep_missing)
        call.ages = refresh_after is not None
        if type is not None:
            typed.check_type(type)
        call.type = type
        return name, load, call

    cdef inline bint is_recent(self, str name) except -1:
        """Return whether the age of a record was checked a moment ago."""
        return dscache_number_of(self._recent, name) > dscache_monotonic()

    cdef inline bint is_quick(
        self, PyObject** given, Py_ssize_t count, PyObject* names
    ) except -1:
        """Return whether a call is known, and a cached record may be its result as it is."""
        cdef PyObject* found
        cdef bint plain, ages
        if count != 2 or names == NULL or not may_be_record(given[0]):
            return False
        # No reference is counted with the GIL: no Python code runs up to the end of its use.
        found = dscache_borrow(<PyObject*>self._known, (<size_t>names >> 4) & (KNOWN_CALLS - 1))
        plain = (<_Call>found).fits(given + 2, names) and (<_Call>found).type is None
        ages = (<_Call>found).ages
        dscache_give_back(found)
        return plain and (not ages or self.is_recent(<str>given[0]))

    cdef inline bint is_missing(self, PyObject* name) except -1:
        """Return whether other calls remember that there is no such record."""
        return PySet_GET_SIZE(<PyObject*>self._missing) > 0 and <object>name in self._missing


cdef inline bint may_be_record(PyObject* name) except -1:
    """Return whether an object is an exact str, not empty, that isn't the name of a note."""
    cdef Py_UCS4 last
    if not PyUnicode_CheckExact(name):
        return False
    last = dscache_last_of(name)
    return last != 0 and (last != _NOTE_END or not (<str>name).endswith(_NOTE_SUFFIX))


cdef inline str checked_record_name(name):
    """Return the name of a record that isn't one of a note, or raise RecordError."""
    cdef str key = check_name(name)
    if dscache_last_of(<PyObject*>key) == _NOTE_END and key.endswith(_NOTE_SUFFIX):
        raise fetch_terms.name_of_note("fetch", key)
    return key


@cython.final
cdef class Fetcher:
    """``fetch`` of an AsyncCache; ``entry`` has the operations of a Pipeline."""

    cdef _Calls _calls
    cdef object _entry, _create_waiter, _slow
    cdef Pipeline _pipeline
    cdef NearCache _near

    def __init__(self, entry, create_waiter, checks, slow):
        self._calls = _Calls.__new__(_Calls, checks)
        self._entry = entry
        self._pipeline = entry if type(entry) is Pipeline else None
        self._near = entry if type(entry) is NearCache else None
        self._create_waiter = create_waiter
        self._slow = slow

    def quick(self):
        """Return the function that programs call."""
        return PyCFunction_New(&_quick_method, self)

    cdef object _fetch(
        self,
        PyObject** given,
        Py_ssize_t count,
        PyObject* names,
        bint looked,
        _Entry entry,
        bint stale,
    ):
        """Do a call that is no plain hit; ``entry`` is what a look-up has found, if it was done."""
        cdef _Call call = self._calls.find(given, count, names)
        if call is None:
            name, load, call = self._calls.learn(given, count, names)
            return self._read(name, load, call, looked, entry, stale)
        return self._read(<object>given[0], <object>given[1], call, looked, entry, stale)

    cdef object _read(
        self, name, load, _Call call, bint looked, _Entry entry, bint stale
    ):
        """Read the record, unless it has an ``entry``, and return the waiter."""
        cdef _FetchRead read
        cdef str key
        if not callable(load):
            raise fetch_terms.no_load("fetch", "load", load)
        key = checked_record_name(name)
        if call.ages and not self._calls.is_recent(key):
            waiter = self._create_waiter()
            self._slow.check_age(waiter, key, load, call.terms, call.type)
            return waiter
        read = _FetchRead.__new__(_FetchRead)
        read.waiter = self._create_waiter()
        read.fetcher = self
        read.name = key
        read.load = load
        read.call = call
        read.context = PyContext_CopyCurrent()
        if entry is not None:
            self._take(read, _record_of(entry, stale))
        elif self._pipeline is not None:
            self._pipeline._join(GET, key, read)
        elif looked:
            self._near._read(key, read)
        else:
            self._entry.read(key, read)
        return read.waiter

    cdef int _take(self, _FetchRead read, record) except -1:
        """Complete the waiter of a call with the record, or leave it to ``slow``."""
        cdef _Call call = read.call
        if record is None or self._calls.is_missing(<PyObject*>read.name):
            self._slow.go_on(
                read.waiter, read.name, read.load, call.terms, call.type, record, read.context
            )
        elif call.type is not None:
            typed.TypedRead(read.waiter, call.type).set_result(record)
        else:
            read.waiter.set_result(record)
        return 0


cdef object _quick_fetch(PyObject* owner, PyObject** given, Py_ssize_t count, PyObject* names):
    cdef Fetcher fetcher = <Fetcher>owner
    cdef bint stale = False
    cdef _Entry entry
    if (
        fetcher._near is None
        or not fetcher._calls.is_quick(given, count, names)
        or not PyCallable_Check(given[1])
    ):
        return fetcher._fetch(given, count, names, False, None, False)
    fetcher._near._stay()
    entry = fetcher._near._look(<object>given[0], &stale)
    if entry is None or entry.raw is None or fetcher._calls.is_missing(given[0]):
        return fetcher._fetch(given, count, names, True, entry, stale)
    return fetcher._near._done(_record_of(entry, stale))


cdef PyMethodDef _quick_method
_quick_method.ml_name = "fetch"
_quick_method.ml_meth = <void*>_quick_fetch
_quick_method.ml_flags = METH_FASTCALL | METH_KEYWORDS
_quick_method.ml_doc = (
    b"fetch($self, /, name, load, *, ttl, refresh_after=None, jitter=0.1, keep_missing=None, "
    b"type=None)\n--\n\n"
    b"Read a record, or load it if it is missing; the result is a Record, or None.\n\n"
    b"``AsyncCache.fetch`` describes the arguments and errors."
)


@cython.final
@cython.freelist(1024)
cdef class _FetchRead:
    """The waiter of the read of one ``fetch``; ``waiter`` is the caller's."""

    cdef Fetcher fetcher
    cdef object waiter, load, context
    cdef str name
    cdef _Call call

    def set_result(self, record, /):
        self.fetcher._take(self, record)

    def set_exception(self, error, /):
        failures.of_call(error, "fetch", self.name)
        self.waiter.set_exception(error)

    def exception(self):
        """Take the error of the caller's waiter, so that no event loop logs it."""
        return self.waiter.exception()


@cython.final
cdef class BlockingFetcher:
    """``fetch`` of a Cache; ``run`` does an operation by its name, and ``near`` has the cached."""

    cdef _Calls _calls
    cdef object _run, _near, _slow
    cdef object _plain  # the code of the latest load that is no coroutine function
    cdef SharedNearCache _shared

    def __init__(self, run, near, checks, slow):
        self._calls = _Calls.__new__(_Calls, checks)
        self._run = run
        self._near = None if near is None else near.get
        self._shared = near if type(near) is SharedNearCache else None
        self._slow = slow

    def quick(self):
        """Return the function that programs call."""
        return PyCFunction_New(&_quick_blocking_method, self)

    cdef inline bint _is_plain(self, PyObject* load) noexcept:
        """Return whether a load is known as no coroutine function."""
        if PyMethod_Check(load):
            load = PyMethod_GET_FUNCTION(load)
        return (
            PyFunction_Check(load)
            and PyFunction_GET_CODE(load) == dscache_load(plain_of_fetcher(self))
        )

    cdef int _check_plain(self, load) except -1:
        fetch_terms.check_plain(load)
        self._keep_plain(getattr(load, "__code__", None))
        return 0

    cdef void _keep_plain(self, code) noexcept:
        dscache_put(plain_of_fetcher(self), <PyObject*>code)

    cdef object _fetch(self, PyObject** given, Py_ssize_t count, PyObject* names):
        """Do a call that is no plain hit."""
        cdef _Call call = self._calls.find(given, count, names)
        if call is None:
            name, load, call = self._calls.learn(given, count, names)
            return self._read(name, load, call)
        return self._read(<object>given[0], <object>given[1], call)

    cdef object _read(self, name, load, _Call call):
        cdef object record
        if not self._is_plain(<PyObject*>load):
            self._check_plain(load)
        cdef str key = checked_record_name(name)
        try:
            if call.ages and not self._calls.is_recent(key):
                record = self._slow.check_age(key, load, call.terms)
            else:
                record = self._run("get", key) if self._near is None else self._near(key)
                if record is None or self._calls.is_missing(<PyObject*>key):
                    record = self._slow.go_on(key, load, call.terms, record)
        except DscacheError as error:
            failures.of_call(error, "fetch", key)
            raise
        return record if call.type is None or record is None else typed.with_type(record, call.type)


cdef extern from *:
    """
    #define dscache_plain_of(owner) (&(owner)->_plain)
    """
    PyObject** plain_of_fetcher "dscache_plain_of"(BlockingFetcher fetcher) noexcept


cdef object _quick_blocking(PyObject* owner, PyObject** given, Py_ssize_t count, PyObject* names):
    cdef BlockingFetcher fetcher = <BlockingFetcher>owner
    if fetcher._shared is not None and fetcher._calls.is_quick(given, count, names):
        if not fetcher._is_plain(given[1]):
            fetcher._check_plain(<object>given[1])
        found = fetcher._shared._take(<object>given[0])
        if type(found) is Record and not fetcher._calls.is_missing(given[0]):
            return found
    return fetcher._fetch(given, count, names)


cdef PyMethodDef _quick_blocking_method
_quick_blocking_method.ml_name = "fetch"
_quick_blocking_method.ml_meth = <void*>_quick_blocking
_quick_blocking_method.ml_flags = METH_FASTCALL | METH_KEYWORDS
_quick_blocking_method.ml_doc = (
    b"fetch($self, /, name, load, *, ttl, refresh_after=None, jitter=0.1, keep_missing=None, "
    b"type=None)\n--\n\n"
    b"Read a record, or load it if it is missing; return a Record, or None.\n\n"
    b"``Cache.fetch`` describes the arguments and errors."
)
