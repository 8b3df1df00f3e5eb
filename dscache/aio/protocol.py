"""One socket of a Connection, as a protocol of the event loop.

Each socket has a SocketProtocol of its own, so that late data of an old one reaches no operation.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..core import constants, failures
from ..errors import ConnectionLost, ProtocolError, ReplyError
from ..net.connect_errors import TurnedAway, end_of_handshake
from ..net.credentials import Hidden, Word, masked, packed
from ..net.foreign_errors import foreign

if TYPE_CHECKING:
    from ..core.pure import Pipeline


class ProtocolListener(Protocol):
    """The Connection of a socket: hears of replies, and when it can send again."""

    def on_replies(self) -> None:
        """Replies have arrived, and their operations have them."""

    def on_writable(self) -> None:
        """The transport takes data again."""


# A read of this size suggests that the socket holds more.
_MUCH = constants.READ_BUFFER_BYTES // 2
# Reading pauses at most this long, in seconds, for the callbacks of messages to get on.
_LONGEST_REST = 1.0
# An incomplete reply has made progress when this many more of its bytes have arrived. Otherwise a
# server that sends a byte now and then would look alive for ever.
_PROGRESS = 4096
# An error reply of this length is cut.
_LONGEST_ERROR = 4096


class SocketProtocol(asyncio.BufferedProtocol):
    """A socket: hands incoming data to the pipeline, and measures silence.

    An exception may strike on any line here: want of memory, too deep a stack, a signal handler
    that raises. If it strikes after the pipeline has counted a command as sent, and before its
    bytes are with the socket, every later reply would go to the wrong operation. So ``is_sending``
    and ``is_reading`` are set before anything happens and unset behind it, without ``finally``.
    While one of them is left over, incoming data is dropped, nothing is sent, and the next call of
    any kind ends the socket.
    """

    def __init__(self, owner: ProtocolListener, pipeline: Pipeline) -> None:
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
        self._is_full = False
        self._is_held = False
        self.is_sending = False
        self.is_reading = False
        self.is_cut = False
        # The error that arrives before the first command; None from that one on.
        self._early: bytes | None = b""
        self.lost: asyncio.Future[Exception] = self._loop.create_future()

    def flush(self) -> None:
        """Send the pipeline's output, as far as its window and the socket allow."""
        # Nearly always false, and then it saves a call.
        if (self.is_cut or self.is_sending or self.is_reading) and self._is_broken():
            return
        self.is_sending = True
        try:
            pipeline = self._pipeline
            while pipeline.queued and not self.paused and (output := pipeline.take_output()):
                self._write(output)
        except BaseException as error:
            self.break_off(error)
            raise
        self.is_sending = False

    def begin(self) -> None:
        """Send the operations of this tick so far, unless the socket is busy.

        Called in the middle of an operation, perhaps by a finalizer within another ``flush``.
        """
        if not self.is_sending and not self.is_reading and self.can_write_directly():
            self.flush()

    def request(self, *commands: Sequence[Word]) -> list[asyncio.Future[Any]]:
        """Send commands at once; return the waiters for their replies.

        Raises ConnectionLost if the socket has ended.
        """
        self._early = None
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
        """Whether the socket has ended; ends one that an exception has struck."""
        if (self.is_sending or self.is_reading) and not self.is_cut:
            self.abort(failures.EndedHere("it was interrupted"))
        return self.is_cut

    def break_off(self, error: BaseException) -> None:
        """End the socket, since an exception has struck while it was used."""
        self.is_cut = True  # first, as the rest may fail too
        self.abort(failures.EndedHere(f"it was interrupted by {type(error).__name__}"))

    def _write(self, output: bytes) -> None:
        """Send bytes now, and leave the rest to the transport; a lost socket drops them."""
        if self._due_since is None:
            self._due_since = self._loop.time()
        if self.can_write_directly():
            output = self._send(output)
        if output and self._transport is not None:
            self._transport.write(output)

    def can_write_directly(self) -> bool:
        """Whether bytes can go straight to the socket: none wait, and there is no TLS."""
        transport = self._transport
        return (
            self._socket is not None
            and transport is not None
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        )

    def _send(self, output: bytes) -> bytes:
        """Send bytes at once; return those that the socket doesn't take.

        uvloop's transport would wait for the end of the tick.
        """
        assert self._socket is not None
        sent = 0
        try:
            sent = os.write(self._socket.fileno(), output)
        except (BrokenPipeError, ConnectionResetError):
            # The server may have said why before it closed. The transport would end unread, while
            # its reader meets the end behind that.
            return b""
        except OSError:
            pass  # the transport will meet the same error, and handle it
        return output[sent:]

    def get_extra_info(self, name: str) -> Any:
        """Return the transport's extra information, such as ``peername``; None if it has none."""
        return None if self._transport is None else self._transport.get_extra_info(name)

    @property
    def reason(self) -> Exception | None:
        """Why the socket has ended, as far as is known."""
        return self._reason

    def adopt(self, owner: ProtocolListener, pipeline: Pipeline) -> None:
        """Serve another pipeline, to which nothing was sent; the present one awaits no reply."""
        self._owner, self._pipeline = owner, pipeline
        self._settled, self._partial, self._due_since = pipeline.settled, 0, None

    def idle(self) -> float:
        """Return the seconds since anything arrived."""
        return self._loop.time() - self._heard

    def unanswered_for(self) -> float:
        """Return the seconds for which a reply is due and has made no progress."""
        return 0.0 if self._due_since is None else self._loop.time() - self._due_since

    def abort(self, reason: Exception) -> None:
        """End the socket at once; later data from it is dropped."""
        self.is_cut = True
        self._reason = self._reason or reason
        # On a closed loop nothing can be ended: the transport's own end closes its socket.
        if self._transport is not None and not self._loop.is_closed():
            self._transport.abort()

    def close(self) -> None:
        """End the socket once all output is sent."""
        if self._transport is not None and not self._loop.is_closed():
            self._transport.close()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        # One flush of a bulk is more than the default of 64 KiB.
        self._transport.set_write_buffer_limits(high=2 * constants.COMMAND_BYTES)
        if transport.get_extra_info("sslcontext") is None:
            self._socket = transport.get_extra_info("socket")
        if self._reason is not None:  # aborted while it was opened
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pipeline.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        if self._reason is not None:
            return
        if (self.is_cut or self.is_sending or self.is_reading) and self._is_broken():
            return
        self.is_reading = True
        try:
            self._heard = self._loop.time()
            if self._early is not None and self._is_early_error(nbytes):
                self.is_reading = False
                return
            self._pipeline.buffer_updated(nbytes)
            self._note_progress()
            self.is_reading = False
            self._owner.on_replies()
        except BaseException as error:
            if isinstance(error, ProtocolError) and foreign(error) is None:
                self.abort(error)
                return
            self.break_off(error)
            raise

    def _is_early_error(self, nbytes: int) -> bool:
        """Whether data before the first command is an error reply; its end ends the socket.

        A server that turns a client away waits for no command.
        """
        assert self._early is not None
        early = self._early + bytes(self._pipeline.get_buffer(-1)[:nbytes])
        if not early.startswith(b"-"):
            self._early = None  # an error of RESP, as no command has asked for it
            return False
        self._early = early
        text, end, _ = early.partition(b"\r\n")
        if end or len(early) > _LONGEST_ERROR:
            self.abort(TurnedAway(text[1:_LONGEST_ERROR].decode(errors="replace")))
        return True

    def _note_progress(self) -> None:
        """Note whether the reply that is due has arrived, or has grown."""
        pipeline = self._pipeline
        settled, in_flight = pipeline.settled, pipeline.in_flight
        grown = pipeline.partial - self._partial
        if settled != self._settled or grown >= _PROGRESS or not in_flight:
            self._due_since = self._heard if in_flight else None
            self._settled = settled
            self._partial += grown
        elif grown < 0:  # a push was completed, and another reply has begun
            self._partial = pipeline.partial

    def pause_writing(self) -> None:
        self._is_full = self.paused = True

    def resume_writing(self) -> None:
        self._is_full = False
        self.paused = self._is_held
        self._owner.on_writable()

    def hold(self, held: bool) -> None:
        """Keep operations from being sent, or let them go on; other commands are sent anyway."""
        self._is_held = held
        self.paused = held or self._is_full

    def eof_received(self) -> None:
        self._reason = self._reason or ConnectionLost("the server closed it")

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_cut = True  # first, so that an exception behind it is noticed
        self._transport = None
        self.paused = self._is_full = self._is_held = False
        if not self.lost.done():
            self.lost.set_result(self._reason or exc or ConnectionLost("it was closed"))


