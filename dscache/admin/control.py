"""A connection to one server for whatever isn't about single records: scanning, asking, hearing.

It is made just as a cache makes its own, by the same Endpoint, and is not made again once it is
lost: who uses it knows what a gap means there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis

from ..aio.credentials import Credentials
from ..aio.endpoint import Endpoint
from ..config import Options
from ..errors import ConnectError, ConnectionLost, DscacheError, ProtocolError, ReplyError
from ..net.connect_errors import as_connect_error
from ..net.credentials import revealed
from ..net.handshake import ServerInfo

RawCommand = Sequence[bytes | str | int]

# hiredis's stubs give both of them narrower types than they have.
_pack: Any = hiredis.pack_command
_Reader: Any = hiredis.Reader

_READ_BYTES = 256 * 1024
_INCOMPLETE = object()
# A server that doesn't answer for so long, in seconds, has hung: no command here takes long.
_PATIENCE = 10.0


class ControlConnection(asyncio.BufferedProtocol):
    """One socket to one server: commands go out at once, replies come back in their order.

    ``pushed`` is called with each push of RESP3. ``lost`` is done when the socket has ended, with
    the reason.
    """

    def __init__(self, pushed: Callable[[list[Any]], None] | None = None) -> None:
        self.address = ""
        self.greeting = ServerInfo("", False)
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._pushed = pushed
        self._transport: asyncio.Transport | None = None
        self._reason: Exception | None = None
        self._reader = _Reader(notEnoughData=_INCOMPLETE, replyError=ReplyError)
        self._buffer = bytearray(_READ_BYTES)
        # Who waits for replies: how many are still to come, those that are here, the waiter.
        self._waiting: deque[tuple[int, list[Any], asyncio.Future[list[Any]]]] = deque()

    @classmethod
    async def open(
        cls, options: Options, pushed: Callable[[list[Any]], None] | None = None
    ) -> ControlConnection:
        """Return a connection to the server of these options, logged in, within connectTimeout.

        Raises ConnectError if it can't be reached, and ReplyError if it refuses.
        """
        direct = cls(pushed)
        endpoint = Endpoint(options, Credentials(options, None))
        try:
            async with asyncio.timeout(options.connect_timeout / 1000):
                await endpoint.open(direct)
                direct.address = endpoint.address
                direct.greeting = await endpoint.greet(direct.execute_many)
        except ReplyError as error:
            direct.close()
            raise ReplyError(error.message, context=f"connect at {endpoint.address}") from error
        except (OSError, DscacheError) as error:
            direct.close()
            said = as_connect_error(error, options.connect_timeout)
            raise ConnectError(f"no connection to {endpoint.address}: {said}") from error
        except BaseException:
            direct.close()
            raise
        return direct

    @property
    def tls(self) -> str:
        """The version of TLS that is spoken; empty if none is."""
        transport = self._transport
        spoken = None if transport is None else transport.get_extra_info("ssl_object")
        return "" if spoken is None else spoken.version() or "TLS"

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        transport = self._transport
        peer = None if transport is None else transport.get_extra_info("peername")
        if not isinstance(peer, tuple):
            return True  # a socket file
        host = str(peer[0]).removeprefix("::ffff:")
        return host == "::1" or host.startswith("127.")

    async def execute_many(self, *commands: RawCommand) -> list[Any]:
        """Return the replies to some commands, errors of Redis among them.

        Raises ConnectionLost if the server is lost before it has answered all, or hangs.
        """
        if not commands:
            return []
        if self._transport is None or self._reason is not None:
            raise self._why_lost()
        waiter: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((len(commands), [], waiter))
        self._transport.write(b"".join(_pack(tuple(revealed(command))) for command in commands))
        try:
            async with asyncio.timeout(_PATIENCE):
                return await asyncio.shield(waiter)
        except TimeoutError:
            self._end(ConnectionLost(f"it did not answer for {_PATIENCE:.0f} s"))
            raise self._why_lost() from None

    async def execute(self, *command: bytes | str | int) -> Any:
        """Return the reply to one command; raises ReplyError if it is an error."""
        (reply,) = await self.execute_many(command)
        if isinstance(reply, ReplyError):
            raise ReplyError(reply.message, context=f"{command[0]!s} at {self.address}")
        return reply

    def close(self) -> None:
        """End the connection; a second call does nothing."""
        self._end(ConnectionLost("it was closed"))

    def _why_lost(self) -> ConnectionLost:
        return ConnectionLost(f"connection to {self.address} lost: {self._reason}")

    def _end(self, reason: Exception) -> None:
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self._reason is not None:  # given up before it was there
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._reason is not None:
            return
        try:
            self._reader.feed(self._buffer, 0, nbytes)
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                if type(reply) is hiredis.PushNotification:
                    if self._pushed is not None:
                        self._pushed(reply)
                else:
                    self._take(reply)
        except (hiredis.HiredisError, TypeError, ValueError, ArithmeticError) as error:
            self._end(ProtocolError(f"it sent what is no RESP: {error}"))

    def _take(self, reply: Any) -> None:
        if not self._waiting:
            raise ValueError("a reply that nobody has asked for")
        count, replies, waiter = self._waiting[0]
        replies.append(reply)
        if len(replies) == count:
            self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(replies)

    def eof_received(self) -> None:
        self._reason = self._reason or ConnectionLost("the server closed it")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._reason = self._reason or exc or ConnectionLost("it was closed")
        while self._waiting:
            _, _, waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(self._why_lost())
                waiter.exception()  # who was cancelled meanwhile does not look
        if not self.lost.done():
            self.lost.set_result(self._reason)
