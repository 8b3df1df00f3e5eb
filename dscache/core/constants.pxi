# The constants of ``constants.py`` and ``condition.py`` as C values.

cdef enum Kind:
    GET, HEAD, SET, SET_TTL, SET_IF_NEWER, DELETE_IF, DELETE, COMMAND, READ_KEY, WRITE_KEY, PUBLISH

cdef enum:
    LIVE = 0  # the state of an epoch
    SLOTS = 16384
    MAX_DEPTH = 32
    TIMED = 8  # operations with latencies: single ones, and behind them bulks
    LATENCY_BOUNDS = 17
    KEPT_TTL = -1

if (
    *(GET, HEAD, SET, SET_TTL, SET_IF_NEWER, DELETE_IF, DELETE, COMMAND),
    *(READ_KEY, WRITE_KEY, PUBLISH, SLOTS, MAX_DEPTH, b"_v", b"_d"),
    *(TIMED, LATENCY_BOUNDS, LIVE, KEPT_TTL),
) != (
    *(c.GET, c.HEAD, c.SET, c.SET_TTL, c.SET_IF_NEWER, c.DELETE_IF, c.DELETE, c.COMMAND),
    *(c.READ_KEY, c.WRITE_KEY, c.PUBLISH, c.SLOTS, c.MAX_DEPTH),
    *(c.VERSION_SUFFIX, c.DATA_SUFFIX),
    *(len(c.TIMED), len(c.LATENCY_BOUNDS), tracking.LIVE, c.KEPT_TTL),
):
    raise ImportError("dscache._fast was built for another dscache.core.constants; build it again")

cdef Py_ssize_t COMMAND_RECORDS = c.COMMAND_RECORDS
cdef Py_ssize_t FLUSH_RECORDS = c.FLUSH_RECORDS
cdef Py_ssize_t EARLY_RECORDS = c.EARLY_RECORDS
cdef Py_ssize_t SCRIPT_RECORDS = c.SCRIPT_RECORDS
cdef Py_ssize_t READ_BUFFER_BYTES = c.READ_BUFFER_BYTES
cdef Py_ssize_t MAX_DATA_DEPTH = c.MAX_DATA_DEPTH
cdef Py_ssize_t DATA_BUFFER = c.DATA_BUFFERS[0]
cdef Py_ssize_t COMMAND_BYTES = c.COMMAND_BYTES
cdef Py_ssize_t WINDOW_RECORDS = c.WINDOW_RECORDS
cdef long long MAX_ELEMENTS = c.MAX_ELEMENTS
cdef int HEADER_BYTES = c.HEADER_BYTES
cdef double[LATENCY_BOUNDS] latency_bounds = c.LATENCY_BOUNDS
# The suffixes are an underscore and one letter, which lets the second key be made of the first.
cdef enum:
    SUFFIX_SIZE = 2
    SUFFIX_OF_VERSION = 118
    SUFFIX_OF_DATA = 100
cdef bytes OK = b"OK"
cdef bytes ASKING = c.ASKING
cdef bytes GUARDED = c.GUARDED
cdef bytes UNGUARDED = c.UNGUARDED
cdef long NOT_NEWER = c.NOT_NEWER
cdef long WRITTEN = c.WRITTEN
cdef long DAMAGED = c.DAMAGED
cdef long UNTOLD = c.UNTOLD
cdef object ANY = condition.ANY
