"""One node's socket among those that a thread of a blocking cache has for a cluster.

It waits for nothing by itself: who has it waits for all nodes at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConnectionLost, DscacheError, ProtocolError
from ..net.backoff import MAX_PAUSE_WHILE_WAITING, full_jitter
from ..net.cluster_state import ClusterState
from ..net.connect_errors import as_connect_error, permanent_failure
from ..net.credentials import packed
from ..net.handshake import ServerInfo
from ..net.slot_table import NodeInfo
from .connection import IN, NOTHING, Connection
from .credentials import current_login
from .foreign_errors import raise_foreign
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

# In what ways an attempt to connect fails; a host name may be none.
_FAILURES: Final = (OSError, DscacheError, UnicodeError)


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
        options = self.place.options
        self.opening = self._connect(
            options,
            *self.place.address,
            self.place.shown,
            lambda: current_login(options, self._provider),
            read_only=options.scale_reads != "master",
        )
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
        longest = min(retry.cap / 1000, MAX_PAUSE_WHILE_WAITING)
        pause = full_jitter(retry.first / 1000, longest, self.failures)
        self.failures += 1
        self.not_before = time.monotonic() + pause

    def disconnect(self) -> None:
        """End the socket, if there is one, or the attempt to get one."""
        self.opening = None
        self.unsent = NOTHING
        super().disconnect()


def milliseconds(seconds: float) -> int:
    """Return what to give to poll: at least as long."""
    return max(math.ceil(seconds * 1000), 0)
