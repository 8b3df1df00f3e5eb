"""The connections of a blocking cache, bounded in number, and lent to one thread at a time.

Theory of operation
-------------------
A thread takes a Connection from ``_idle`` and puts its operation into the connection's pipeline. It
sends and receives by itself, and puts the connection back. The deque needs no lock for this. A
thread that finds ``_idle`` empty makes a connection, and reserves a place for it among
``maxConnections``. If no place is free, it waits for a connection that another thread puts back.
The thread that has waited longest gets it.

An exception may strike a thread between any two steps: Ctrl-C, a signal handler that raises, a
greenlet that is killed. It may be of any class, also of this package. The connection is then ended
instead of being put back, since its reply is still to come, unless the thread has given it away
already. Its place isn't lost: places are not counted but held by the connections themselves, and
dead connections hold none (``_prune``).

After a fork, the child drops its parent's connections and closes their sockets without a word.
"""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakMethod, ref

from .. import _backend
from .._forks import after_fork_in_child
from .._locks import make_lock
from ..config import Options
from ..core import stats as counters
from ..core.failures import ErrorOf, closed
from ..errors import (
    ConfigError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    RecordError,
    ReplyError,
)
from ..net.backoff import pause_while_waiting
from ..net.maintenance import Announcements, NewAddress
from ..net.slot_table import NodeInfo
from .connection import LEAST_TO_CONNECT, Connection
from .connector import Connector, on_renewal
from .maintenance import Mover, follow_maintenance
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

# How often a waiting thread looks for a connection that died without being put back, in seconds.
_GLANCE: Final = 0.05
# How often ``close`` looks whether all operations have ended, in seconds.
_PATIENCE: Final = 0.005
# In what ways an attempt to connect fails; a host name may be none.
_FAILURES: Final = (OSError, ConfigError, ReplyError, ProtocolError, UnicodeError)


class Asked(str):
    """The name of an operation; ``identity`` becomes that of the server that has answered last."""

    identity: str | None = None


class _Turn:
    """A thread that waits for a connection. ``given`` gets one, or None for a place to look for.

    ``is_left``: whether the thread waits no longer.
    """

    __slots__ = ("given", "is_left")

    def __init__(self) -> None:
        self.given: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        self.is_left = False


