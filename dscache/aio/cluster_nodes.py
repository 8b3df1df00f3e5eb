"""The connections of an AsyncCache to the nodes of a cluster: current nodes, and leaving ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from ..core import stats as counters
from ..core.constants import SLOTS
from ..net.cluster_state import ClusterState
from ..net.slot_table import NodeInfo, Shard
from .connection import Connection


class ClusterNodes:
    """One connection to each node of a ClusterState that was needed so far.

    ``connect`` returns a new connection to a node.
    """

    def __init__(self, state: ClusterState, connect: Callable[[NodeInfo], Connection]) -> None:
        self._state = state
        self._connect = connect
        self.by_address: dict[str, Connection] = {}
        self.leaving: dict[Connection, asyncio.Task[None]] = {}
        """The connections that finish their commands in flight before they close."""

    def open(self, info: NodeInfo) -> Connection:
        """Return the connection to a node, made now if there is none."""
        node = self.by_address.get(info.shown)
        if node is None:
            node = self._connect(info)
            info.is_tried, info.trouble = True, node.pipeline.down
            self.by_address[info.shown] = node
        node.info = info  # a new one if the node has left and come back meanwhile
        return node

    def open_shard(self, shard: Shard) -> Connection:
        """Return the connection to a shard's primary; connect to the shard's readers too."""
        for reader in (*shard.readers, *shard.reserves):
            self.open(self._state.node_at(reader))
        return self.open(self._state.node_at(shard.primary))

    def ready(self) -> list[Connection]:
        # Of a copy, since another thread may ask, such as that of a monitoring system.
        return [node for node in list(self.by_address.values()) if node.is_ready]

    def is_up(self, shown: str) -> bool:
        """Return whether the node at ``host:port`` has a connection that can send now."""
        node = self.by_address.get(shown)
        return node is not None and node.is_ready

    def leave(self, node: Connection) -> None:
        """Close a connection once its commands in flight are answered."""

        async def close() -> None:
            await node.close()
            with self._state.lock:  # one step for counted()
                del self.leaving[node]
                self._state.keep_counts(None, node.stats())

        closing = asyncio.create_task(close(), name=f"dscache {node.address}")
        with self._state.lock:
            del self.by_address[node.info.shown]
            self.leaving[node] = closing

    def counted(self) -> tuple[dict[str, Connection], list[Connection], dict[str, Any]]:
        """Return the current nodes, those that leave, and the counters of those that have left.

        Another thread may call this, such as that of a monitoring system. Each node is in one of
        the three.
        """
        past: dict[str, Any] = {}
        with self._state.lock:
            counters.add(past, self._state.past)
            return self.by_address.copy(), list(self.leaving), past

    async def close(self) -> None:
        closing = [node.close() for node in self.by_address.values()]
        await asyncio.gather(*closing, *self.leaving.values())

    # -- the slots of each

    def masters(self) -> tuple[list[Connection | None], dict[int, Shard]]:
        """Return the owner of each slot, and the slots whose owner has no connection yet."""
        table = self._state.table
        masters: list[Connection | None] = [None] * SLOTS
        unopened: dict[int, Shard] = {}
        for shard in table.shards:
            slots = range(shard.first, shard.last + 1)
            known = self.by_address.get(shard.primary)
            node = self.open_shard(shard) if self._state.opens_all else known
            if node is None:
                unopened.update(dict.fromkeys(slots, shard))
            masters[shard.first : shard.last + 1] = [node] * len(slots)
        for slot, shown in table.moved:
            masters[slot] = self.by_address.get(shown)
            unopened.pop(slot, None)
        return masters, unopened

    def readers(self, *, also_primary: bool) -> dict[Connection, list[Connection]]:
        """Return the replicas of each primary that are ready, and the primary if it is read too."""
        replicas: dict[Connection, dict[Connection, None]] = {}
        for shard in self._state.table.shards:
            if (primary := self.by_address.get(shard.primary)) is None:
                continue
            ready = self._ready_of(shard.readers, primary)
            ready = ready or self._ready_of(shard.reserves, primary)
            replicas.setdefault(primary, {}).update(dict.fromkeys(ready))
        return {
            primary: [*ready, primary] if also_primary else list(ready)
            for primary, ready in replicas.items()
        }

    def _ready_of(self, shown: Iterable[str], primary: Connection) -> list[Connection]:
        found = map(self.by_address.get, shown)
        return [one for one in found if one is not None and one is not primary and one.is_ready]
