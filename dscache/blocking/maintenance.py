"""Maintenance of the servers of a blocking cache, as the servers announce it.

Theory of operation
-------------------
A server announces its maintenance over each connection, and nothing reads from a connection that no
thread uses. So an announcement waits in the socket of an idle connection until its next use. The
thread then reads it before it sends anything (``Connection._is_lost``). The first thread that has
read an announcement acts for all connections of the pool.

A Follower takes the announcements of one connection, in the thread that uses it, and gives the
operations there more time. A connection that is made during maintenance begins with more time.

A Mover follows the one server of a pool to its new address. A thread of its own connects there
while all operations go on over the old connections, since an address that doesn't answer may take
seconds. Once the Mover has a connection, new ones are made to that address only. Idle old
connections end at once, and used ones as soon as their thread has its reply. So no operation is
lost, and none is in doubt. If the old server ends connections that are idle, their next users find
them ended, and connect to the new address.

On a cluster, the shared table of slots takes over the slots that have moved (``SlotFollower``).
Each thread follows the table before its next operation, and connections to nodes that left end when
nothing is under way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakMethod, ref

from .._locks import ReentrantEvent, make_lock
from ..config.address import join_address
from ..core.recovery import change_timeout
from ..errors import ConfigError, ProtocolError, ReplyError
from ..net.backoff import full_jitter
from ..net.cluster_state import ClusterState
from ..net.maintenance import (
    MOVE_PAUSE,
    MOVE_PAUSE_CAP,
    MOVING,
    SLOTS_MOVED,
    Announcements,
    Leeway,
    NewAddress,
    Notice,
)
from .foreign_errors import raise_foreign

if TYPE_CHECKING:
    from .connection import Connection
    from .pool import Pool

_logger = logging.getLogger("dscache")

# Seconds that ``stop`` waits for a thread that may be looking up a host.
_GRACE: Final = 1.0
# More attempts to connect to new addresses at the same time end when another one is announced.
_MOST_ATTEMPTS: Final = 3
# In what ways an attempt to connect fails; a host name may be none.
_FAILURES: Final = (OSError, ConfigError, ReplyError, ProtocolError, UnicodeError)


class Follower:
    """Follows the announcements over one connection, in the thread that uses it.

    ``on_news`` is called with those that no other connection has brought. ``others`` takes all
    other pushes.
    """

    __slots__ = ("_connection", "_leeway", "_on_news", "_others", "announcements")

    def __init__(
        self,
        connection: Connection,
        announcements: Announcements,
        on_news: Callable[[Notice], object],
        others: Callable[[list[Any]], object] | None = None,
    ) -> None:
        self._connection = ref(connection)  # which refers to it
        self.announcements = announcements
        self._on_news = on_news
        self._others = others
        self._leeway = Leeway(connection.pipeline.timeout)

    @property
    def patience(self) -> float:
        """How long the server may be silent because of maintenance, in seconds; 0 outside it."""
        return 0.0 if self._leeway.until is None else self._leeway.seconds

    def take_push(self, push: list[Any]) -> None:
        """Take a push, while the pipeline reads replies."""
        connection = self._connection()
        if connection is None:
            return
        address = connection.pipeline.address
        notice = self.announcements.read(push, address)
        if notice is None:
            if self._others is not None:
                self._others(push)
            return
        is_new = self.announcements.is_new(notice, address)
        if is_new:
            _logger.info("%s announces %s", address, notice.kind.decode())
        self._change(self._leeway.follow(notice, time.monotonic()))
        if is_new:
            self._on_news(notice)

    def on_connected(self) -> None:
        """Give more time over a new connection while its server may be slow."""
        connection = self._connection()
        if connection is not None:
            until = self.announcements.slow_until(connection.pipeline.address)
            if until > time.monotonic():
                self._change(self._leeway.begin(until))

    def end_if_over(self) -> None:
        """End the maintenance whose end was not announced."""
        self._change(self._leeway.end_if_over(time.monotonic()))

    def _change(self, seconds: float | None) -> None:
        connection = self._connection()
        if seconds is None or connection is None:
            return
        change_timeout(connection.pipeline, seconds)
        connection.expire_soon()
        if self._leeway.until is None:
            connection.watch_time(None)
        else:
            connection.watch_time(self.end_if_over)
            self.announcements.count_relaxed()


def follow_maintenance(
    announcements: Announcements,
    on_news: Callable[[Notice], object],
    connection: Connection,
    others: Callable[[list[Any]], object] | None = None,
) -> None:
    """Follow the announcements over a connection, unless none are wanted; see Follower."""
    if announcements.are_wanted:
        connection.follow(Follower(connection, announcements, on_news, others))


class SlotFollower:
    """Gives slots of a cluster to the nodes that have them by now, as a node has announced."""

    def __init__(self, state: ClusterState, announcements: Announcements) -> None:
        self._state = state
        self._announcements = announcements
        self._on_moved: WeakMethod[Callable[[], object]] | None = None

    def on_moved(self, moved: Callable[[], object]) -> None:
        """Have a bound method called after each change, without a reference to its object."""
        self._on_moved = WeakMethod(moved)

    def follow(self, notice: Notice) -> None:
        """Follow an announcement that no other connection has brought."""
        if notice.kind not in (MOVING, SLOTS_MOVED):
            return
        self._announcements.count_slots(len(self._state.record_moves(notice.moves)))
        moved = None if self._on_moved is None else self._on_moved()
        if moved is not None:
            moved()


class Mover:
    """Moves the connections of a pool to the new address of its server, ``new_address``."""

    def __init__(self, pool: Pool, announcements: Announcements, new_address: NewAddress) -> None:
        self._pool = ref(pool)  # which refers to it
        self._announcements = announcements
        self._new_address = new_address
        self._begin()

    def _begin(self) -> None:
        self._lock = make_lock()
        self._stopping = threading.Event()
        # Set when the latest move is to end: another one begins, or the pool is closed.
        self._over: threading.Event = ReentrantEvent()
        self._thread: threading.Thread | None = None
        # A later announcement may begin another move while the first still tries to connect.
        self.opening: set[Connection] = set()
        """The connections to a new address that the pool doesn't have yet."""

    def follow(self, notice: Notice) -> None:
        """Follow an announcement that no other connection has brought; of a move, in a thread."""
        pool = self._pool()
        if notice.kind != MOVING or pool is None or self._stopping.is_set():
            return
        with self._lock:
            self._over.set()
            if self._stopping.is_set():  # by another thread, just now
                return
            over = self._over = ReentrantEvent()
        if len(self.opening) >= _MOST_ATTEMPTS:
            # A faulty server announces without end.
            self._end_attempts("the server has announced another address")
        if notice.endpoint is not None and notice.endpoint == self._new_address.get():
            self._new_address.set(notice.endpoint, time.monotonic() + notice.patience)
            return
        thread = threading.Thread(
            target=self._move, args=(pool, notice, over), name=f"dscache moves from {pool.address}"
        )
        thread.daemon = True
        self._thread = thread
        try:
            thread.start()
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            # The interpreter ends, or the system has no thread left: the next loss moves the pool.
            raise_foreign(error)

    def stop(self) -> None:
        """End the move under way."""
        self._stopping.set()
        with self._lock:
            self._over.set()
        thread = self._thread
        self._end_attempts("the cache was closed")
        # A cache may be dropped in any thread.
        if thread is not None and thread.ident and thread is not threading.current_thread():
            thread.join(_GRACE)

    def _end_attempts(self, reason: str) -> None:
        for connection in tuple(self.opening):
            if not connection.admitted:  # otherwise it has moved, and may have an operation
                connection.interrupt(ConnectionAbortedError(reason))

    def reset_after_fork(self) -> None:
        """Begin again in a forked child, which has no such thread."""
        opening = self.opening
        self._begin()
        for connection in opening:
            connection.leave()

    # -- the thread

    def _move(self, pool: Pool, notice: Notice, over: threading.Event) -> None:
        """Connect to the new address in time, and have all others do so."""
        until = time.monotonic() + notice.patience
        if notice.endpoint is None:
            # The name leads to the new server only after a while.
            over.wait(notice.seconds / 2)
        shown = "its usual address" if notice.endpoint is None else join_address(*notice.endpoint)
        failures = 0
        while not over.is_set() and time.monotonic() < until:
            try:
                if self._try_to_move(pool, notice, until, over):
                    _logger.info("%s has moved to %s", pool.address, shown)
                    return
            except _FAILURES as error:
                _logger.info("can't move to %s yet: %s", shown, error)
            failures += 1
            over.wait(full_jitter(MOVE_PAUSE, MOVE_PAUSE_CAP, failures))

    def _try_to_move(self, pool: Pool, notice: Notice, until: float, over: threading.Event) -> bool:
        connection = pool.new_connection()
        self.opening.add(connection)
        is_moved = False
        try:
            server = pool.open(connection, until, notice.endpoint)
            if not over.is_set():
                self._new_address.set(notice.endpoint, until)
                is_moved = True
                pool.move_to(connection, server)
                self._announcements.count_move()
        finally:
            self.opening.discard(connection)
            if not is_moved:
                pool.drop(connection)
        return is_moved
