"""One connection of a blocking cache: a socket, the Pipeline over it, and an operation.

A Connection serves one thread at a time, and that thread sends, waits and receives. Its pipeline
outlives its sockets, and decides what happens to an operation whose socket is lost or whose
deadline is past.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..config.address import join_address
from ..core import constants
from ..core.failures import EndedHere, ErrorOf
from ..errors import ConnectionLost, DscacheError, ProtocolError
from ..net.backoff import half_jitter
from ..net.connect_errors import as_connect_error, end_of_handshake, permanent_failure
from ..net.credentials import Word, packed, without
from ..net.handshake import (
    Attempt,
    Handshake,
    ServerInfo,
    handshake,
    secrets_of,
)
from ..net.slot_table import NodeInfo
from ..net.sockets import SocketConnect
from .foreign_errors import ConnectTimeout, raise_foreign
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from ..core.pure import Pipeline
    from ..net.credentials import Logins
    from .connector import Connector
    from .maintenance import Follower

_logger = logging.getLogger("dscache")

# An attempt to connect with less time than this, in seconds, would only hide the error of the
# attempts before it.
LEAST_TO_CONNECT: Final = 0.005
IN: Final = select.POLLIN
OUT: Final = select.POLLOUT
NOTHING: Final = memoryview(b"")
# The refusals after which nothing more is sent for now.
_AWAY: Final = constants.PASSING.union(constants.LEFT_FOR)
_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class _SecurePoller:
    """The poll object of a TLS socket, which also sees the data that OpenSSL keeps.

    A read whose buffer ends inside a TLS record takes only a part of it. The rest has left the
    socket, where poll can't see it.
    """

    __slots__ = ("_kept", "_poller", "modify", "pending")

    def __init__(self, poller: select.poll, fd: int, pending: Callable[[], int]) -> None:
        self._poller = poller
        self._kept = [(fd, IN)]
        self.modify = poller.modify
        self.pending = pending

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        if self.pending():
            return self._kept
        return self._poller.poll(timeout)


def _always(timeout: int) -> bool:
    """Report a readable socket without a look: the caller's read then finds out."""
    return True


def _behind(look: Callable[[], object], poll: Callable[[int], object], timeout: int) -> object:
    look()
    return poll(timeout)


