"""Soak rows on messages: order, lost servers, and slow subscribers."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import dscache
from dscache.embedded import EmbeddedServer, ServerBinary
from tests.soak.figures import Figures, held, until

EVENT = 1004  # none of deepstream's
TEXT = "x" * 60
# The messages of one sender in flight at a time.
_WINDOW = 500
# The least part of their rate that reads keep beside a slow subscriber.
_KEPT = 0.8
_READERS = 50
_NEWS_A_SECOND = 5000


def open_node(server: EmbeddedServer, name: str, **options: Any) -> dscache.MessageNode:
    """Return a message node on a server."""
    where = {"host": server.host, "port": server.port, **options}
    config = {"serverName": name, "clusterNode": {"name": "redis", "options": where}}
    return dscache.MessageNode.from_config(config)


# -- complete delivery


async def everything(
    figures: Figures, binary: ServerBinary, *, count: int = 1_000_000, nodes: int = 3
) -> None:
    """Let several nodes send at once: each receives all others' messages once, in order."""
    names = [f"node-{number}" for number in range(nodes)]
    each = count // nodes
    options = {"maxPending": 10 * count, "commandTimeout": 60_000}
    with EmbeddedServer(binary) as server:
        opened = [open_node(server, name, **options) for name in names]
        last = {name: dict.fromkeys(names, -1) for name in names}
        wrong: list[str] = []
        for name, node in zip(names, opened, strict=True):

            def callback(message: Any, sender: str, mine: Any = last[name], me: str = name) -> None:
                number = message["number"]
                if number != mine[sender] + 1 or sender == me:
                    wrong.append(f"{me} heard {number} of {sender} after {mine[sender]}")
                mine[sender] = number

            node.subscribe(EVENT, callback)
            await node.when_ready()
        began = time.monotonic()
        sent = await asyncio.gather(*(_send(node, each) for node in opened))
        await until(
            lambda: (
                all(
                    last[me][sender] == each - 1 for me in names for sender in names if me != sender
                )
                # Each node's own messages come back to it too, maybe behind those of the others.
                and all(node.stats()["own"] >= each for node in opened)
            ),
            "the last messages",
        )
        seconds = time.monotonic() - began
        figures.problems += wrong[:10]
        figures.operations = nodes * each
        figures.outcomes["ok"] += figures.operations
        if set(sent) != {nodes}:
            figures.problems.append(f"messages went to {sent} connections, not to {nodes}")
        for node in opened:
            stats = node.stats()
            heard = (stats["received"], stats["own"], stats["dropped"], stats["gaps"])
            if heard != ((nodes - 1) * each, each, 0, 0):
                figures.problems.append(f"{node.server_name} heard {heard}")
            await node.close()
            _drained(figures, node)
        rate = nodes * each / seconds
        figures.notes.append(f"{rate:.0f} sent and {rate * (nodes - 1):.0f} heard a second")


async def _send(node: dscache.MessageNode, count: int) -> int:
    """Send numbered messages; return to how many connections each went, or -1 if they differ."""
    went: set[int] = set()
    for first in range(0, count, _WINDOW):
        numbers = range(first, min(first + _WINDOW, count))
        went |= set(
            await asyncio.gather(
                *(node.send({"topic": EVENT, "number": n, "text": TEXT}) for n in numbers)
            )
        )
    return went.pop() if len(went) == 1 else -1


# -- the server is killed


class SentMessages:
    """All sent messages: when each was issued, when its result came, and whether Redis took it.

    In arrays, as the row's own memory must not look like that of dscache.
    """

    def __init__(self) -> None:
        self.issued = array("d")
        self.settled = array("d")
        self.is_taken = bytearray()

    def issue(self) -> int:
        """Record a message that is about to be sent; return its number."""
        self.issued.append(time.time())
        self.settled.append(0.0)
        self.is_taken.append(False)
        return len(self.issued) - 1

    def settle(self, number: int, is_taken: bool) -> None:
        """Record the result of a message."""
        self.settled[number] = time.time()
        self.is_taken[number] = is_taken


