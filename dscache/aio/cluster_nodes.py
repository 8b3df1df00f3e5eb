"""The connections of an AsyncCache to the nodes of a cluster: current nodes, and leaving ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..core.constants import SLOTS
from ..net.cluster_state import ClusterState
from ..net.slot_table import NodeInfo, Shard
from ..net.slots import Address
from .connection import Connection


class ClusterNodes:
    """One connection to each node of a ClusterState that was needed so far.

    ``connect`` returns a new connection to a node.
    """

    def __init__(self, state: ClusterState, connect: Callable[[NodeInfo], Connection]) -> None:
        self._state = state
        self._connect = connect
        self._nodes: dict[str, Connection] = {}
        self._infos: dict[Connection, NodeInfo] = {}
        self._leaving: dict[Connection, asyncio.Task[None]] = {}

    def find(self, shown: str) -> Connection | None:
        """Return the connection to the node at ``host:port``, if there is one."""
        return self._nodes.get(shown)

    def open(self, info: NodeInfo) -> Connection:
        """Return the connection to a node, made now if there is none."""
        node = self._nodes.get(info.shown)
        if node is None:
            node = self._connect(info)
            info.is_tried, info.trouble = True, node.pipeline.down
            self._nodes[info.shown] = node
        self._infos[node] = info  # a new one if the node has left and come back meanwhile
        return node

    def open_shard(self, shard: Shard) -> Connection:
        """Return the connection to a shard's primary; connect to the shard's readers too."""
        for reader in shard.readers:
            self.open(self._state.node_at(reader))
        return self.open(self._state.node_at(shard.primary))

    def info_of(self, node: Connection) -> NodeInfo:
        """Return the node that a connection leads to, even while it is leaving."""
        return self._infos[node]

    def address_of(self, node: Connection) -> Address:
        """Return the address of a connection's node, even while it is leaving."""
        return self._infos[node].address

    def ready(self) -> list[Connection]:
        """Return the connections that can send now."""
        return [node for node in self._nodes.values() if node.is_ready]

    def is_up(self, shown: str) -> bool:
        """Return whether the node at ``host:port`` has a connection that can send now."""
        node = self._nodes.get(shown)
        return node is not None and node.is_ready

    def leaving(self) -> list[Connection]:
        """Return the connections that finish their commands in flight before they close."""
        return list(self._leaving)

    def departed(self) -> list[Connection]:
        """Return the connections to nodes that the state no longer has."""
        return [node for shown, node in self._nodes.items() if shown not in self._state.nodes]

    def leave(self, node: Connection) -> None:
        """Close a connection once its commands in flight are answered."""
        del self._nodes[self._infos[node].shown]

        async def close() -> None:
            await node.close()
            del self._infos[node], self._leaving[node]
            self._state.keep_counts(None, node.stats())

        self._leaving[node] = asyncio.create_task(close(), name=f"dscache {node.address}")

    async def close(self) -> None:
        """Close every connection."""
        closing = [node.close() for node in self._nodes.values()]
        await asyncio.gather(*closing, *self._leaving.values())

    # -- the slots of each

    def masters(self) -> tuple[list[Connection | None], dict[int, Shard]]:
        """Return the owner of each slot, and the slots whose owner has no connection yet."""
        table = self._state.table
        masters: list[Connection | None] = [None] * SLOTS
        unopened: dict[int, Shard] = {}
        for shard in table.shards:
            slots = range(shard.first, shard.last + 1)
            known = self._nodes.get(shard.primary)
            node = self.open_shard(shard) if self._state.opens_all else known
            if node is None:
                unopened.update(dict.fromkeys(slots, shard))
            masters[shard.first : shard.last + 1] = [node] * len(slots)
        for slot, shown in table.moved:
            masters[slot] = self._nodes.get(shown)
            unopened.pop(slot, None)
        return masters, unopened

    def readers(self, *, also_primary: bool) -> dict[Connection, list[Connection]]:
        """Return the replicas of each primary that are ready, and the primary if it is read too."""
        replicas: dict[Connection, dict[Connection, None]] = {}
        for shard in self._state.table.shards:
            if (primary := self._nodes.get(shard.primary)) is None:
                continue
            found = map(self._nodes.get, shard.readers)
            ready = [
                one for one in found if one is not None and one is not primary and one.is_ready
            ]
            replicas.setdefault(primary, {}).update(dict.fromkeys(ready))
        return {
            primary: [*ready, primary] if also_primary else list(ready)
            for primary, ready in replicas.items()
        }

    # -- their part of stats()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return the counters of each node, by its address."""
        # A copy, since another thread may call this, such as that of a monitoring system.
        return {shown: node.stats() for shown, node in list(self._nodes.items())}
