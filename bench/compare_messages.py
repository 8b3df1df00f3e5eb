"""Messages beside redis-py and deepstream's own connector, in one run: interleaved, medians.

``python bench/compare_messages.py`` prints a table. Two nodes on one core, with the server on
another, both subscribe to a topic and both publish on it; a message counts when the other node has
received it. Messages that return to their sender are dropped, which is part of the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import redis.asyncio
import uvloop

import dscache
from contestants import HERE, Absent, from_npm
from dscache.embedded import EmbeddedServer
from machine import facts
from report import goal
from rounds import RowInLoop, arguments, measure_in_loop
from workload import apart, chosen, decode, encode

TOPIC = 4
MESSAGE = {
    "topic": TOPIC,
    "action": 0,
    "name": "news/europe",
    "data": {"headline": "Analytic engine", "authors": ["Ada", "Charles"], "score": 12.25},
}
TASKS = 100
WINDOW = 1000
# The connector requires more than it declares.
PACKAGES = ("@deepstream/clusternode-redis@1.0.1", "@deepstream/protobuf@1.0.8")
PATIENCE = {"commandTimeout": 600_000, "connectTimeout": 60_000, "maxPending": 10_000_000}


class Counter:
    """Counts received messages, and signals when all have arrived."""

    def __init__(self) -> None:
        self.heard = 0
        self._count = 0
        self._done: asyncio.Future[None] | None = None

    def expect(self, count: int) -> asyncio.Future[None]:
        """Return a future that is done once that many messages have arrived from now on."""
        self.heard = 0
        self._count = count
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def add(self) -> None:
        self.heard += 1
        if self.heard == self._count and self._done is not None:
            self._done.set_result(None)


async def from_tasks(send: Callable[[int], Awaitable[object]], counter: Counter, n: int) -> float:
    """Await each message from a hundred tasks."""

    async def task(number: int) -> None:
        for _ in range(n // TASKS):
            await send(number)

    done = counter.expect(n // TASKS * TASKS)
    began = time.perf_counter()
    await asyncio.gather(*(task(number) for number in range(TASKS)))
    await done
    return (time.perf_counter() - began) * n / (n // TASKS * TASKS)


async def in_a_window(send: Callable[[int], object], counter: Counter, n: int) -> float:
    """Send without waiting for the results, a thousand in flight at a time."""
    done = counter.expect(n)
    sent = 0
    began = time.perf_counter()
    while sent < n:
        while sent < n and sent - counter.heard < WINDOW:
            send(sent)
            sent += 1
        await asyncio.sleep(0)
    await done
    return time.perf_counter() - began


# -- contestants


@contextlib.asynccontextmanager
async def ours(server: EmbeddedServer, core: str, reads: bool) -> AsyncIterator[Any]:
    """Yield a measurement of two nodes of dscache, in either way."""
    options = {"host": server.host, "port": server.port, **PATIENCE}
    counter = Counter()

    def callback(message: Any, sender: str) -> None:
        if reads:
            _ = message.data
        counter.add()

    with chosen(core):
        nodes = [
            dscache.MessageNode.from_config(
                {"serverName": f"py-{core}-{reads}-{i}", "name": "redis", "options": options}
            )
            for i in range(2)
        ]
        for node in nodes:
            await node.when_ready()

    @contextlib.asynccontextmanager
    async def listening() -> AsyncIterator[None]:
        # Idle contestants must not receive the messages as well.
        with chosen(core):
            leave = [node.subscribe(TOPIC, callback) for node in nodes]
        for node in nodes:
            await node.when_ready()
        yield
        for one in leave:
            one()
        await asyncio.sleep(0.02)

    async def tasks(n: int) -> float:
        async with listening():
            return await from_tasks(lambda i: nodes[i % 2].send(MESSAGE), counter, n)

    async def window(n: int) -> float:
        async with listening():
            return await in_a_window(lambda i: nodes[i % 2].send(MESSAGE), counter, n)

    try:
        yield tasks, window
    finally:
        for node in nodes:
            await node.close()


class RedisPy:
    """Two of redis-py's asyncio clients, each with a subscriber."""

    def __init__(self, server: EmbeddedServer) -> None:
        where = {"host": server.host, "port": server.port}
        self._clients = [redis.asyncio.Redis(**where) for _ in range(2)]
        self._counter = Counter()

    async def measure(self, n: int, tasks: int = TASKS) -> float:
        pubsubs = [client.pubsub(ignore_subscribe_messages=True) for client in self._clients]
        for pubsub in pubsubs:
            await pubsub.subscribe(str(TOPIC))
        ready = asyncio.get_running_loop().create_future()
        readers = [asyncio.create_task(self._read(i, one, ready)) for i, one in enumerate(pubsubs)]
        await asyncio.sleep(0.05)
        try:
            return await from_tasks(self._publish, self._counter, n)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)
            for pubsub in pubsubs:
                await pubsub.aclose()  # type: ignore[attr-defined]

    async def _publish(self, number: int) -> None:
        envelope = {"fromServer": f"redis-py-{number % 2}", "message": MESSAGE}
        await self._clients[number % 2].publish(str(TOPIC), encode(envelope))

    async def _read(self, number: int, pubsub: Any, ready: Any) -> None:
        me = f"redis-py-{number}"
        async for message in pubsub.listen():
            if decode(message["data"])["fromServer"] != me:
                self._counter.add()

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


