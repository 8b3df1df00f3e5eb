"""One pooled connection of a blocking cache: a socket, the Pipeline over it, and an operation.

A Line serves one thread at a time, and that thread does everything: it sends, waits and receives.
Its pipeline outlives its sockets, as that of an asyncio connection does, and settles what becomes
of an operation whose socket is lost or whose time is over.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from ..core.constants import ErrorOf
from ..errors import ConnectionLost, ProtocolError
from ..net.credentials import packed
from .connector import Connector, ConnectTimeout, raise_foreign
from .waiter import BlockingWaiter

IN: Final = select.POLLIN
OUT: Final = select.POLLOUT
NOTHING: Final = memoryview(b"")
_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class _SecurePoller:
    """The poll object of a TLS socket, which also sees what OpenSSL keeps in its own memory.

    A read takes a part of a TLS record where the buffer ends. The rest of it has left the socket.
    """

    __slots__ = ("_kept", "_poller", "modify", "pending")

    def __init__(self, poller: Any, fd: int, pending: Callable[[], int]) -> None:
        self._poller = poller
        self._kept = [(fd, IN)]
        self.modify = poller.modify
        self.pending = pending

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        if self.pending():
            return self._kept
        ready: list[tuple[int, int]] = self._poller.poll(timeout)
        return ready


def _always(timeout: int) -> bool:
    """Say that there is something to be read, for whom a look costs less than an answer."""
    return True


class Connection:
    """A pipeline and, most of the time, a socket.

    ``admitted`` tells that it counts as one of its pool's, ``ready`` that it may be lent again as
    it is, ``retired`` that nobody is to get it again, ``gone`` that its socket was ended for good.
    ``loss`` is why its last socket was lost, and ``connects`` how many it has had.
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_events",
        "_fd",
        "_patience",
        "_poller",
        "_reason",
        "admitted",
        "connects",
        "gone",
        "is_readable",
        "loss",
        "pipeline",
        "ready",
        "retired",
        "sock",
    )

    def __init__(self, pipeline: Any, timeout: int) -> None:
        self.pipeline = pipeline
        self.sock: socket.socket | None = None
        self.admitted = False
        self.ready = False
        self.retired = False
        self.gone = False
        self.is_readable: Callable[[int], object] = _always
        self._connection: Any = None
        self._poller: Any = None
        self._events = IN
        self._fd = -1
        self._patience = timeout
        self._reason: Exception | None = None
        self.loss = ""
        self.connects = 0

    # -- one operation

    def send_and_receive(self, outcome: BlockingWaiter) -> bool:
        """Try what nearly every operation takes: one send, one wait, one receive.

        Returns whether it has its outcome. Without it, ``stream`` goes on from there if there is
        still a socket.
        """
        sock = self.sock
        if sock is None:
            return False
        # Before anything is sent: a server that went away costs a plain write its certainty,
        # and what nobody asked for must not be taken for the answer.
        if self.is_readable(0) and self._is_stale(sock):
            return False
        pipeline = self.pipeline
        output = pipeline.take_output()
        if not output:  # this thread was away for so long that the time is over
            return outcome.done
        sent = 0
        try:
            try:
                # While the rest of a bulk is encoded, the server works on what it has.
                while output:
                    sent = 0
                    sent = sock.send(output)
                    if sent < len(output):
                        break
                    output = pipeline.take_output() if pipeline.queued else b""
                # Its time may have ended in between, and then there is nothing to wait for.
                patience = 0 if outcome.done else self._patience
                if not output and self._poller.poll(patience):
                    size = sock.recv_into(pipeline.get_buffer(-1))
                    if not size:
                        raise ConnectionLost("the server closed it")
                    pipeline.buffer_updated(size)
                    if outcome.done and not pipeline.in_flight:
                        return True
            except _NOT_NOW as error:
                # The buffer is full, or TLS had something to say to itself. Where it was raised
                # by a signal handler, it isn't known how much was sent.
                raise_foreign(error)
            self._pump(outcome, memoryview(output)[sent:])
        except (OSError, ProtocolError) as error:
            self._lose(error)
        return outcome.done

    def expire(self, now: float) -> float | None:
        """Fail an operation whose deadline is past; return the deadline of one under way."""
        deadline: float | None = self.pipeline.expire(now)
        return deadline

    def fail_all(self, error_of: ErrorOf) -> None:
        """Fail the operation that is under way."""
        self.pipeline.fail_all(error_of)

    def take_over(self, spare: Connection) -> None:
        """Go on with the operation of a line that has no place."""
        given = spare.pipeline.take_queued(lambda kind, name: self.pipeline)
        self.pipeline.requeue([batch for _, batch in given])

    def stream(self, outcome: BlockingWaiter) -> None:
        """Go on with an operation until it has its outcome or the socket is lost."""
        try:
            self._pump(outcome, NOTHING)
        except (OSError, ProtocolError) as error:
            self._lose(error)

    def _pump(self, outcome: BlockingWaiter, unsent: memoryview) -> None:
        """Send and receive, both as far as they go: with full buffers on both sides, a server
        reads no more until its replies are read."""
        pipeline = self.pipeline
        deadline = -math.inf
        while True:
            now = time.monotonic()
            if now >= deadline:
                deadline = pipeline.expire(now)
            if outcome.done:
                break
            events = IN
            while unsent or (pipeline.queued and (unsent := memoryview(pipeline.take_output()))):
                unsent, events = self._send(unsent)
                if unsent:
                    break
            self._receive(events, deadline)
        if pipeline.in_flight or unsent:
            # The answers are still to come, and nobody will be there for them.
            self.disconnect()
            pipeline.connection_lost(ConnectionLost("it was given up"), False)

    def _send(self, data: memoryview) -> tuple[memoryview, int]:
        """Send what the socket takes; return the rest, and what to wait for because of it."""
        assert self.sock is not None
        try:
            sent = self.sock.send(data)
        except _NOT_NOW as error:
            raise_foreign(error)
            return data, IN if isinstance(error, ssl.SSLWantReadError) else IN | OUT
        return data[sent:], IN | OUT if sent < len(data) else IN

    def _receive(self, events: int, deadline: float) -> None:
        """Wait until ``deadline`` for what comes, and take it; or until more can be sent."""
        assert self.sock is not None
        if events != self._events:
            self._poller.modify(self._fd, events)
            self._events = events
        wait = max(math.ceil((deadline - time.monotonic()) * 1000), 0)
        ready = self._poller.poll(wait)
        if events != IN:
            self._poller.modify(self._fd, IN)
            self._events = IN
        if ready and ready[0][1] != OUT:
            self._take()

    def _take(self) -> None:
        """Take what has come, if anything has."""
        assert self.sock is not None
        try:
            size = self.sock.recv_into(self.pipeline.get_buffer(-1))
        except _NOT_NOW as error:
            raise_foreign(error)
            return
        if not size:
            raise ConnectionLost("the server closed it")
        self.pipeline.buffer_updated(size)

    def _lose(self, reason: Exception) -> None:
        """End the socket; what may be repeated waits for the next one."""
        raise_foreign(reason)
        reason = self._reason or reason
        self.disconnect()
        self._note_loss(str(reason))
        self.pipeline.down = ConnectionLost(f"connection lost: {reason}")
        self.pipeline.connection_lost(reason, not isinstance(reason, ProtocolError))

    def _is_stale(self, sock: socket.socket) -> bool:
        """Whether the socket has ended, or brought something that nobody asked for.

        What TLS has to say to itself is none of it. A stale socket is no more when this returns.
        """
        loss = "it brought what nobody had asked for"
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

    def _note_loss(self, reason: str) -> None:
        self.loss = reason

    # -- the socket

    def open(self, dialer: Connector, deadline: float) -> str:
        """Connect and greet the server; return its address and what it says it is.

        Raises OSError, RedisError or a DscacheError.
        """
        call = dialer.call(deadline)
        # From here on it is found when this thread is interrupted, or the process forks.
        self._connection = call.connection
        self._attach(call.connect())
        pipeline = self.pipeline
        pipeline.address = call.address
        greeting = call.greet(lambda commands: self._ask(commands, deadline))
        pipeline.has_msetex = greeting.has_msetex
        pipeline.down = None
        self.ready = True
        server: str = greeting.server
        return server

    def _attach(self, sock: socket.socket) -> None:
        self.sock = sock
        self._fd = sock.fileno()
        self._events = IN
        poller = select.poll()
        poller.register(self._fd, IN)
        genuine = type(poller).__module__ == "select"
        pending = getattr(sock, "pending", None)
        self._poller = poller if pending is None else _SecurePoller(poller, self._fd, pending)
        # gevent's poll of no time sees nothing.
        self.is_readable = self._poller.poll if genuine else _always

    def _ask(self, commands: list[list[Any]], deadline: float) -> list[Any]:
        """Return the replies to some commands, errors of Redis among them."""
        outcomes: list[BlockingWaiter] = []
        unsent = memoryview(packed(self.pipeline, commands, outcomes))
        events = IN
        while not all(outcome.done for outcome in outcomes):
            if time.monotonic() >= deadline:
                raise ConnectTimeout
            if unsent:
                unsent, events = self._send(unsent)
            self._receive(events, deadline)
        return [outcome.reply() for outcome in outcomes]

    def disconnect(self) -> None:
        """End the socket, if there is one."""
        self.ready = False
        self.sock = None
        self.is_readable = _always
        connection = self._connection
        if connection is not None:
            connection.disconnect()
            self._connection = None

    def is_open(self) -> bool:
        """Whether there is a socket, and as far as can be told the server at its other end."""
        sock = self.sock
        if sock is None:
            return False
        return not (self.is_readable(0) and self._is_stale(sock))

    def leave(self) -> None:
        """Close the socket without a word to the server: it is another process's as well."""
        connection, sock = self._connection, self.sock
        self.admitted = self.ready = False
        self.sock = self._connection = None
        if connection is not None:
            sock, connection._sock = connection._sock, None
        if sock is not None:
            sock.close()

    def interrupt(self, reason: Exception) -> None:
        """End the socket under a thread that waits at it, and let that be told as the reason."""
        self._reason = reason
        sock = self.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def clear(self) -> None:
        """Take back an operation that was refused, as far as it had come; nothing was sent."""
        self.pipeline.fail_all(refused)

    def discard(self) -> None:
        """End the line for good."""
        self.gone = True
        self.disconnect()


def refused(operation: str) -> Exception:
    """Return what nobody is told: whoever asked for it was told by what it raised."""
    return ConnectionLost(f"{operation}: it was refused")