class PushProtocol(SocketProtocol):
    """A socket for pushed messages.

    After a large read it pauses until the subscribers have run, and longer while their queues are
    crowded: the queues are bounded, and the callbacks need this loop's time.
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
        # Scheduled behind the subscribers' own callbacks.
        self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        inbox = self._pipeline.inbox
        is_crowded = inbox is not None and inbox.is_crowded()
        if is_crowded and self._loop.time() < self._rests_until:
            self._loop.call_soon(self._read_on)
            return
        self._rests = False
        transport.resume_reading()


async def request(link: SocketProtocol, *commands: Sequence[Word]) -> list[Any]:
    """Send commands at once; return the replies, error replies included.

    Raises ConnectionLost, or the reason for which the socket was lost before the last reply.
    """
    return await _answered(link, link.request(*commands))


async def request_greeting(link: SocketProtocol, *commands: Sequence[Word]) -> list[Any]:
    """Send commands of a handshake as ``request`` does.

    If the socket is lost, the last error reply before that is the reason.
    """
    waiters: list[asyncio.Future[Any]] = []
    try:
        waiters = link.request(*commands)
        return await _answered(link, waiters)
    except OSError as error:
        if foreign(error) is not None:
            raise
        failure = link.lost.result() if link.lost.done() else link.reason or error
    if isinstance(failure, OSError):
        said = [one.exception() for one in waiters if one.done() and not one.cancelled()]
        failure = end_of_handshake(said, failure)
    raise failure


async def _answered(link: SocketProtocol, waiters: list[asyncio.Future[Any]]) -> list[Any]:
    """Return the replies, or raise the reason for which the socket was lost before the last."""
    try:
        # Replies come in order, and the last one tells that all are there. An export asks for
        # thousands at a time, of which ``gather`` would note each.
        either: list[asyncio.Future[Any]] = [waiters[-1], link.lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not waiters[-1].done():
            raise link.lost.result()
        replies = [one.exception() or one.result() for one in waiters]
    except BaseException:
        for waiter in waiters:
            # Its reply is dropped, and an error that nothing reads isn't reported as unseen.
            if not waiter.cancel() and not waiter.cancelled():
                waiter.exception()
        raise
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, ReplyError):
            raise reply
    return replies


def send_control(
    link: SocketProtocol, *command: str | Hidden, secrets: Iterable[Hidden | None] = ()
) -> None:
    """Send a command whose error reply ends the socket, and whose other replies are ignored.

    A PING that is refused, as by a busy server or by a proxy that doesn't know it, has been
    answered; only NOAUTH says that the login is over. No text
    shows the ``secrets``, or those of the command.
    """

    def settled(waiter: asyncio.Future[Any]) -> None:
        error = None if waiter.cancelled() else waiter.exception()
        if isinstance(error, ReplyError) and (command[0] != "PING" or error.code == "NOAUTH"):
            hidden = [word for word in command if isinstance(word, Hidden)]
            said = masked(str(error), [*hidden, *secrets])
            link.abort(failures.EndedHere(f"{command[0]} was refused: {said}"))

    (waiter,) = link.request(command)
    waiter.add_done_callback(settled)