class Deepstream:
    """deepstream's own connector on Node, in a separate process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def measure(self, n: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"count": n, "window": WINDOW}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        answer = json.loads(await self._process.stdout.readline())
        return float(answer["seconds"])


@contextlib.asynccontextmanager
async def deepstream(server: EmbeddedServer) -> AsyncIterator[Deepstream | str]:
    """Yield the connector, or the reason for its absence."""
    with contextlib.ExitStack() as stack:
        reason = ""
        try:
            node, folder = await asyncio.to_thread(stack.enter_context, from_npm(*PACKAGES))
        except Absent as error:
            reason = str(error)
        if reason:
            yield reason
            return
        where = (str(folder), server.host, str(server.port))
        process = await asyncio.create_subprocess_exec(
            # On a topic of its own: it stays subscribed while others are measured.
            *(node, str(HERE / "messages.js"), *where, encode(MESSAGE | {"topic": 5}).decode()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            await process.stdout.readline()
            yield Deepstream(process)
        finally:
            process.stdin.close()
            await process.wait()


# -- the run


async def run(server: EmbeddedServer, rounds: int, seconds: float) -> tuple[list[RowInLoop], str]:
    async with contextlib.AsyncExitStack() as stack:
        rows = []
        for core, reads in (("fast", True), ("fast", False), ("pure", True)):
            tasks, window = await stack.enter_async_context(ours(server, core, reads))
            raw = "" if reads else ", data not read"
            rows.append(RowInLoop(f"dscache, {core} core{raw}, {TASKS} tasks", tasks))
            rows.append(RowInLoop(f"dscache, {core} core{raw}, {WINDOW} on their way", window))
        peer = RedisPy(server)
        stack.push_async_callback(peer.close)
        rows.append(
            RowInLoop(f"redis-py, hiredis: publish and listen, {TASKS} tasks", peer.measure)
        )
        real = await stack.enter_async_context(deepstream(server))
        missing = real if isinstance(real, str) else ""
        if isinstance(real, Deepstream):
            rows.append(RowInLoop(f"deepstream's connector, {WINDOW} on their way", real.measure))
        await measure(rows, rounds, seconds)
        return rows, missing


async def measure(rows: list[RowInLoop], rounds: int, seconds: float) -> None:
    """Fill the rows; a measurement ends when all messages have been received."""
    sizes = []
    for row in rows:
        taste = 1000
        for _ in range(2):
            took = await row.measure(taste)
        sizes.append(max(taste, round(taste / took * seconds)))
    await measure_in_loop(rows, sizes, rounds)


def main() -> None:
    options = arguments(__doc__, rounds=7, seconds=0.4).parse_args()
    with EmbeddedServer() as server, apart(server) as placing:
        rows, missing = uvloop.run(run(server, options.rounds, options.seconds))
        header = facts(server, placing, options.rounds)
    print(*header[:-1], sep="\n")
    print(
        f"messages of {len(encode(MESSAGE))} bytes; median of {options.rounds} interleaved rounds"
    )
    print(f"\n{'two nodes that send and hear each other':52}{'messages/s':>12}{'best round':>12}")
    for row in rows:
        print(f"  {row.label:50}{row.median:12,.0f}{row.best:12,.0f}")
    by_label = {row.label: row for row in rows}
    peer = next(row for row in rows if row.label.startswith("redis-py"))
    tasks = by_label[f"dscache, fast core, {TASKS} tasks"]
    print()
    print(goal("fast core to redis-py, both from tasks", tasks, peer, 8))
    if missing:
        print(f"deepstream's connector: not measured: {missing}")
        return
    real = rows[-1]
    window = by_label[f"dscache, fast core, {WINDOW} on their way"]
    print(goal("fast core to deepstream's connector, both without waiting", window, real, 2))


if __name__ == "__main__":
    main()
