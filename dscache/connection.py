"""One node's connection: the socket's life, and the operations that wait for it.

A Connection owns the Pipeline of its node, which outlives every socket. Each socket is a
``_Link``: a new protocol object, so that the last words of an old socket reach nobody.

States: *connecting* (operations wait until their deadline), *ready*, *refused* (the server said
no to the handshake: operations fail at once with what it said, while attempts go on, since a
password may be put right) and *closed*.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, cast

from . import _backend, _common
from .config import Options
from .errors import (
    ConnectError,
    ConnectionLost,
    DscacheError,
    ProtocolError,
    ReplyError,
    UsageError,
)

_logger = logging.getLogger("dscache")

_FIRST_DELAY = 0.05
_LONGEST_DELAY = 5.0
# The finest step of the timer that enforces deadlines.
_TIMER_STEP = 0.005
# A connection that lasted so many seconds was a good one: the next attempt comes soon.
_STEADY_AFTER = 1.0
_FAMILIES = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}


class Connection:
    """The connection to one node: made, kept, made again, and closed."""

    def __init__(self, options: Options, address: str, hash_tag: bool) -> None:
        self.address = address
        self.server = ""
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self.pipeline = _backend.core.Pipeline(
            self._loop.create_future,
            self._wake,
            address=address,
            key_prefix=options.key_prefix,
            hash_tag=hash_tag,
            ttl=options.ttl or 0,
            timeout=options.command_timeout / 1000,
        )
        self._link: _Link | None = None
        self._closed = False
        self._refusal: Callable[[str], Exception] | None = None
        # Set while the state is ready, refused or closed: when there is something to tell.
        self._decided = asyncio.Event()
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None
        self._connects = 0
        self._last_loss = ""
        self._task = self._loop.create_task(self._run(), name=f"dscache {address}")

    @property
    def is_ready(self) -> bool:
        """Whether operations go to the server at once."""
        return self._link is not None

    async def when_ready(self) -> None:
        """Wait until the connection is ready.

        Raises ConnectError if it isn't within ``connectTimeout``, and at once what the server
        says if it refuses the handshake.
        """
        timeout = self._options.connect_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                await self._decided.wait()
        except TimeoutError:
            down = self.pipeline.down
            reason = f": {down}" if down else ""
            raise ConnectError(
                f"no connection to {self.address} within {timeout} ms{reason}"
            ) from down
        self._check_open()
        if self._refusal is not None:
            raise self._refusal("connect")

    async def close(self) -> None:
        """Finish what was issued, within ``closeTimeout``, and end the connection."""
        if self._closed:
            return
        self._closed = True
        timeout = self._options.close_timeout / 1000
        link = self._link
        try:
            self._flush()
            if self.pipeline.queued or self.pipeline.in_flight:
                self._drained = self._loop.create_future()
                await asyncio.wait([self._drained], timeout=timeout)
        finally:
            self._task.cancel()
        await asyncio.wait([self._task])
        if link is not None:
            await asyncio.wait([link.lost], timeout=timeout)
            link.abort()

    def stats(self) -> dict[str, Any]:
        """Return the pipeline's counters, and what became of the connection."""
        return {
            **self.pipeline.stats(),
            "connects": self._connects,
            "last_loss": self._last_loss,
        }

    # -- the way out

    def _wake(self) -> None:
        """Schedule this tick's flush; the pipeline calls it before the first operation of one."""
        check_loop(self._loop)
        if os.getpid() != self._pid:
            raise UsageError("an AsyncCache can't be used after a fork; open one in the child")
        self._check_open()
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)
        if self._timer is None:
            self._timer = self._loop.call_later(
                self._options.command_timeout / 1000, self._enforce_deadlines
            )

    def _flush(self) -> None:
        self._flush_due = False
        link = self._link
        self.pipeline.end_tick()
        if link is None:
            if self._refusal is not None:
                self.pipeline.fail_all(self._refusal)
            return
        while not link.paused and (output := self.pipeline.take_output()):
            link.write(output)

    # -- the way back, called by the link

    def answered(self) -> None:
        """Go on after replies: what the window held back may go, and a close may end."""
        if self.pipeline.queued and not self._flush_due:
            self._flush()
        self._note_drained()

    def resumed(self) -> None:
        """Go on after the transport had too much to send."""
        if not self._flush_due:
            self._flush()

    def _note_drained(self) -> None:
        drained = self._drained
        pending = self.pipeline.queued or self.pipeline.in_flight
        if drained is not None and not pending and not drained.done():
            drained.set_result(None)

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        deadline = self.pipeline.expire(now)
        self._timer = None
        if deadline is not None:
            self._timer = self._loop.call_later(
                max(deadline - now, _TIMER_STEP), self._enforce_deadlines
            )
        self._note_drained()

    # -- the socket's life

    async def _run(self) -> None:
        """Keep a connection until cancelled: by ``close``, or by a loop that ends."""
        failures = 0
        try:
            while True:
                if await self._live():
                    failures = 0
                # Full jitter: the clients of a server that restarts must not come all at once.
                longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2**failures)
                shortest = longest / 2 if self._refusal else 0
                await asyncio.sleep(random.uniform(shortest, longest))
                failures = min(failures + 1, 10)
        finally:
            self._closed = True
            self._give_up("the cache was closed before the answer came")

    async def _live(self) -> bool:
        """Live through one socket; return whether it was of use for a while."""
        link = _Link(self)
        try:
            async with asyncio.timeout(self._options.connect_timeout / 1000):
                await self._connect(link)
        except (OSError, DscacheError) as error:  # a TimeoutError is an OSError
            link.abort()
            self._failed(error)
            return False
        except BaseException:
            link.abort()
            raise
        began = self._loop.time()
        self._became_ready(link)
        try:
            reason = await asyncio.shield(link.lost)
        except BaseException:
            link.close()
            raise
        self._became_lost(reason)
        return self._loop.time() - began > _STEADY_AFTER

    async def _connect(self, link: _Link) -> None:
        """Open a socket for ``link`` and get the server's consent to work with it."""
        options = self._options
        context = options.tls.context() if options.tls else None
        if options.path:
            await self._loop.create_unix_connection(
                lambda: link,
                options.path,
                ssl=context,
                server_hostname=(options.tls.servername or "localhost") if options.tls else None,
            )
        else:
            await self._loop.create_connection(
                lambda: link,
                options.host,
                options.port,
                family=_FAMILIES[options.family],
                ssl=context,
                server_hostname=(options.tls.servername or options.host) if options.tls else None,
            )
        await self._shake_hands(link)

    async def _shake_hands(self, link: _Link) -> None:
        options = self._options
        hello: list[str] = ["HELLO", "3"]
        if options.password is not None or options.username is not None:
            hello += ["AUTH", options.username or "default", options.password or ""]
        if options.connection_name:
            hello += ["SETNAME", options.connection_name]
        commands = [hello]
        if options.db:
            commands.append(["SELECT", str(options.db)])
        questions: list[list[str | bytes]] = [
            # Loaded here, the script is missing only after SCRIPT FLUSH.
            ["SCRIPT", "LOAD", _common.SET_SCRIPT],
            ["COMMAND", "INFO", "MSETEX"],
        ]
        greeting, *others = await self._ask(link, *commands, *questions)
        if isinstance(greeting, ReplyError) and _is_without_resp3(greeting):
            commands[0] = ["PING"]
            if options.password is not None:
                user = [options.username] if options.username else []
                commands[0] = ["AUTH", *user, options.password]
            if options.connection_name:
                commands.append(["CLIENT", "SETNAME", options.connection_name])
            greeting, *others = await self._ask(link, *commands, *questions)
        *consents, loaded, known = [greeting, *others]
        for reply in consents:
            if isinstance(reply, ReplyError):
                raise reply
        # A user who may not load scripts may do all the rest; a server that is still loading
        # its data may do nothing.
        if isinstance(loaded, ReplyError) and loaded.code in ("LOADING", "NOAUTH"):
            raise loaded
        self.pipeline.has_msetex = isinstance(known, list) and any(known)
        if isinstance(greeting, dict):
            facts = (greeting.get(b"server"), greeting.get(b"version"))
            self.server = " ".join(fact.decode() for fact in facts if isinstance(fact, bytes))

    async def _ask(self, link: _Link, *commands: list[Any]) -> list[Any]:
        """Send commands at once; return the replies, errors of Redis among them."""
        asked = [self.pipeline.command(*command) for command in commands]
        link.write(b"".join(output for output, _ in asked))
        answers = asyncio.gather(*(waiter for _, waiter in asked), return_exceptions=True)
        either: list[asyncio.Future[Any]] = [answers, link.lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise link.lost.result()
        replies = answers.result()
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, ReplyError):
                raise reply
        return replies

    # -- changes of state

    def _became_ready(self, link: _Link) -> None:
        self._link = link
        self._connects += 1
        self._refusal = None
        self.pipeline.down = None
        self._decided.set()
        _logger.info("connected to %s (%s)", self.address, self.server or "server unknown")
        self._flush()

    def _became_lost(self, reason: Exception) -> None:
        self._link = None
        self._decided.clear()
        self._last_loss = str(reason)
        self.pipeline.down = ConnectionLost(f"connection lost: {reason}")
        self.pipeline.connection_lost(reason, retry=not isinstance(reason, ProtocolError))
        _logger.warning("connection to %s lost: %s", self.address, reason)
        self._note_drained()

    def _failed(self, error: Exception) -> None:
        """Note that an attempt to connect failed."""
        self.pipeline.connection_lost(error, retry=True)
        said = self._explain(error)
        if self.pipeline.down is None or str(self.pipeline.down) != str(said):
            _logger.warning("can't connect to %s: %s", self.address, said)
        self.pipeline.down = said
        self._last_loss = str(said)
        refusal = self._refusal_of(error, said)
        self._refusal = refusal
        if refusal is None:
            self._decided.clear()
        else:
            self._decided.set()
            self.pipeline.fail_all(refusal)
        self._note_drained()

    def _explain(self, error: Exception) -> Exception:
        """Return what to tell of a failed attempt."""
        if isinstance(error, TimeoutError) and not isinstance(error, DscacheError):
            return ConnectError(f"no answer within {self._options.connect_timeout} ms")
        if isinstance(error, ssl.SSLCertVerificationError):
            return ConnectError(f"the server's certificate is refused: {error.verify_message}")
        if isinstance(error, OSError) and not isinstance(error, DscacheError):
            return ConnectError(error.strerror or str(error) or type(error).__name__)
        return error

    def _refusal_of(self, error: Exception, said: Exception) -> Callable[[str], Exception] | None:
        """Return how to fail operations at once, if waiting for the next attempt is no use."""
        if isinstance(error, ReplyError) and error.code != "LOADING":
            message = error.message
            return lambda operation: ReplyError(message, context=f"{operation} at {self.address}")
        if isinstance(error, (ssl.SSLError, ProtocolError)):
            kind = ProtocolError if isinstance(error, ProtocolError) else ConnectError
            return lambda operation: kind(f"{operation}: {self.address}: {said}")
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionLost("the cache is closed")

    def _give_up(self, reason: str) -> None:
        self._link = None
        self._decided.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.pipeline.fail_all(lambda operation: ConnectionLost(f"{operation}: {reason}"))


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Raise UsageError unless ``loop`` is the one that is running."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is not loop:
        raise UsageError(
            "an AsyncCache belongs to the event loop it was opened on, and was used from "
            f"{'another one' if running else 'outside of it'}; open one in each loop"
        )


