"""A blocking connection to one server for commands that aren't about single records.

It has the socket, the handshake and the pipeline of a cache's own connection. It doesn't
reconnect: a SCAN cursor and a tracking subscription end with their socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from .. import _backend
from ..config import Options
from ..core.failures import EndedHere
from ..errors import ConnectionLost, DscacheError, ProtocolError
from ..net.connect_errors import as_connect_error, connect_failure
from ..net.maintenance import NewAddress
from ..net.slot_table import NodeInfo
from .connection import Connection
from .connector import Connector
from .foreign_errors import raise_foreign
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

RawCommand = Sequence[bytes | str | int]
"""The words of one command."""

# Seconds without a reply after which the server counts as hung: every command here is short.
_ANSWER_TIMEOUT: Final = 10.0
_FAILURES: Final = (OSError, DscacheError, UnicodeError)


class ControlConnection(Connection):
    """One socket to one server: commands go out at once, and replies arrive in the same order.

    ``on_push`` is called with each RESP3 push. It serves one thread at a time, except that any
    thread may ``interrupt`` it.
    """

    __slots__ = ()

    def __init__(
        self, options: Options, on_push: Callable[[list[Any]], object] | None = None
    ) -> None:
        pipeline = _backend.core.Pipeline(
            BlockingWaiter, _no_wakeup, address=options.address, **options.for_pipeline()
        )
        pipeline.on_push = on_push
        super().__init__(pipeline, NodeInfo(options))

    def connect(
        self, provider: CredentialProvider | None, new_address: NewAddress | None = None
    ) -> Self:
        """Connect to the server of the options and log in, within ``connectTimeout``.

        ``new_address`` is that of the cache, whose server may have moved. Raises ConnectError if
        the server can't be reached, and ReplyError if it refuses.
        """
        options = self.info.options
        deadline = time.monotonic() + options.connect_timeout / 1000
        connector = Connector(options, provider, new_address)
        moved = connector.new_address.get()
        try:
            self.open(connector, deadline)
        except BaseException as error:
            self.discard()
            if not isinstance(error, _FAILURES):
                raise
            raise_foreign(error)
            connector.new_address.note_failure(moved)
            said = self._reason or as_connect_error(error, options.connect_timeout)
            raise connect_failure(error, self.pipeline.address, said) from error
        return self

    def request(self, *commands: RawCommand) -> list[Any]:
        """Return the replies to commands that are sent together, in order; errors included.

        Raises ConnectionLost if the socket ends first, or no reply arrives within 10 s.
        """
        deadline = time.monotonic() + _ANSWER_TIMEOUT
        waiters = self.ask(commands)
        try:
            while not all(waiter.done for waiter in waiters):
                if time.monotonic() >= deadline:
                    raise EndedHere(f"it did not answer for {_ANSWER_TIMEOUT:.0f} s")
                self.take(deadline)
        except BaseException:
            self.discard()  # a later request would get its replies
            raise
        return [waiter.reply() for waiter in waiters]

    def take(self, deadline: float) -> None:
        """Wait for data until the deadline, and take it; replies and pushes are handled here.

        Raises ConnectionLost if the socket has ended.
        """
        try:
            if self.sock is None:
                raise self._reason or ConnectionLost("it was closed")
            if self.unsent:
                self._send()
            self._receive(deadline)
            if self._reason is not None:
                raise self._reason
        except (OSError, ProtocolError) as error:
            raise_foreign(error)
            reason = self._reason or error
            address = self.pipeline.address
            self.discard()
            raise ConnectionLost(f"connection to {address} lost: {reason}") from None


def _no_wakeup() -> None:
    """Do nothing when an operation is queued: none is."""
