"""A connection to one server for commands that aren't about single records: SCAN, INFO, TRACKING.

It has the socket, the handshake and the pipeline of a cache's own connection, or shares the socket
of a cache. It doesn't reconnect: a SCAN cursor and a tracking subscription end with their socket,
and only the caller knows what the gap costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from .. import _backend
from ..config import Options
from ..core.failures import remedy_of
from ..errors import ConnectionLost, DscacheError, ReplyError
from ..net.connect_errors import as_connect_error, connect_failure
from ..net.maintenance import NewAddress
from .connection import Connection
from .endpoint import Endpoint
from .protocol import SocketProtocol, request, request_greeting

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

RawCommand = Sequence[bytes | str | int]
"""The words of one command."""
Reply = Any
"""A reply of any RESP type; an error reply is a ReplyError."""

# Seconds without a reply after which the server counts as hung: every command here is short.
_ANSWER_TIMEOUT = 10.0


class ControlConnection:
    """One socket to one server: commands go out at once, and replies arrive in the same order.

    Made by ``open``, which connects, or by ``share``, which uses the socket of a cache.

    Attributes:
        address: ``host:port`` or the path of the server.
        server: The server's kind and version, such as ``redis 7.0.15``; empty if unknown.
    """

    def __init__(self, link: SocketProtocol, address: str, server: str, *, is_shared: bool) -> None:
        self.address = address
        self.server = server
        self._link = link
        self._is_shared = is_shared

    @classmethod
    async def open(
        cls,
        options: Options,
        on_push: Callable[[list[Reply]], object] | None = None,
        credentials: CredentialProvider | None = None,
        new_address: NewAddress | None = None,
    ) -> Self:
        """Connect to the server of these options and log in, within ``connectTimeout``.

        ``on_push`` is called with each RESP3 push. ``new_address`` is that of the cache, whose
        server may have moved. Raises ConnectError if the server can't be reached, and ReplyError
        if it refuses the handshake.
        """
        endpoint = Endpoint(options, credentials, new_address=new_address)
        pipeline = _backend.core.Pipeline(
            asyncio.get_running_loop().create_future,
            lambda: None,
            address=options.address,
            **options.for_pipeline(),
        )
        pipeline.on_push = on_push
        link = SocketProtocol(_IgnoreProgress(), pipeline)
        try:
            async with asyncio.timeout(options.connect_timeout / 1000):
                await endpoint.open(link)
                pipeline.address = endpoint.address
                info = await endpoint.greet(partial(request_greeting, link))
        except BaseException as error:
            link.abort(ConnectionLost("it was closed"))
            if isinstance(error, (OSError, DscacheError)):
                endpoint.note_failure()
                tried, in_tls = endpoint.tried, endpoint.in_tls
                said = as_connect_error(error, options.connect_timeout, tried, in_tls=in_tls)
                raise connect_failure(error, endpoint.address, said) from error
            raise
        return cls(link, endpoint.address, info.server, is_shared=False)

    @classmethod
    def share(cls, connection: Connection) -> Self:
        """Return a control connection over the current socket of a cache's connection.

        Raises ConnectionLost if that connection isn't ready.
        """
        link = connection.link
        if link is None:
            raise ConnectionLost(f"no connection to {connection.address}")
        return cls(link, connection.address, connection.server, is_shared=True)

    @property
    def lost(self) -> asyncio.Future[Exception]:
        """A future that resolves to the reason when the socket has ended."""
        return self._link.lost

    @property
    def tls(self) -> str:
        """The TLS version in use, such as ``TLSv1.3``; empty without TLS."""
        ssl_object = self._link.get_extra_info("ssl_object")
        return "" if ssl_object is None else ssl_object.version() or "TLS"

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine."""
        peer = self._link.get_extra_info("peername")
        if not isinstance(peer, tuple):
            return True  # a unix socket
        host = str(peer[0]).removeprefix("::ffff:")
        return host == "::1" or host.startswith("127.")

    async def execute_many(self, *commands: RawCommand) -> list[Reply]:
        """Return the replies to commands that are sent together, in order; errors included.

        Raises ConnectionLost if the socket ends first, or no reply arrives within 10 s.
        """
        if not commands:
            return []
        link = self._link
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT) as limit:
                return await request(link, *(list(command) for command in commands))
        except (OSError, DscacheError) as error:
            reason: Exception = error
            if link.lost.done():
                reason = link.lost.result()
            elif limit.expired():
                reason = ConnectionLost(f"it did not answer for {_ANSWER_TIMEOUT:.0f} s")
                link.abort(reason)
            raise ConnectionLost(f"connection to {self.address} lost: {reason}") from None

    async def execute(self, *command: bytes | str | int) -> Reply:
        """Return the reply to one command.

        Raises ReplyError for an error reply, and ConnectionLost as ``execute_many`` does.
        """
        (reply,) = await self.execute_many(command)
        if isinstance(reply, ReplyError):
            context = f"{command[0]!s} at {self.address}{remedy_of(reply.message)}"
            raise ReplyError(reply.message, context=context)
        return reply

    def close(self) -> None:
        """End the socket, unless a cache owns it; a second call does nothing."""
        if not self._is_shared:
            self._link.abort(ConnectionLost("it was closed"))


class _IgnoreProgress:
    """A ProtocolListener without a queue to flush."""

    def on_replies(self) -> None:
        """Do nothing: nothing waits for the window."""

    def on_writable(self) -> None:
        """Do nothing: every command is already written."""


async def is_clustered(server: ControlConnection) -> bool:
    """Return whether a server is a cluster node; False if it refuses CLUSTER INFO."""
    (reply,) = await server.execute_many(["CLUSTER", "INFO"])
    return isinstance(reply, bytes)
