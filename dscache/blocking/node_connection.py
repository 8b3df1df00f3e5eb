"""One thread's connection to one node of a cluster.

It never waits by itself: its ClusterConnection polls the sockets of all nodes at once.
"""

from __future__ import annotations

import logging
import math
import random
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import RedisError

from ..errors import ConnectionLost, DscacheError, ProtocolError
from ..net.cluster_state import ClusterState
from ..net.credentials import Login, packed, without
from ..net.handshake import ServerInfo, as_connect_error, handshake, permanent_failure, secrets_of
from ..net.slot_table import NodeInfo
from ..net.sockets import SocketConnect
from .connection import IN, NOTHING, Connection
from .connector import login_of, raise_foreign
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.pipeline import Pipeline

_logger = logging.getLogger("dscache")

# The longest pause between attempts to connect while an operation waits, in seconds.
_LONGEST_PAUSE: Final = 0.25
# The exceptions of a failed attempt to connect; UnicodeError is an invalid host name.
_FAILURES: Final = (RedisError, OSError, DscacheError, UnicodeError)


class NodeConnection(Connection):
    """A node's pipeline and, most of the time, a socket.

    ``ready`` says that operations may be sent. ``opening`` is the attempt to connect under way,
    which ends at ``limit``; after a failure, none begins before ``not_before``. Both are times of
    ``time.monotonic()``. ``wanted`` asks for a connection although no operation waits for it.
    ``events`` is the poll mask of the socket. ``unsent`` are bytes that the socket didn't take yet.
    """

    __slots__ = (
        "_allowed",
        "_provider",
        "_state",
        "events",
        "failures",
        "info",
        "limit",
        "not_before",
        "opening",
        "unsent",
        "wanted",
    )

    def __init__(
        self,
        pipeline: Pipeline,
        info: NodeInfo,
        state: ClusterState,
        provider: CredentialProvider | None,
    ) -> None:
        super().__init__(pipeline, info.options.command_timeout)
        self.info = info
        self.opening: Generator[int, None, ServerInfo] | None = None
        self.wanted = False
        self.events = IN
        self.limit = 0.0
        self._allowed = 0
        self.failures = 0
        self.not_before = 0.0
        self.unsent = NOTHING
        self._state = state
        self._provider = provider

    @property
    def is_busy(self) -> bool:
        """Whether an operation or an attempt to connect is under way or waits."""
        pipeline = self.pipeline
        under_way = pipeline.queued or pipeline.in_flight or pipeline.redirected
        return bool(under_way or self.unsent or self.opening)

    @property
    def fd(self) -> int:
        """The file descriptor of the socket, which must exist."""
        fd: int = self._connection.sock.fileno()
        return fd

    @property
    def has_more(self) -> bool:
        """Whether OpenSSL has decrypted bytes of the socket, which poll can't see."""
        pending = getattr(self._connection.sock, "pending", None)
        return pending is not None and pending() > 0

    # -- operations under way

    def check(self) -> bool:
        """Return whether operations may be sent, and note a socket that the node has closed.

        A write sent to a closed socket would have an unknown outcome.
        """
        if self.ready and not (self.pipeline.in_flight or self.unsent):
            return self.is_open()
        return self.ready

    def flush(self) -> None:
        """Send waiting operations, as far as the socket takes their bytes."""
        pipeline = self.pipeline
        unsent, self.events = self.unsent, IN
        try:
            while unsent or (pipeline.queued and (unsent := memoryview(pipeline.take_output()))):
                unsent, self.events = self._send(unsent)
                self.unsent = unsent
                if unsent:
                    break
        except OSError as error:
            self._lose(error)

    def ask(self, commands: Sequence[Sequence[Any]]) -> list[BlockingWaiter]:
        """Queue commands behind the bytes being sent; return the waiter of each reply."""
        outcomes: list[BlockingWaiter] = []
        self.unsent = memoryview(bytes(self.unsent) + packed(self.pipeline, commands, outcomes))
        return outcomes

    def receive(self) -> None:
        """Take the bytes that have arrived."""
        try:
            self._take()
        except (OSError, ProtocolError) as error:
            self._lose(error)

    def give_up(self, reason: str) -> None:
        """End a socket whose outstanding replies no operation waits for any more."""
        self.disconnect()
        self.pipeline.connection_lost(ConnectionLost(reason), False)

    def _pump(self, outcome: BlockingWaiter, unsent: memoryview) -> None:
        # The ClusterConnection goes on, together with the other nodes.
        self.unsent = unsent

    def _note_loss(self, reason: str) -> None:
        _logger.info("connection to %s lost: %s", self.info.shown, reason)
        self._state.exclude_replica(self.info)
        self._state.record_loss(self.info, reason)

    # -- the socket

    def begin(self, now: float, limit: float) -> None:
        """Begin an attempt to connect that ends at ``limit``; both times are monotonic."""
        self.limit = limit
        self._allowed = milliseconds(limit - now)
        self.opening = self._open()
        self.step()

    def step(self) -> None:
        """Go on connecting, as far as possible without waiting."""
        assert self.opening is not None
        try:
            self.events = next(self.opening)
        except StopIteration as done:
            self._note_connected(done.value)
        except _FAILURES as error:
            self.fail(error)

    def _note_connected(self, server: ServerInfo) -> None:
        self.opening = None
        self.failures = 0
        self.pipeline.down = None
        self.ready = True
        self.connects += 1
        self._state.record_connected(self.info, server.server, self.connects > 1)
        _logger.info("connected to %s (%s)", self.info.shown, server.server or "server unknown")

    def fail(self, error: Exception) -> None:
        """Note a failed attempt to connect."""
        raise_foreign(error)
        options = self.info.options
        failure = as_connect_error(error, self._allowed)
        self.disconnect()
        self.pipeline.connection_lost(error, True)
        self.pipeline.down = failure
        refusal = permanent_failure(error, failure, self.info.shown)
        if str(failure) != str(self.info.trouble):
            _logger.warning("can't connect to %s: %s", self.info.shown, failure)
        self._state.exclude_replica(self.info)
        self._state.record_unreachable(self.info, failure, refusal)
        if refusal is not None:
            self.pipeline.fail_all(refusal)
        retry = options.retry_strategy
        # Full jitter: after a restart of the server, the threads must not all connect at once.
        longest = min(retry.cap / 1000, retry.first / 1000 * 2**self.failures, _LONGEST_PAUSE)
        self.failures = min(self.failures + 1, 30)
        self.not_before = time.monotonic() + random.uniform(0, longest)

    def _open(self) -> Generator[int, None, ServerInfo]:
        """Connect and do the handshake; yields the poll mask to wait for."""
        options = self.info.options
        login = login_of(options, self._provider)
        attempt = SocketConnect(options)
        # From here on, an interruption of the thread or a fork of the process finds the socket.
        self._connection = attempt
        yield from attempt.steps()
        self._attach(attempt.sock)
        try:
            return (yield from self._handshake(login))
        except DscacheError as error:
            raise_foreign(error)
            failure = without(error, secrets_of(options, login))
        raise failure

    def _handshake(self, login: Login) -> Generator[int, None, ServerInfo]:
        options = self.info.options
        read_only = options.scale_reads != "master"
        words = handshake(options, login, self.info.shown, read_only=read_only)
        commands = next(words)
        while True:
            asked = self.ask(commands)
            while not all(outcome.done for outcome in asked):
                events = IN
                if self.unsent:
                    self.unsent, events = self._send(self.unsent)
                yield events
                self._take()
            try:
                commands = words.send([outcome.reply() for outcome in asked])
            except StopIteration as done:
                server: ServerInfo = done.value
                return server

    def disconnect(self) -> None:
        """End the socket, or the attempt to connect."""
        self.opening = None
        self.unsent = NOTHING
        super().disconnect()

    def leave(self) -> None:
        """Close the socket without a message to the node: another process uses it too."""
        self.opening = None
        self.unsent = NOTHING
        super().leave()

    def interrupt(self, reason: Exception) -> None:
        """End the socket while its thread waits for it; operations fail with ``reason``."""
        self._reason = reason
        connection = self._connection
        sock = None if connection is None else connection._sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def milliseconds(seconds: float) -> int:
    """Return the timeout for poll, in milliseconds: rounded up and not negative."""
    return max(math.ceil(seconds * 1000), 0)