class Pool:
    """The connections to one server; a ``provider`` gives the credentials of each."""

    def __init__(self, options: Options, provider: CredentialProvider | None = None) -> None:
        self._info = NodeInfo(options)
        self.address = options.address
        self._options = options
        self._limit = options.max_connections
        self._new_pipeline: Callable[[], Any] = partial(
            _backend.core.Pipeline,
            BlockingWaiter,
            _no_wakeup,
            address=options.address,
            **options.for_pipeline(),
        )
        self._connector = Connector(options, provider)
        self._idle: deque[Connection] = deque()
        # Connections without a place, whose operation another connection has taken over.
        self._unplaced: list[Connection] = []
        self._waiters: deque[_Turn] = deque()
        self._connections: list[ref[Connection]] = []
        # All connections whose counters aren't kept yet, with and without a place, by id.
        self._uncounted: dict[int, ref[Connection]] = {}
        # A signal handler may use the cache while its thread is in the middle of anything.
        self._lock = make_lock()
        self._closed = False
        self._closing = False
        self._overloads = 0
        self.announcements = Announcements(options)
        self._mover = Mover(self, self.announcements, self._connector.new_address)
        # Without a reference to the pool, to which its connections would refer.
        self.follow_maintenance = partial(
            follow_maintenance, self.announcements, self._mover.follow
        )
        """Has a connection follow announcements, and others take all other pushes."""
        self._on_moved: WeakMethod[Callable[[], object]] | None = None
        self.is_near = options.near_cache is not None
        on_renewal(provider, self._renew, options.address)
        after_fork_in_child(self, lambda pool: pool.reset_after_fork())

    # -- operations

    def run(self, operation: str, *arguments: Any) -> Any:
        """Do one operation of a Pipeline, by its name; return its result or raise its error."""
        idle = self._idle
        connection: Connection | None = None
        mine = True
        try:
            try:
                connection = idle.pop()
            except IndexError:
                connection = self._spare()
            try:
                outcome: BlockingWaiter = getattr(connection.pipeline, operation)(*arguments)
            except RecordError:
                # Nearly always for bad arguments. A signal handler may raise one when the
                # operation is queued already.
                connection.clear()
                mine = False
                self._put_back(connection)
                raise
            if not (outcome.done or connection.send_and_receive(outcome)):
                if not connection.admitted:
                    connection = self._admit(connection)
                self._run_until_done(connection, outcome)
            if outcome.error is not None:
                self._note_error(connection)
            if self.is_near and isinstance(operation, Asked):
                operation.identity = connection.identity
            mine = False
            if not connection.ready or connection.retired or self._waiters:
                self._put_back(connection)
            else:
                idle.append(connection)
                if connection.retired:
                    self._withdraw(connection)  # type: ignore[unreachable] # other threads set it
        except BaseException:
            if mine and connection is not None:
                self.drop(connection)
            # A traceback may be kept for long, and must not keep the connection's place.
            connection = None
            raise
        return outcome.take()

    def _run_until_done(self, connection: Connection, outcome: BlockingWaiter) -> None:
        """Go on with an operation, over as many sockets as it takes, until its deadline."""
        pipeline = connection.pipeline
        refusals = 0
        while not outcome.done:
            if self._closing:
                pipeline.fail_all(closed_meanwhile)
            elif connection.sock is not None:
                connection.stream(outcome)
            else:
                deadline = pipeline.expire(time.monotonic())
                if not outcome.done:
                    assert deadline is not None
                    if pipeline.away:
                        self._note_error(connection)
                        if refusals:  # the next one too has sent it away
                            self._pause(refusals, deadline)
                        refusals += 1
                    refusal = self._connect(connection, deadline)
                    if refusal is not None:
                        pipeline.fail_all(refusal)

    # -- places

    def _spare(self) -> Connection:
        """Return a connection without a place."""
        if self._closed:
            raise closed("cache")
        with suppress(IndexError):
            while (connection := self._unplaced.pop()).gone:
                pass
            return connection
        return self.new_connection()

    def _new_connection(self) -> Connection:
        return self._prepared(Connection(self._new_pipeline(), self._info))

    def _prepared(self, connection: Connection) -> Connection:
        connection.pipeline.reconnects = self._options.leaves_replicas
        self.follow_maintenance(connection)
        return connection

    def _admit(self, spare: Connection) -> Connection:
        """Reserve a place for a connection, or move its operation to one that has a place.

        Returns the connection that has the operation. If no place is free by its deadline, the
        operation has failed. Raises Overloaded if ``whenFull`` is error.
        """
        if not self._waiters and self._reserve(spare):
            return spare
        connection: Connection | None
        if self._options.when_full == "error":
            # Once more: another thread may have had one for a moment, but for no operation.
            try:
                connection = self._idle.pop()
            except IndexError:
                with self._lock:
                    self._overloads += 1
                raise Overloaded(
                    f"{self.address}: all {self._limit} connections are in use, which is all that "
                    "maxConnections allows; the operation was not sent"
                ) from None
        else:
            deadline = spare.expire(time.monotonic())
            connection = None if deadline is None else self._wait(spare, deadline)
        if connection is None:
            spare.fail_all(closed_meanwhile if self._closing else self._none_free)
            return spare
        if connection is not spare:
            try:
                connection.take_over(spare)
                self._put_aside(spare)
            except BaseException:
                self.drop(connection)
                raise
        return connection

    def _reserve(self, connection: Connection) -> bool:
        """Give a connection a place if one is free; return whether it has one."""
        with self._lock:
            if len(self._connections) >= self._limit:
                self._prune()
            if len(self._connections) >= self._limit:
                return False
            self._connections.append(ref(connection))
            connection.admitted = True
            return True

    def _wait(self, spare: Connection, deadline: float) -> Connection | None:
        """Wait for a connection that is put back, or for a place; return None at the deadline."""
        turn = _Turn()
        connection: Connection | None = None
        try:
            while not self._closing:
                if turn not in self._waiters:
                    # At first, and again if the thread that took the turn was struck before it
                    # gave anything.
                    self._waiters.append(turn)
                    try:
                        # One that was put back before its thread could see the turn.
                        connection = self._idle.pop()
                        return connection
                    except IndexError:
                        pass
                if self._reserve(spare):
                    return spare
                rest = deadline - time.monotonic()
                if rest <= 0:
                    return None
                try:
                    connection = turn.given.get(timeout=min(rest, _GLANCE))
                except queue.Empty:
                    continue
                if connection is not None:
                    return connection
            return None
        except BaseException:
            if connection is not None:
                self.drop(connection)
            raise
        finally:
            self._leave(turn)

    def _leave(self, turn: _Turn) -> None:
        """Stop waiting, and pass on a connection that was given meanwhile."""
        turn.is_left = True
        with suppress(ValueError):
            self._waiters.remove(turn)
        self._take_back(turn)

    def _give(self, turn: _Turn, connection: Connection | None) -> None:
        """Give a connection, or None for a place to look for, to a thread that waits."""
        turn.given.put(connection)
        # Behind that: a thread that leaves later finds it, and one that has left doesn't look.
        if turn.is_left:
            self._take_back(turn)

    def _take_back(self, turn: _Turn) -> None:
        """Pass on what a thread was given that waits no longer."""
        while True:
            try:
                given = turn.given.get_nowait()
            except queue.Empty:
                return
            if given is not None:
                self._put_back(given)
            elif (following := self._call_next()) is not None:
                self._give(following, None)

    def _call_next(self) -> _Turn | None:
        """Return the turn that has waited longest, or None."""
        try:
            return self._waiters.popleft()
        except IndexError:
            return None

    def _put_back(self, connection: Connection) -> None:
        """Give a connection to the thread that has waited longest, or make it idle."""
        mine = True
        try:
            if connection.retired or self._closing:
                self.drop(connection)
            elif not connection.admitted:
                self._put_aside(connection)
            else:
                turn = self._call_next() if self._waiters else None
                is_ready = connection.ready
                # From here on another thread may have it.
                mine = False
                if turn is not None:
                    self._give(turn, connection)  # its thread drops it if it is retired by now
                    return
                if is_ready:
                    self._idle.append(connection)
                else:
                    self._idle.appendleft(connection)
                if connection.retired:
                    self._withdraw(connection)  # type: ignore[unreachable] # other threads set it
        except BaseException:
            if mine:
                self.drop(connection)
            del connection
            raise

    def _put_aside(self, spare: Connection) -> None:
        """Keep a connection without a place for later use, or only its counters."""
        if len(self._unplaced) < self._limit:
            self._unplaced.append(spare)
        else:
            self._count(spare)

    def _withdraw(self, connection: Connection) -> None:
        """End a retired connection that is idle; if it is in use, its thread drops it.

        A thread that puts one back looks behind that whether it is retired. So the thread that has
        retired it and found it in use leaves nothing behind.
        """
        # A thread that finds none idle waits for the lock, and then finds this place free.
        with self._lock:
            try:
                self._idle.remove(connection)
            except ValueError:
                return
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """End a connection, and free its place."""
        first = not connection.gone
        connection.discard()
        if first:
            self._count(connection)
        if connection.admitted:
            with self._lock:
                self._prune()
            if (turn := self._call_next()) is not None:
                self._give(turn, None)

    def _prune(self) -> None:
        """Forget the connections that have ended."""
        self._connections = [
            held for held in self._connections if (one := held()) is not None and not one.gone
        ]

    def _present(self) -> list[Connection]:
        with self._lock:
            connections = [held() for held in self._connections]
        return [one for one in connections if one is not None and not one.gone]

    def _count(self, connection: Connection) -> None:
        """Keep the counters of a connection that ends, in one step for ``stats``."""
        with self._counting:
            if self._uncounted.pop(id(connection), None) is not None:
                self._keep_counts(connection)

    @property
    def _counting(self) -> AbstractContextManager[object]:
        """The lock of the counters that are kept."""
        return self._lock

    def _keep_counts(self, connection: Connection) -> None:
        counters.add(self._info.counts, connection.pipeline.stats(), lasting=True)

    def _to_count(self) -> list[Connection]:
        """Return the connections whose counters aren't kept, while holding ``_counting``."""
        found = []
        for key, held in list(self._uncounted.items()):
            if (connection := held()) is not None:
                found.append(connection)
            else:  # an exception has struck its thread
                del self._uncounted[key]
        return found

    def _none_free(self, operation: str) -> Exception:
        return DeadlineExceeded(
            f"{operation}: none of the {self._limit} connections to {self.address} "
            f"(maxConnections) was free within {self._options.command_timeout} ms; "
            "nothing was done"
        )

    # -- connections

    def _connect(self, connection: Connection, deadline: float) -> ErrorOf | None:
        """Try to connect until the deadline; return how operations fail at once, if they do.

        ``pipeline.down`` is then the error of the last attempt.
        """
        options = self._options
        failures = 0
        while not self._closing:
            now = time.monotonic()
            limit = min(now + options.connect_timeout / 1000, deadline)
            moved = self.new_address.get()
            try:
                server = connection.open(self._connector, limit)
            except _FAILURES as error:
                self.new_address.note_failure(moved)
                refusal = connection.note_failure(error, math.ceil((limit - now) * 1000))
                if refusal is not None and moved is None:
                    return refusal
            else:
                self._note_success(connection, server)
                return None
            pause = pause_while_waiting(options.retry_strategy, failures)
            failures += 1
            rest = deadline - time.monotonic()
            if pause + LEAST_TO_CONNECT >= rest:
                time.sleep(max(rest, 0))
                break
            time.sleep(pause)
        return closed_meanwhile if self._closing else None

    def _pause(self, failures: int, deadline: float) -> None:
        pause = pause_while_waiting(self._options.retry_strategy, failures)
        time.sleep(max(min(pause, deadline - time.monotonic()), 0))

    def _note_success(self, connection: Connection, server: str) -> None:
        with self._lock:
            self._info.record_connected(server, connection.connects > 1)
            self.address = self._info.shown = connection.pipeline.address

    def _note_error(self, connection: Connection) -> None:
        """Clear the refusal that a connection has met; behind Sentinels there is more to do."""
        connection.pipeline.away = ""

    def _renew(self) -> None:
        """Replace all connections: there are new credentials."""
        self._retire(lambda other: True)

    def _retire(self, concerns: Callable[[Connection], bool]) -> None:
        """Replace the connections that ``concerns`` selects: idle ones now, others after use."""
        for connection in (*self._present(), *self._mover.opening):
            if concerns(connection):
                connection.retired = True
                self._withdraw(connection)

    def leave_strangers(self, identity: str) -> None:
        """Replace the connections to other servers than the one with this identity."""
        self._retire(lambda other: other.identity not in (None, identity))

    # -- another address of the server

    @property
    def new_address(self) -> NewAddress:
        """The address to which the server has moved."""
        return self._connector.new_address

    def on_moved(self, moved: Callable[[], object]) -> None:
        """Have a bound method called when the server, or slots of a cluster, have moved.

        The pool keeps no reference to the method's object.
        """
        self._on_moved = WeakMethod(moved)

    def new_connection(self) -> Connection:
        """Return a connection that no operation has, and that has no place."""
        connection = self._new_connection()
        with self._counting:
            self._uncounted[id(connection)] = ref(connection)
        return connection

    def open(self, connection: Connection, until: float, address: tuple[str, int] | None) -> str:
        """Connect to the server, perhaps at another address; return its kind and version.

        None is the configured address, even if the server has moved to another one before.
        """
        options = self._options
        where = address or (options.host, options.port)
        limit = time.monotonic() + options.connect_timeout / 1000
        return connection.open(
            self._connector,
            min(limit, until),
            None if options.sentinels is not None else where,  # they name it
        )

    def move_to(self, connection: Connection, server: str) -> None:
        """Use this connection and later ones in place of all others: idle ones end now."""
        # If all places are taken, one becomes free below. Else the connection is there before the
        # others end, so that no thread finds none and makes another.
        is_placed = self._place(connection)
        self._note_success(connection, server)
        self._retire(lambda other: other is not connection)
        if not is_placed and not self._place(connection):
            self.drop(connection)
        moved = None if self._on_moved is None else self._on_moved()
        if moved is not None:
            moved()

    def _place(self, connection: Connection) -> bool:
        """Give a connection to the threads, if a place is free; return whether it is."""
        if self._closed or not self._reserve(connection):
            return False
        self._put_back(connection)
        return True

    # -- the life of the pool

    @property
    def connects(self) -> int:
        """How many connections there have been."""
        return self._info.connects

    @property
    def server(self) -> str:
        """The server's kind and version; empty until they are known."""
        return self._info.server

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection."""
        return not self._closed and any(one.sock is not None for one in self._present())

    def when_ready(self) -> None:
        """Wait until there is a connection.

        Raises ConnectError if there is none within ``connectTimeout``, and the server's error at
        once if it refuses the handshake.
        """
        timeout = self._options.connect_timeout
        deadline = time.monotonic() + timeout / 1000
        connection: Connection | None = None
        mine = True
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                spare = self._spare()
                connection = spare if self._reserve(spare) else self._wait(spare, deadline)
                if connection is not spare:
                    self._put_aside(spare)  # it has counters
            if connection is None:
                raise ConnectError(
                    f"no connection to {self.address} within {timeout} ms: all {self._limit} "
                    "(maxConnections) are in use"
                )
            problem = self._make_ready(connection, deadline)
            mine = False
            self._put_back(connection)
        except BaseException:
            if mine and connection is not None:
                self.drop(connection)
            connection = None
            raise
        if problem is not None:
            try:
                raise problem
            finally:
                # Its traceback holds this frame: break the cycle.
                del problem

    def _make_ready(self, connection: Connection, deadline: float) -> Exception | None:
        """Connect a connection that has a place; return the error if that fails."""
        if connection.is_open():
            return None
        refusal = self._connect(connection, deadline)
        if refusal is not None:
            return refusal("connect")
        if connection.sock is None:
            down = connection.pipeline.down
            problem = ConnectError(
                f"no connection to {self.address} within {self._options.connect_timeout} ms: {down}"
            )
            problem.__cause__ = down
            return problem
        return None

    def stats(self) -> dict[str, Any]:
        """Return the counters of the pipelines and of the connections.

        No counter falls: each connection counts once, whatever its threads do meanwhile.
        """
        with self._counting:
            kept = counters.merged([self._info.counts])
            connections = self._to_count()
        parts = [counters.of(one.pipeline, one.admitted) for one in connections]
        return {
            **counters.merged([kept, *parts, {"overloaded": self._overloads}]),
            "waiting": len(self._waiters),
            "connections": sum(one.sock is not None for one in self._present()),
            **self._info.connections(),
            "last_loss": self._info.last_loss,
            "maintenance": self.announcements.stats(),
        }

    def close(self) -> None:
        """Let operations finish within ``closeTimeout``, and end all connections."""
        deadline = time.monotonic() + self._options.close_timeout / 1000
        self._closed = True
        self._mover.stop()
        while self._is_in_use() and time.monotonic() < deadline:
            time.sleep(_PATIENCE)
        self._closing = True
        self._retire(lambda connection: True)
        for connection in self._present():
            connection.interrupt(ConnectionLost("the cache was closed"))

    def _is_in_use(self) -> bool:
        return bool(self._waiters) or len(self._present()) > len(self._idle)

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child, and leave the parent's connections alone."""
        connections = [held() for held in self._connections]
        self._lock = make_lock()
        self.announcements.reset_after_fork()
        self._mover.reset_after_fork()
        self._idle = deque()
        self._unplaced.clear()
        self._waiters = deque()
        self._connections = []
        self._uncounted = {}
        for connection in connections:
            if connection is not None:
                connection.leave()


def _no_wakeup() -> None:
    """Do nothing when an operation is queued: its own thread sends it."""


def closed_meanwhile(operation: str) -> Exception:
    return ConnectionLost(f"{operation}: the cache was closed before the answer came")