class Connection:
    """A pipeline and, most of the time, a socket.

    - ``admitted``: whether it holds one of its pool's places
    - ``ready``: whether it may be lent again as it is
    - ``retired``: whether it isn't lent again
    - ``gone``: whether its socket was ended for good
    - ``greeting``: the server's latest facts about itself
    - ``identity``: tells servers apart, where there is a near cache
    - ``info``: the NodeInfo of the server
    - ``connects``: the number of sockets so far
    - ``unsent``: output that the socket has not taken yet
    - ``events``: the events of poll to wait for
    - ``announces``: whether the server announces its maintenance over this socket
    """

    __slots__ = (
        "__weakref__",
        "_expire_at",
        "_follower",
        "_holder",
        "_least_telling",
        "_look",
        "_patience",
        "_poll",
        "_poller",
        "_reason",
        "admitted",
        "announces",
        "connects",
        "events",
        "gone",
        "greeting",
        "identity",
        "info",
        "is_readable",
        "pipeline",
        "ready",
        "retired",
        "sock",
        "unsent",
    )

    def __init__(self, pipeline: Pipeline, info: NodeInfo) -> None:
        self.pipeline = pipeline
        self.info = info
        self.sock: socket.socket | None = None
        self.admitted = False
        self.announces = False
        self.ready = False
        self.retired = False
        self.gone = False
        self.greeting: ServerInfo | None = None
        self.identity: str | None = None
        self.is_readable: Callable[[int], object] = _always
        self._follower: Follower | None = None
        self._look: Callable[[], object] | None = None
        self._poll: Callable[[int], object] = _always
        self._expire_at = -math.inf
        self._holder: SocketConnect | None = None
        self._poller: select.poll | _SecurePoller
        self._patience = info.options.command_timeout
        self._reason: Exception | None = None
        self.connects = 0
        self.unsent = NOTHING
        self.events = IN
        self._least_telling = min(info.options.connect_timeout, self._patience) / 2

    # -- one operation

    def send_and_receive(self, outcome: BlockingWaiter) -> bool:
        """Try the usual course of an operation: one send, one wait, one receive.

        Returns whether the operation has its result. If not, ``stream`` goes on from there, as
        long as there is a socket.
        """
        sock = self.sock
        if sock is None:
            return False
        # Checked before anything is sent: if the server has closed the connection, the result of
        # a plain write would be unknown, and stray data would be taken for the reply.
        if self.is_readable(0) and self._is_stale(sock):
            return False
        pipeline = self.pipeline
        output = pipeline.take_output()
        if not output:  # this thread was suspended until the deadline was past
            return outcome.done
        sent = 0
        try:
            try:
                # While the rest of a bulk is encoded, the server works on its beginning.
                while output:
                    sent = 0
                    sent = sock.send(output)
                    if sent < len(output):
                        break
                    output = pipeline.take_output() if pipeline.queued else b""
                # The deadline may have passed in between; then no reply is awaited.
                patience = 0 if outcome.done else self._patience
                if not output and self._poller.poll(patience):
                    size = sock.recv_into(pipeline.get_buffer(-1))
                    if not size:
                        raise ConnectionLost("the server closed it")
                    pipeline.buffer_updated(size)
                    if outcome.done and not pipeline.in_flight:
                        return True
            except _NOT_NOW as error:
                # The buffer is full, or TLS has data of its own to exchange. If a signal handler
                # has raised this, the number of bytes sent is unknown.
                raise_foreign(error)
            self.unsent = memoryview(output)[sent:] or NOTHING
            self._pump(outcome)
        except (OSError, ProtocolError) as error:
            self._lose(error)
        return outcome.done

    def expire(self, now: float) -> float | None:
        """Fail an operation whose deadline is past; return the deadline of one under way."""
        return self.pipeline.expire(now)

    def fail_all(self, error_of: ErrorOf) -> None:
        """Fail the operation that is under way."""
        self.pipeline.fail_all(error_of)

    def take_over(self, spare: Connection) -> None:
        """Take over the operation of a connection without a place."""
        move_queued(spare.pipeline, self.pipeline)

    def stream(self, outcome: BlockingWaiter) -> None:
        """Go on with an operation until it has its result or the socket is lost."""
        try:
            self._pump(outcome)
        except (OSError, ProtocolError) as error:
            self._lose(error)

    def _pump(self, outcome: BlockingWaiter) -> None:
        """Send and receive at once, until the operation has its result.

        With full buffers on both sides, a server reads no more until its replies are read.
        """
        pipeline = self.pipeline
        self._expire_at = -math.inf
        put_offs = 0
        while True:
            now = time.monotonic()
            if now >= self._expire_at:
                self._expire_at = pipeline.expire(now) or now  # without a deadline, it is done
            deadline = self._expire_at
            if outcome.done:
                break
            if pipeline.away not in _AWAY:
                self._flush()
            elif not pipeline.in_flight:
                self._be_put_off(deadline - now, put_offs)
                put_offs += 1
                continue
            elif self.unsent:
                self._send()
            self._receive(deadline)
        if pipeline.in_flight or self.unsent:
            self.give_up()

    def _be_put_off(self, rest: float, put_offs: int) -> None:
        """Wait for a busy server, at most ``rest`` seconds, or leave it by ConnectionLost.

        This is called when all commands under way have their replies. Otherwise it would be unknown
        whether their writes have happened.
        """
        code = self.pipeline.away
        if code in constants.LEFT_FOR:
            if self._holder is not None:
                self._holder.note_useless()
            # ``away`` stays: the pool sees why the socket is lost.
            raise EndedHere(constants.LEFT_FOR[code])
        self.pipeline.away = ""
        pause = half_jitter(constants.PUT_OFF_FIRST, constants.PUT_OFF_CAP, put_offs)
        time.sleep(min(pause, max(rest, 0)))

    def give_up(self) -> None:
        """End a socket with replies outstanding that no operation awaits any more."""
        self.disconnect()
        self.pipeline.connection_lost(ConnectionLost("it was given up"), False)

    def _flush(self) -> None:
        """Send the output, as far as the socket takes it."""
        pipeline = self.pipeline
        self.events = IN
        while self.unsent or pipeline.queued:
            self.unsent = self.unsent or memoryview(pipeline.take_output())
            if not self.unsent:
                break  # the deadline of the queued operations is past
            self._send()
            if self.unsent:
                break

    def _send(self) -> None:
        """Send as much of ``unsent`` as the socket takes, and set ``events`` accordingly."""
        assert self.sock is not None
        try:
            sent = self.sock.send(self.unsent)
        except _NOT_NOW as error:
            raise_foreign(error)
            self.events = IN if isinstance(error, ssl.SSLWantReadError) else IN | OUT
            return
        # An empty rest would keep the bytes alive, among which may be a password.
        self.unsent = self.unsent[sent:] or NOTHING
        self.events = IN | OUT if self.unsent else IN

    def _receive(self, deadline: float) -> None:
        """Wait until the deadline for data, and take it, or until more can be sent."""
        if self.events != IN:
            self._poller.modify(self.fd, self.events)
        ready = self._poller.poll(milliseconds(deadline - time.monotonic()))
        if self.events != IN:
            self._poller.modify(self.fd, IN)
        if ready and ready[0][1] != OUT:
            self._take()

    def _take(self) -> bool:
        """Take the data that has arrived; return whether there was any."""
        assert self.sock is not None
        try:
            size = self.sock.recv_into(self.pipeline.get_buffer(-1))
        except _NOT_NOW as error:
            raise_foreign(error)
            return False
        if not size:
            raise ConnectionLost("the server closed it")
        self.pipeline.buffer_updated(size)
        return True

    def _lose(self, reason: Exception) -> None:
        """End the socket; operations that may be repeated wait for the next one."""
        raise_foreign(reason)
        reason = self._reason or reason
        self.disconnect()
        self._note_loss(str(reason))
        self.pipeline.down = ConnectionLost(f"connection lost: {reason}")
        self.pipeline.connection_lost(reason, not isinstance(reason, ProtocolError))

    def _is_stale(self, sock: socket.socket) -> bool:
        """Whether the server has closed the socket, or sent data without a command.

        Messages of TLS itself don't count, nor do announcements, which are taken. A stale socket is
        closed when this returns.
        """
        if self.announces:
            return self._is_lost()
        loss = "the server sent data that no command had asked for"
        try:
            if not sock.recv(1):
                loss = "the server closed it"
        except OSError as error:
            raise_foreign(error)
            if isinstance(error, _NOT_NOW):
                return False
            loss = str(error)
        self.disconnect()
        self._note_loss(loss)
        return True

    def _is_lost(self) -> bool:
        """Take the announcements that have arrived; return whether the server has closed.

        Anything else is a reply without a command, which ends the socket.
        """
        try:
            while self.is_readable(0) and self._take():
                pass
        except (OSError, ProtocolError) as error:
            self._lose(error)
            return True
        return False

    def _note_loss(self, reason: str) -> None:
        _logger.info("connection to %s lost: %s", self.pipeline.address, reason)
        self.info.last_loss = reason

    # -- the socket

    def open(
        self, connector: Connector, deadline: float, address: tuple[str, int] | None = None
    ) -> str:
        """Connect and log in; return the kind and version of the server.

        With an ``address`` the server is there. Raises OSError, DscacheError or UnicodeError.
        """
        host, port = address or connector.locate(deadline)
        attempt = connector.attempt((host, port))
        steps = self._connect(host, port, connector.logins, attempt=attempt)
        try:
            while True:
                self._wait(next(steps), deadline)
        except StopIteration as end:
            info: ServerInfo = end.value
        self.greeting = info
        if self.info.options.near_cache is not None:
            self.identity = info.run_id or f"{self.pipeline.address} at {self._peer()}"
        self.pipeline.has_msetex = info.has_msetex
        self.pipeline.single_writes = info.is_proxied
        self.pipeline.whole_scripts = False
        self._note_connected(info.server)
        return info.server

    def _peer(self) -> Any:
        assert self.sock is not None
        return self.sock.getpeername()

    # -- announced maintenance

    def follow(self, follower: Follower) -> None:
        """Have the server asked to announce its maintenance, from the next socket on."""
        self._follower = follower
        self.pipeline.on_push = follower.take_push

    @property
    def patience(self) -> float:
        """How long the server may be silent because of maintenance, in seconds; 0 outside it."""
        return 0.0 if self._follower is None else self._follower.patience

    def watch_time(self, look: Callable[[], object] | None) -> None:
        """Call ``look`` before each operation from now on; None ends that."""
        self._look = look
        self.is_readable = self._poll if look is None else partial(_behind, look, self._poll)

    def expire_soon(self) -> None:
        """Look at the deadlines now, since they have changed."""
        self._expire_at = -math.inf

    def _note_connected(self, server: str) -> None:
        self.pipeline.down = None
        self.ready = True
        self.connects += 1
        _logger.info("connected to %s (%s)", self.pipeline.address, server or "server unknown")

    def note_failure(self, error: Exception, timeout: int) -> ErrorOf | None:
        """Note a failed attempt to connect; return how operations fail at once, if they do.

        ``timeout`` is the time that it had, in milliseconds.
        """
        raise_foreign(error)
        tried, in_tls = "", False
        if self._holder is not None:
            tried, in_tls = self._holder.tried, self._holder.in_tls
            self._holder.note_useless()
        error = self._reason or error
        failure = as_connect_error(error, timeout, tried, in_tls=in_tls)
        if isinstance(error, ConnectTimeout) and timeout < self._least_telling:
            # The attempts before it have used up the time, and their error tells more.
            failure = self.pipeline.down or failure
        self.disconnect()
        self.pipeline.connection_lost(error, True)
        self.pipeline.down = failure
        if self._reason is None and str(failure) != str(self.info.trouble):
            _logger.warning("can't connect to %s: %s", self.info.shown, failure)
        refusal = permanent_failure(error, failure, self.pipeline.address)
        self._record_failure(failure, refusal)
        return refusal

    def _record_failure(self, failure: Exception, refusal: ErrorOf | None) -> None:
        self.info.trouble, self.info.last_loss = failure, str(failure)

    def _wait(self, events: int, deadline: float) -> None:
        """Wait until the socket that is being opened has the events, or raise ConnectTimeout."""
        wait = deadline - time.monotonic()
        if wait <= 0:
            raise ConnectTimeout
        if events & IN and self.has_more:
            return
        wait = min(wait, self.wake_at - time.monotonic())
        poller = select.poll()
        poller.register(self.fd, events)
        if not poller.poll(milliseconds(wait)) and time.monotonic() >= deadline:
            raise ConnectTimeout

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
        """Connect and log in; yields the events that the socket must have before the next step."""
        options = self.info.options
        holder = SocketConnect(self.info.useless)
        # From here on the socket is found when this thread is interrupted, or the process forks.
        self._holder = holder
        yield from holder.open(options, host, port)
        self._attach(holder.sock)
        self.pipeline.address = address = options.path or join_address(host, port)
        login = logins.current(options)
        follower = self._follower
        try:
            steps = handshake(
                options,
                login,
                address,
                read_only=read_only,
                is_near=is_near,
                of_cluster=of_cluster,
                identifies=options.near_cache is not None,
                attempt=attempt,
                announcements=None if follower is None else follower.announcements,
                peer="" if follower is None or options.path else str(self._peer()[0]),
            )
            info = yield from self._greet(steps, attempt)
            self.announces = info.announces
            if follower is not None and info.announces:
                follower.on_connected()
            return info
        except DscacheError as error:
            raise_foreign(error)  # now, while the error has its frames
            failure = without(error, [*secrets_of(options, login), *logins.given])
        raise failure

    def _greet(self, steps: Handshake, attempt: Attempt | None) -> Generator[int, None, ServerInfo]:
        """Send the commands of a handshake, and hand it the replies."""
        commands = next(steps)
        while True:
            waiters = self.ask(commands)
            try:
                while not all(waiter.done for waiter in waiters):
                    self.events = IN
                    if self.unsent:
                        self._send_or_read_on()
                    yield self.events
                    self._take()
            except OSError as error:
                raise_foreign(error)
                failure = end_of_handshake((waiter.error for waiter in waiters), error)
                if attempt is not None and isinstance(error, (ConnectionError, ssl.SSLEOFError)):
                    failure = attempt.note_closed(failure)
                if failure is error:
                    raise
                raise failure from None
            try:
                commands = steps.send([waiter.reply() for waiter in waiters])
            except StopIteration as end:
                info: ServerInfo = end.value
                return info

    def _send_or_read_on(self) -> None:
        """Send; if the server has closed, read first what it has said before that."""
        try:
            self._send()
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError) as error:
            raise_foreign(error)
            self.unsent = NOTHING

    def ask(self, commands: Iterable[Iterable[Word]]) -> list[BlockingWaiter]:
        """Put commands behind the unsent output; return the waiters for their replies."""
        waiters: list[BlockingWaiter] = []
        self.unsent = memoryview(bytes(self.unsent) + packed(self.pipeline, commands, waiters))
        return waiters

    @property
    def fd(self) -> int:
        """The socket's file descriptor; there must be one."""
        assert self._holder is not None
        return self._holder.sock.fileno()

    @property
    def wake_at(self) -> float:
        """When the next step of connecting is due even without an event."""
        return math.inf if self._holder is None else self._holder.wake_at

    @property
    def has_more(self) -> bool:
        """Whether OpenSSL keeps data that has left the socket, which poll can't see."""
        assert self._holder is not None
        pending = getattr(self._holder.sock, "pending", None)
        return pending is not None and pending() > 0

    def _attach(self, sock: socket.socket) -> None:
        self.sock = sock
        poller = select.poll()
        poller.register(sock, IN)
        genuine = type(poller).__module__ == "select"
        pending = getattr(sock, "pending", None)
        self._poller = poller if pending is None else _SecurePoller(poller, self.fd, pending)
        # gevent's poll sees nothing with a timeout of zero.
        self._poll = self._poller.poll if genuine else _always
        self.watch_time(self._look)

    def disconnect(self) -> None:
        """Close the socket, if there is one."""
        self.ready = False
        self.announces = False
        self.unsent = NOTHING
        self.sock = None
        self.is_readable = self._poll = _always
        holder = self._holder
        if holder is not None:
            holder.close()
            self._holder = None

    def is_open(self) -> bool:
        """Whether there is a socket, and the server hasn't closed it as far as is known."""
        sock = self.sock
        if sock is None:
            return False
        return not (self.is_readable(0) and self._is_stale(sock))

    def leave(self) -> None:
        """Close the socket in a forked child; the parent's connection goes on."""
        self.admitted = False
        self.disconnect()

    def interrupt(self, reason: Exception) -> None:
        """End the connection under a thread that waits for it; that thread sees the reason."""
        self._reason = reason
        holder = self._holder
        if holder is not None:
            holder.shutdown()

    def clear(self) -> None:
        """Drop an operation that its own arguments have failed; nothing was sent."""
        self.pipeline.fail_all(over)

    def discard(self) -> None:
        """End the connection for good."""
        self.gone = True
        self.disconnect()


def move_queued(source: Pipeline, target: Pipeline) -> None:
    """Move all operations that wait in one pipeline to another."""
    given = source.take_queued(lambda kind, name: target)
    if given:
        target.requeue([batch for _, batch in given])


def milliseconds(seconds: float) -> int:
    """Return a timeout for poll, rounded up."""
    return max(math.ceil(seconds * 1000), 0)


def over(operation: str) -> Exception:
    """Error for an operation whose caller already has a result or an error; never seen."""
    return ConnectionLost(f"{operation}: it was over")