@dataclass
class Listener:
    """The messages received by one node, and the gaps reported to it."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    gaps: list[tuple[float, float]] = field(default_factory=list)

    def take(self, message: Any, sender: str) -> None:
        self.numbers.append(message["number"])

    def note(self, since: float, until: float) -> None:
        self.gaps.append((since, until))

    def problems(self, book: SentMessages, me: str) -> Iterator[str]:
        """Return messages received twice or too late, and those missed outside of any gap."""
        last = -1
        for number in self.numbers:
            if number <= last:
                yield f"{me} heard {number} after {last}"
            for missed in range(last + 1, number):
                issued, settled = book.issued[missed], book.settled[missed]
                told = any(since <= settled and issued <= until for since, until in self.gaps)
                if book.is_taken[missed] and not told:
                    yield f"{me} missed {missed} and was not told"
            last = number


async def kill(figures: Figures, binary: ServerBinary, *, rounds: int = 20) -> None:
    """Kill the server and start it again, under load."""
    book = SentMessages()
    listeners = {"B": Listener(), "C": Listener()}
    with EmbeddedServer(binary) as server:
        sender = open_node(server, "A")
        hearers = [open_node(server, name) for name in listeners]
        for node in hearers:
            listener = listeners[node.server_name]
            node.on_gap = listener.note
            node.subscribe(EVENT, listener.take)
        for node in (sender, *hearers):
            await node.when_ready()
        stop = asyncio.Event()
        load = asyncio.create_task(_load(figures, sender, book, stop))
        for number in range(rounds):
            await asyncio.sleep(random.uniform(0.1, 0.4))
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(random.uniform(0, 0.5))
            await asyncio.to_thread(server.start)
            began = time.monotonic()
            await until(
                lambda n=number: all(len(listener.gaps) > n for listener in listeners.values()),
                "subscriptions after a kill",
            )
            figures.recovered(time.monotonic() - began)
            heard = [len(listener.numbers) for listener in listeners.values()]
            await until(
                lambda h=heard: all(
                    len(listener.numbers) > before
                    for listener, before in zip(listeners.values(), h, strict=True)
                ),
                "messages after a kill",
            )
        stop.set()
        await load
        final = book.issue()
        await sender.send({"topic": EVENT, "number": final})
        book.settle(final, True)
        await until(
            lambda: all(listener.numbers[-1] == final for listener in listeners.values()),
            "the last one",
        )
        for name, listener in listeners.items():
            figures.problems += list(listener.problems(book, name))[:5]
            if len(listener.gaps) != rounds:
                figures.problems.append(
                    f"{name} was told of {len(listener.gaps)} gaps, not {rounds}"
                )
        for node in (sender, *hearers):
            await node.close()
            _drained(figures, node)
    figures.operations = final + 1
    missed = sum(figures.operations - len(listener.numbers) for listener in listeners.values())
    figures.notes.append(f"{rounds} kills, {missed} messages missed, all of them in gaps")


async def _load(
    figures: Figures, node: dscache.MessageNode, book: SentMessages, stop: asyncio.Event
) -> None:
    def settled(number: int, waiter: asyncio.Future[int]) -> None:
        error = waiter.exception()
        figures.outcomes["ok" if error is None else type(error).__name__] += 1
        book.settle(number, error is None)

    waiter = None
    while not stop.is_set():
        for _ in range(20):
            number = book.issue()
            waiter = node.send({"topic": EVENT, "number": number})
            waiter.add_done_callback(partial(settled, number))
        await asyncio.sleep(0.002)
    if waiter is not None:
        await asyncio.wait([waiter])


# -- a slow subscriber


async def slow(
    figures: Figures, binary: ServerBinary, *, seconds: float = 10.0, pause: float = 0.01
) -> None:
    """Let one subscriber fall behind: its queue is limited, and the cache is no slower."""
    limit = 1000
    with EmbeddedServer(binary) as server:
        cache = dscache.AsyncCache.from_config(server.url)
        node = open_node(server, "B", maxPending=limit)
        async with cache, node:
            await cache.set("slow", 1, {"text": TEXT})
            prompt = taken = 0

            def count(message: Any, sender: str) -> None:
                nonlocal prompt
                prompt += 1

            async def dawdle(message: Any, sender: str) -> None:
                nonlocal taken
                taken += 1
                await asyncio.sleep(pause)

            node.subscribe(EVENT, count)
            await node.when_ready()
            with _flood(server):
                await until(lambda: prompt > 0, "the first message")
                usual = await _gets(cache, seconds / 2)
                before = held()
                leave = node.subscribe(EVENT, dawdle)
                begun = node.stats()["received"]
                beside = await _gets(cache, seconds / 2)
                figures.memory = (before, held())
            await until(lambda: node.stats()["waiting"] <= limit, "the queue to be bounded")
            await _settled(lambda: prompt)
            stats = node.stats()
            came = stats["received"] - begun
            # On a busy machine, the prompt subscriber's messages may wait or be dropped too.
            of_prompt = stats["received"] - prompt
            if taken + stats["waiting"] + stats["dropped"] - of_prompt != came:
                figures.problems.append(
                    f"{taken} taken, {stats['waiting']} waiting and {stats['dropped']} dropped "
                    f"of {came}"
                )
            if came > 2 * limit and not stats["dropped"]:
                figures.problems.append("nothing was dropped")
            leave()
            figures.operations = prompt
            figures.outcomes["ok"] += prompt
            figures.notes.append(
                f"{usual:.0f} gets/s beside prompt subscribers, {beside:.0f} beside a slow one; "
                f"{stats['dropped']} messages dropped"
            )
            if beside < _KEPT * usual:
                figures.slow.append(f"gets fell to {beside / usual:.0%} beside a slow subscriber")
        _drained(figures, node)


async def _settled(count: Any) -> None:
    """Wait until no more messages arrive."""
    before = -1
    while before != count():
        before = count()
        await asyncio.sleep(0.2)


async def _gets(cache: dscache.AsyncCache, seconds: float) -> float:
    """Return how many reads a second some tasks achieve."""
    end = time.monotonic() + seconds
    done = 0

    async def read() -> None:
        nonlocal done
        while time.monotonic() < end:
            await cache.get("slow")
            done += 1

    await asyncio.gather(*(read() for _ in range(_READERS)))
    return done / seconds


@contextmanager
def _flood(server: EmbeddedServer) -> Iterator[None]:
    """Let another process publish messages, many a second, for the duration of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.soak.message_rows", server.host, str(server.port)],
        cwd=Path(__file__).parents[2],
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def _send_for_ever(host: str, port: int) -> None:
    config = {"clusterNode": {"name": "redis", "options": {"host": host, "port": port}}}
    async with dscache.MessageNode.from_config(config, server_name="A") as node:
        number = 0
        while True:
            batch = [
                node.send({"topic": EVENT, "number": number + i, "text": TEXT})
                for i in range(_NEWS_A_SECOND // 100)
            ]
            number += len(batch)
            await asyncio.gather(*batch)
            await asyncio.sleep(0.01)


def _drained(figures: Figures, node: dscache.MessageNode) -> None:
    stats = node.stats()
    left = {name: stats[name] for name in ("pending", "pending_bytes", "in_flight", "queued")}
    if any(left.values()):
        figures.problems.append(f"{node.server_name} is not drained: {left}")


if __name__ == "__main__":
    asyncio.run(_send_for_ever(sys.argv[1], int(sys.argv[2])))
