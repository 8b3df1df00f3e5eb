"""Two message nodes in one process, which both subscribe to a topic and both publish on it.

A message counts when the other node has received it. Messages that return to their sender are
dropped, which is part of the work.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, ClassVar

import dscache
from clients.work import MESSAGE, TOPIC, Work, chosen, decode, encode

WINDOW = 1000
PATIENCE = {"commandTimeout": 600_000, "connectTimeout": 60_000, "maxPending": 10_000_000}


class _Pair:
    """Counts the messages that arrive."""

    blocking: ClassVar[bool] = False
    _heard = 0
    _expected = 0
    _done: asyncio.Future[None] | None = None

    def prepare(self, work: Work) -> None:
        self._reads = work.decode

    def _send(self, number: int) -> Awaitable[object]:
        raise NotImplementedError

    def _hear(self) -> None:
        self._heard += 1
        if self._heard == self._expected and self._done is not None:
            self._done.set_result(None)

    async def exchange(self, count: int, tasks: int) -> None:
        """Send messages until the other node has them all.

        Each of the tasks awaits its messages; with one task, a constant number is on its way.
        """
        self._heard, self._expected = 0, count
        self._done = asyncio.get_running_loop().create_future()
        if tasks > 1:
            left = iter(range(count))

            async def task() -> None:
                for number in left:
                    await self._send(number)

            await asyncio.gather(*(task() for _ in range(tasks)))
        else:
            sent = 0
            while sent < count:
                while sent < count and sent - self._heard < WINDOW:
                    self._send(sent)
                    sent += 1
                await asyncio.sleep(0)
        await self._done


class Nodes(_Pair):
    """Two MessageNodes with one of the cores."""

    def __init__(self, core: str) -> None:
        self._core = core

    async def open(self, where: dict[str, Any]) -> None:
        config = {"name": "redis", "options": {**where["options"], **PATIENCE}}
        with chosen(self._core):
            self._nodes = [
                dscache.MessageNode.from_config({"serverName": f"{self._core}-{i}", **config})
                for i in range(2)
            ]
            for node in self._nodes:
                await node.when_ready()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        # Idle contestants must not receive the messages as well.
        with chosen(self._core):
            leave = [node.subscribe(TOPIC, self._received) for node in self._nodes]
        for node in self._nodes:
            await node.when_ready()
        yield
        for one in leave:
            one()
        await asyncio.sleep(0.02)

    def _received(self, message: Any, sender: str) -> None:
        if self._reads:
            _ = message.data
        self._hear()

    def _send(self, number: int) -> Awaitable[object]:
        return self._nodes[number % 2].send(MESSAGE, unchecked=True)

    async def close(self) -> None:
        for node in self._nodes:
            await node.close()


class RedisPy(_Pair):
    """Two of redis-py's asyncio clients, each with a subscriber."""

    async def open(self, where: dict[str, Any]) -> None:
        import redis.asyncio

        at = {"host": where["host"], "port": where["port"]}
        self._clients: list[Any] = [redis.asyncio.Redis(**at) for _ in range(2)]

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        pubsubs = [client.pubsub(ignore_subscribe_messages=True) for client in self._clients]
        for pubsub in pubsubs:
            await pubsub.subscribe(str(TOPIC))
        readers = [asyncio.create_task(self._read(i, one)) for i, one in enumerate(pubsubs)]
        await asyncio.sleep(0.05)
        yield
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        for pubsub in pubsubs:
            await pubsub.aclose()

    async def _send(self, number: int) -> None:
        envelope = {"fromServer": f"redis-py-{number % 2}", "message": MESSAGE}
        await self._clients[number % 2].publish(str(TOPIC), encode(envelope))

    async def _read(self, number: int, pubsub: Any) -> None:
        async for message in pubsub.listen():
            if decode(message["data"])["fromServer"] != f"redis-py-{number}":
                self._hear()

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()
