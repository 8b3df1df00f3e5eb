"""A blocking connection to one node of a cluster, driven by poll.

It never waits by itself: the ClusterConnection that holds it waits for all nodes at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Final

from ..errors import ConnectionLost, DscacheError, ProtocolError
from ..net.backoff import MAX_PAUSE_WHILE_WAITING, full_jitter
from ..net.cluster_state import ClusterState
from ..net.connect_errors import as_connect_error, permanent_failure
from ..net.credentials import Word, packed
from ..net.handshake import ServerInfo
from ..net.slot_table import NodeInfo
from .connection import IN, NOTHING, Connection
from .credentials import current_login
from .foreign_errors import raise_foreign
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.pure import Pipeline

_logger = logging.getLogger("dscache")

# Errors of an attempt to connect; UnicodeError for a text that can't be a host.
_FAILURES: Final = (OSError, DscacheError, UnicodeError)


class NodeConnection(Connection):
    """A node's pipeline and, most of the time, a socket.

    ``ready``: operations may be sent. ``opening``: the attempt to connect under way, which ends at
    ``limit``; after a failure, none begins before ``not_before``. ``wanted``: connect although no
    operation waits for the node. ``events``: the events of poll to wait for.
    """

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
        """Whether an operation or an attempt to connect is under way."""
        pipeline = self.pipeline
        under_way = pipeline.queued or pipeline.in_flight or pipeline.redirected
        return bool(under_way or self.unsent or self.opening)

    # -- operations under way

    def check(self) -> bool:
        """Whether operations may be sent; notices first if the node has closed the connection.

        Otherwise the result of a write would be unknown.
        """
        if self.ready and not (self.pipeline.in_flight or self.unsent):
            return self.is_open()
        return self.ready

    def flush(self) -> None:
        """Send the output, as far as the socket takes it."""
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

    def ask(self, commands: Sequence[Sequence[Word]]) -> list[BlockingWaiter]:
        """Send commands behind the present output; return the waiters for their replies."""
        outcomes: list[BlockingWaiter] = []
        self.unsent = memoryview(bytes(self.unsent) + packed(self.pipeline, commands, outcomes))
        return outcomes

    def receive(self) -> None:
        """Take the data that has arrived."""
        try:
            self._take()
        except (OSError, ProtocolError) as error:
            self._lose(error)

    def give_up(self, reason: str) -> None:
        """End a socket with replies outstanding that no operation awaits any more."""
        self.disconnect()
        self.pipeline.connection_lost(ConnectionLost(reason), False)

    def _pump(self, outcome: BlockingWaiter, unsent: memoryview) -> None:
        # The ClusterConnection sends the rest, beside the other nodes' output.
        self.unsent = unsent

    def _note_loss(self, reason: str) -> None:
        _logger.info("connection to %s lost: %s", self.info.shown, reason)
        self._state.exclude_replica(self.info)
        self._state.record_loss(self.info, reason)

    # -- the socket

    def begin(self, now: float, limit: float) -> None:
        """Begin to connect, with ``limit`` as the deadline."""
        self.limit = limit
        self._allowed = milliseconds(limit - now)
        options = self.info.options
        self.opening = self._connect(
            options,
            *self.info.address,
            self.info.shown,
            lambda: current_login(options, self._provider),
            read_only=options.scale_reads != "master",
        )
        self.step()

    def step(self) -> None:
        """Go on connecting until the next wait."""
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
        longest = min(retry.cap / 1000, MAX_PAUSE_WHILE_WAITING)
        pause = full_jitter(retry.first / 1000, longest, self.failures)
        self.failures += 1
        self.not_before = time.monotonic() + pause

    def disconnect(self) -> None:
        """Close the socket, if there is one, or end the attempt to connect."""
        self.opening = None
        self.unsent = NOTHING
        super().disconnect()


def milliseconds(seconds: float) -> int:
    """Return a timeout for poll, rounded up."""
    return max(math.ceil(seconds * 1000), 0)
