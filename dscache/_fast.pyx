# cython: language_level=3, auto_pickle=False, autotestdict=False
"""The compiled core, with the names, results and errors of ``core/pure.py``.

Sans-IO: operations go in and RESP bytes come out, bytes go in and waiters are resolved. There
is no socket, event loop or configuration here. The theory of operation stands at the top of
``core/pipeline.py``; this file gives only the reasons for its differences:

* Commands are encoded straight into one C buffer, from the UTF-8 that a str caches.
* Replies to MGET and MSET are read in place. All other replies, and unusual ones, are left to
  hiredis, so that both cores judge them alike; where the GIL is off, to a reader that does as
  hiredis does.
* ``Record`` takes no part in garbage collection. A bulk makes thousands of records at once, and
  each collection that they would trigger looks at all of them.
"""

import sys
from asyncio import InvalidStateError
from collections import deque
from collections.abc import Mapping
from functools import partial
from sys import getsizeof
from types import GenericAlias

cimport cython
from cpython.bytearray cimport (
    PyByteArray_AS_STRING,
    PyByteArray_FromStringAndSize,
    PyByteArray_GET_SIZE,
)
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.dict cimport (
    PyDict_GetItem,
    PyDict_Keys,
    PyDict_Next,
    PyDict_SetItem,
    PyDict_Size,
    PyDict_Values,
)
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from libc.math cimport INFINITY, NAN
from libc.string cimport memchr, memcmp, memcpy, memmove, memset

import msgspec

from ._interruptions import raise_interruption
from .core import (
    condition,
    failures,
    json_text,
    outcomes,
    recovery,
    refusals,
    scripts,
    tolerant_json,
    tracking,
)
from .core import constants as c
from .core import envelope as e
from .core import typed
from .core.stats import latency_of, stats_of
from .core.suspects import is_restricted, restricted_window
from .core.waiters import DISCARDED as _discarded
from .core.waiters import reject as _reject
from .errors import DscacheError, ProtocolError, ReplyError, shorten

include "core/platform.pxi"
include "core/constants.pxi"

cdef list _DISCARDED = _discarded

cdef class _Encoder  # of core/resp.pxi, for the batches before it
cdef class MessageDispatcher  # of core/message.pxi
cdef class NearCache  # of core/near_cache.pxi, as are
cdef class _Epoch
cdef class _PendingRead
cdef class _Reachability

include "core/record.pxi"
include "core/batch.pxi"
include "core/entries.pxi"
include "core/resp.pxi"
include "core/own_reader.pxi"
include "core/reader.pxi"


