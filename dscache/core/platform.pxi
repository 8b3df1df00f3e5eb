# Functions of CPython and of the operating system.

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    bint PyUnicode_IS_COMPACT_ASCII(object text) noexcept
    const char* PyUnicode_DATA(object text) noexcept
    Py_ssize_t PyUnicode_GET_LENGTH(object text) noexcept
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow) except? -1
    PyObject* PyDict_SetDefault(object records, object key, object value) except NULL
    void PyObject_GC_UnTrack(PyObject* untied) noexcept
    void Py_SET_SIZE(object container, Py_ssize_t size) noexcept
    double PyOS_string_to_double(const char* text, char** rest, PyObject* overflow) except? -1.0
    Py_ssize_t PY_SSIZE_T_MAX
    int PyList_SetSlice(object items, Py_ssize_t low, Py_ssize_t high, PyObject* given) except -1

cdef extern from *:
    """
    #include <pthread.h>
    #include <time.h>

    /* The memory that threads share. With the GIL they take turns, so that these are plain loads
       and stores, and no locks. */
    #ifdef Py_GIL_DISABLED
    typedef PyMutex dscache_mutex;
    #define dscache_renew(mutex) memset(mutex, 0, sizeof(dscache_mutex))
    #define dscache_lock(mutex) PyMutex_Lock(mutex)
    #define dscache_unlock(mutex) PyMutex_Unlock(mutex)
    #define DSCACHE_SCRATCHES 64
    #define dscache_load(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
    #define dscache_exchange(place, value) __atomic_exchange_n(place, value, __ATOMIC_ACQ_REL)
    #define dscache_increment(number) __atomic_add_fetch(&(number), 1, __ATOMIC_RELAXED)
    #define dscache_current(number) __atomic_load_n(&(number), __ATOMIC_RELAXED)
    #define dscache_item_of(items, i) PyList_GetItemRef(items, i)
    #define dscache_borrow(items, i) PyList_GetItemRef(items, i)
    #define dscache_give_back(item) Py_DECREF(item)
    /* A field that a thread reads without the lock that others hold to write it. */
    #define dscache_read(place) __extension__ ({ \
        __typeof__(place) dscache_seen; \
        __atomic_load(&(place), &dscache_seen, __ATOMIC_ACQUIRE); \
        dscache_seen; \
    })
    #define dscache_write(place, value) __extension__ ({ \
        __typeof__(place) dscache_new = (value); \
        __atomic_store(&(place), &dscache_new, __ATOMIC_RELEASE); \
    })
    #define DSCACHE_LOCK_FREE 1
    static int dscache_replace(PyObject **place, PyObject *expected, PyObject *value) {
        return __atomic_compare_exchange_n(
            place, &expected, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    #else
    typedef char dscache_mutex;
    #define dscache_renew(mutex) ((void)(mutex))
    #define dscache_lock(mutex) ((void)(mutex))
    #define dscache_unlock(mutex) ((void)(mutex))
    #define DSCACHE_SCRATCHES 1
    #define dscache_load(place) (*(place))
    #define dscache_increment(number) (++(number))
    #define dscache_current(number) (number)
    #define dscache_item_of(items, i) Py_NewRef(PyList_GET_ITEM(items, i))
    #define dscache_borrow(items, i) PyList_GET_ITEM(items, i)
    #define dscache_give_back(item) ((void)(item))
    #define dscache_read(place) (place)
    #define dscache_write(place, value) ((void)((place) = (value)))
    #define DSCACHE_LOCK_FREE 0
    static inline PyObject *dscache_exchange(PyObject **place, PyObject *value) {
        PyObject *before = *place;
        *place = value;
        return before;
    }
    static inline int dscache_replace(PyObject **place, PyObject *expected, PyObject *value) {
        if (*place != expected) {
            return 0;
        }
        *place = value;
        return 1;
    }
    #endif

    /* Put a value into a place that holds ``none`` so far, unless another thread, or code that has
       run meanwhile, was first; return what is there. The place holds it from then on. */
    static PyObject *dscache_settle(PyObject **place, PyObject *none, PyObject *value) {
        if (dscache_replace(place, none, value)) {
            Py_INCREF(value);
            Py_DECREF(none);
        } else {
            value = dscache_load(place);
        }
        Py_INCREF(value);
        return value;
    }

    /* Put a value into a place that any thread may read or change, and keep it there. */
    static inline void dscache_put(PyObject **place, PyObject *value) {
        Py_INCREF(value);
        Py_DECREF(dscache_exchange(place, value));
    }

    /* The float of a name, or 0.0 where there is none. */
    static inline double dscache_number_of(PyObject *numbers, PyObject *name) {
        double number = 0.0;
    #ifdef Py_GIL_DISABLED
        PyObject *found;
        if (PyDict_GetItemRef(numbers, name, &found) < 0) {
            return -1.0;
        }
        if (found != NULL) {
            number = PyFloat_AS_DOUBLE(found);
            Py_DECREF(found);
        }
    #else
        PyObject *found = PyDict_GetItem(numbers, name);
        if (found != NULL) {
            number = PyFloat_AS_DOUBLE(found);
        }
    #endif
        return number;
    }

    /* A buffer for the text of data, or NULL where all are in use. Threads that run at once look
       in different places, each in a cache line of its own. */
    static struct {
        PyObject *kept;
        char apart[64 - sizeof(PyObject *)];
    } dscache_scratches[DSCACHE_SCRATCHES];

    /* The place of this thread among DSCACHE_SCRATCHES. */
    static inline size_t dscache_own_place(void) {
    #if DSCACHE_SCRATCHES > 1
        size_t thread = (size_t)pthread_self();  /* an address, whose low bits are all alike */
        thread = (thread >> 12) * (size_t)0x9e3779b97f4a7c15u;
        return thread >> (sizeof(size_t) * 8 - 6);
    #else
        return 0;
    #endif
    }

    static inline PyObject **dscache_scratch_place(void) {
        return &dscache_scratches[dscache_own_place()].kept;
    }

    static inline PyObject *dscache_take_scratch(PyObject *otherwise) {
        PyObject *scratch = dscache_exchange(dscache_scratch_place(), NULL);
        if (scratch == NULL) {
            Py_INCREF(otherwise);
            return otherwise;
        }
        return scratch;
    }

    static inline void dscache_give_scratch(PyObject *scratch) {
        if (dscache_replace(dscache_scratch_place(), NULL, scratch)) {
            Py_INCREF(scratch);
        }
    }

    /* A number that threads count up at once, each in a cache line of its own. */
    typedef struct {
        struct {
            unsigned long long count;
            char apart[64 - sizeof(unsigned long long)];
        } of[DSCACHE_SCRATCHES];
    } dscache_tally;

    static inline void dscache_count(dscache_tally *tally) {
        (void)dscache_increment(tally->of[dscache_own_place()].count);
    }

    static inline unsigned long long dscache_total(dscache_tally *tally) {
        unsigned long long total = 0;
        for (size_t i = 0; i < DSCACHE_SCRATCHES; i++) {
            total += dscache_current(tally->of[i].count);
        }
        return total;
    }

    /* The value of a key, or ``none``, without a lock; called only if DSCACHE_LOCK_FREE. */
    static inline PyObject *dscache_value_of(PyObject *dict, PyObject *key, PyObject *none) {
        PyObject *found = NULL;
    #if DSCACHE_LOCK_FREE
        if (PyDict_GetItemRef(dict, key, &found) < 0) {
            return NULL;
        }
    #endif
        return found == NULL ? Py_NewRef(none) : found;
    }

    static unsigned long dscache_thread(void) {
        return (unsigned long)pthread_self();
    }

    static double dscache_monotonic(void) {
        struct timespec now;
    #ifdef __APPLE__
        clock_gettime(CLOCK_UPTIME_RAW, &now);
    #else
        clock_gettime(CLOCK_MONOTONIC, &now);
    #endif
        return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    }

    static PyObject *dscache_done(PyObject *of, PyObject *none, PyObject *options,
                                  PyObject *set_result, PyObject *result) {
        PyTypeObject *type = (PyTypeObject *)of;
        PyObject *future = type->tp_new(type, none, NULL);
        PyObject *said;
        if (future == NULL) {
            return NULL;
        }
        if (type->tp_init(future, none, options) < 0) {
            Py_DECREF(future);
            return NULL;
        }
        if (Py_TYPE(set_result) == &PyMethodDescr_Type
            && ((PyMethodDescrObject *)set_result)->d_method->ml_flags == METH_O) {
            said = ((PyMethodDescrObject *)set_result)->d_method->ml_meth(future, result);
        } else {
            PyObject *both[] = {future, result};
            said = PyObject_Vectorcall(set_result, both, 2, NULL);
        }
        if (said == NULL) {
            Py_DECREF(future);
            return NULL;
        }
        Py_DECREF(said);
        return future;
    }
    """
    # A future of a class with a result, by its ``set_result``. The calls of the class and of the
    # method from Python's side would take 230 instructions more.
    object dscache_done(
        PyObject* of, PyObject* none, PyObject* options, PyObject* set_result, PyObject* result
    )
    # The clock of time.monotonic, without a call into Python.
    double dscache_monotonic() noexcept nogil
    # The identity of this thread. Python's own function takes four times the instructions.
    unsigned long dscache_thread() noexcept nogil

    # Nothing with the GIL. A thread that has the lock runs no Python code, and waits
    # for another only at a dict.
    ctypedef struct dscache_mutex:
        pass
    void dscache_renew(dscache_mutex*) noexcept
    void dscache_lock(dscache_mutex*) noexcept
    void dscache_unlock(dscache_mutex*) noexcept
    PyObject* dscache_load(PyObject**) noexcept
    void dscache_put(PyObject** place, PyObject* value) noexcept
    object dscache_item_of(object items, Py_ssize_t i)
    # An item of a list that lives until it is given back, or Python code runs.
    PyObject* dscache_borrow(PyObject* items, Py_ssize_t i) noexcept
    void dscache_give_back(PyObject* item) noexcept
    double dscache_number_of(object numbers, object name) except? -1.0
    object dscache_settle(PyObject** place, PyObject* none, PyObject* value)
    # Whether a thread may find an entry of a near cache without a lock: never with the GIL.
    const bint LOCK_FREE "DSCACHE_LOCK_FREE"
    bint read_flag "dscache_read"(bint) noexcept
    int read_int "dscache_read"(int) noexcept
    unsigned int read_unsigned "dscache_read"(unsigned int) noexcept
    double read_double "dscache_read"(double) noexcept
    void write_flag "dscache_write"(bint, bint) noexcept
    void write_int "dscache_write"(int, int) noexcept
    void write_unsigned "dscache_write"(unsigned int, unsigned int) noexcept
    void write_double "dscache_write"(double, double) noexcept
    ctypedef struct dscache_tally:
        pass
    void dscache_count(dscache_tally*) noexcept
    unsigned long long dscache_total(dscache_tally*) noexcept
    object dscache_value_of(PyObject* dict, PyObject* key, PyObject* none)
    long long dscache_increment(long long) noexcept
    long long dscache_current(long long) noexcept
    object dscache_take_scratch(PyObject* otherwise)
    void dscache_give_scratch(PyObject* scratch) noexcept
