"""The pair of connections of a message node, to one server or to any node of a cluster."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from ..aio.connection import Connection, NodeListener
from ..aio.endpoint import Endpoint
from ..config import Options
from ..config.messages import MessageConfig
from ..errors import DscacheError
from ..net.slots import QUESTIONS
from .any_node import AnyNode
from .subscriptions import Listener, Subscriptions

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.pure import MessageDispatcher, Pipeline


SENDING_COUNTERS: Final = (
    "commands",
    "flushes",
    "queued",
    "in_flight",
    "pending",
    "pending_bytes",
)
"""Counters of a pipeline that concern messages."""


class PairTransport(NodeListener):
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
        self.dispatcher = dispatcher
        self.subscriptions = subscriptions
        options: Options = config.options
        nodes: list[AnyNode | None] = [None, None]
        if options.nodes:
            nodes = [AnyNode(options, credentials, config.source) for _ in nodes]
            first = options.seeds[0]
            # The options of every node; AnyNode replaces the address.
            options = options.for_node(first.host, first.port, first)
        self._sender = Connection(options, credentials, endpoint=nodes[0], owner="a MessageNode")
        # By itself a Connection with a ``cluster`` takes its server for a node of one.
        endpoint = nodes[1] or Endpoint(options, credentials)
        self._receiver = Connection(
            options, credentials, cluster=self, endpoint=endpoint, inbox=dispatcher
        )
        self._sender.share_tokens(self._receiver)
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
    def pipeline(self) -> Pipeline:
        return self._sender.pipeline

    @property
    def connects(self) -> int:
        """How often the sending connection was made."""
        return self._sender.connects

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
            **{name: sent[name] for name in SENDING_COUNTERS},
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