@cython.final
cdef class Pipeline:
    """The operations of one node on their way to Redis, and their replies on the way back.

    - ``create_waiter`` makes the object that an operation returns.
    - ``wake`` is called before the first operation since the last ``take_output`` is queued. If it
      raises, nothing is queued. A pipeline ``bound`` to one thread also calls it before an
      operation from another thread.
    - ``begin`` is called when enough operations wait for an idle server, and must not raise.
    - ``timeout`` is in seconds. ``ttl`` is the default lifetime of records in whole seconds, 0 for
      none.
    - ``address`` and ``down``, the reason why there is no connection, appear in error texts.
    - ``has_msetex`` is set for a server that knows MSETEX.
    - With ``single_writes`` a write command holds one record, and with ``single_reads`` an MGET
      does, since a proxy hides several servers.
    - With ``whole_scripts`` a script is sent as its text, since the server refuses EVALSHA.
    - ``away`` is the code of an error reply for which the server should be left, or asked again
      later. The owner of the socket clears it.
    - Without ``reconnects``, a replica's refusal is the outcome of a write.
    - ``near`` is the NearCache in front of the pipeline, or None.
    - ``inbox`` is the MessageDispatcher that takes the messages of its subscriptions.
    - ``resp2_pubsub`` is set for a server without RESP3, which sends messages as replies.
    - ``on_push`` is called with each push that is for neither of them.
    - ``redirected`` holds the operations that a ``clustered`` node sent away, as (error text, slot,
      batch). An operation redirected more than ``max_redirections`` times fails.

    At most ``max_pending`` records are in flight. With ``refuse_when_full``, an operation raises
    Overloaded if ``max_pending`` others are pending (a bulk counts as one), or
    ``max_pending_bytes`` of text to be written. Without it, the operation waits. More than
    ``max_reply_bytes`` without the end of a reply end the connection.
    """

    cdef public str address
    cdef public object down
    cdef public bint has_msetex
    cdef public str away
    cdef public list doubts  # operations put off that another under way may overtake
    cdef public bint reconnects
    cdef public bint single_writes
    cdef public bint single_reads
    cdef public bint whole_scripts
    cdef public list redirected
    cdef public NearCache near
    cdef public object on_push
    cdef public MessageDispatcher inbox
    cdef public bint resp2_pubsub
    cdef unsigned long long _messages
    cdef public _Reachability reach
    cdef public _Epoch epoch
    cdef readonly Py_ssize_t settled
    cdef public Py_ssize_t operations
    cdef public Py_ssize_t pending_bytes
    cdef Py_ssize_t _max_pending, _max_pending_bytes, _max_reply_bytes
    cdef readonly Py_ssize_t window
    cdef public Py_ssize_t open_window  # 0 while output is restricted
    cdef public Py_ssize_t script_fence  # no output until ``settled`` reaches it
    cdef readonly Py_ssize_t partial  # bytes of a reply that isn't complete
    cdef readonly Py_ssize_t max_redirections
    cdef bint _refuse_when_full
    cdef readonly bint clustered
    cdef unsigned long _thread  # the one it is bound to, or 0
    cdef readonly Py_ssize_t in_flight
    cdef public Py_ssize_t queued
    cdef object _create_waiter
    cdef object _wake
    cdef object _begin
    cdef _Encoder _encoder
    cdef _LengthGuard _guard
    cdef readonly long long ttl
    cdef public double timeout
    cdef bint _awake
    cdef public bint busy  # the queue or the slots change: only new operations may come
    cdef readonly list open_batches
    cdef public object queue
    cdef public list suspects
    cdef readonly object slots
    cdef readonly list returned
    cdef _Replies _replies
    cdef object _version_reply  # of a head: its first reply, until the second one comes
    cdef public object answering  # always None: no exception comes between a record and its count
    cdef public bint severed  # replies are still to come that belong to no operation
    cdef bint _asked  # the reply to an ASKING was read, and what was asked comes next
    cdef unsigned long long _reads, _hits, _halves, _damages, _writes, _not_newer, _deletes
    cdef unsigned long long _commands, _flushes, _bytes_out, _bytes_in
    cdef public unsigned long long failed
    cdef unsigned long long _misses, _calls, _overloads, _batches, _sent
    cdef unsigned long long[TIMED * (LATENCY_BOUNDS + 1)] _latencies
    cdef double[TIMED] _seconds
    cdef double _now  # time of arrival of the replies at hand, 0.0 until it is needed

    def __init__(
        self,
        create_waiter,
        wake,
        *,
        begin=None,
        str address="",
        str key_prefix="",
        bint hash_tag=False,
        long long ttl=0,
        double timeout=1.0,
        Py_ssize_t max_pending=c.MAX_PENDING,
        Py_ssize_t max_pending_bytes=c.MAX_PENDING_BYTES,
        bint refuse_when_full=False,
        Py_ssize_t max_reply_bytes=c.MAX_REPLY_BYTES,
        bint clustered=False,
        Py_ssize_t max_redirections=c.MAX_REDIRECTIONS,
        bint bound=False,
    ):
        self.address = address
        self._thread = dscache_thread() if bound else 0
        self.down = None
        self.away = ""
        self.doubts = []
        self.reconnects = True
        self.redirected = []
        self._create_waiter = create_waiter
        self._wake = wake
        self._begin = begin
        self._encoder = _Encoder.__new__(_Encoder, key_prefix, hash_tag)
        self.ttl = ttl
        self.timeout = timeout
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._refuse_when_full = refuse_when_full
        self._max_reply_bytes = max_reply_bytes
        self.clustered = clustered
        self.max_redirections = max_redirections
        self.window = max(1, min(WINDOW_RECORDS, max_pending))
        self.open_window = self.window
        self.open_batches = []
        self.queue = deque()
        self.suspects = []
        self.slots = deque()
        self.returned = []
        self.reach = _Reachability.__new__(_Reachability)
        self._replies = _Replies.__new__(_Replies)
        self.reset_reader()

    # -- operations on one record

    def get(self, name):
        """Queue a read; its waiter gets the Record, or None."""
        return self._join(GET, check_name(name))

    def head(self, name):
        """Queue a read of the version; its waiter gets the int, or None."""
        return self._join(HEAD, check_name(name))

    def set(self, name, version, data, ttl=None, if_newer=False, if_version=ANY):
        """Queue a write; its waiter gets True, or False if its condition doesn't hold."""
        return self._put(check_name(name), version, data, ttl, if_newer, if_version)

    def delete(self, name, if_version=ANY):
        """Queue a removal; its waiter gets whether there was such a record, of that version."""
        cdef str key = check_name(name)
        return self._join(DELETE, key) if if_version is ANY else self._remove_if(key, if_version)

    # -- bulk operations

    def get_bulk(self, names):
        """Queue a read of many records; its waiter gets a dict of the records found."""
        return self._add_bulk(GET, _unique("get_bulk", names))

    def head_bulk(self, names):
        """Queue a read of many versions; its waiter gets a dict of the versions found."""
        return self._add_bulk(HEAD, _unique("head_bulk", names))

    def set_bulk(self, records, ttl=None, if_newer=False, if_version=ANY):
        """Queue a write of many records; its waiter gets the set of names not written."""
        cdef dict writes = {}
        cdef long long write_ttl = 0
        cdef Py_ssize_t size = 0
        make_writes(self.ttl, records, ttl, if_newer, if_version, writes, &write_ttl, &size)
        return self._add_bulk(_kind_of(write_ttl, if_newer or if_version is not ANY), writes, size)

    def delete_bulk(self, names, if_version=ANY):
        """Queue a removal of many records; its waiter gets how many were removed."""
        cdef dict unique = _unique("delete_bulk", names)
        if if_version is ANY:
            return self._add_bulk(DELETE, unique)
        return self._add_bulk(DELETE_IF, make_removals(unique, if_version))

    # -- reads for the near cache

    def read(self, str name not None, waiter, int kind=GET):
        """Queue a GET or HEAD, of which ``waiter`` gets the Record or the version, or None."""
        self._join(kind, name, waiter)

    def read_bulk(self, int kind, names, waiter):
        """Queue a GET or HEAD of many records; ``waiter`` gets a dict of the records found."""
        self._add_bulk(kind, dict.fromkeys(names), 0, waiter)

    # -- any other command

    def command(self, *parts):
        """Return the bytes of a command to be sent at once, and the waiter for its reply."""
        cdef bytes text = packed(parts)
        cdef object waiter = self._create_waiter()
        # No deadline of its own: what bounds a handshake is connectTimeout.
        cdef dict records = {str(parts[0]): waiter}
        cdef _Batch batch = _Batch.__new__(_Batch, COMMAND, INFINITY, 0, records)
        batch.freeze()
        batch.sent = 1
        cdef tuple slot = (batch, 1)
        cdef tuple command = (text, waiter)
        # Nothing can fail behind this: a slot whose bytes are lost would take another's reply.
        self.slots.append(slot)
        self.in_flight += 1
        self.operations += 1
        if self.epoch is not None:
            self.epoch.asked(self.fence())
        return command

    def key_command(self, int kind, str key not None, waiter, *parts):
        """Queue a command of one key, READ_KEY or WRITE_KEY, whose bare reply ``waiter`` gets."""
        self._add_command(kind, key, packed(parts), waiter)

    # -- messages

    def publish(self, topic, bytes opening not None, message, bint sharded):
        """Queue a message; its waiter gets how many connections Redis gave it to.

        ``opening`` is the envelope up to the message, which tells the topic if it is None.
        """
        return self._publish(topic_of(topic, message), opening, message, sharded)

    cdef object _publish(self, long long topic, bytes opening, message, bint sharded):
        cdef bytes text = pack_message(topic, opening, message, sharded)
        self.check_capacity(PyBytes_GET_SIZE(text))
        # Each with a name of its own, as they are many to a topic.
        self._messages += 1
        cdef str name = name_of_message(topic, self._messages)
        cdef object waiter = self._create_waiter()
        self._add_command(PUBLISH, name, text, waiter)
        return waiter

    # -- what changes nodes

    cpdef Py_ssize_t fence(self):
        """Return the value of ``settled`` once everything in flight now is answered."""
        return self.settled + len(self.slots)

    take_queued = recovery.take_queued

    def requeue(self, batches):
        """Queue batches that another pipeline gave away, each in the place of its age.

        Batches that wait here already, were sent or have their outcome are skipped, so that a
        caller that was interrupted may pass the same batches again.
        """
        self.notify_pending()
        recovery.requeue(self, batches)

    # -- output

    cpdef end_tick(self):
        """Close the open batches, for a tick that can't be sent."""
        self._close_batches()
        self._awake = False

    cdef inline int _close_batches(self) except -1:
        cdef Py_ssize_t size = PyList_GET_SIZE(self.open_batches)
        if size:
            PyList_SetSlice(self.open_batches, 0, size, NULL)
        return 0

    def take_output(self):
        """Return the RESP bytes of about 256 waiting records, which then count as sent.

        Further records wait for the next call, or until the window has room for them. If it
        raises, or the bytes can't be sent, the connection must end.
        """
        cdef bytes output = None
        self.busy = True
        try:  # without except, which costs a call that succeeds 60 instructions
            output = self._take()
        finally:
            if output is None:
                # There may be slots without bytes, which would take the replies to other commands.
                self.severed = True
            self.busy = False
        return output

    cdef bytes _take(self):
        cdef _Encoder encoder = self._encoder
        cdef _Batch batch
        cdef Py_ssize_t count, taken = 0
        cdef double now
        cdef tuple slot
        self._close_batches()
        self._awake = False
        if self.queue:
            batch = self.queue[0]
            now = dscache_monotonic()
            if batch.deadline <= now:
                # The caller was too busy to say so by ``expire``; it must not be sent all the same.
                recovery.drop_late(self, now)
                self.recount()
        encoder.begin()
        while (
            self.queue
            and self.in_flight < self.open_window
            and taken < FLUSH_RECORDS
            and encoder.size() < COMMAND_BYTES
        ):
            batch = self.queue[0]
            if batch.abandoned() or not batch.records:
                self.queued -= batch.waiting()
                self.queue.popleft()
                continue
            self._close_batches()  # it may be one that a finalizer has begun just now
            batch.freeze()
            if self.clustered and batch.hash_slots == NULL and is_grouped(batch.kind):
                batch.group(encoder)
            if self.single_writes and SET <= batch.kind <= DELETE_IF:
                refusals.prepare_single_writes(self, batch)
                if not batch.waiting():
                    self.queue.popleft()
                    continue
            elif self.single_reads and batch.kind == GET:
                batch.one_per_command = True
            if self.whole_scripts:
                batch.whole_script = True
            count = encoder.encode(batch, self.has_msetex)
            if is_one_by_one(batch.kind):
                slot = (batch, 1)
                self.slots.extend([slot] * count)
                self._commands += 2 * count if batch.kind == HEAD else count
            else:
                slot = (batch, count)
                self.slots.append(slot)
                self._commands += 1
            taken += count
            self._batches += not batch.sent
            self._sent += count
            batch.sent += count
            self.queued -= count
            self.in_flight += count
            if not batch.waiting():
                self.queue.popleft()
        if not encoder.size():
            return b"" if self.open_window else self._take_restricted()
        self._flushes += 1
        self._bytes_out += encoder.size()
        if self.epoch is not None:
            self.epoch.asked(self.fence())
        return encoder.take()

    cdef bytes _take_restricted(self):
        """Return output while there are suspects: one of them alone, or other operations.

        Returns nothing while output waits for the refusals of a lost script.
        """
        cdef Py_ssize_t window
        cdef bytes output = b""
        try:
            while not output:
                window = restricted_window(self)
                if self.in_flight >= window or not self.queue:
                    break
                self.open_window = window
                output = self._take()  # nothing, if no waiter was left for what waited
            return output
        finally:
            self.open_window = 0 if is_restricted(self) else self.window

    # -- input

    def get_buffer(self, size_hint):
        """Return the buffer for received bytes, as ``asyncio.BufferedProtocol`` requires."""
        return self._replies.buffer()

    def buffer_updated(self, Py_ssize_t size):
        """Read the first ``size`` bytes of the buffer, and settle the operations they answer.

        Raises ProtocolError for bytes that Redis would not send. After any exception the
        connection must end: no later reply is given to an operation.
        """
        if size > self._replies.room():
            raise ValueError("there is no such part of the buffer")
        cdef bint is_read = False
        try:
            self._note_arrival(self._replies.arrive(size), size)
            self._parse()
            self._check_partial()
            is_read = True
        finally:
            if not is_read:
                self.severed = True

    def feed(self, bytes data not None):
        """Read received bytes, and settle the operations they answer.

        Raises ProtocolError for bytes that Redis would not send.
        """
        cdef const char* text = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t taken = 0
        cdef bint is_read = False
        try:
            self._note_arrival(<const unsigned char*>text, size)
            while taken < size:
                taken += self._replies.put(text + taken, size - taken)
                self._parse()
            self._check_partial()
            is_read = True
        finally:
            if not is_read:
                self.severed = True

    cdef int _note_arrival(self, const unsigned char* text, Py_ssize_t size) except -1:
        self._bytes_in += size
        self.partial += size
        return self._guard.inspect(text, size, self.address)

    cpdef reset_reader(self):
        """Drop a partial reply: the next bytes come from a new connection."""
        self._version_reply = _INCOMPLETE
        self._asked = False
        self.severed = False
        self.partial = 0
        self._guard = _LengthGuard.__new__(_LengthGuard, self._max_reply_bytes)
        self._replies.reset()

    # -- what the near cache may believe

    connected = tracking.connected
    disconnected = tracking.disconnected
    unknown = tracking.unknown
    forget = tracking.forget

    def new_epoch(self):
        """Return an epoch that begins now."""
        return _Epoch.__new__(_Epoch, self.reach)

    # -- time and failure

    expire = recovery.expire
    connection_lost = recovery.connection_lost
    fail_all = recovery.fail_all

    cpdef drop_slots(self):
        """Drop the slots and returned batches, once each operation is settled or queued."""
        self.settled += len(self.slots)
        self.slots.clear()
        self.returned.clear()

    def stats(self):
        """Return the counters: records by kind and outcome, traffic, and pending operations."""
        return stats_of(self, (
            *(self._calls, self._reads, self._hits, self._misses, self._halves, self._damages),
            *(self._writes, self._not_newer, self._deletes, self._overloads),
            *(self._batches, self._sent, self._commands, self._flushes),
            *(self._bytes_out, self._bytes_in),
        ), self._latency())

    cdef dict _latency(self):
        """Return the latencies for ``stats()``, without operations that never occurred."""
        cdef dict rows = {}
        cdef Py_ssize_t i, j
        for i in range(TIMED):
            buckets = [self._latencies[i * (LATENCY_BOUNDS + 1) + j]
                       for j in range(LATENCY_BOUNDS + 1)]
            if any(buckets):
                rows[c.TIMED[i]] = (self._seconds[i], buckets)
        return latency_of(rows)

    # -- building batches

    cdef _Batch _new_batch(self, int kind, dict records):
        return _Batch.__new__(_Batch, kind, dscache_monotonic() + self.timeout, 0, records)

    cdef inline int notify_pending(self) except -1:
        """Call ``wake`` before the first operation of a tick is queued; raises its error."""
        if not self._awake:
            self._wake()
            self._awake = True
        return 0

    cdef int _enqueue(self, _Batch batch, bint is_open) except -1:
        """Queue a complete batch. Later operations may join it if it ``is_open``.

        Runs no Python code, so that nothing can come in between; the caller has called
        ``notify_pending``.
        """
        cdef _Batch other
        cdef Py_ssize_t i
        for i in range(PyList_GET_SIZE(self.open_batches)):
            other = <_Batch>PyList_GET_ITEM(self.open_batches, i)
            if other.kind == batch.kind or not is_open:
                self._close_batches()
                break
        batch.serial = dscache_increment(last_serial)
        self.queue.append(batch)
        if is_open:  # behind it: what joins a batch that isn't queued would be lost
            self.open_batches.append(batch)
        return 0

    cdef inline _Batch _joinable(self, int kind, str name):
        """Return the open batch that an operation on ``name`` may join by rule 1, or None.

        Runs no Python code, so that the batch is still open when the operation joins it at once.
        """
        cdef _Batch batch
        cdef _Batch found = None
        cdef bint free = True
        cdef Py_ssize_t i
        for i in range(PyList_GET_SIZE(self.open_batches)):
            batch = <_Batch>PyList_GET_ITEM(self.open_batches, i)
            if batch.kind == kind:
                found = batch
                # Two removals, or two guarded writes, of one name have each its own result.
                free = not is_unshared(kind) or name not in batch.records
            elif found is not None and name in batch.records:
                free = False
        return found if free else None

    cdef inline PyObject* _add(self, int kind, str name, entry) except NULL:
        """Queue an operation; return its entry, or an earlier entry of the same name.

        Python code may run here, and issue other operations, but not between the choice of a
        batch and the moment when the entry is in it.
        """
        cdef _Batch batch = self._joinable(kind, name)
        cdef PyObject* found
        cdef Py_ssize_t before
        cdef dict records
        if batch is None:
            records = {}
            PyDict_SetItem(records, name, entry)
            batch = self._new_batch(kind, records)
            self.notify_pending()
            self._enqueue(batch, True)
            found = <PyObject*>entry
        else:
            before = PyDict_Size(batch.records)
            found = PyDict_SetDefault(batch.records, name, entry)
            if PyDict_Size(batch.records) == before:
                return found
        self.queued += 1
        self.operations += 1
        return found

    cdef int _add_command(self, int kind, str name, bytes text, waiter) except -1:
        self._add(kind, name, _Command.__new__(_Command, text, waiter))
        self.pending_bytes += PyBytes_GET_SIZE(text)
        return 0

    cdef inline int check_capacity(self, Py_ssize_t size) except -1:
        """Raise Overloaded if an operation that writes ``size`` bytes finds the pipeline full.

        In another thread than that of a bound pipeline, it raises the error of ``wake``.
        """
        if self._thread and self._thread != dscache_thread():
            self._change_thread()
        if self._refuse_when_full:
            self._refuse_if_full(size)
        return 0

    # Apart, so that the compiler writes the usual case of ``check_capacity`` into its callers.

    cdef int _change_thread(self) except -1:
        self._wake()
        self._thread = dscache_thread()  # the event loop runs there now
        return 0

    cdef int _refuse_if_full(self, Py_ssize_t size) except -1:
        if (
            self.operations >= self._max_pending
            # One write that is larger than the limit may go alone.
            or (size and self.pending_bytes and self.pending_bytes + size > self._max_pending_bytes)
        ):
            self._overloads += 1
            raise failures.overloaded(self.address, self.operations, self.pending_bytes)
        return 0

    cdef object _put(self, str name, version, data, ttl, if_newer, if_version):
        cdef _Write write = make_write(self.ttl, name, version, data, ttl, if_newer, if_version)
        self.check_capacity(PyBytes_GET_SIZE(write.text))
        cdef object waiter = self._create_waiter()
        cdef int kind = _kind_of(write.ttl, write.guard is not UNGUARDED)
        cdef list waiters = None
        cdef _Batch batch
        cdef _Write earlier
        write.waiter = waiter
        while True:
            earlier = <_Write>self._add(kind, name, write)
            if earlier is write:
                break
            if type(earlier.waiter) is list:
                (<list>earlier.waiter).append(waiter)
                waiters = <list>earlier.waiter
            elif waiters is None:
                waiters = [None, waiter]  # which may run Python code: look again
                continue
            else:
                waiters[0] = earlier.waiter
            write.waiter = waiters
            batch = self._joinable(kind, name)
            PyDict_SetItem(batch.records, name, write)
            self.pending_bytes -= PyBytes_GET_SIZE(earlier.text)
            break
        self._calls += 1
        self.pending_bytes += PyBytes_GET_SIZE(write.text)
        self._begin_early()
        return waiter

    cdef object _remove_if(self, str name, if_version):
        cdef _Write removal = make_removal(name, if_version)
        self.check_capacity(0)
        cdef object waiter = self._create_waiter()
        removal.waiter = waiter
        self._add(DELETE_IF, name, removal)
        self._calls += 1
        self._begin_early()
        return waiter

    cdef object _join(self, int kind, str name, waiter=None):
        self.check_capacity(0)
        cdef list waiters = None
        cdef _Batch batch
        cdef object entry
        if waiter is None:
            waiter = self._create_waiter()
        while True:
            entry = <object>self._add(kind, name, waiter)
            if entry is waiter:
                break
            if type(entry) is list:
                (<list>entry).append(waiter)
            elif waiters is None:
                waiters = [None, waiter]  # which may run Python code: look again
                continue
            else:
                waiters[0] = entry
                batch = self._joinable(kind, name)
                PyDict_SetItem(batch.records, name, waiters)
            break
        self._calls += 1
        self._begin_early()
        return waiter

    cdef inline int _begin_early(self) except -1:
        """Call ``begin`` if the server is idle and enough operations wait for it."""
        if self.queued >= EARLY_RECORDS and not self.in_flight:
            self._let_begin()
        return 0

    cdef int _let_begin(self) except -1:
        if not self.busy and self._begin is not None:
            self._begin()
        return 0

    cdef object _add_bulk(self, int kind, dict records, Py_ssize_t size=0, waiter=None):
        self.check_capacity(size)
        if waiter is None:
            waiter = self._create_waiter()
        cdef _Bulk bulk = _new_bulk(kind, records, waiter, False)
        if records:
            self.add_part(bulk, kind, records, size)
        else:
            self.notify_pending()
            self._calls += 1
            waiter.set_result(bulk.result)
        return waiter

    cdef int add_part(self, _Bulk bulk, int kind, dict records, Py_ssize_t size) except -1:
        """Queue the records of a bulk that this node serves."""
        cdef _Batch batch = self._new_batch(kind, records)
        batch.bulk = bulk
        batch.counted = True
        self.notify_pending()
        self._enqueue(batch, False)
        self._calls += 1
        self.queued += PyDict_Size(records)
        self.operations += 1
        self.pending_bytes += size
        return 0

    # -- replies

    cdef int _parse(self) except -1:
        cdef object reply
        self._now = 0.0
        self.busy = True
        try:
            while True:
                reply = self._next_reply()
                if reply is _INCOMPLETE:
                    break
                self.partial = 0
                if type(reply) is _PUSH:
                    take_push(self, reply)
                elif self.resp2_pubsub and e.is_plain_message(reply):
                    take_message(self, reply)
                else:
                    answer(self, reply)
            if self.returned:
                recovery.requeue_returned(self)
        finally:
            self.busy = False
        return 0

    cdef object _next_reply(self):
        cdef _Batch batch = None
        cdef Py_ssize_t count = 0
        cdef tuple slot
        # A message comes where a reply is due if it is ``resp2_pubsub``, and two replies of an
        # ``asking``.
        if self.slots and not self.resp2_pubsub and not self.severed:
            slot = self.slots[0]
            batch = slot[0]
            count = slot[1]
            if batch.asking:
                batch = None
        return self._replies.next(batch, count, self.address)

    cdef int _check_partial(self) except -1:
        if self.partial > self._max_reply_bytes:
            raise ProtocolError(
                f"{self.address} sent more than {self._max_reply_bytes} bytes (maxReplyBytes) "
                "without the end of a reply"
            )
        return 0

    # -- counting

    cpdef int slot_of(self, int kind, str name) except -2:
        """Return the slot of an operation's target, by its kind: a record, or one key."""
        return self._encoder.slot_of(kind, name)

    cpdef int recount(self) except -1:
        """Count pending records and operations anew, after batches were dropped."""
        # By index, which makes no object: nothing can fail here, and no Python code runs.
        cdef long long number = dscache_increment(last_count)
        cdef _Batch batch
        cdef tuple slot
        cdef Py_ssize_t i
        self.in_flight = self.queued = self.operations = self.pending_bytes = 0
        for i in range(len(self.slots)):
            slot = self.slots[i]
            self.in_flight += slot[1]
            self._count(slot[0], number)
        for i in range(len(self.queue)):
            batch = self.queue[i]
            self.queued += batch.waiting()
            self._count(batch, number)
        for i in range(PyList_GET_SIZE(self.suspects)):
            batch = self.suspects[i]
            if batch.count != number:
                self.queued += batch.waiting()
                self._count(batch, number)
        return 0

    cdef int _count(self, _Batch batch, long long number) except -1:
        cdef Py_ssize_t last
        if batch.count == number:
            return 0
        batch.count = number
        if batch.bulk is None:
            # An abandoned record that was not sent never will be.
            last = batch.sent if batch.abandoned() else PyDict_Size(batch.records)
            self.operations += last - batch.answered
        else:
            batch.counted = not batch.abandoned() and batch.answered < PyDict_Size(batch.records)
            self.operations += batch.counted
        self.pending_bytes += batch.text_size()
        return 0


include "core/pushes.pxi"
include "core/replies.pxi"
include "core/router.pxi"
include "core/near_cache.pxi"
include "core/shared_near.pxi"
include "core/host_segment.pxi"
include "core/host_near.pxi"
include "core/message.pxi"
include "core/fetcher.pxi"
