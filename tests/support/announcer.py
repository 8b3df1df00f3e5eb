"""Announcements of maintenance, played by proxies in front of one real server.

An Announcer is the only server of a cache, or a node of a cluster of Announcers: ``FakeSlots`` has
which of them serves which slot. All have the records of the real server, so that a test sees every
write wherever it went.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import hiredis
from redis.crc import key_slot

from tests.support.blocking import LoopThread
from tests.support.wire import Push, resp

SLOTS = 16384
CONSENT = b"+OK\r\n"
REFUSAL = b"-ERR unknown subcommand 'MAINT_NOTIFICATIONS'\r\n"
_INCOMPLETE = object()


class FakeSlots:
    """The slots of a cluster of Announcers, on which all of them agree at once."""

    def __init__(self) -> None:
        self.nodes: list[Announcer] = []
        self.owners: list[Announcer] = []
        self._epoch = 1

    def divide(self, *nodes: Announcer) -> None:
        """Divide the slots evenly."""
        self.owners = [nodes[slot * len(nodes) // SLOTS] for slot in range(SLOTS)]

    def give(self, first: int, last: int, target: Announcer) -> None:
        """Move slots to another node."""
        self.owners[first : last + 1] = [target] * (last + 1 - first)
        self._epoch += 1

    def reply(self, node: Announcer, command: list[bytes]) -> bytes | None:
        """Return a node's own reply to a command; None if the server is to give it."""
        match command:
            case [b"CLUSTER", b"SLOTS", *_]:
                return resp(self._slots())
            case [b"CLUSTER", b"INFO", *_]:
                return resp(b"cluster_state:ok\r\ncluster_current_epoch:%d\r\n" % self._epoch)
            case [b"CLUSTER", b"MYID", *_]:
                return resp(node.id.encode())
            case [b"READONLY", *_]:
                return CONSENT
        keys = _keys_in(command)
        if keys and (owner := self.owners[key_slot(keys[0])]) is not node:
            node.redirected += 1
            return b"-MOVED %d 127.0.0.1:%d\r\n" % (key_slot(keys[0]), owner.port)
        return None

    def _slots(self) -> list[Any]:
        ranges = []
        for owner, run in groupby(range(SLOTS), self.owners.__getitem__):
            slots = list(run)
            ranges.append([slots[0], slots[-1], [b"127.0.0.1", owner.port, owner.id.encode()]])
        return ranges


def _keys_in(command: list[bytes]) -> list[bytes]:
    match command[0].upper():
        case b"EVAL" | b"EVALSHA":
            return command[3:4]
        case b"MSET" | b"MGET" | b"DEL" | b"EXISTS" | b"GET" | b"TYPE" | b"SET":
            return command[1:2]
    return []


