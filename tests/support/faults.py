"""A TCP proxy that fails on command, and a server that sends the replies a test gives it.

Both live in the event loop that starts them and end with their ``async with`` block; the proxy can
also run in its own process.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Literal, Self, cast

import hiredis

Direction = Literal["requests", "replies"]
Ending = Literal["fin", "rst"]
BOTH: tuple[Direction, ...] = ("requests", "replies")

_HOST = "127.0.0.1"
_CHUNK = 65536


class FaultProxy:
    """Forward connections to a target, and break them the way networks do.

    Settings hold for all connections, open and new, until ``heal()``. With ``tls``, clients must
    speak TLS to the proxy, which forwards plain TCP: few servers that come in wheels were built
    with TLS.
    """

    def __init__(
        self, target_host: str, target_port: int, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self.host = _HOST
        self.port = 0
        self.accepted = 0
        """How many connections there have been."""
        self.forwarded: dict[Direction, int] = {"requests": 0, "replies": 0}
        """How many bytes went through."""
        self._target = target_host, target_port
        self._tls = tls
        self._forwardings: set[_Forwarding] = set()
        self._listener: asyncio.Server | None = None
        self._reservation: socket.socket | None = None
        self._open: dict[Direction, asyncio.Event] = {way: asyncio.Event() for way in BOTH}
        self.heal()

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"{'rediss' if self._tls else 'redis'}://{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._forwardings)

    def retarget(self, host: str, port: int) -> None:
        """Forward new connections elsewhere, like a host name whose server has moved."""
        self._target = host, port

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        forwardings = list(self._forwardings)
        for forwarding in forwardings:
            forwarding.abort()
        await asyncio.gather(*(forwarding.task for forwarding in forwardings))
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    def heal(self) -> None:
        """Forward everything unchanged and at once again.

        A connection that was cut stays cut, and one that was accepted while deaf is never read.
        """
        self._delay = 0.0
        self._delays: dict[int, float] = {}
        self._deaf = False
        self._split: dict[Direction, int] = {}
        self._cut_after: dict[Direction, tuple[int, Ending]] = {}
        self._alterations: dict[Direction, list[Callable[[bytes], bytes]]] = {
            way: [] for way in BOTH
        }
        self.resume()

    def delay(self, seconds: float) -> None:
        """Delay each chunk by that many seconds, in both directions."""
        self._delay = seconds

    def delay_one(self, port: int, seconds: float) -> None:
        """Delay the chunks of one connection by another time than those of all others.

        ``port`` is the one that the target sees; CLIENT LIST of a server shows it in ``addr``.
        """
        self._delays[port] = seconds

    def stall(self, *directions: Direction) -> None:
        """Hold back everything in these directions, by default in both."""
        for way in directions or BOTH:
            self._open[way].clear()

    def stall_one(self, port: int, *directions: Direction) -> None:
        """Hold back everything of one connection, whose port the target sees."""
        for forwarding in self._forwardings:
            if forwarding.port == port:
                for way in directions or BOTH:
                    forwarding.gates[way].clear()

    def cut_one(self, port: int, ending: Ending = "fin") -> None:
        """Close one connection, whose port the target sees, on both sides."""
        for forwarding in list(self._forwardings):
            if forwarding.port == port:
                forwarding.end(ending)

    def resume(self) -> None:
        """End a stall: what was held back is sent now."""
        for gate in self._open.values():
            gate.set()
        for forwarding in self._forwardings:
            for gate in forwarding.gates.values():
                gate.set()

    def deaf(self) -> None:
        """Accept new connections, but neither read from them nor connect to the target."""
        self._deaf = True

    def cut(self, ending: Ending = "fin") -> None:
        """Close all open connections on both sides, orderly or with a reset."""
        for forwarding in list(self._forwardings):
            forwarding.end(ending)

    def cut_after(
        self, count: int, direction: Direction = "replies", ending: Ending = "fin"
    ) -> None:
        """Let that many more bytes pass, then cut the connection that carried the last of them."""
        self._cut_after[direction] = count, ending

    def corrupt(self, function: Callable[[bytes], bytes], direction: Direction = "replies") -> None:
        """Replace the next chunk with what ``function`` returns for it."""
        self._alterations[direction].append(function)

    @property
    def is_cut_due(self) -> bool:
        """Whether ``cut_after`` has not cut a connection yet."""
        return bool(self._cut_after)

    def duplicate(self, direction: Direction = "replies") -> None:
        """Send the next chunk twice."""
        self.corrupt(lambda chunk: chunk + chunk, direction)

    def garble(self, direction: Direction = "replies") -> None:
        """Send invalid RESP in front of the next chunk."""
        self.corrupt(lambda chunk: b"?!" + chunk, direction)

    def split(self, size: int, direction: Direction = "replies") -> None:
        """Send at most that many bytes at a time."""
        self._split[direction] = size

    async def refuse(self) -> None:
        """Stop listening: new connections are refused, open ones continue."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            await asyncio.sleep(0)

    async def listen(self) -> None:
        """Listen, always on the same port."""
        if self._reservation is None:
            # A port that is bound but not listening refuses connections and stays reserved: neither
            # another server nor a client that reconnects to itself can get it.
            self._reservation = _bound_socket(0)
            self.port = self._reservation.getsockname()[1]
        if self._listener is None:
            bound = _bound_socket(self.port)
            self._listener = await asyncio.start_server(self._accept, sock=bound, ssl=self._tls)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        forwarding = _Forwarding(writer)
        self._forwardings.add(forwarding)
        try:
            if self._deaf:
                cast("asyncio.Transport", writer.transport).pause_reading()
                await forwarding.ended.wait()
            else:
                await self._forward(forwarding, reader)
        finally:
            forwarding.end("rst")
            await forwarding.finished()
            self._forwardings.discard(forwarding)

    async def _forward(self, forwarding: _Forwarding, reader: asyncio.StreamReader) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target)
        except OSError:
            return
        forwarding.add(target_writer)
        pumps = [
            asyncio.create_task(self._pump(forwarding, reader, target_writer, "requests")),
            asyncio.create_task(
                self._pump(forwarding, target_reader, forwarding.client, "replies")
            ),
        ]
        await forwarding.ended.wait()
        for pump in pumps:
            pump.cancel()
        for outcome in await asyncio.gather(*pumps, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _pump(
        self,
        forwarding: _Forwarding,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: Direction,
    ) -> None:
        try:
            while chunk := await reader.read(_CHUNK):
                if delay := self._delays.get(forwarding.port, self._delay):
                    await asyncio.sleep(delay)
                await self._open[way].wait()
                await forwarding.gates[way].wait()
                if self._alterations[way]:
                    chunk = self._alterations[way].pop(0)(chunk)
                chunk, ending = self._cut_point(chunk, way)
                await self._send(chunk, writer, way)
                if ending:
                    forwarding.end(ending)
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            forwarding.end("fin")

    async def _send(self, chunk: bytes, writer: asyncio.StreamWriter, way: Direction) -> None:
        size = self._split.get(way) or len(chunk) or 1
        for start in range(0, len(chunk), size):
            piece = chunk[start : start + size]
            writer.write(piece)
            self.forwarded[way] += len(piece)
            await writer.drain()
            if size < len(chunk):
                # Twice, so that a reader in this event loop runs in between.
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    def _cut_point(self, chunk: bytes, way: Direction) -> tuple[bytes, Ending | None]:
        if way not in self._cut_after:
            return chunk, None
        left, ending = self._cut_after[way]
        if len(chunk) < left:
            self._cut_after[way] = left - len(chunk), ending
            return chunk, None
        del self._cut_after[way]
        return chunk[:left], ending


class ProxyProcess:
    """A FaultProxy in its own process, so that it takes no time and memory of this one.

    asyncio's streams receive into objects of 256 KiB each, which fragments the heap of a process:
    under faults its memory grows by the minute although nothing is kept.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self.host = _HOST
        self.port = 0
        self._target = target_host, target_port

    async def __aenter__(self) -> Self:
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, __file__, *map(str, (*self._target, number))]
            self._process = subprocess.Popen(command, pass_fds=(number,))  # noqa: ASYNC220
        try:
            self.port = await self._answer()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._control.close()
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    async def do(self, action: str, *arguments: object) -> None:
        """Call the proxy's method of this name, and return when it has returned."""
        call = f"{(action, *arguments)!r}\n".encode()
        await asyncio.get_running_loop().sock_sendall(self._control, call)
        await self._answer()

    async def _answer(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            piece = await asyncio.get_running_loop().sock_recv(self._control, 100)
            if not piece:
                raise AssertionError("the process of the proxy has ended")
            line += piece
        return int(line)


async def _obey(host: str, port: int, control: int) -> None:
    """Run the process of a ProxyProcess: obey it until it ends, however it ends."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=control))
    async with FaultProxy(host, port) as proxy:
        writer.write(b"%d\n" % proxy.port)
        while line := await reader.readline():
            action, *arguments = ast.literal_eval(line.decode())
            result = getattr(proxy, action)(*arguments)
            if inspect.isawaitable(result):
                await result
            writer.write(b"%d\n" % proxy.port)
    writer.close()


class _Forwarding:
    """The two sockets of one forwarded connection, which end together."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.port = 0
        self.gates: dict[Direction, asyncio.Event] = {way: asyncio.Event() for way in BOTH}
        for gate in self.gates.values():
            gate.set()
        self.ended = asyncio.Event()
        self.task = cast("asyncio.Task[None]", asyncio.current_task())
        self._writers = [client]
        _send_at_once(client)

    def add(self, target: asyncio.StreamWriter) -> None:
        self._writers.append(target)
        self.port = target.get_extra_info("sockname")[1]
        _send_at_once(target)
        if self.ended.is_set():
            target.close()

    def end(self, ending: Ending) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        for writer in self._writers:
            if ending == "rst":
                _reset(writer)
            else:
                writer.close()  # orderly: pending data is sent first

    def abort(self) -> None:
        """End at once, even during an orderly end that a silent peer delays."""
        self.ended.set()
        for writer in self._writers:
            _reset(writer)

    async def finished(self) -> None:
        for writer in self._writers:
            # Data that arrives after the end of a TLS connection is an SSLError.
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


HELLO_REPLY = (
    b"%7\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n7.0.0\r\n$5\r\nproto\r\n:3\r\n"
    b"$2\r\nid\r\n:1\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n"
    b"$7\r\nmodules\r\n*0\r\n"
)
DEFAULT_ANSWERS: Mapping[str, bytes] = {
    "AUTH": b"+OK\r\n",
    "CLIENT": b"+OK\r\n",
    "HELLO": HELLO_REPLY,
    "PING": b"+PONG\r\n",
    "SELECT": b"+OK\r\n",
}
Answer = bytes | None | Callable[[list[bytes]], bytes | None]


class FakeServer:
    """Answer each command with the bytes that a test gives for it, valid or not.

    ``answers`` maps a command's name to bytes, or to a function that takes the whole command and
    returns them; ``b""`` stays silent and None closes the connection. The key ``"*"`` matches every
    other command; the handshake is answered as Redis would.
    """

    def __init__(
        self, answers: Mapping[str, Answer] | None = None, *, host: str = _HOST, port: int = 0
    ) -> None:
        self.host = host
        self.port = port
        self.accepted = 0
        self.commands: list[list[bytes]] = []
        """Every command received, in order, with its arguments."""
        self.answers: dict[str, Answer] = {"*": b"-ERR unknown command\r\n"}
        self.answers.update(DEFAULT_ANSWERS)
        self.answers.update(answers or {})
        self._tasks: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"redis://{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        bound = _bound_socket(self.port, self.host)
        self.port = bound.getsockname()[1]
        self._listener = await asyncio.start_server(self._serve, sock=bound)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        tasks = list(self._tasks.values())
        for writer in self._tasks:
            _reset(writer)
        await asyncio.gather(*tasks)

    def push(self, data: bytes) -> None:
        """Send unsolicited bytes to every open connection."""
        for writer in self._tasks:
            writer.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._tasks[writer] = cast("asyncio.Task[None]", asyncio.current_task())
        _send_at_once(writer)
        parser = hiredis.Reader()
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(_CHUNK):
                    parser.feed(data)
                    while isinstance(command := parser.gets(), list):
                        self.commands.append(command)
                        reply = self._answer(command)
                        if reply is None:
                            return
                        writer.write(reply)
                    await writer.drain()
        finally:
            del self._tasks[writer]
            writer.close()

    def _answer(self, command: list[bytes]) -> bytes | None:
        name = command[0].decode(errors="replace").upper()
        answer = self.answers.get(name, self.answers["*"])
        return answer(command) if callable(answer) else answer


def _bound_socket(port: int, host: str = _HOST) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


def _send_at_once(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset instead of an end of stream."""
    if not writer.transport.is_closing():
        linger_for_nothing = struct.pack("ii", 1, 0)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_nothing)
    writer.transport.abort()


if __name__ == "__main__":
    asyncio.run(_obey(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