def _is_without_resp3(error: ReplyError) -> bool:
    """Whether HELLO was refused by a server before Redis 6, or to a user who may not say it."""
    return error.code in ("NOPROTO", "NOPERM") or "unknown command" in error.message.lower()


class _Link(asyncio.BufferedProtocol):
    """One socket of a Connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pipeline = connection.pipeline
        self._transport: asyncio.Transport | None = None
        self._reason: Exception | None = None
        self.paused = False
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    def write(self, output: bytes) -> None:
        """Hand bytes to the transport; a lost one drops them, and has told so."""
        if self._transport is not None:
            self._transport.write(output)

    def abort(self) -> None:
        """End the socket without another word; nothing more is heard of it."""
        self._reason = self._reason or ConnectionLost("it was cut")
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """End the socket after what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        # One flush of a bulk is more than the default of 64 KiB.
        self._transport.set_write_buffer_limits(high=2 * _common.COMMAND_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer: memoryview = self._pipeline.get_buffer(sizehint)
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._reason is not None:
            return
        try:
            self._pipeline.buffer_updated(nbytes)
        except ProtocolError as error:
            self._reason = error
            self.abort()
        else:
            self._connection.answered()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._connection.resumed()

    def eof_received(self) -> None:
        if self._reason is None:
            self._reason = ConnectionLost("the server closed it")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.paused = False
        if not self.lost.done():
            self.lost.set_result(self._reason or exc or ConnectionLost("it was closed"))
