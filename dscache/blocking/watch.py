"""A watch for threads: a thread of its own for every primary, which takes the reports of changes.

The threads read at once, however slow the caller is: a server keeps unread reports in its own
memory, without a limit.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from .._cache import warn_of_dropped
from .._forks import after_fork_in_child
from .._locks import ReentrantEvent
from ..config import Options
from ..config.address import join_address
from ..core import typed
from ..core.failures import remedy_of
from ..core.record import DataT
from ..errors import ConnectError, ConnectionLost, DscacheError, ReplyError, UsageError
from ..net.backoff import full_jitter
from ..net.maintenance import NewAddress
from ..net.watch import (
    CHECK_INTERVAL,
    LONGEST_PAUSE,
    PAUSE,
    Change,
    check_pushes,
    check_role,
)
from ..net.watching import WatchBase, Watching
from .connector import Connector
from .control import ControlConnection
from .memory import MemoryPool
from .pool import Pool

if TYPE_CHECKING:
    from ..core.pure import Record
    from .cluster_pool import ClusterPool

# Seconds that ``close`` waits for a thread, beside connectTimeout: one may be looking up a host.
_GRACE: Final = 1.0


@dataclass(frozen=True, slots=True)
class BlockingChange(Change[DataT]):
    """A change that a watch of a Cache reports."""

    def read(self) -> Record[DataT] | None:
        """Return the record as it is now, read from its primary, or None if it is gone.

        The call raises the errors of ``Cache.get``.
        """
        assert self._read is not None
        found: Record[DataT] | None = self._read(self.name)
        return found


class _Watching(Watching[DataT]):
    """A watch whose threads listen to the primaries, each to one."""

    _kind = BlockingChange
    _event = ReentrantEvent
    _usage = "with"
    _topology: Pool | MemoryPool
    _found: deque[BlockingChange[DataT]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._closing = ReentrantEvent()
        self._keeper: threading.Thread | None = None
        self.cluster: ClusterPool | None = None
        self.is_dropped = False
        """Whether the threads are to end, which they do within ``CHECK_INTERVAL``."""
        after_fork_in_child(self, _Watching._reset_after_fork)

    @property
    def is_closed(self) -> bool:  # type: ignore[override] # set by ``end`` alone
        return self._closing.is_set()

    # -- the block

    def begin(self) -> None:
        self._check_process()
        self._enter()
        try:
            self._begin()
        except BaseException:
            self.end(None)
            raise

    def _begin(self) -> None:
        topology = self._topology
        if isinstance(topology, MemoryPool):
            topology.when_ready()
            topology.listen(self.changes.note_changed)
            return
        options = self._of_primaries.options
        if options.nodes:
            from .cluster_pool import ClusterPool

            if options != self._options:  # reads may be of replicas
                topology = self._private = ClusterPool(self._of_primaries, self.credentials)
            assert isinstance(topology, ClusterPool)
            self.cluster = topology
        elif options.sentinels and options.role != self._options.role:
            from .sentinel_pool import SentinelPool

            topology = self._private = SentinelPool(options, self.credentials)
        self._topology = topology
        topology.when_ready()
        self._update(is_first=True)
        for listener in list(self._listening.values()):
            listener.wait_until_ready()
        if self.cluster is not None:
            self._keeper = threading.Thread(target=self._keep, name="dscache watch", daemon=True)
            self._keeper.start()

    def end(self, reason: Exception | None) -> None:
        if self._pid != os.getpid():
            return  # a forked child has neither its threads nor its sockets
        if not self._closing.is_set():
            self._end = reason
            self._closing.set()
        self._news.set()
        if isinstance(self._topology, MemoryPool):
            self._topology.forget(self.changes.note_changed)
        for listener in list(self._listening.values()):
            listener.stop()
        limit = time.monotonic() + self._options.connect_timeout / 1000 + _GRACE
        threads = [one.thread for one in list(self._listening.values())]
        for thread in [*threads, *([self._keeper] if self._keeper else [])]:
            # One without an ident was never begun, for want of memory or threads.
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(limit - time.monotonic(), 0))
        private, self._private = self._private, None
        if private is not None:
            private.close()

    # -- the iteration

    def next(self) -> BlockingChange[DataT]:
        self._check_process()
        holder = self._hold()
        try:
            found = self._found
            while True:
                if self._closing.is_set():
                    raise self._end or StopIteration
                if found:
                    return found.popleft()
                self._find()
        finally:
            del holder

    def _find(self) -> None:
        """Take events or read some names, or wait for either."""
        if names := self._look():
            self._read_names(names)
        elif names is not None:
            self._wait()

    def _wait(self) -> None:
        """Wait for news; in memory, records end only when their time is looked at."""
        limit = CHECK_INTERVAL  # an exception or a signal handler can strike the call that wakes it
        topology = self._topology
        if not isinstance(topology, MemoryPool):
            self._news.wait(limit)
            return
        rest = topology.seconds_to_expiry()
        if not self._news.wait(limit if rest is None else min(limit, rest)):
            topology.expire()

    def _read_names(self, names: list[str]) -> None:
        try:
            pause = self._settle(names, self._topology.run(self.changes.operation, names))
        except DscacheError as error:
            pause = self._settle(names, {}, error)
        self._closing.wait(pause)

    def _get(self, name: str) -> Record | None:
        found: Record | None = self._topology.run("get", name)
        if found is None or self._type is None:
            return found
        return typed.with_type(found, self._type)

    # -- the servers

    @property
    def new_address(self) -> NewAddress | None:
        """The address to which the server of the cache has moved."""
        return self._topology.new_address if isinstance(self._topology, Pool) else None

    def _keep(self) -> None:
        """Listen to the current primaries of a cluster until the watch is closed."""
        try:
            while not self._closing.wait(CHECK_INTERVAL):
                if self.was_dropped():
                    return
                assert self.cluster is not None
                self.cluster.refresh_slots()
                self._update(is_first=False)
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise

    def drop(self) -> None:
        """Tell the threads to end, from any line of any thread."""
        self.is_dropped = True
        if isinstance(self._topology, MemoryPool):
            self._topology.forget(self.changes.note_changed)

    def _end_dropped(self) -> None:
        """Close in a thread of the watch's own, without waiting for the others."""
        self._closing.set()
        for listener in list(self._listening.values()):
            listener.stop()
        private, self._private = self._private, None
        if private is not None:
            private.close()

    def was_dropped(self) -> bool:
        """Close if the program has dropped the watch; return whether it has."""
        if self.is_dropped and not self._closing.is_set():
            self._end_dropped()
        return self.is_dropped

    def fail(self, error: BaseException) -> None:
        """End the iteration with an error that nothing else reports.

        A thread may end by any exception. Under gevent, a KeyboardInterrupt strikes any greenlet.
        """
        if not isinstance(error, Exception):
            error = ConnectionLost(f"{type(error).__name__} has ended a thread of the watch")
        if not self._closing.is_set():
            self._end = error
            self._closing.set()
        self._news.set()

    def _update(self, *, is_first: bool) -> None:
        """Listen to the current primaries, and to no others."""
        options, cluster = self._of_primaries.options, self.cluster
        wanted = {options.address: options} if cluster is None else cluster.primaries()
        self._follow(wanted, is_first=is_first)

    def _listen_to(self, address: str, options: Options, *, is_first: bool) -> None:
        listener = self._listening[address] = _Listener(self, address, options, is_first)
        listener.thread.start()

    def _leave(self, listener: _Listener) -> None:
        listener.stop()

    def follow(self, address: str) -> None:
        """Have records read from the primary that reports changes, before they are read again.

        The one before may still take it for the primary, and answer with records that are lost.
        Raises ConnectError if the Sentinels name another.
        """
        if self._of_primaries.options.sentinels:
            from .sentinel_pool import SentinelPool

            assert isinstance(self._topology, SentinelPool)
            self._topology.follow(address)

    # -- forks

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise UsageError("a watch can't be used after a fork; begin one in the child")

    def _reset_after_fork(self) -> None:
        """Leave the sockets to the parent, in a forked child."""
        for listener in list(self._listening.values()):
            listener.leave()


