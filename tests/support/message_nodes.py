"""Message nodes for tests: opened together and closed at the end, when each must be drained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dscache.messages import MessageNode
from tests.conftest import PATIENT
from tests.soak.figures import COUNTERS
from tests.support.waiting import own_tasks, until

# Seconds until something must have ended: far more than any machine needs, since it measures
# nothing.


class LooseNode(MessageNode):
    """A node that sends any message on any topic: most tests' messages mean nothing to anybody."""

    def send(
        self, message: Any, *, topic: int | None = None, unchecked: bool = True
    ) -> asyncio.Future[int]:
        return super().send(message, topic=topic, unchecked=unchecked)

    def send_direct(
        self, server: str, message: Any, *, topic: int | None = None, unchecked: bool = True
    ) -> asyncio.Future[int]:
        return super().send_direct(server, message, topic=topic, unchecked=unchecked)


class Nodes:
    """Nodes by name: ``await nodes("A", **options)``; later ones take the same options."""

    def __init__(self, **options: Any) -> None:
        self._options = PATIENT | options
        self.opened: list[MessageNode] = []

    async def __call__(self, name: str, *, on_gap: Any = None, **options: Any) -> MessageNode:
        entry = {"name": "redis", "options": self._options | options}
        config = {"serverName": name, "clusterNode": entry}
        node = LooseNode.from_config(config, on_gap=on_gap)
        self.opened.append(node)
        await node.when_ready()
        return node


@asynccontextmanager
async def open_nodes(**options: Any) -> AsyncIterator[Nodes]:
    """Yield an opener of nodes, all of which are closed and drained at the end."""
    nodes = Nodes(**options)
    try:
        yield nodes
    finally:
        for node in nodes.opened:
            await node.close()
    for node in nodes.opened:
        counters = {name: node.stats()[name] for name in COUNTERS if node.stats()}
        assert not any(counters.values()), f"{node.description}: not drained: {counters}"
    assert own_tasks() == []


class Received(list[Any]):
    """A callback's calls: the data of the messages, and their senders."""

    def __init__(self) -> None:
        super().__init__()
        self.senders: list[str] = []

    def __call__(self, message: Any, sender: str) -> None:
        self.append(message.data)
        self.senders.append(sender)

    async def reaches(self, count: int) -> None:
        """Wait until that many messages have arrived."""
        await until(lambda: len(self) >= count)


async def receive_on(node: MessageNode, topic: int) -> Received:
    """Subscribe a node; return the messages it receives from now on."""
    heard = Received()
    node.subscribe(topic, heard)
    await node.when_ready()
    return heard
