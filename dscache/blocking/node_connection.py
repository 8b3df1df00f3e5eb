"""A blocking connection to one node of a cluster, driven by poll.

It never waits by itself: the ClusterConnection that holds it waits for all nodes at once.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Final

from ..core.constants import LEFT_FOR
from ..core.failures import EndedHere, ErrorOf
from ..errors import DscacheError, ProtocolError
from ..net.backoff import pause_while_waiting
from ..net.cluster_state import ClusterState
from ..net.handshake import ServerInfo
from ..net.slot_table import NodeInfo
from .connection import Connection, milliseconds
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from ..core.pure import Pipeline
    from ..net.credentials import Logins

# Errors of an attempt to connect; UnicodeError for a text that can't be a host.
_FAILURES: Final = (OSError, DscacheError, UnicodeError)


class NodeConnection(Connection):
    """A node's pipeline and, most of the time, a socket.

    ``ready``: operations may be sent. ``opening``: the attempt to connect under way, which ends at
    ``limit``; after a failure, none begins before ``not_before``. ``wanted``: connect although no
    operation waits for the node. ``node_id``: the node's id, empty if it doesn't tell it.
    ``has_new_deadline``: the deadlines of operations have changed since it was last false.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        info: NodeInfo,
        state: ClusterState,
        logins: Logins,
    ) -> None:
        super().__init__(pipeline, info)
        self.opening: Generator[int, None, ServerInfo] | None = None
        self.wanted = False
        self.has_new_deadline = False
        self.node_id = ""
        self.limit = 0.0
        self._allowed = 0
        self.failures = 0
        self.not_before = 0.0
        self._state = state
        self._logins = logins

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
            if self.pipeline.away:
                self._log_in_again()
            return self.is_open()
        return self.ready

    def _log_in_again(self) -> None:
        """End a socket whose login the node has ended."""
        reason = EndedHere(LEFT_FOR[self.pipeline.away])
        self.pipeline.away = ""
        self._lose(reason)

    def flush(self) -> None:
        """Send the output, as far as the socket takes it."""
        try:
            self._flush()
        except OSError as error:
            self._lose(error)

    def receive(self) -> None:
        """Take the data that has arrived."""
        try:
            self._take()
        except (OSError, ProtocolError) as error:
            self._lose(error)

    def _pump(self, outcome: BlockingWaiter) -> None:
        """Leave the rest to the ClusterConnection, which also sends the other nodes' output."""

    def expire_soon(self) -> None:
        self.has_new_deadline = True

    def _note_loss(self, reason: str) -> None:
        super()._note_loss(reason)
        self._state.exclude_replica(self.info)
        self._state.record_loss(self.info, reason)

    # -- the socket

    def begin(self, now: float, limit: float) -> None:
        """Begin to connect, with ``limit`` as the deadline."""
        self.limit = limit
        self._allowed = milliseconds(limit - now)
        options = self.info.options
        self.opening = self._connect(
            *self.info.address,
            self._logins,
            read_only=options.scale_reads != "master",
            of_cluster=True,
        )
        self.step()

    def step(self) -> None:
        """Go on connecting until the next wait."""
        assert self.opening is not None
        try:
            try:
                self.events = next(self.opening)
                return
            except StopIteration as done:
                server: ServerInfo = done.value
            self._state.check_identity(self.info, server.node_id)
            self.opening = None
            self.failures = 0
            self.node_id = server.node_id
            self._note_connected(server.server)
            self._state.record_connected(self.info, server.server, self.connects > 1)
            self._state.record_zone(self.info, server.zone)
        except _FAILURES as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Note a failed attempt to connect."""
        refusal = self.note_failure(error, self._allowed)
        if refusal is not None:
            self.pipeline.fail_all(refusal)
        pause = pause_while_waiting(self.info.options.retry_strategy, self.failures)
        self.failures += 1
        self.not_before = time.monotonic() + pause

    def _record_failure(self, failure: Exception, refusal: ErrorOf | None) -> None:
        self._state.exclude_replica(self.info)
        self._state.record_unreachable(self.info, failure, refusal)

    def check_identity(self) -> None:
        """End the connection if the cluster has another node at this address by now."""
        ids = (self.node_id, self.info.node_id)
        if self.ready and not all(self._state.may_use(self.info, one) for one in ids):
            self._lose(EndedHere("the cluster has another node at its address"))

    def disconnect(self) -> None:
        """Close the socket, if there is one, or end the attempt to connect."""
        self.opening = None
        super().disconnect()
