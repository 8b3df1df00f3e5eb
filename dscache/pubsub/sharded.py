"""The connections of a message node to each node of a cluster, for sharded messages."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..aio.cluster import Cluster
from ..aio.connection import Connection
from ..config.messages import MessageConfig
from ..core.keys import slot_of_key
from .subscriptions import Listener, Subscriptions
from .transport import SENDING_COUNTERS

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.pure import MessageDispatcher, Pipeline


class ShardedTransport(Cluster):
    """A connection to each node of a cluster, with the topics of its slots."""

    def __init__(
        self,
        config: MessageConfig,
        credentials: CredentialProvider | None,
        dispatcher: MessageDispatcher,
        subscriptions: Subscriptions,
    ) -> None:
        self.dispatcher = dispatcher
        self.subscriptions = subscriptions
        self._heartbeat = config.options.heartbeat / 1000
        self._listeners: dict[Connection, Listener] = {}
        self.connects = 0
        """How often a connection was made."""
        super().__init__(config, credentials, inbox=dispatcher)

    def on_topics_changed(self) -> None:
        for listener in self._listeners.values():
            listener.on_topics_changed()

    def ended(self, pipeline: Pipeline, topic: int) -> None:
        """Record that the server behind ``pipeline`` has ended a subscription."""
        for node, listener in self._listeners.items():
            if node.pipeline is pipeline:
                listener.ended(topic)

    async def close(self) -> None:
        await asyncio.gather(*(listener.close() for listener in self._listeners.values()))
        await super().close()

    def stats(self) -> dict[str, Any]:
        stats = super().stats()
        wanted = (*SENDING_COUNTERS, "bytes_out", "bytes_in", "connects", "last_loss")
        return {name: stats[name] for name in (*wanted, "redirections", "refreshes")}

    # -- events of the cluster

    def on_connected(self, node: Connection) -> None:
        super().on_connected(node)
        self.connects += 1
        if node not in self._listeners:
            self._listeners[node] = Listener(
                self.subscriptions,
                node,
                lambda: self._topics_of(node),
                heartbeat=self._heartbeat,
                commands=("SSUBSCRIBE", "SUNSUBSCRIBE"),
                moved=self.look_again,
            )
        self._listeners[node].on_connected()

    def on_disconnected(self, node: Connection) -> None:
        super().on_disconnected(node)
        self._record_loss(node)

    def _leave(self, node: Connection) -> None:
        self._record_loss(node)
        super()._leave(node)

    def _forget(self, slots: list[int]) -> None:
        super()._forget(slots)
        if slots:
            self._loop.call_soon(self.on_topics_changed)

    def _record_loss(self, node: Connection) -> None:
        listener = self._listeners.get(node)
        if listener is not None:
            listener.on_disconnected()
            if not self._topics_of(node):
                del self._listeners[node]

    def _topics_of(self, node: Connection) -> Collection[int]:
        wanted = self.subscriptions.wanted
        return [topic for topic in wanted if self.owner(slot_of_key(b"%d" % topic)) is node]
