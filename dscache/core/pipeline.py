"""The operations of one node on their way to Redis and back; the pure twin of ``_fast.pyx``.

Sans-IO: operations go in and RESP bytes come out, bytes go in and waiters are resolved. There
is no socket, event loop or configuration here.

Theory of operation
-------------------
**Batches and slots.** An operation joins a batch: the records of one kind (reads, writes, ...)
issued in one tick of the event loop, or one bulk operation. ``take_output`` turns waiting batches
into commands of up to 256 records each, and returns about as many records at a time, so
that the server begins with the first ones while the next are encoded. A command in flight is a
slot, and replies come in the order of the slots. A slot belongs to the pipeline: if its waiter is
cancelled or late, the reply is still parsed, and then dropped.

**Order.** Two rules keep the order of operations on one name:

1. An operation joins an open batch only if no later batch of the tick holds its name. Otherwise
   all open batches are closed and it begins a new one. A bulk closes them all.
2. Nothing joins a batch after ``take_output``: a read already sent may be older than a write
   that was answered before the new read was issued.

**Early output.** When the server is idle, the pipeline calls ``begin`` before a long tick ends,
and the owner of the socket then calls ``take_output`` for the operations issued so far.

**Heads.** A head costs two commands, ``GET`` of the version and ``TYPE`` of the data's key. Their
cost doesn't grow with the data, and is a third of the server time of a script per record. The two
commands share a slot.

**Repeats.** Redis may refuse a command because it lost the script, or because of one of its
records. Such a command is sent again and keeps its place: the queue is ordered by the serial
numbers of the batches. But Redis does the commands sent behind it before the repeat:

* A read of a name that the repeat writes is sent again behind the repeat.
* A write that a later write of its name has overtaken isn't repeated, because it would undo the
  later one. Its waiters are attached to the later write (``SupersededWrite``). If the later
  outcome doesn't determine theirs, they get the refusal.
* A read that a later write has overtaken gets the refusal, because the value is gone.

**Clusters.** Each node has its pipeline, and the ``Router`` chooses it by slot. Records of one
hash slot share a command. A command that the node redirects leaves the pipeline through
``redirected``, for the code that knows the nodes. ``take_queued`` removes waiting operations that
belong to another node, and ``requeue`` adds them to that node's pipeline in the order in which
they were issued. ``fence`` returns the value that ``settled`` reaches once everything in flight
is answered, so that nothing newer overtakes it on another node.

**Failures.** Timeouts and lost connections are handled in ``recovery.py``, refusals and
redirections in ``refusals.py``, the same modules for both cores.

**Suspects.** If the server cuts the connection at one operation, each repeat costs all others a
connection. An operation that was under way at two losses is therefore a suspect. It waits outside
the queue, in ``suspects``. Its turn comes when nothing else waits or is in flight, when half of its
time is left, or when an operation that must not overtake it is next. Nothing else is then sent
until it is answered. If the connection is cut once more, it fails. While there are suspects, the
window is 0. All output then goes through ``_take_restricted``, and the usual way needs no test.

**Lost scripts.** Redis refuses every write by script until it has the script again, which the
first repeat brings. The refusals of the other writes under way must come before that: a write
issued later would otherwise be done before their repeats. So the pipeline sends nothing until they
have come (``script_fence``). If another client has loaded the script meanwhile, Redis does a later
write under way. A write of its name that waits for its repeat is then overtaken
(``settle_doubts``).

**Re-entrancy.** A finalizer, a waiter, ``wake`` or ``create_waiter`` may issue operations in the
middle of any method. A batch is therefore queued with its first record already in it. While the
queue or the slots change, ``busy`` is set, so that such operations are queued but don't call
``begin``; code that replaces the queue keeps operations that arrived meanwhile.

**Exceptions.** Any line may raise, such as a MemoryError or a KeyboardInterrupt. An operation
stays in the queue, in a slot or in ``redirected`` until it has its outcome. If ``take_output`` or
``feed`` raises, the pipeline is ``severed``: commands may have no bytes or replies no reader, so
it accepts no further reply, and the connection must end. ``connection_lost`` and ``fail_all`` may
then be called until they succeed, and ``connection_lost`` makes the pipeline usable again.

Waiters are settled by ``resolve`` or ``reject``, and the waiter of a bulk by ``Bulk.settle``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any, Final

import hiredis

from ..errors import ProtocolError, ReplyError
from . import constants as c
from . import envelope as e
from . import failures, recovery, refusals, replies, tracking
from .batch import Batch, Bulk, Command, serials
from .condition import (
    ANY,
    IfVersion,
    IfVersions,
    IfVersionsHeld,
)
from .entries import kind_of, make_removal, make_removals, make_write, make_writes, new_bulk, unique
from .keys import slot_of_key
from .markers import Ttl
from .message import MessageDispatcher, pack_message
from .near_cache import Epoch, NearCache, Reachability
from .pushes import take_message, take_push
from .reader import LengthGuard
from .record import check_name
from .resp import Encoder, pack_command
from .stats import Latencies, stats_of
from .suspects import is_restricted, restricted_window
from .waiters import with_waiter

# hiredis's stub gives it a narrower type than it has.
_Reader: Any = hiredis.Reader
_NO_RESP = (hiredis.HiredisError, *failures.NO_RESP)

# The kinds of which records of one slot share a command, and those that have one for each.
_GROUPED: Final = (c.GET, c.SET, c.SET_TTL, c.SET_IF_NEWER, c.DELETE_IF)
_ONE_BY_ONE: Final = (c.HEAD, c.DELETE, c.READ_KEY, c.WRITE_KEY, c.PUBLISH)
_UNSHARED: Final = (c.SET_IF_NEWER, c.DELETE_IF, c.DELETE, c.READ_KEY, c.WRITE_KEY)


class Pipeline:
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

    def __init__(
        self,
        create_waiter: Callable[[], Any],
        wake: Callable[[], object],
        *,
        begin: Callable[[], object] | None = None,
        address: str = "",
        key_prefix: str = "",
        hash_tag: bool = False,
        ttl: int = 0,
        timeout: float = 1.0,
        max_pending: int = c.MAX_PENDING,
        max_pending_bytes: int = c.MAX_PENDING_BYTES,
        refuse_when_full: bool = False,
        max_reply_bytes: int = c.MAX_REPLY_BYTES,
        clustered: bool = False,
        max_redirections: int = c.MAX_REDIRECTIONS,
        bound: bool = False,
    ) -> None:
        self.address = address
        self._thread = get_ident() if bound else 0
        self.down: Exception | None = None
        self.has_msetex = False
        self.away = ""
        self.doubts: list[Any] = []
        self.reconnects = True
        self.single_writes = False
        self.single_reads = False
        self.whole_scripts = False
        self.near: NearCache | None = None
        self.on_push: Callable[[list[Any]], object] | None = None
        self.inbox: MessageDispatcher | None = None
        self.resp2_pubsub = False
        self._messages = 0
        self.redirected: list[tuple[str, int, Batch]] = []
        self.settled = 0
        self.operations = 0
        self.pending_bytes = 0
        self.in_flight = 0
        self.queued = 0
        self._create_waiter = create_waiter
        self._wake = wake
        self._begin = begin
        self._encoder = Encoder(key_prefix, hash_tag)
        self.ttl = ttl
        self.timeout = timeout
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._refuse_when_full = refuse_when_full
        self._max_reply_bytes = max_reply_bytes
        self.clustered = clustered
        self.max_redirections = max_redirections
        self.window = max(1, min(c.WINDOW_RECORDS, max_pending))
        self.open_window = self.window  # 0 while output is restricted
        self.script_fence = 0  # no output until ``settled`` reaches it
        self._awake = False
        self.busy = False  # the queue or the slots are being changed: only new operations may come
        self.open_batches: list[Batch] = []
        self.queue: deque[Batch] = deque()
        self.suspects: list[Batch] = []
        self.slots: deque[tuple[Batch, int]] = deque()
        self.returned: list[Batch] = []
        self.answering: Batch | None = None  # an exception may strike its bulk
        self._buffer = memoryview(b"")
        self.counts = dict.fromkeys(
            ("reads", "hits", "misses", "halves", "damaged", "writes", "not_newer", "deletes"), 0
        )
        self.failed = 0
        self._calls = 0
        self._overloads = 0
        self._batches = 0
        self._sent = 0
        self._commands = 0
        self._flushes = 0
        self._bytes_out = 0
        self._bytes_in = 0
        self.latencies = Latencies()
        self.arrived = 0.0  # time of arrival of the replies at hand, 0.0 until it is needed
        self.reach = Reachability()
        self.epoch: Epoch | None = None
        self.reset_reader()

    # -- operations on one record

    def get(self, name: str) -> Any:
        """Queue a read; its waiter gets the Record, or None."""
        if type(name) is not str or not name or not name.isascii():
            name = check_name(name)
        return self._join(c.GET, name)

    def head(self, name: str) -> Any:
        """Queue a read of the version; its waiter gets the int, or None."""
        return self._join(c.HEAD, check_name(name))

    def set(
        self,
        name: str,
        version: int,
        data: Any,
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersion = ANY,
    ) -> Any:
        """Queue a write; its waiter gets True, or False if its condition doesn't hold."""
        name = check_name(name)
        write = make_write(self.ttl, name, version, data, ttl, if_newer, if_version)
        self.check_capacity(len(write.text))
        waiter = write.waiter = self._create_waiter()
        kind = kind_of(write.ttl, write.guard != c.UNGUARDED)
        try:
            while (earlier := self._add(kind, name, write)) is not write:
                write.waiter = with_waiter(earlier.waiter, waiter)
                if self._replace(kind, name, earlier, write):
                    self.pending_bytes -= len(earlier.text)
                    break
            self.pending_bytes += len(write.text)
        except BaseException:
            self._count_struck()
            raise
        self._calls += 1
        self._begin_early()
        return waiter

    def delete(self, name: str, if_version: IfVersion = ANY) -> Any:
        """Queue a removal; its waiter gets whether there was such a record, of that version."""
        name = check_name(name)
        if if_version is ANY:
            return self._join(c.DELETE, name)
        removal = make_removal(name, if_version)
        self.check_capacity(0)
        waiter = removal.waiter = self._create_waiter()
        try:
            self._add(c.DELETE_IF, name, removal)
        except BaseException:
            self._count_struck()
            raise
        self._calls += 1
        self._begin_early()
        return waiter

    # -- bulk operations

    def get_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of many records; its waiter gets a dict of the records found."""
        return self._add_bulk(c.GET, unique("get_bulk", names))

    def head_bulk(self, names: Iterable[str]) -> Any:
        """Queue a read of many versions; its waiter gets a dict of the versions found."""
        return self._add_bulk(c.HEAD, unique("head_bulk", names))

    def set_bulk(
        self,
        records: Mapping[str, tuple[int, Any]],
        ttl: Ttl = None,
        if_newer: bool = False,
        if_version: IfVersions = ANY,
    ) -> Any:
        """Queue a write of many records; its waiter gets the set of names not written."""
        writes, write_ttl, size = make_writes(self.ttl, records, ttl, if_newer, if_version)
        return self._add_bulk(kind_of(write_ttl, if_newer or if_version is not ANY), writes, size)

    def delete_bulk(self, names: Iterable[str], if_version: IfVersionsHeld = ANY) -> Any:
        """Queue a removal of many records; its waiter gets how many were removed."""
        records = unique("delete_bulk", names)
        if if_version is ANY:
            return self._add_bulk(c.DELETE, records)
        return self._add_bulk(c.DELETE_IF, make_removals(records, if_version))

    # -- reads for the near cache

    def read(self, name: str, waiter: Any, kind: int = c.GET) -> None:
        """Queue a GET or HEAD, of which ``waiter`` gets the Record or the version, or None."""
        self._join(kind, name, waiter)

    def read_bulk(self, kind: int, names: Iterable[str], waiter: Any) -> None:
        """Queue a GET or HEAD of many records; ``waiter`` gets a dict of the records found."""
        self._add_bulk(kind, dict.fromkeys(names), 0, waiter)

    # -- any other command

    def command(self, *parts: bytes | str | int) -> tuple[bytes, Any]:
        """Return the bytes of a command to be sent at once, and the waiter for its reply."""
        text = pack_command(parts)
        waiter = self._create_waiter()
        # No deadline of its own: what bounds a handshake is connectTimeout.
        batch = Batch(c.COMMAND, math.inf, 0, {str(parts[0]): waiter})
        batch.freeze()
        batch.sent = 1
        # Nothing can fail behind this: a slot whose bytes are lost would take another's reply.
        self.slots.append((batch, 1))
        self.in_flight += 1
        self.operations += 1
        if self.epoch is not None:
            self.epoch.asked(self.fence())
        return text, waiter

    def key_command(self, kind: int, key: str, waiter: Any, *parts: bytes | str | int) -> None:
        """Queue a command of one key, READ_KEY or WRITE_KEY, whose bare reply ``waiter`` gets."""
        self._add_command(kind, key, pack_command(parts), waiter)

    # -- messages

    def publish(self, topic: int | None, opening: bytes, message: Any, sharded: bool) -> Any:
        """Queue a message; its waiter gets how many connections Redis gave it to.

        ``opening`` is the envelope up to the message, which tells the topic if it is None.
        """
        topic = e.topic_of(message) if topic is None else e.check_topic(topic)
        text = pack_message(topic, opening, message, sharded)
        self.check_capacity(len(text))
        # Each with a name of its own, as they are many to a topic.
        self._messages += 1
        name = f"{{{topic}}}{self._messages}"
        waiter = self._create_waiter()
        self._add_command(c.PUBLISH, name, text, waiter)
        return waiter

    # -- what changes nodes

    def fence(self) -> int:
        """Return the value of ``settled`` once everything in flight now is answered."""
        return self.settled + len(self.slots)

    take_queued = recovery.take_queued

    def requeue(self, batches: Iterable[Batch]) -> None:
        """Queue batches that another pipeline gave away, each in the place of its age.

        Batches that wait here already, were sent or have their outcome are skipped, so that a
        caller that was interrupted may pass the same batches again.
        """
        self.notify_pending()
        recovery.requeue(self, batches)

    # -- output

    def end_tick(self) -> None:
        """Close the open batches, for a tick that can't be sent."""
        self.open_batches.clear()
        self._awake = False

    def take_output(self) -> bytes:
        """Return the RESP bytes of about 256 waiting records, which then count as sent.

        Further records wait for the next call, or until the window has room for them. If it
        raises, or the bytes can't be sent, the connection must end.
        """
        self.busy = True
        try:
            return self._take()
        except BaseException:
            # There may be slots without bytes, which would take the replies to other commands.
            self.severed = True
            raise
        finally:
            self.busy = False

    def _take(self) -> bytes:
        self.end_tick()
        queue = self.queue
        if queue and queue[0].deadline <= (now := time.monotonic()):
            # The owner was too busy to call ``expire``. A late operation must not be sent anyway.
            recovery.drop_late(self, now)
            self.recount()
        out: list[bytes] = []
        size = taken = 0
        while (
            queue
            and self.in_flight < self.open_window
            and taken < c.FLUSH_RECORDS
            and size < c.COMMAND_BYTES
        ):
            batch = queue[0]
            if batch.abandoned() or not batch.records:
                self.queued -= batch.waiting()
                queue.popleft()
                continue
            self.open_batches.clear()  # the batch may be one that a finalizer has just begun
            batch.freeze()
            if self.clustered and not batch.hash_slots and batch.kind in _GROUPED:
                batch.group(self._encoder.slot)
            if self.single_writes and c.SET <= batch.kind <= c.DELETE_IF:
                refusals.prepare_single_writes(self, batch)
                if not batch.waiting():
                    queue.popleft()
                    continue
            elif self.single_reads and batch.kind == c.GET:
                batch.one_per_command = True
            if self.whole_scripts:
                batch.whole_script = True
            text, count = self._encoder.encode(batch, self.has_msetex)
            if batch.kind in _ONE_BY_ONE:
                self.slots.extend([(batch, 1)] * count)
                self._commands += 2 * count if batch.kind == c.HEAD else count
            else:
                self.slots.append((batch, count))
                self._commands += 1
            out.append(text)
            size += len(text)
            taken += count
            self._batches += not batch.sent
            self._sent += count
            batch.sent += count
            self.queued -= count
            self.in_flight += count
            if not batch.waiting():
                queue.popleft()
        if out:
            self._flushes += 1
            self._bytes_out += size
            if self.epoch is not None:
                self.epoch.asked(self.fence())
        elif not self.open_window:
            return self._take_restricted()
        return b"".join(out)

    def _take_restricted(self) -> bytes:
        """Return output while there are suspects: one of them alone, or other operations.

        Returns nothing while output waits for the refusals of a lost script.
        """
        output = b""
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

    def get_buffer(self, size_hint: int) -> memoryview:
        """Return the buffer for received bytes, as ``asyncio.BufferedProtocol`` requires."""
        if not self._buffer:  # there are pipelines that never read
            self._buffer = memoryview(bytearray(c.READ_BUFFER_BYTES))
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        """Read the first ``size`` bytes of the buffer, and settle the operations they answer.

        Raises ProtocolError for bytes that Redis would not send. After any exception the
        connection must end: no later reply is given to an operation.
        """
        if size > len(self._buffer):
            raise ValueError("there is no such part of the buffer")
        try:
            self.feed(bytes(self._buffer[:size]))
        except BaseException:
            self.severed = True
            raise

    def feed(self, data: bytes) -> None:
        """Read received bytes, and settle the operations they answer.

        Raises ProtocolError for bytes that Redis would not send.
        """
        try:
            self._bytes_in += len(data)
            self.partial += len(data)
            self._guard.inspect(data, self.address)
            # The last reply that begins here may be incomplete, and is read on its own: the guard
            # then knows that the replies before it end with the first part.
            last = data.rfind(b"\n*", 1) + 1 if len(data) > c.HEADER_BYTES else 0
            self._reader.feed(data, 0, last or len(data))
            self._parse(data[last:] if last else b"")
        except BaseException:
            self.severed = True
            raise

    def reset_reader(self) -> None:
        """Drop a partial reply: the next bytes come from a new connection."""
        self.version_reply: Any = replies.INCOMPLETE
        self.asked = False  # the reply to an ASKING was read, and what was asked comes next
        self.severed = False  # replies are still to come that belong to no operation
        self.partial = 0
        self._guard = LengthGuard(self._max_reply_bytes)
        self._reader = _Reader(notEnoughData=replies.INCOMPLETE, replyError=ReplyError)

    # -- what the near cache may believe

    connected = tracking.connected
    disconnected = tracking.disconnected
    unknown = tracking.unknown
    forget = tracking.forget

    def new_epoch(self) -> Epoch:
        """Return an epoch that begins now."""
        return Epoch(self.reach)

    # -- time and failure

    expire = recovery.expire
    connection_lost = recovery.connection_lost
    fail_all = recovery.fail_all

    def drop_slots(self) -> None:
        """Drop the slots and returned batches, once each operation is settled or queued."""
        self.settled += len(self.slots)
        self.slots.clear()
        self.returned.clear()

    def stats(self) -> dict[str, Any]:
        """Return the counters: records by kind and outcome, traffic, and pending operations."""
        counts = (
            *(self._calls, *self.counts.values(), self._overloads),
            *(self._batches, self._sent, self._commands, self._flushes),
            *(self._bytes_out, self._bytes_in),
        )
        return stats_of(self, counts, self.latencies.stats())

    # -- building batches

    def _new_batch(self, kind: int, records: dict[str, Any]) -> Batch:
        return Batch(kind, time.monotonic() + self.timeout, 0, records)

    def notify_pending(self) -> None:
        """Call ``wake`` before the first operation of a tick is queued; raises its error."""
        if not self._awake:
            self._wake()
            self._awake = True

    def _enqueue(self, batch: Batch, is_open: bool) -> None:
        """Queue a complete batch. Later operations may join it if it ``is_open``.

        The caller has called ``notify_pending``.
        """
        if not is_open or any(other.kind == batch.kind for other in self.open_batches):
            self.open_batches.clear()
        batch.serial = next(serials)
        self.queue.append(batch)
        if is_open:  # behind it: what joins a batch that isn't queued would be lost
            self.open_batches.append(batch)

    def _joinable(self, kind: int, name: str) -> Batch | None:
        """Return the open batch that an operation on ``name`` may join by rule 1, or None."""
        found: Batch | None = None
        free = True
        for batch in self.open_batches:
            if batch.kind == kind:
                found = batch
                # Two removals, or two guarded writes, of one name have each its own result.
                free = kind not in _UNSHARED or name not in batch.records
            elif found is not None and name in batch.records:
                free = False
        return found if free else None

    def _add(self, kind: int, name: str, entry: Any) -> Any:
        """Queue an operation; return its entry, or an earlier entry of the same name.

        Python's garbage collection, ``wake`` and ``create_waiter`` may issue other operations: a
        batch is queued with its first record in it, as an empty one would be dropped.
        """
        batch = self._joinable(kind, name)
        if batch is None:
            batch = self._new_batch(kind, {name: entry})
            self.notify_pending()
            self._enqueue(batch, True)
        elif (earlier := batch.records.setdefault(name, entry)) is not entry:
            return earlier
        self.queued += 1
        self.operations += 1
        return entry

    def _replace(self, kind: int, name: str, earlier: Any, entry: Any) -> bool:
        """Put ``entry`` in the place of an earlier one, unless that was sent meanwhile."""
        batch = self._joinable(kind, name)
        if batch is None or batch.records.get(name) is not earlier:
            return False
        batch.records[name] = entry
        return True

    def _add_command(self, kind: int, name: str, text: bytes, waiter: Any) -> None:
        try:
            self._add(kind, name, Command(text, waiter))
            self.pending_bytes += len(text)
        except BaseException:
            self._count_struck()
            raise

    def check_capacity(self, size: int) -> None:
        """Raise Overloaded if an operation that writes ``size`` bytes finds the pipeline full.

        In another thread than that of a bound pipeline, it raises the error of ``wake``.
        """
        if self._thread and self._thread != get_ident():
            self._wake()
            self._thread = get_ident()  # the event loop runs there now
        if self._refuse_when_full and (
            self.operations >= self._max_pending
            # One write that is larger than the limit may go alone.
            or (size and self.pending_bytes and self.pending_bytes + size > self._max_pending_bytes)
        ):
            self._overloads += 1
            raise failures.overloaded(self.address, self.operations, self.pending_bytes)

    def _join(self, kind: int, name: str, waiter: Any = None) -> Any:
        if self._refuse_when_full or self._thread != get_ident():
            self.check_capacity(0)
        if waiter is None:
            waiter = self._create_waiter()
        batches = self.open_batches
        try:
            # As _add does in most cases, for a tenth of the time of a read.
            if (
                batches
                and kind < c.SET
                and (batch := batches[-1]).kind == kind
                and batch.records.setdefault(name, waiter) is waiter
            ):
                self.queued += 1
                self.operations += 1
            else:
                while (earlier := self._add(kind, name, waiter)) is not waiter:
                    if self._replace(kind, name, earlier, with_waiter(earlier, waiter)):
                        break
        except BaseException:
            self._count_struck()
            raise
        self._calls += 1
        if self.queued >= c.EARLY_RECORDS:
            self._begin_early()
        return waiter

    def _count_struck(self) -> None:
        """Count anew after an exception, which may have come between a record and its count.

        While replies are read, records to be sent again are counted and not queued yet.
        """
        if not self.busy:
            self.recount()

    def _begin_early(self) -> None:
        """Call ``begin`` if the server is idle and enough operations wait for it."""
        idle = not self.in_flight and not self.busy
        if self.queued >= c.EARLY_RECORDS and idle and self._begin is not None:
            self._begin()

    def _add_bulk(
        self, kind: int, records: dict[str, Any], size: int = 0, waiter: Any = None
    ) -> Any:
        self.check_capacity(size)
        if waiter is None:
            waiter = self._create_waiter()
        if records:
            self.add_part(new_bulk(kind, records, waiter), kind, records, size)
        else:
            self.notify_pending()
            self._calls += 1
            waiter.set_result(new_bulk(kind, records, waiter).result)
        return waiter

    def add_part(self, bulk: Bulk, kind: int, records: dict[str, Any], size: int) -> None:
        """Queue the records of a bulk that this node serves."""
        batch = self._new_batch(kind, records)
        batch.bulk = bulk
        batch.counted = True
        self.notify_pending()
        try:
            self._enqueue(batch, False)
            self.queued += len(records)
            self.operations += 1
            self.pending_bytes += size
        except BaseException:
            self._count_struck()
            raise
        self._calls += 1

    # -- replies

    def _parse(self, rest: bytes) -> None:
        """Settle the operations that the reader's bytes, and ``rest`` behind them, answer."""
        reader = self._reader
        gets, has_data = reader.gets, reader.has_data
        self.arrived = 0.0
        self.busy = True
        try:
            while True:
                try:
                    reply = gets()
                except _NO_RESP as error:
                    failures.raise_invalid_resp(self.address, error)
                if reply is replies.INCOMPLETE:
                    if not rest:
                        break
                    reader.feed(rest)
                    rest = b""
                    continue
                self.partial = 0
                if not has_data():
                    self._guard.restart()
                    if rest:
                        self._guard.inspect(rest, self.address)
                if type(reply) is hiredis.PushNotification:
                    take_push(self, reply)
                elif self.resp2_pubsub and e.is_plain_message(reply):
                    take_message(self, reply)
                else:
                    replies.answer(self, reply)
            if self.partial > self._max_reply_bytes:
                raise ProtocolError(
                    f"{self.address} sent more than {self._max_reply_bytes} bytes (maxReplyBytes) "
                    "without the end of a reply"
                )
            if self.returned:
                recovery.requeue_returned(self)
        finally:
            self.busy = False

    # -- counting

    def slot_of(self, kind: int, name: str) -> int:
        """Return the slot of an operation's target, by its kind: a record, or one key."""
        return slot_of_key(name.encode()) if kind >= c.READ_KEY else self._encoder.slot(name)

    def recount(self) -> None:
        """Count pending records and operations anew, after batches were dropped."""
        slots, queue = self.slots.copy(), self.queue.copy()
        pending = dict.fromkeys(batch for batch, _count in slots)
        pending.update(dict.fromkeys(queue))
        pending.update(dict.fromkeys(self.suspects))
        operations = pending_bytes = 0
        for batch in pending:
            if batch.bulk is None:
                # An abandoned record that was not sent never will be.
                last = batch.sent if batch.abandoned() else len(batch.records)
                operations += last - batch.answered
            else:
                batch.counted = not batch.abandoned() and batch.answered < len(batch.records)
                operations += batch.counted
            pending_bytes += batch.text_size()
        self.in_flight = sum(count for _batch, count in slots)
        waiting = dict.fromkeys((*queue, *self.suspects))
        self.queued = sum(batch.waiting() for batch in waiting)
        self.operations = operations
        self.pending_bytes = pending_bytes