class Announcer:
    """A proxy that answers the request for announcements, and pushes them between replies."""

    def __init__(
        self, host: str, port: int, answer: bytes = CONSENT, slots: FakeSlots | None = None
    ) -> None:
        self.port = 0
        self.requests: list[list[bytes]] = []
        self.served = 0
        """How many commands of records it has forwarded."""
        self.redirected = 0
        self.accepted = 0
        self.slow = 0.0
        """The pause before each command of records, in seconds."""
        self.greets = True
        """Whether it answers on new connections; it ends them otherwise."""
        self.ends_at = b""
        """The command at which it ends a connection."""
        self.answers = asyncio.Event()
        """Set while it answers; otherwise it is silent."""
        self.answers.set()
        self.id = f"{id(self):040x}"
        self._target = host, port
        self.answer = answer
        """The reply to the request for announcements, perhaps with a push behind it."""
        self._slots = slots
        self._tasks: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        if slots is not None:
            slots.nodes.append(self)

    @property
    def address(self) -> bytes:
        """The address, as in an announcement."""
        return b"127.0.0.1:%d" % self.port

    async def __aenter__(self) -> Announcer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """End all connections."""
        tasks = dict(self._tasks)
        for writer, task in tasks.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        # The transports close their sockets in the next tick.
        await asyncio.sleep(0)

    @property
    def connections(self) -> int:
        return len(self._tasks)

    def cut_latest(self) -> None:
        """End the connection that was made last."""
        latest = list(self._tasks)[-1]
        latest.transport.abort()

    def push(self, *words: Any) -> None:
        for writer in list(self._tasks):
            writer.write(resp(Push(words)))

    async def _serve(self, client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[writer] = task
        self.accepted += 1
        try:
            server, out = await asyncio.open_connection(*self._target)
        except BaseException:
            del self._tasks[writer]  # cut before it has served
            writer.transport.abort()
            raise
        commands, replies = hiredis.Reader(), _Replies()
        try:
            while (data := await client.read(65536)) and self.greets:
                await self.answers.wait()
                commands.feed(data)
                while isinstance(command := commands.gets(), list):
                    if (reply := self._reply(command)) is not None:
                        writer.write(reply)
                        continue
                    if command[0] in (b"MGET", b"MSET", b"SET"):
                        self.served += 1
                        await asyncio.sleep(self.slow)
                    out.write(hiredis.pack_command(tuple(command)))
                    # One at a time, so that a push never stands in the middle of a reply.
                    writer.write(await replies.next(server))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            out.transport.abort()
            try:
                for end in (writer, out):
                    with contextlib.suppress(ConnectionError):
                        await end.wait_closed()
            finally:
                del self._tasks[writer]

    def _reply(self, command: list[bytes]) -> bytes | None:
        if command[0] == self.ends_at:
            raise ConnectionError
        if command[:2] == [b"CLIENT", b"MAINT_NOTIFICATIONS"]:
            self.requests.append(command)
            return self.answer
        return None if self._slots is None else self._slots.reply(self, command)


class _Replies:
    """Cuts the bytes of a server into whole replies."""

    def __init__(self) -> None:
        self._rest = b""
        self._begin()

    def _begin(self) -> None:
        self._whole = b""
        self._reader: Any = hiredis.Reader(notEnoughData=_INCOMPLETE)

    async def next(self, server: asyncio.StreamReader) -> bytes:
        """Return the next reply, with the pushes before it."""
        pushes = b""
        while True:
            piece, end, self._rest = self._rest.partition(b"\r\n")
            if not end:
                data = await server.read(65536)
                if not data:
                    raise ConnectionError
                self._rest = piece + data
                continue
            self._whole += piece + end
            self._reader.feed(piece + end)
            if (reply := self._reader.gets()) is _INCOMPLETE:
                continue
            whole = self._whole
            self._begin()
            if type(reply) is not hiredis.PushNotification:
                return pushes + whole
            pushes += whole


class Stage:
    """Announcers in a thread of their own, for caches of any kind."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port
        self._thread = LoopThread()
        self.slots = FakeSlots()
        self.open: list[Announcer] = []
        """All announcers, in the order of their creation."""

    def server(self, answer: bytes = CONSENT) -> Announcer:
        """Return a new server."""
        return self._begin(Announcer(*self._where, answer))

    def node(self) -> Announcer:
        """Return a new node of the cluster."""
        return self._begin(Announcer(*self._where, slots=self.slots))

    def _begin(self, announcer: Announcer) -> Announcer:
        self._thread.run(announcer.__aenter__())
        self.open.append(announcer)
        return announcer

    def push(self, *words: Any, by: Announcer) -> None:
        """Push an announcement over all connections of a server."""
        self._thread.call(by.push, *words)

    def cut(self, announcer: Announcer) -> None:
        """End all connections of a server."""
        self._thread.run(announcer.cut())

    def do(self, work: Callable[[], object]) -> None:
        """Do something between two commands."""
        self._thread.call(work)

    def close(self) -> None:
        for announcer in self.open:
            self._thread.run(announcer.__aexit__())
        self._thread.close()


@contextlib.contextmanager
def staged(server: Any) -> Iterator[Stage]:
    stage = Stage(server.host, server.port)
    try:
        yield stage
    finally:
        stage.close()