class _Listener:
    """A thread that takes the reports of one server, and connects again when it is lost.

    A failure before the reports have begun at first is raised by ``wait_until_ready``.
    """

    def __init__(
        self, watching: _Watching[Any], address: str, options: Options, is_first: bool
    ) -> None:
        self._watching = watching
        self._address = address
        self._options = options
        self._is_first = is_first
        self._must_be_primary = bool(options.sentinels) or watching.cluster is not None
        self._connector = Connector(options, watching.credentials)
        self._decided = ReentrantEvent()
        self._error: Exception | None = None
        self._stopping = ReentrantEvent()
        self._server: ControlConnection | None = None
        self.thread = threading.Thread(
            target=self._run, name=f"dscache watches {address}", daemon=True
        )

    def wait_until_ready(self) -> None:
        """Wait until the reports have begun, or raise the error that keeps them from that."""
        self._decided.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Have the thread end soon."""
        self._stopping.set()
        server = self._server
        if server is not None:
            server.interrupt(ConnectionLost("it was closed"))

    def leave(self) -> None:
        """Close the socket in a forked child, which has no such thread."""
        server, self._server = self._server, None
        if server is not None:
            server.leave()

    def _run(self) -> None:
        try:
            self._listen()
        except BaseException as error:
            self._watching.fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._error = self._error or ConnectionLost("the watch was closed")
            self._decided.set()

    def _is_over(self) -> bool:
        # ``end`` stops the listeners that there are. The keeper may be about to add one.
        watching = self._watching
        return watching.was_dropped() or watching.is_closed or self._stopping.is_set()

    def _listen(self) -> None:
        failures = 0
        while not self._is_over():
            server = self._server = ControlConnection(
                self._options, partial(self._watching.changes.take_push, self._address)
            )
            try:
                server.connect(self._watching.credentials, self._watching.new_address)
                failures = 0
                self._follow(server)
            except DscacheError as error:
                if self._stopping.is_set():
                    return
                if self._is_first:
                    self._error = error
                    return
                self._watching.changes.lose(self._address, str(error))
                if self._watching.cluster is not None:
                    # Another node may be the primary by now; the next timer would be late.
                    self._watching.cluster.look_again()
            finally:
                server.discard()
            self._stopping.wait(full_jitter(PAUSE, LONGEST_PAUSE, failures))
            failures += 1

    def _follow(self, server: ControlConnection) -> None:
        """Take the reports of a server until it is lost, hangs, or isn't a primary any more."""
        changes = self._watching.changes
        hello, role = server.request(["HELLO"], ["ROLE"])
        check_pushes(server.pipeline.address, hello)
        self._check_role(server, role)
        (reply,) = server.request(changes.tracking)
        if isinstance(reply, ReplyError):
            context = f"CLIENT at {server.pipeline.address}{remedy_of(reply.message)}"
            raise ReplyError(reply.message, context=context)
        self._is_first = False
        self._decided.set()
        self._watching.follow(server.pipeline.address)
        changes.resume(self._address)
        while not self._is_over():
            until = time.monotonic() + CHECK_INTERVAL
            while time.monotonic() < until and not self._stopping.is_set():
                server.take(until)
            self._check_role(server, server.request(["ROLE"])[0])
            self._check_place(server.pipeline.address)

    def _check_place(self, address: str) -> None:
        """Raise ConnectError if the Sentinels name another server.

        This one may be a primary still, cut off from the others.
        """
        options = self._options
        if not options.sentinels:
            return
        try:
            named = self._connector.locate(time.monotonic() + options.connect_timeout / 1000)
        except ConnectError:
            return  # no Sentinel knows better
        if join_address(*named) != address:
            raise ConnectError(f"the Sentinels name another primary than {address}")

    def _check_role(self, server: ControlConnection, role: Any) -> None:
        self._must_be_primary = check_role(
            server.pipeline.address, role, must_be_primary=self._must_be_primary
        )


class Watch(WatchBase, Iterator[BlockingChange[DataT]]):
    """The changes of the records of a prefix, by ``with`` and ``for``; made by ``Cache.watch``.

    It listens from the beginning of the block to its end, in a thread for each primary, and keeps
    its cache from being dropped until then.
    """

    _made_with = _Watching
    _watching: _Watching[DataT]

    def __enter__(self) -> Self:
        self._watching.begin()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watch, its connections and threads; a second call does nothing.

        An iteration under way ends.
        """
        self.end(None)

    def end(self, reason: Exception | None) -> None:
        """Close; an iteration under way raises the reason, or ends if it is None."""
        self._watching.end(reason)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BlockingChange[DataT]:
        return self._watching.next()

    def __del__(self) -> None:
        watching = self.__dict__.get("_watching")
        if watching is None or not watching.is_listening or sys.is_finalizing():
            return
        watching.drop()
        self._cache = None  # the warning may be kept, and this object with it
        warn_of_dropped(self, "use with, or call its close()")
