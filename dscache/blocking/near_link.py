"""The thread that hears of changes for a near cache: one for each server, over its own connection.

It connects, asks the server to report every change under the prefixes, hands the reports to the
NearNode of the server, and asks now and then whether the server still answers. After a loss it
connects again. Nothing else reads from that connection.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakSet

from msgspec.structs import replace

from ..config import NearCacheOptions, Options
from ..config.address import join_address
from ..core.failures import EndedHere, ErrorOf
from ..errors import ConnectError, DscacheError, ProtocolError
from ..net.backoff import full_jitter
from ..net.connect_errors import as_connect_error, permanent_failure
from ..net.credentials import Logins
from ..net.handshake import Attempt, ServerInfo
from .connector import Connector
from .control import ControlConnection
from .foreign_errors import ConnectTimeout, raise_foreign
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .pool import Pool

_logger = logging.getLogger("dscache")

# A server is asked this many times within ``idleLimit`` whether it answers, and at least this
# often, in seconds. Two answers in a row prove something: see NearLink._follow.
_BEATS: Final = 4
_LONGEST_BEAT: Final = 2.5
# A server that doesn't answer for this many seconds is left.
_ANSWER_WITHIN: Final = 4.0
# How often the Sentinels are asked for the primary, in seconds.
_PLACE_EVERY: Final = 1.0
# The first and the last limit of the pause before the next attempt to connect, in seconds.
_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0
# A link that lasted for this many seconds was a good one: the next attempt follows at once.
_STEADY_AFTER: Final = 1.0
# Seconds that ``stop`` waits for a thread that may be looking up a host.
_GRACE: Final = 1.0
# Errors of a link; UnicodeError for a text that can't be a host.
_FAILURES: Final = (OSError, DscacheError, UnicodeError)

_links: WeakSet[NearLink] = WeakSet()


class Reported(Protocol):
    """A server whose changes a link reports: a NearNode, or the HostNode of many processes."""

    @property
    def is_live(self) -> bool: ...
    def connected(self, identity: str | None, since: float) -> None: ...
    def confirm(self, known: float) -> None: ...
    def disconnected(self, reason: str, is_trusted: bool = ...) -> None: ...
    def unreachable(self) -> None: ...
    def reachable(self) -> None: ...
    def take_push(self, push: Any) -> None: ...


def broadcast_options(options: Options) -> Options:
    """Return the options of a link: tracking in broadcast mode, under the shortest prefixes."""
    near = options.near_cache or NearCacheOptions()
    shortest: list[str] = []
    for prefix in sorted(near.prefixes):
        if not (shortest and prefix.startswith(shortest[-1])):
            shortest.append(prefix)  # Redis refuses prefixes that overlap
    return replace(options, near_cache=replace(near, mode="broadcast", prefixes=tuple(shortest)))


def start_thread(thread: threading.Thread) -> None:
    """Start a thread, unless a signal handler has, or the interpreter ends and starts none."""
    try:
        if thread.ident is None:
            thread.start()
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise_foreign(error)


class NearConnection(ControlConnection):
    """The socket over which a server reports its changes."""

    __slots__ = ("_of_cluster",)

    def __init__(
        self, options: Options, on_push: Callable[[list[Any]], object], *, of_cluster: bool
    ) -> None:
        super().__init__(options, on_push)
        self._of_cluster = of_cluster

    def _connect(
        self,
        host: str,
        port: int,
        logins: Logins,
        *,
        read_only: bool = False,
        of_cluster: bool = False,
        is_near: bool = False,
        attempt: Attempt | None = None,
    ) -> Generator[int, None, ServerInfo]:
        return super()._connect(
            host, port, logins, of_cluster=self._of_cluster, is_near=True, attempt=attempt
        )


class NearLink:
    """Hears of the changes of one server, in a thread of its own.

    ``on_connected`` is called with the connection before anything is cached. It may raise
    DscacheError to refuse the server. ``on_lost`` is called after a loss, and after each attempt in
    vain. With the ``pool`` of the cache, the link follows the pool to another address, and has the
    pool follow the announcements of the server.
    """

    def __init__(
        self,
        options: Options,
        credentials: CredentialProvider | None,
        node: Reported,
        *,
        of_cluster: bool = False,
        on_connected: Callable[[NearConnection], object],
        on_lost: Callable[[], object] | None = None,
        pool: Pool | None = None,
    ) -> None:
        self.refusal: ErrorOf | None = None
        """How operations fail while the server refuses the link, and it is required."""
        self.node = node
        assert options.near_cache is not None
        self._near = options.near_cache
        self._options = broadcast_options(options)
        self._of_cluster = of_cluster
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._pool = pool
        self._connector = Connector(
            self._options, credentials, None if pool is None else pool.new_address
        )
        self._decided = threading.Event()
        self._stopping = threading.Event()
        self._connection: NearConnection | None = None
        self._complaint = ""
        self._limit = 0.0
        address = options.address
        self._threads = [self._thread(self._run, f"dscache hears of changes at {address}")]
        if options.sentinels:
            self._threads.append(self._thread(self._follow_place, f"dscache follows {address}"))
        _links.add(self)

    def _thread(self, work: Callable[[], object], name: str) -> threading.Thread:
        """Return a thread that works until ``stop``; another follows if an exception ends it.

        Without its thread a cache would keep nothing for good. Under gevent, where all greenlets
        run in one thread, a KeyboardInterrupt may strike it.
        """

        def work_on() -> None:
            try:
                work()
            finally:
                if not self._stopping.is_set():
                    successor = self._thread(work, name)
                    self._threads.append(successor)
                    self._threads.remove(threading.current_thread())
                    start_thread(successor)

        return threading.Thread(target=work_on, name=name, daemon=True)

    # -- for other threads

    def start(self) -> None:
        """Begin to connect."""
        for thread in self._threads:
            start_thread(thread)

    def wait(self, seconds: float) -> bool:
        """Wait until the first attempt to connect has ended; return whether it has."""
        return self._decided.wait(seconds)

    def restart(self, reason: str) -> None:
        """End the present connection; another one follows."""
        connection = self._connection
        if connection is not None:
            connection.interrupt(EndedHere(reason))

    def renew(self) -> None:
        """Log in anew: the credentials have changed. Records of the present login are dropped."""
        self.node.disconnected("login", False)
        self.restart("there are new credentials")

    def stop(self) -> None:
        """Have the threads end soon."""
        self._limit = time.monotonic() + self._options.connect_timeout / 1000 + _GRACE
        self._stopping.set()
        self._decided.set()
        self.restart("it was closed")

    def join(self) -> None:
        """Wait for the threads after ``stop``, unless one of them is the caller."""
        for thread in tuple(self._threads):
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(max(self._limit - time.monotonic(), 0))

    def leave(self) -> None:
        """Close the socket in a forked child, which has no such thread."""
        connection, self._connection = self._connection, None
        _links.discard(self)
        if connection is not None:
            connection.leave()

    # -- the thread

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            failures = self._pause(0 if self._serve() else failures + 1)

    def _pause(self, failures: int) -> int:
        """Pause after so many failures in a row, and return their number."""
        if failures:
            self._stopping.wait(full_jitter(_PAUSE, _LONGEST_PAUSE, failures - 1))
        return failures

    def _serve(self) -> bool:
        """Connect, and take reports until the connection ends; return whether it was a good one."""
        began = time.monotonic()
        connection = self._connection = NearConnection(
            self._options, self.node.take_push, of_cluster=self._of_cluster
        )
        if self._pool is not None:
            self._pool.follow_maintenance(connection, self.node.take_push)
        try:
            if self._open(connection):
                self._follow(connection)
        except Exception as error:
            # Whatever it is, a link that ended without a successor would end the cache.
            if not self._stopping.is_set():
                self._lose(connection, error)
        finally:
            self.node.disconnected("connection")
            connection.discard()
            self._decided.set()
        if self._on_lost is not None and not self._stopping.is_set():
            self._on_lost()
        return time.monotonic() > began + _STEADY_AFTER

    def _open(self, connection: NearConnection) -> bool:
        """Connect; return whether the server reports its changes from now on."""
        options = self._options
        deadline = time.monotonic() + options.connect_timeout / 1000
        new_address = self._connector.new_address
        moved = new_address.get()
        try:
            connection.open(self._connector, deadline)
            self._on_connected(connection)
        except _FAILURES as error:
            new_address.note_failure(moved)
            failure = as_connect_error(error, options.connect_timeout)
            address = connection.pipeline.address
            refusal = permanent_failure(error, failure, address) if moved is None else None
            self.refusal = refusal if self._near.required else None
            if isinstance(error, (OSError, ConnectError, ConnectTimeout)) and refusal is None:
                self.node.unreachable()
            else:
                self.node.reachable()
            raise
        self.refusal = None
        greeting = connection.greeting
        assert greeting is not None
        if greeting.is_tracked:
            return True
        self._complain(
            f"{connection.pipeline.address} announces no changes: its records are not kept in the "
            "near cache"
        )
        # It may be another server, or of another version, at the next attempt.
        connection.discard()
        self.node.reachable()
        self._decided.set()
        self._stopping.wait(_LONGEST_PAUSE)
        return False

    def _lose(self, connection: NearConnection, error: Exception) -> None:
        is_trusted = not isinstance(error.__context__, ProtocolError)
        self.node.disconnected("connection", is_trusted)
        failure = as_connect_error(error, self._options.connect_timeout)
        self._complain(f"no reports of changes from {connection.pipeline.address}: {failure}")

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            _logger.warning("%s", complaint)

    def _follow(self, connection: NearConnection) -> None:
        """Take the reports of a server until it is lost, or doesn't answer.

        In broadcast mode, a server reports the changes of one turn of its event loop at the turn's
        end, which may be behind the answer to a PING of that turn. The next PING is sent after that
        answer, and comes in a later turn. So its answer proves that all changes from before the
        first PING have been reported.
        """
        node = self.node
        beat = min(self._near.idle_limit / 1000 / _BEATS, _LONGEST_BEAT)
        since = asked = time.monotonic()
        node.connected(connection.identity or connection.pipeline.address, since)
        self._complaint = ""
        self._decided.set()
        due = since
        pong: BlockingWaiter | None = None
        while not self._stopping.is_set():
            now = time.monotonic()
            if pong is not None and pong.done:
                node.confirm(since)
                since, pong = asked, None
            if pong is None and now >= due:
                (pong,) = connection.ask([["PING"]])
                asked, due = now, now + beat
            within = max(_ANSWER_WITHIN, connection.patience)
            if pong is not None and now >= asked + within:
                raise EndedHere(f"the server did not answer for {within:.0f} s")
            connection.take(due if pong is None else asked + within)

    def _follow_place(self) -> None:
        """Leave a server that the Sentinels no longer name, which may be cut off from them."""
        options = self._options
        while not self._stopping.wait(_PLACE_EVERY):
            connection = self._connection
            if connection is None or not self.node.is_live:
                continue
            with suppress(*_FAILURES):
                named = self._connector.locate(time.monotonic() + options.connect_timeout / 1000)
                if join_address(*named) != connection.pipeline.address and self.node.is_live:
                    self.restart("the Sentinels name another server")


def _stop_all() -> None:
    """End the threads before the interpreter does, which they would otherwise be struck by."""
    # Ctrl-C ends the wait. Python would show it as an exception that was ignored.
    with suppress(KeyboardInterrupt):
        links = list(_links)
        for link in links:
            link.stop()
        for link in links:
            link.join()


atexit.register(_stop_all)
