"""One socket of a Connection, as a protocol of the event loop.

Each socket has a Link of its own, so that the last words of an old one reach nobody.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any, Protocol, cast

from ..core import constants
from ..errors import ConnectionLost, ProtocolError
from ..net.credentials import packed


class ProtocolListener(Protocol):
    """What a Link tells its Connection."""

    def on_replies(self) -> None:
        """Replies came, and were given to whom they belong."""

    def on_writable(self) -> None:
        """The transport takes bytes again."""


# Of what a socket brings, so much at once means that there is more.
_MUCH = constants.READ_BUFFER_BYTES // 2
# For so long, in seconds, what has come on a socket may wait there for callbacks to get on.
_LONGEST_REST = 1.0
# A reply that isn't complete has made progress when so many of its bytes have come. A server that
# sends one byte now and then would else look alive for as long as it likes.
_PROGRESS = 4096


class SocketProtocol(asyncio.BufferedProtocol):
    """A socket: it hands what arrives to the pipeline, and knows for how long nothing did.

    Any exception may strike at any place here: want of memory, too deep a stack, a signal handler
    that raises. Between the moment when the pipeline counts a command as sent and the one when
    its bytes are with the socket, that would let every later reply go to the wrong operation. So
    ``is_sending`` and ``is_reading`` are set before anything happens and unset behind it, by no
    ``finally``: while one of them is left over, nothing that arrives is believed, nothing is sent,
    and the socket is ended by whatever comes first.
    """

    def __init__(self, owner: ProtocolListener, pipeline: Any) -> None:
        self._owner = owner
        self._pipeline = pipeline
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None  # unless there is TLS over it
        self._reason: Exception | None = None
        self._heard = self._loop.time()
        self._due_since: float | None = None
        self._settled = 0
        self._partial = 0
        self.paused = False
        self.is_sending = False
        self.is_reading = False
        self.is_cut = False
        self.lost: asyncio.Future[Exception] = self._loop.create_future()

    def flush(self) -> None:
        """Send what waits in the pipeline, as far as the window and the socket allow."""
        if self._is_broken():
            return
        self.is_sending = True
        try:
            while not self.paused and (output := self._pipeline.take_output()):
                self._write(output)
        except BaseException as error:
            self.break_off(error)
            raise
        self.is_sending = False

    def begin(self) -> None:
        """Send what this tick has brought up to now, if the socket has nothing else to do.

        Called in the middle of an operation, which may be a finalizer's within another ``flush``.
        """
        if not self.is_sending and not self.is_reading and self.can_write_directly():
            self.flush()

    def request(self, *commands: list[Any]) -> list[asyncio.Future[Any]]:
        """Send commands at once, and return the waiters for their replies.

        Raises ConnectionLost if the link is cut.
        """
        if self._is_broken():
            raise ConnectionLost("the connection has just been lost")
        self.is_sending = True
        try:
            waiters: list[asyncio.Future[Any]] = []
            self._write(packed(self._pipeline, commands, waiters))
        except BaseException as error:
            self.break_off(error)
            raise
        self.is_sending = False
        return waiters

    def _is_broken(self) -> bool:
        """Return whether nothing may be sent or believed, and cut what an exception has broken."""
        if (self.is_sending or self.is_reading) and not self.is_cut:
            self.abort(ConnectionLost("it was interrupted"))
        return self.is_cut

    def break_off(self, error: BaseException) -> None:
        """Cut the link as an exception has struck while it was used."""
        self.is_cut = True  # first, as what follows may fail as well
        self.abort(ConnectionLost(f"it was interrupted by {type(error).__name__}"))

    def _write(self, output: bytes) -> None:
        """Send bytes, or as many of them as can't be sent yet later; a lost link drops them."""
        if self._due_since is None:
            self._due_since = self._loop.time()
        if self.can_write_directly():
            output = self._send(output)
        if output and self._transport is not None:
            self._transport.write(output)

    def can_write_directly(self) -> bool:
        """Whether bytes can go to the socket itself, and not behind others or through TLS."""
        transport = self._transport
        return (
            self._socket is not None
            and transport is not None
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        )

    def _send(self, output: bytes) -> bytes:
        """Send bytes at once, where uvloop's transport waits for the end of the tick; return those
        that the socket doesn't take."""
        assert self._socket is not None
        sent = 0
        # The transport will meet the same error, and knows what to do.
        with suppress(OSError):
            sent = os.write(self._socket.fileno(), output)
        return output[sent:]

    def get_extra_info(self, name: str) -> Any:
        """Return what the transport knows under a name, such as ``peername``; None if nothing."""
        return None if self._transport is None else self._transport.get_extra_info(name)

    def idle(self) -> float:
        """Return the seconds since anything arrived."""
        return self._loop.time() - self._heard

    def unanswered_for(self) -> float:
        """Return the seconds for which an answer is due and has made no progress."""
        return 0.0 if self._due_since is None else self._loop.time() - self._due_since

    def abort(self, reason: Exception) -> None:
        """End the socket without another word; nothing more is heard of it."""
        self.is_cut = True
        self._reason = self._reason or reason
        # On a closed loop nothing can be ended: the transport's own end closes its socket.
        if self._transport is not None and not self._loop.is_closed():
            self._transport.abort()

    def close(self) -> None:
        """End the socket after what was written is sent."""
        if self._transport is not None and not self._loop.is_closed():
            self._transport.close()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        # One flush of a bulk is more than the default of 64 KiB.
        self._transport.set_write_buffer_limits(high=2 * constants.COMMAND_BYTES)
        if transport.get_extra_info("sslcontext") is None:
            self._socket = transport.get_extra_info("socket")
        if self._reason is not None:  # cut before it was there
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer: memoryview = self._pipeline.get_buffer(sizehint)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._reason is not None or self._is_broken():
            return
        self.is_reading = True
        try:
            self._heard = self._loop.time()
            self._pipeline.buffer_updated(nbytes)
            self._note_progress()
            self.is_reading = False
            self._owner.on_replies()
        except ProtocolError as error:
            self.abort(error)
        except BaseException as error:
            self.break_off(error)
            raise

    def _note_progress(self) -> None:
        """Note whether the answer that is due has come, or has come nearer."""
        pipeline = self._pipeline
        grown = pipeline.partial - self._partial
        if pipeline.settled != self._settled or grown >= _PROGRESS or not pipeline.in_flight:
            self._due_since = self._heard if pipeline.in_flight else None
            self._settled = pipeline.settled
            self._partial = pipeline.partial
        elif grown < 0:  # a push was complete, and something else has begun
            self._partial = pipeline.partial

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._owner.on_writable()

    def eof_received(self) -> None:
        self._reason = self._reason or ConnectionLost("the server closed it")

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_cut = True  # first, so that an exception behind it is noticed
        self._transport = None
        self.paused = False
        if not self.lost.done():
            self.lost.set_result(self._reason or exc or ConnectionLost("it was closed"))


class PushProtocol(SocketProtocol):
    """A socket over which messages come, which nobody has asked for.

    When much has come, it reads on after those who want it had their turn, and as long as they
    have enough to do not yet: what waits for them is bounded, and they need this loop's time.
    """

    _rests = False
    _rests_until = 0.0

    def buffer_updated(self, nbytes: int) -> None:
        super().buffer_updated(nbytes)
        transport = self._transport
        if nbytes < _MUCH or self._rests or transport is None or transport.is_closing():
            return
        self._rests = True
        self._rests_until = self._loop.time() + _LONGEST_REST
        transport.pause_reading()
        # Theirs was called for before this.
        self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._pipeline.inbox.is_crowded() and self._loop.time() < self._rests_until:
            self._loop.call_soon(self._read_on)
            return
        self._rests = False
        transport.resume_reading()
