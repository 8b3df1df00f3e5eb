"""The connections of an AsyncCache to the nodes of a cluster: current nodes, and leaving ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ..net.cluster_state import ClusterState
from ..net.slot_table import NodeInfo
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
            self._infos[node] = info
            self._nodes[info.shown] = node
        return node

    def info_of(self, node: Connection) -> NodeInfo:
        """Return the node that a connection leads to, even while it is leaving."""
        return self._infos[node]

    def address_of(self, node: Connection) -> Address:
        """Return the address of a connection's node, even while it is leaving."""
        return self._infos[node].address

    def all(self) -> list[Connection]:
        """Return the connections that are not leaving."""
        return list(self._nodes.values())

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
        known = self._state.nodes
        return [node for node, info in self._infos.items() if self._is_departed(node, info, known)]

    def _is_departed(self, node: Connection, info: NodeInfo, known: Mapping[str, NodeInfo]) -> bool:
        return node not in self._leaving and known.get(info.shown) is not info

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

    # -- what stats() shows of them

    @property
    def server(self) -> str:
        """The kinds and versions of the servers, as far as they are known."""
        return ", ".join(sorted({node.server for node in self._nodes.values() if node.server}))

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return the counters of each node, by its address."""
        # A copy, since another thread may call this, such as that of a monitoring system.
        return {shown: node.stats() for shown, node in list(self._nodes.items())}

    def former_stats(self) -> list[Mapping[str, Any]]:
        """Return the counters of all departed nodes together, and of each leaving one."""
        return [self._state.past, *(node.stats() for node in list(self._leaving))]
