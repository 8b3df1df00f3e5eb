"""One node's socket among those that a thread of a blocking cache has for a cluster.

It waits for nothing by itself: who has it waits for all nodes at once.
"""

from __future__ import annotations

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

# While an operation waits, attempts to connect are no further apart; in seconds.
_LONGEST_PAUSE: Final = 0.25
# In what ways an attempt to connect fails; a host name may be none.
_FAILURES: Final = (RedisError, OSError, DscacheError, UnicodeError)


class NodeConnection(Connection):
    """A node's pipeline and, most of the time, a socket.

    ``ready`` tells that operations may be sent, ``opening`` that it is being connected, until
    ``limit``; after a failure not again before ``not_before``. ``wanted`` has it connected though
    no operation waits for it. ``events`` is what its socket is to be watched for.
    """

    __slots__ = (
        "_allowed",
        "_map",
        "_provider",
        "events",
        "failures",
        "limit",
        "not_before",
        "opening",
        "place",
        "unsent",
        "wanted",
    )

    def __init__(
        self,
        pipeline: Any,
        place: NodeInfo,
        cluster_map: ClusterState,
        provider: CredentialProvider | None,
    ) -> None:
        super().__init__(pipeline, place.options.command_timeout)
        self.place = place
        self.opening: Generator[int, None, ServerInfo] | None = None
        self.wanted = False
        self.events = IN
        self.limit = 0.0
        self._allowed = 0
        self.failures = 0
        self.not_before = 0.0
        self.unsent = NOTHING
        self._map = cluster_map
        self._provider = provider

    @property
    def is_busy(self) -> bool:
        """Whether anything waits here or is under way."""
        pipeline = self.pipeline
        under_way = pipeline.queued or pipeline.in_flight or pipeline.redirected
        return bool(under_way or self.unsent or self.opening)

    @property
    def fd(self) -> int:
        """The socket's file descriptor; there must be one."""
        fd: int = self._connection.sock.fileno()
        return fd

    @property
    def has_more(self) -> bool:
        """Whether OpenSSL keeps something that its socket brought, and which poll can't see."""
        pending = getattr(self._connection.sock, "pending", None)
        return pending is not None and pending() > 0

    # -- what is under way

    def check(self) -> bool:
        """Return whether something may be sent; what the node has closed is noticed before.

        Else that would cost a write its certainty.
        """
        if self.ready and not (self.pipeline.in_flight or self.unsent):
            return self.is_open()
        return self.ready

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
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
        """Have commands sent behind what is being sent; return what becomes of each."""
        outcomes: list[BlockingWaiter] = []
        self.unsent = memoryview(bytes(self.unsent) + packed(self.pipeline, commands, outcomes))
        return outcomes

    def receive(self) -> None:
        """Take what has come."""
        try:
            self._take()
        except (OSError, ProtocolError) as error:
            self._lose(error)

    def give_up(self, reason: str) -> None:
        """End a socket over which something is still to come, as nobody will be there for it."""
        self.disconnect()
        self.pipeline.connection_lost(ConnectionLost(reason), False)

    def _pump(self, outcome: BlockingWaiter, unsent: memoryview) -> None:
        # Who has the other nodes' lines too goes on from here.
        self.unsent = unsent

    def _note_loss(self, reason: str) -> None:
        self._map.record_loss(self.place, reason)

    # -- the socket

    def begin(self, now: float, limit: float) -> None:
        """Begin to connect, which has to be done by ``limit``."""
        self.limit = limit
        self._allowed = milliseconds(limit - now)
        self.opening = self._open()
        self.step()

    def step(self) -> None:
        """Go on connecting, as far as it goes without waiting."""
        assert self.opening is not None
        try:
            self.events = next(self.opening)
        except StopIteration as consent:
            self.opening = None
            self.failures = 0
            self.pipeline.down = None
            self.ready = True
            self.connects += 1
            self._map.record_connected(self.place, consent.value.server, self.connects > 1)
        except _FAILURES as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Note that an attempt to connect failed."""
        raise_foreign(error)
        options = self.place.options
        said = as_connect_error(error, self._allowed)
        self.disconnect()
        self.pipeline.connection_lost(error, True)
        self.pipeline.down = said
        refusal = permanent_failure(error, said, self.place.shown)
        self._map.record_unreachable(self.place, said, refusal)
        if refusal is not None:
            self.pipeline.fail_all(refusal)
        retry = options.retry_strategy
        # Full jitter: the threads of a server that restarts must not come all at once.
        longest = min(retry.cap / 1000, retry.first / 1000 * 2**self.failures, _LONGEST_PAUSE)
        self.failures = min(self.failures + 1, 30)
        self.not_before = time.monotonic() + random.uniform(0, longest)

    def _open(self) -> Generator[int, None, ServerInfo]:
        """Connect and greet the node; yields what its socket is to be watched for."""
        options = self.place.options
        login = login_of(options, self._provider)
        attempt = SocketConnect(options)
        # From here on it is found when this thread is interrupted, or the process forks.
        self._connection = attempt
        yield from attempt.steps()
        self._attach(attempt.sock)
        try:
            return (yield from self._greet(login))
        except DscacheError as error:
            raise_foreign(error)
            failure = without(error, secrets_of(options, login))
        raise failure

    def _greet(self, login: Login) -> Generator[int, None, ServerInfo]:
        options = self.place.options
        read_only = options.scale_reads != "master"
        words = handshake(options, login, self.place.shown, read_only=read_only)
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
            except StopIteration as consent:
                greeting: ServerInfo = consent.value
                return greeting

    def disconnect(self) -> None:
        """End the socket, if there is one, or the attempt to get one."""
        self.opening = None
        self.unsent = NOTHING
        super().disconnect()

    def leave(self) -> None:
        """Close the socket without a word to the node: it is another process's as well."""
        self.opening = None
        self.unsent = NOTHING
        super().leave()

    def interrupt(self, reason: Exception) -> None:
        """End the socket under a thread that waits at it, and let that be told as the reason."""
        self._reason = reason
        connection = self._connection
        sock = None if connection is None else connection._sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def milliseconds(seconds: float) -> int:
    """Return what to give to poll: at least as long."""
    return max(math.ceil(seconds * 1000), 0)
