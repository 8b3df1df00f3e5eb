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
