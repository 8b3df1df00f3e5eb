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
    Py_ssize_t PySet_GET_SIZE(object values) noexcept
    Py_UCS4 PyUnicode_READ_CHAR(object text, Py_ssize_t i) noexcept
    bint PyFunction_Check(object function) noexcept
    PyObject* PyFunction_GET_CODE(object function) noexcept
    object PyContext_CopyCurrent()

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
        self._known = [None] * KNOWN_CALLS
        self._recent = checks.recent
        self._missing = checks.missing

    cdef inline _Call find(self, PyObject** given, Py_ssize_t count, PyObject* names):
        """Return the call with these arguments, or None."""
        cdef _Call call
        if count != 2 or names == NULL:
            return None
        # Threads of a Cache replace each other's calls.
        call = <_Call>dscache_item_of(self._known, (<size_t>names >> 4) & (KNOWN_CALLS - 1))
        return call if call is not None and call.fits(given + 2, names) else None

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

    cdef inline bint is_quick(self, name, _Call call) except -1:
        """Return whether a cached record of that name, if there is one, may be served as it is."""
        return (
            call.type is None
            and type(name) is str
            and PyUnicode_GET_LENGTH(name) > 0
            and PyUnicode_READ_CHAR(name, PyUnicode_GET_LENGTH(name) - 1) != _NOTE_END
            and (not call.ages or self.is_recent(<str>name))
        )

    cdef inline bint is_missing(self, str name) except -1:
        """Return whether other calls remember that there is no such record."""
        return PySet_GET_SIZE(self._missing) > 0 and name in self._missing


cdef inline str checked_record_name(name):
    """Return the name of a record that isn't one of a note, or raise RecordError."""
    cdef str key = check_name(name)
    if PyUnicode_READ_CHAR(key, PyUnicode_GET_LENGTH(key) - 1) == _NOTE_END:
        if key.endswith(_NOTE_SUFFIX):
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

    cdef object _first(self, tuple parsed):
        """Do a call that was not known."""
        name, load, call = parsed
        return self._fetch(name, load, call)

    cdef inline object _fetch(self, name, load, _Call call):
        cdef bint stale = False
        cdef _Entry entry = None
        if self._near is not None and callable(load) and self._calls.is_quick(name, call):
            self._near._stay()
            entry = self._near._look(name, &stale)
            if entry is not None and entry.raw is not None and not self._calls.is_missing(name):
                return self._near._done(_record_of(entry, stale))
        return self._read(name, load, call, entry, stale)

    cdef object _read(self, name, load, _Call call, _Entry entry, bint stale):
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
        elif self._near is not None:
            self._near._read(key, read)
        else:
            self._entry.read(key, read)
        return read.waiter

    cdef int _take(self, _FetchRead read, record) except -1:
        """Complete the waiter of a call with the record, or leave it to ``slow``."""
        cdef _Call call = read.call
        if record is None or self._calls.is_missing(read.name):
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
    cdef _Call call = fetcher._calls.find(given, count, names)
    if call is None:
        return fetcher._first(fetcher._calls.learn(given, count, names))
    return fetcher._fetch(<object>given[0], <object>given[1], call)


cdef PyMethodDef _quick_method
_quick_method.ml_name = "fetch"
_quick_method.ml_meth = <void*>_quick_fetch
_quick_method.ml_flags = METH_FASTCALL | METH_KEYWORDS


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

    cdef object _first(self, tuple parsed):
        """Do a call that was not known."""
        name, load, call = parsed
        return self._fetch(name, load, call)

    cdef inline object _fetch(self, name, load, _Call call):
        if not (
            PyFunction_Check(load)
            and PyFunction_GET_CODE(load) == dscache_load(plain_of_fetcher(self))
        ):
            fetch_terms.check_plain(load)
            self._keep_plain(getattr(load, "__code__", None))
        if self._shared is not None and self._calls.is_quick(name, call):
            found = self._shared._take(name)
            if type(found) is Record and not self._calls.is_missing(name):
                return found
        return self._read(name, load, call)

    cdef void _keep_plain(self, code) noexcept:
        dscache_put(plain_of_fetcher(self), <PyObject*>code)

    cdef object _read(self, name, load, _Call call):
        cdef object record
        cdef str key = checked_record_name(name)
        if call.ages and not self._calls.is_recent(key):
            record = self._slow.check_age(key, load, call.terms)
        else:
            record = self._run("get", key) if self._near is None else self._near(key)
            if record is None or self._calls.is_missing(key):
                record = self._slow.go_on(key, load, call.terms, record)
        return record if call.type is None or record is None else typed.with_type(record, call.type)


cdef extern from *:
    """
    #define dscache_plain_of(owner) (&(owner)->_plain)
    """
    PyObject** plain_of_fetcher "dscache_plain_of"(BlockingFetcher fetcher) noexcept


cdef object _quick_blocking(PyObject* owner, PyObject** given, Py_ssize_t count, PyObject* names):
    cdef BlockingFetcher fetcher = <BlockingFetcher>owner
    cdef _Call call = fetcher._calls.find(given, count, names)
    if call is None:
        return fetcher._first(fetcher._calls.learn(given, count, names))
    return fetcher._fetch(<object>given[0], <object>given[1], call)


cdef PyMethodDef _quick_blocking_method
_quick_blocking_method.ml_name = "fetch"
_quick_blocking_method.ml_meth = <void*>_quick_blocking
_quick_blocking_method.ml_flags = METH_FASTCALL | METH_KEYWORDS
