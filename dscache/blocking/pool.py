"""The connections of a blocking cache, bounded in number, and lent to one thread at a time.

Theory of operation
-------------------
A thread takes a Line from ``_idle``, puts its operation into the line's pipeline, does the whole
exchange itself and puts the line back: two steps of a deque, which need no lock. Only who finds
none there goes the longer way: it makes a line and asks for a place among ``maxConnections``, or
waits for one that another thread puts back, first come, first served.

An exception may strike a thread between any two steps: Ctrl-C, a signal handler that raises, a
greenlet that is killed. It may be of any class, also of this package's. A line is then never put
back but ended, since its reply is still to come; but not by a thread that has given it away.
Nor is its place lost, though nobody may be left who could give it back: places are not counted
but held by the lines themselves, and those that are no more hold none (``_prune``).

After a fork, the child forgets its parent's lines and closes their sockets without a word.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from .. import _backend
from .._forks import after_fork_in_child
from ..config import Options
from ..core import stats as counters
from ..core.constants import ErrorOf
from ..errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    RecordError,
    ReplyError,
)
from ..net.backoff import MAX_PAUSE_WHILE_WAITING, full_jitter
from ..net.connect_errors import as_connect_error, permanent_failure
from .connection import Connection
from .connector import Connector
from .credentials import on_renewal
from .foreign_errors import raise_foreign
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")

# An attempt with less time than this would only hide why the others failed; in seconds, as all
# below.
_LEAST: Final = 0.005
# How often those who wait for a line look whether one is gone without having been put back.
_GLANCE: Final = 0.05

# How often a cache that closes looks whether all is done.
_PATIENCE: Final = 0.005
# In what ways an attempt to connect fails; a host name may be none.
_FAILURES: Final = (OSError, ReplyError, ProtocolError, UnicodeError)


class Pool:
    """The connections to one server. ``provider`` is asked before each, if there is one."""

    def __init__(self, options: Options, provider: CredentialProvider | None = None) -> None:
        self._server = ""
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
        # Lines without a place, from which others have taken over.
        self._unplaced: deque[Connection] = deque()
        self._waiters: deque[queue.SimpleQueue[Connection | None]] = deque()
        self._lines: list[ref[Connection]] = []
        # A signal handler may use the cache while its thread is in the middle of anything.
        self._lock = threading.RLock()
        self._closed = False
        self._closing = False
        self._connects = 0
        self._reconnections = 0
        self._overloads = 0
        self._last_loss = ""
        self._complained = ""
        # What lines that are no more have counted.
        self._counts: dict[str, Any] = {}
        on_renewal(provider, self._renew)
        after_fork_in_child(self, lambda pool: pool.reset_after_fork())

    # -- operations

    def run(self, operation: str, *arguments: Any) -> Any:
        """Do one operation of a Pipeline, by its name; return its result or raise its error."""
        idle = self._idle
        line: Connection | None = None
        mine = True
        try:
            try:
                line = idle.pop()
            except IndexError:
                line = self._spare()
            try:
                outcome: BlockingWaiter = getattr(line.pipeline, operation)(*arguments)
            except RecordError:
                # Nearly always of the arguments. One of a signal handler may come when the
                # operation is queued already.
                line.clear()
                mine = False
                self._put_back(line)
                raise
            if not (outcome.done or line.send_and_receive(outcome)):
                if not line.admitted:
                    line = self._admit(line)
                self._run_until_done(line, outcome)
            if outcome.error is not None:
                self._note_error(line)
            mine = False
            if not line.ready or line.retired or self._waiters:
                self._put_back(line)
            else:
                idle.append(line)
        except BaseException:
            if mine and line is not None:
                self._drop(line)
            # A traceback may be kept for long, and must not keep the line's place.
            line = None
            raise
        return outcome.take()

    def _run_until_done(self, line: Connection, outcome: BlockingWaiter) -> None:
        """Go on with an operation, over as many connections as it takes, until its deadline."""
        pipeline = line.pipeline
        while not outcome.done:
            if self._closing:
                pipeline.fail_all(closed_meanwhile)
            elif line.sock is not None:
                line.stream(outcome)
            else:
                self._note_loss(line)
                deadline = pipeline.expire(time.monotonic())
                if not outcome.done:
                    refusal = self._connect(line, deadline)
                    if refusal is not None:
                        pipeline.fail_all(refusal)

    # -- places

    def _spare(self) -> Connection:
        """Return a line that has no place yet."""
        if self._closed:
            raise ConnectionLost("the cache is closed")
        while self._unplaced:
            try:
                line = self._unplaced.pop()
            except IndexError:
                break  # another thread was quicker
            if not line.gone:
                return line
        return self._new_line()

    def _new_line(self) -> Connection:
        return Connection(self._new_pipeline(), self._options.command_timeout)

    def _admit(self, spare: Connection) -> Connection:
        """Give a line a place, or its operation another line that has one.

        If there is none in time, the operation has failed and the line is without a place.
        Raises Overloaded if nobody is to wait.
        """
        if not self._waiters and self._reserve(spare):
            return spare
        if self._options.when_full == "error":
            with self._lock:
                self._overloads += 1
            raise Overloaded(
                f"{self.address}: all {self._limit} connections are in use, which is all that "
                "maxConnections allows; the operation was not sent"
            )
        deadline = spare.expire(time.monotonic())
        line = None if deadline is None else self._wait(spare, deadline)
        if line is None:
            spare.fail_all(closed_meanwhile if self._closing else self._none_free)
            return spare
        if line is not spare:
            try:
                line.take_over(spare)
                self._put_aside(spare)
            except BaseException:
                self._drop(line)
                raise
        return line

    def _reserve(self, line: Connection) -> bool:
        """Give a line a place if there is one."""
        with self._lock:
            if len(self._lines) >= self._limit:
                self._prune()
            if len(self._lines) >= self._limit:
                return False
            self._lines.append(ref(line))
            line.admitted = True
            return True

    def _wait(self, spare: Connection, deadline: float) -> Connection | None:
        """Wait for a line that is put back, or for a place; return None at the deadline."""
        turn: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        line: Connection | None = None
        try:
            while not self._closing:
                if turn not in self._waiters:
                    # At first, and if whoever took it was struck before it could give anything.
                    self._waiters.append(turn)
                    try:
                        # Put back before the turn could be seen.
                        line = self._idle.pop()
                        return line
                    except IndexError:
                        pass
                if self._reserve(spare):
                    return spare
                rest = deadline - time.monotonic()
                if rest <= 0:
                    return None
                try:
                    line = turn.get(timeout=min(rest, _GLANCE))
                except queue.Empty:
                    continue
                if line is not None:
                    return line
            return None
        except BaseException:
            if line is not None:
                self._drop(line)
            raise
        finally:
            self._leave(turn)

    def _leave(self, turn: queue.SimpleQueue[Connection | None]) -> None:
        """Wait no more; what was given meanwhile is passed on."""
        try:
            self._waiters.remove(turn)
        except ValueError:
            while not turn.empty():
                given = turn.get_nowait()
                if given is not None:
                    self._put_back(given)
                elif (following := self._call_next()) is not None:
                    following.put(None)

    def _call_next(self) -> queue.SimpleQueue[Connection | None] | None:
        """Return the turn of who has waited longest, if anyone has."""
        try:
            return self._waiters.popleft()
        except IndexError:
            return None

    def _put_back(self, line: Connection) -> None:
        """Give a line to who waits for one, or to whoever needs one next."""
        mine = True
        try:
            self._note_loss(line)
            if line.retired or self._closing:
                self._drop(line)
            elif not line.admitted:
                self._put_aside(line)
            else:
                turn = self._call_next() if self._waiters else None
                is_ready = line.ready
                # From here on another thread may have it.
                mine = False
                if turn is not None:
                    turn.put(line)
                elif is_ready:
                    self._idle.append(line)
                else:
                    self._idle.appendleft(line)
        except BaseException:
            if mine:
                self._drop(line)
            del line
            raise

    def _put_aside(self, spare: Connection) -> None:
        """Keep a line without a place for who needs one next, or what it has counted."""
        if len(self._unplaced) < self._limit:
            self._unplaced.append(spare)
        else:
            self._count(spare)

    def _drop(self, line: Connection) -> None:
        """End a line, and let another one have its place."""
        first = not line.gone
        line.discard()
        if first:
            self._count(line)
        if line.admitted:
            with self._lock:
                self._lines = [it for it in self._lines if it() not in (line, None)]
            if (turn := self._call_next()) is not None:
                turn.put(None)

    def _prune(self) -> None:
        """Forget the lines that are no more."""
        self._lines = [it for it in self._lines if (line := it()) is not None and not line.gone]

    def _present(self) -> list[Connection]:
        with self._lock:
            lines = [it() for it in self._lines]
        return [line for line in lines if line is not None and not line.gone]

    def _count(self, line: Connection) -> None:
        """Keep what a pipeline has counted that is given up."""
        said = line.pipeline.stats()
        with self._lock:
            counters.add(self._counts, said, lasting=True)

    def _none_free(self, operation: str) -> Exception:
        return DeadlineExceeded(
            f"{operation}: none of the {self._limit} connections to {self.address} "
            f"(maxConnections) was free within {self._options.command_timeout} ms; "
            "nothing was done"
        )

    # -- connections

    def _connect(self, line: Connection, deadline: float) -> ErrorOf | None:
        """Try to connect a line until the deadline; return how operations fail if that's no use.

        ``line.pipeline.down`` tells why it was in vain.
        """
        options = self._options
        retry = options.retry_strategy
        failures = 0
        while not self._closing:
            now = time.monotonic()
            limit = min(now + options.connect_timeout / 1000, deadline)
            try:
                server = line.open(self._connector, limit)
            except _FAILURES as error:
                raise_foreign(error)
                said = as_connect_error(error, math.ceil((limit - now) * 1000))
                line.disconnect()
                line.pipeline.connection_lost(error, True)
                line.pipeline.down = said
                self._note_failure(said)
                refusal = permanent_failure(error, said, line.pipeline.address)
                if refusal is not None:
                    return refusal
            else:
                self._note_success(line, server)
                return None
            longest = min(retry.cap / 1000, MAX_PAUSE_WHILE_WAITING)
            pause = full_jitter(retry.first / 1000, longest, failures)
            failures += 1
            rest = deadline - time.monotonic()
            if pause + _LEAST >= rest:
                time.sleep(max(rest, 0))
                break
            time.sleep(pause)
        return closed_meanwhile if self._closing else None

    def _note_success(self, line: Connection, server: str) -> None:
        address = line.pipeline.address
        line.connects += 1
        with self._lock:
            self._connects += 1
            self._reconnections += line.connects > 1
            self._server = server
            self._complained = ""
            moved = address != self.address and self._options.sentinels is not None
            self.address = address
        _logger.info("connected to %s (%s)", address, server or "server unknown")
        if moved:
            self._retire(lambda other: other.pipeline.address != address)

    def _note_failure(self, error: Exception) -> None:
        said = self._last_loss = str(error)
        if said != self._complained:
            self._complained = said
            _logger.warning("can't connect to %s: %s", self.address, said)

    def _note_loss(self, line: Connection) -> None:
        if line.loss:
            self._last_loss, line.loss = line.loss, ""
            _logger.info("connection to %s lost: %s", line.pipeline.address, self._last_loss)

    def _note_error(self, line: Connection) -> None:
        """Leave a server that has refused a write for being a replica, if there is another."""
        if line.pipeline.read_only:
            line.pipeline.read_only = False
            if self._options.sentinels is not None:
                self._retire(lambda other: other.pipeline.address == line.pipeline.address)

    def _renew(self) -> None:
        """Let new connections replace the others, as there are new credentials."""
        self._retire(lambda other: True)

    def _retire(self, concerns: Callable[[Connection], bool]) -> None:
        """Let new connections replace some: at once those that nobody uses."""
        for line in self._present():
            if concerns(line):
                line.retired = True
                try:
                    self._idle.remove(line)
                except ValueError:
                    continue  # who uses it will see
                self._drop(line)

    # -- the life of the pool

    @property
    def server(self) -> str:
        """The server's kind and version, as far as it is known."""
        return self._server

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection."""
        return not self._closed and any(line.sock is not None for line in self._present())

    def when_ready(self) -> None:
        """Wait until there is a connection.

        Raises ConnectError if there is none within ``connectTimeout``, and at once what the
        server says if it refuses.
        """
        timeout = self._options.connect_timeout
        deadline = time.monotonic() + timeout / 1000
        line: Connection | None = None
        mine = True
        try:
            try:
                line = self._idle.pop()
            except IndexError:
                spare = self._spare()
                line = spare if self._reserve(spare) else self._wait(spare, deadline)
            if line is None:
                raise ConnectError(
                    f"no connection to {self.address} within {timeout} ms: all {self._limit} "
                    "(maxConnections) are in use"
                )
            problem = self._make_ready(line, deadline)
            mine = False
            self._put_back(line)
        except BaseException:
            if mine and line is not None:
                self._drop(line)
            line = None
            raise
        if problem is not None:
            try:
                raise problem
            finally:
                # Its traceback holds this frame, which must not hold it in turn.
                del problem

    def _make_ready(self, line: Connection, deadline: float) -> Exception | None:
        """Connect a line that has a place; return what keeps it from that until the deadline."""
        if line.is_open():
            return None
        refusal = self._connect(line, deadline)
        if refusal is not None:
            return refusal("connect")
        if line.sock is None:
            down = line.pipeline.down
            problem = ConnectError(
                f"no connection to {self.address} within {self._options.connect_timeout} ms: {down}"
            )
            problem.__cause__ = down
            return problem
        return None

    def stats(self) -> dict[str, Any]:
        """Return the pipelines' counters, and what became of the connections."""
        present = self._present()
        parts = [self._counts]
        parts += [line.pipeline.stats() for line in (*present, *list(self._unplaced))]
        return {
            **counters.merged([*parts, {"overloaded": self._overloads}]),
            "waiting": len(self._waiters),
            "connections": sum(line.sock is not None for line in present),
            "connects": self._connects,
            "reconnections": self._reconnections,
            "redirections": 0,
            "last_loss": self._last_loss,
        }

    def close(self) -> None:
        """Let those who use connections finish, within ``closeTimeout``, and end them all."""
        deadline = time.monotonic() + self._options.close_timeout / 1000
        self._closed = True
        while self._is_in_use() and time.monotonic() < deadline:
            time.sleep(_PATIENCE)
        self._closing = True
        self._retire(lambda line: True)
        for line in self._present():
            line.interrupt(ConnectionLost("the cache was closed"))

    def _is_in_use(self) -> bool:
        return bool(self._waiters) or len(self._present()) > len(self._idle)

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child: nothing that the parent uses is touched."""
        lines = [it() for it in self._lines]
        self._lock = threading.RLock()
        self._idle = deque()
        self._unplaced.clear()
        self._waiters = deque()
        self._lines = []
        for line in lines:
            if line is not None:
                line.leave()


def _no_wakeup() -> None:
    """Do nothing when an operation is queued: its thread is about to send it."""


def closed_meanwhile(operation: str) -> Exception:
    return ConnectionLost(f"{operation}: the cache was closed before the answer came")
