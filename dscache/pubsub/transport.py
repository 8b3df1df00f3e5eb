"""How messages get from here to Redis and back: over two connections, or those of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol

from ..aio.connection import Connection
from ..aio.topology import Topology
from ..config import Config
from ..config.messages import MessageConfig
from ..core.keys import slot_of_key
from ..errors import DscacheError
from ..net.slots import QUESTIONS
from .any_node import AnyNode
from .subscriptions import Listener, Subscriptions

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..aio.cluster import Cluster


class MessageTransport(Topology, Protocol):
    """The nodes of a message node, which also listen, each to some of the topics."""

    def look(self) -> None:
        """Look which topics are wanted by now."""

    def ended(self, pipeline: Any, topic: int) -> None:
        """Note that a server has ended a subscription."""


class PairTransport:
    """A connection that sends and one that listens, to one server or to any node of a cluster.

    There are two, as deepstream's own connector has it: a server that closes a connection because
    its messages are not taken fast enough closes none over which something was sent, and one that
    knows no RESP3 lets nothing be sent where anybody listens.
    """

    def __init__(
        self,
        config: MessageConfig,
        credentials: CredentialProvider | None,
        inbox: Any,
        subscriptions: Subscriptions,
    ) -> None:
        options = config.options
        nodes: list[AnyNode | None] = [None, None]
        if options.nodes:
            nodes = [AnyNode(options, credentials, config.source) for _ in nodes]
            first = options.seeds[0]
            # What holds for every node; where each is, it finds out by itself.
            options = options.for_node(first.host, first.port, first)  # type: ignore[assignment]
        self._subscriptions = subscriptions
        self._sender = Connection(options, credentials, endpoint=nodes[0], owner="a MessageNode")
        self._receiver = Connection(
            options, credentials, cluster=self, endpoint=nodes[1], inbox=inbox
        )
        self._listener = Listener(
            subscriptions,
            self._receiver,
            lambda: subscriptions.wanted,
            heartbeat=options.heartbeat / 1000,
        )
        self._nodes = [
            (node, connection)
            for node, connection in zip(nodes, (self._sender, self._receiver), strict=True)
            if node is not None
        ]
        self._interval = (options.slots_refresh_interval or 5000) / 1000
        self._task: asyncio.Task[None] | None = None
        if self._nodes:
            self._task = asyncio.get_running_loop().create_task(self._look_after())

    @property
    def entry(self) -> Any:
        return self._sender.pipeline

    @property
    def is_ready(self) -> bool:
        return self._sender.is_ready and self._receiver.is_ready

    @property
    def server(self) -> str:
        return self._sender.server or self._receiver.server

    def look(self) -> None:
        self._listener.look()

    def ended(self, pipeline: Any, topic: int) -> None:
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
            **{name: sent[name] for name in _OF_SENDING},
            "bytes_out": sent["bytes_out"] + heard["bytes_out"],
            "bytes_in": sent["bytes_in"] + heard["bytes_in"],
            "connects": sent["connects"] + heard["connects"],
            "last_loss": heard["last_loss"] or sent["last_loss"],
        }

    # -- what the listening connection tells

    def on_redirected(self, source: Connection) -> None:
        """Take no notice: nothing is asked that could be."""

    def on_progress(self, source: Connection) -> None:
        """Take no notice."""

    def on_connected(self, source: Connection) -> None:
        """Subscribe again."""
        self._listener.on_connected()

    def on_disconnected(self, source: Connection) -> None:
        """Note that nothing is heard."""
        self._listener.on_disconnected()

    async def _look_after(self) -> None:
        """Leave a node of a cluster that is cut off from the others, and learn which there are."""
        while True:
            await asyncio.sleep(self._interval)
            for node, connection in self._nodes:
                if connection.pipeline.resp2_pubsub and connection is self._receiver:
                    continue  # where it listens, it may ask nothing
                was_well = node.is_well
                try:
                    async with asyncio.timeout(self._interval):
                        node.learn(*await connection.ask(*map(list, QUESTIONS)))
                except (DscacheError, TimeoutError):
                    continue
                # Once: where all of them are, none is better.
                if was_well and not node.is_well:
                    connection.leave("it is cut off from its cluster")


class ShardedTransport:
    """The nodes of a cluster, each with the topics whose slots it serves."""

    def __init__(
        self,
        config: MessageConfig,
        credentials: CredentialProvider | None,
        inbox: Any,
        subscriptions: Subscriptions,
    ) -> None:
        from ..aio.cluster import Cluster

        self._subscriptions = subscriptions
        self._heartbeat = config.options.heartbeat / 1000
        self._listeners: dict[Connection, Listener] = {}
        self._cluster: Cluster = Cluster(
            Config(name="redis", options=config.options, source=config.source),
            credentials,
            inbox=inbox,
            follower=self,
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

    def look(self) -> None:
        for listener in self._listeners.values():
            listener.look()

    def ended(self, pipeline: Any, topic: int) -> None:
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
        wanted = (*_OF_SENDING, "bytes_out", "bytes_in", "connects", "last_loss")
        return {name: stats[name] for name in (*wanted, "redirections", "refreshes")}

    # -- what the cluster tells

    def on_connected(self, node: Connection) -> None:
        """Subscribe to what the node serves."""
        listener = self._listeners.get(node)
        if listener is None:
            listener = self._listeners[node] = Listener(
                self._subscriptions,
                node,
                lambda: self._topics_of(node),
                heartbeat=self._heartbeat,
                words=("SSUBSCRIBE", "SUNSUBSCRIBE"),
                moved=self._cluster.look_again,
            )
        listener.on_connected()

    def on_disconnected(self, node: Connection) -> None:
        """Note that nothing of it is heard."""
        listener = self._listeners.get(node)
        if listener is not None:
            listener.on_disconnected()
            if not self._topics_of(node):
                del self._listeners[node]

    def slots_moved(self) -> None:
        """Subscribe where the slots are by now."""
        self.look()

    def _topics_of(self, node: Connection) -> Collection[int]:
        owner = self._cluster.owner
        wanted = self._subscriptions.wanted
        return [topic for topic in wanted if owner(slot_of_key(b"%d" % topic)) is node]


# What of a pipeline's counters says something of messages.
_OF_SENDING = (*("commands", "flushes", "queued", "in_flight", "pending", "pending_bytes"),)


def open_transport(
    config: MessageConfig,
    credentials: CredentialProvider | None,
    inbox: Any,
    subscriptions: Subscriptions,
) -> MessageTransport:
    """Return the connections that a configuration names, and begin to connect."""
    kind: Callable[..., MessageTransport] = (
        ShardedTransport if config.options.sharded else PairTransport
    )
    return kind(config, credentials, inbox, subscriptions)
