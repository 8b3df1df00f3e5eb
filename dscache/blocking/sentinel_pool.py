"""The pool of a blocking cache's connections to a server that Sentinels name.

Theory of operation
-------------------
No thread listens to the Sentinels. Before a thread sends an operation, it asks them itself if their
last answer is older than ``_LOOK_AFTER``, and one thread at a time does. The operation is queued by
then, so the time counts for its deadline. If the Sentinels name another primary, the connections to
the old one are replaced, and the operation goes to the new one. Without an answer the connections
stay, and the next look comes later and later.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final
from weakref import ref

from ..config import Options
from ..config.address import join_address
from ..core import constants
from ..core.holder import Holder, Place
from ..errors import ConnectError
from ..net.slot_table import NodeInfo
from .connection import Connection
from .foreign_errors import ConnectTimeout, raise_foreign
from .pool import Pool
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.pure import Pipeline

# How old the last answer of the Sentinels may be when an operation is sent, in seconds.
_LOOK_AFTER: Final = 1.0
# The longest time between two looks while no Sentinel answers, in seconds.
_LOOK_CAP: Final = 10.0
# The part of an operation's time that a look may take.
_SHARE: Final = 0.5


class SentinelConnection(Connection):
    """A connection that first has its pool look for another primary, if that is due."""

    __slots__ = ("_pool",)

    def __init__(self, pipeline: Pipeline, info: NodeInfo, pool: SentinelPool) -> None:
        super().__init__(pipeline, info)
        self._pool = ref(pool)  # which refers to it: a cycle would outlive a dropped cache

    def send_and_receive(self, outcome: BlockingWaiter) -> bool:
        pool = self._pool()
        if pool is not None and self.sock is not None:
            pool.look(self)
        return super().send_and_receive(outcome)


class SentinelPool(Pool):
    """The connections to the primary of a group, or to its replicas."""

    def __init__(self, options: Options, provider: CredentialProvider | None = None) -> None:
        super().__init__(options, provider)
        self._looking = Place()
        self._look_at = 0.0
        self._failures = 0

    def _new_connection(self) -> Connection:
        connection: Connection
        if self._options.role == "master":
            connection = SentinelConnection(self._new_pipeline(), self._info, self)
        else:
            connection = Connection(self._new_pipeline(), self._info)
        return self._prepared(connection)

    def _note_success(self, connection: Connection, server: str) -> None:
        self._note_answer()
        before = self.address
        super()._note_success(connection, server)
        if self.address != before:
            self._leave_others(connection)

    def _note_error(self, connection: Connection) -> None:
        """Replace the connections to a server that has become a replica.

        If it misses its replicas (NOREPLICAS), the Sentinels are asked at the next operation: they
        may have promoted another one.
        """
        code = connection.pipeline.away
        super()._note_error(connection)
        if self._options.role != "master":
            return
        if code in constants.LEFT_FOR:
            address = connection.pipeline.address
            self._retire(
                lambda other: other is not connection and other.pipeline.address == address
            )
            if connection.sock is not None:
                connection.retired = True
        elif code == "NOREPLICAS":
            self._look_at = 0.0

    def look(self, connection: Connection) -> None:
        """Ask the Sentinels for the primary if that is due; leave the others."""
        now = time.monotonic()
        if now < self._look_at:
            return
        holder: Holder | None = None
        try:
            holder = self._looking.take()
            if holder is None:
                return
            options = self._options
            limit = min(options.connect_timeout, options.command_timeout * _SHARE) / 1000
            self._failures += 1
            self._look_at = now + min(_LOOK_AFTER * self._failures, _LOOK_CAP)
            try:
                host, port = self._connector.locate(now + limit)
            except (ConnectError, ConnectTimeout) as error:
                raise_foreign(error)
                return
            self._note_answer()
            named = join_address(host, port)
            if named != connection.pipeline.address:
                self._retire(
                    lambda other: other is not connection and other.pipeline.address != named
                )
                connection.disconnect()  # nothing was sent: its operation goes to the new one
        finally:
            # A traceback may be kept for long, and must not keep the place.
            del holder

    def follow(self, address: str) -> None:
        """Leave all other servers for the one at an address, which Sentinels name.

        Raises ConnectError if there is none within ``connectTimeout``, or if they name another.
        """
        self._retire(lambda other: other.pipeline.address != address)
        if self.address != address:
            self.when_ready()
        if self.address != address:
            raise ConnectError(f"the Sentinels name another primary than {address}")

    def _note_answer(self) -> None:
        self._failures = 0
        self._look_at = time.monotonic() + _LOOK_AFTER

    def _leave_others(self, connection: Connection) -> None:
        """Replace the connections to another server than this one's."""
        address = connection.pipeline.address
        self._retire(lambda other: other.pipeline.address != address)

    def reset_after_fork(self) -> None:
        super().reset_after_fork()
        # Another thread may have held it, which the child doesn't have.
        self._looking = Place()
