"""The connections of a message node: a pair, or one to each node of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

from ..aio.connection import Connection, NodeListener
from ..config import Config, Options
from ..config.messages import MessageConfig
from ..core.keys import slot_of_key
from ..errors import DscacheError
from ..net.slots import QUESTIONS
from .any_node import AnyNode
from .subscriptions import Listener, Subscriptions

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..aio.cluster import Cluster
    from ..core.pure import MessageDispatcher, Pipeline


# Counters of a pipeline that concern messages.
_SENDING: Final = (
    "commands",
    "flushes",
    "queued",
    "in_flight",
    "pending",
    "pending_bytes",
)


class _Transport(NodeListener):
    """The connections of a message node: ``subscriptions`` has its topics."""

    def __init__(self, dispatcher: MessageDispatcher, subscriptions: Subscriptions) -> None:
        self.dispatcher = dispatcher
        self.subscriptions = subscriptions


class PairTransport(_Transport):
    """A sending and a listening connection, to one server or to any node of a cluster.

    deepstream's own connector has two as well. When the server closes the listening connection
    because its output buffer is full, no sent message is lost. And a server without RESP3 accepts
    no PUBLISH on a connection with subscriptions.
    """

    def __init__(
        self,
        config: MessageConfig,
        credentials: CredentialProvider | None,
        dispatcher: MessageDispatcher,
        subscriptions: Subscriptions,
    ) -> None:
        super().__init__(dispatcher, subscriptions)
        options: Options = config.options
        nodes: list[AnyNode | None] = [None, None]
        if options.nodes:
            nodes = [AnyNode(options, credentials, config.source) for _ in nodes]
            first = options.seeds[0]
            # The options of every node; AnyNode replaces the address.
            options = options.for_node(first.host, first.port, first)
        self._sender = Connection(options, credentials, endpoint=nodes[0], owner="a MessageNode")
        self._receiver = Connection(
            options, credentials, cluster=self, endpoint=nodes[1], inbox=dispatcher
        )
        self._listener = Listener(
            subscriptions,
            self._receiver,
            lambda: subscriptions.wanted,
            heartbeat=config.options.heartbeat / 1000,
        )
        self._nodes = [
            (node, connection)
            for node, connection in zip(nodes, (self._sender, self._receiver), strict=True)
            if node is not None
        ]
        self._interval = (options.slots_refresh_interval or 5000) / 1000
        self._task: asyncio.Task[None] | None = None
        if self._nodes:
            self._task = asyncio.get_running_loop().create_task(self._watch_nodes())

    @property
    def entry(self) -> Any:
        return self._sender.pipeline

    @property
    def is_ready(self) -> bool:
        return self._sender.is_ready and self._receiver.is_ready

    @property
    def server(self) -> str:
        return self._sender.server or self._receiver.server

    def on_topics_changed(self) -> None:
        self._listener.on_topics_changed()

    def ended(self, pipeline: Pipeline, topic: int) -> None:
        self._listener.ended(topic)

    async def when_ready(self) -> None:
        await asyncio.gather(self._sender.when_ready(), self._receiver.when_ready())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._sender.close()
        await self._listener.close()
        await self._receiver.close()

    def stats(self) -> dict[str, Any]:
        sent, heard = self._sender.stats(), self._receiver.stats()
        return {
            **{name: sent[name] for name in _SENDING},
            "bytes_out": sent["bytes_out"] + heard["bytes_out"],
            "bytes_in": sent["bytes_in"] + heard["bytes_in"],
            "connects": sent["connects"] + heard["connects"],
            "last_loss": heard["last_loss"] or sent["last_loss"],
        }

    # -- events of the listening connection

    def on_connected(self, node: Connection) -> None:
        self._listener.on_connected()

    def on_disconnected(self, node: Connection) -> None:
        self._listener.on_disconnected()

    async def _watch_nodes(self) -> None:
        """Update the known nodes of the cluster, and leave a node that is cut off from it."""
        while True:
            await asyncio.sleep(self._interval)
            for node, connection in self._nodes:
                if connection.pipeline.resp2_pubsub and connection is self._receiver:
                    continue  # RESP2 forbids other commands beside subscriptions
                was_healthy = node.is_healthy
                try:
                    async with asyncio.timeout(self._interval):
                        node.update_nodes(*await connection.ask(*map(list, QUESTIONS)))
                except (DscacheError, TimeoutError):
                    continue
                # Only once: if every node is cut off, no other one is better.
                if was_healthy and not node.is_healthy:
                    connection.leave("it is cut off from its cluster")


class ShardedTransport(_Transport):
    """A connection to each node of a cluster, with the topics of its slots."""

    def __init__(
        self,
        config: MessageConfig,
        credentials: CredentialProvider | None,
        dispatcher: MessageDispatcher,
        subscriptions: Subscriptions,
    ) -> None:
        from ..aio.cluster import Cluster

        super().__init__(dispatcher, subscriptions)
        self._heartbeat = config.options.heartbeat / 1000
        self._listeners: dict[Connection, Listener] = {}
        self._cluster: Cluster = Cluster(
            Config(name="redis", options=config.options, source=config.source),
            credentials,
            inbox=dispatcher,
            listener=self,
        )

    @property
    def entry(self) -> Any:
        return self._cluster.entry

    @property
    def is_ready(self) -> bool:
        return self._cluster.is_ready

    @property
    def server(self) -> str:
        return self._cluster.server

    def on_topics_changed(self) -> None:
        for listener in self._listeners.values():
            listener.on_topics_changed()

    def ended(self, pipeline: Pipeline, topic: int) -> None:
        for node, listener in self._listeners.items():
            if node.pipeline is pipeline:
                listener.ended(topic)

    async def when_ready(self) -> None:
        await self._cluster.when_ready()

    async def close(self) -> None:
        await asyncio.gather(*(listener.close() for listener in self._listeners.values()))
        await self._cluster.close()

    def stats(self) -> dict[str, Any]:
        stats = self._cluster.stats()
        wanted = (*_SENDING, "bytes_out", "bytes_in", "connects", "last_loss")
        return {name: stats[name] for name in (*wanted, "redirections", "refreshes")}

    # -- events of the cluster

    def on_connected(self, node: Connection) -> None:
        listener = self._listeners.get(node)
        if listener is None:
            listener = self._listeners[node] = Listener(
                self.subscriptions,
                node,
                lambda: self._topics_of(node),
                heartbeat=self._heartbeat,
                commands=("SSUBSCRIBE", "SUNSUBSCRIBE"),
                moved=self._cluster.look_again,
            )
        listener.on_connected()

    def on_disconnected(self, node: Connection) -> None:
        listener = self._listeners.get(node)
        if listener is not None:
            listener.on_disconnected()
            if not self._topics_of(node):
                del self._listeners[node]

    def on_slots_moved(self) -> None:
        self.on_topics_changed()

    def _topics_of(self, node: Connection) -> Collection[int]:
        owner = self._cluster.owner
        wanted = self.subscriptions.wanted
        return [topic for topic in wanted if owner(slot_of_key(b"%d" % topic)) is node]


Transport = PairTransport | ShardedTransport
