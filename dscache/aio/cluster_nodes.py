"""The connections to the nodes of a cluster: to those that are part of it, and that leave it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..config import Options
from ..core import stats as counters
from ..core.constants import join_address
from ..net.slots import VIEWS_TO_LEAVE, Address, SlotRange
from .connection import Connection


class ClusterNodes:
    """The nodes of a cluster that are known, each with a connection."""

    def __init__(self) -> None:
        self._nodes: dict[str, Connection] = {}
        self._addresses: dict[Connection, Address] = {}
        self._absences: Counter[Connection] = Counter()
        self._leaving: dict[Connection, asyncio.Task[None]] = {}
        self._past: dict[str, Any] = {}

    def find(self, address: Address) -> Connection | None:
        """Return the node at an address, if it is known."""
        return self._nodes.get(join_address(*address))

    def address_of(self, node: Connection) -> Address:
        """Return where a node is, even if it is leaving."""
        return self._addresses[node]

    def all(self) -> list[Connection]:
        """Return the nodes that are not leaving."""
        return list(self._nodes.values())

    def ready(self) -> list[Connection]:
        """Return the nodes that can be asked."""
        return [node for node in self._nodes.values() if node.is_ready]

    def leaving(self) -> list[Connection]:
        """Return the nodes that finish what they have in flight."""
        return list(self._leaving)

    # -- who comes and goes

    def join(self, address: Address, node: Connection) -> None:
        """Note a node that is new."""
        self._nodes[join_address(*address)] = node
        self._addresses[node] = address

    def missing(self, present: Collection[Connection]) -> dict[Connection, bool]:
        """Return the nodes that a view leaves out, and of each whether it counts as gone by now."""
        for node in present:
            self._absences.pop(node, None)
        absent = [node for node in self._nodes.values() if node not in present]
        self._absences.update(absent)
        return {node: self._absences[node] >= VIEWS_TO_LEAVE for node in absent}

    def leave(self, node: Connection) -> None:
        """Close a node that is no part of the cluster any more, after what it has in flight."""
        del self._nodes[join_address(*self._addresses[node])]
        self._absences.pop(node, None)

        async def close() -> None:
            await node.close()
            del self._addresses[node], self._leaving[node]
            counters.add(self._past, node.stats())

        self._leaving[node] = asyncio.create_task(close(), name=f"dscache {node.address}")

    async def close(self) -> None:
        """Close every node."""
        closing = [node.close() for node in self._nodes.values()]
        await asyncio.gather(*closing, *self._leaving.values())

    # -- what they tell

    def readers(
        self, view: Iterable[SlotRange], options: Options
    ) -> dict[Connection, list[Connection]]:
        """Return who is read of each primary's slots: those that are ready, as configured."""
        mapped = options.mapped
        shards: dict[Connection, dict[Connection, None]] = {}
        for one in view:
            primary = self.find(mapped(*one.primary))
            if primary is not None:
                replicas = (self.find(mapped(*replica)) for replica in one.replicas)
                ready = {node: None for node in replicas if node is not None and node.is_ready}
                shards.setdefault(primary, {}).update(ready)
        also_primary = options.scale_reads == "all"
        return {
            primary: [*replicas, primary] if also_primary else list(replicas)
            for primary, replicas in shards.items()
        }

    @property
    def server(self) -> str:
        """The kinds and versions of the servers, as far as they are known."""
        return ", ".join(sorted({node.server for node in self._nodes.values() if node.server}))

    def errors_by_node(self) -> str:
        """Return what keeps the nodes from being ready, each in a few words."""
        down = {address: node.pipeline.down for address, node in self._nodes.items()}
        return "; ".join(f"{address}: {why}" for address, why in down.items() if why)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return the counters of each node, by its address."""
        # Lists, as it may be asked from another thread, such as that of a monitoring system.
        return {address: node.stats() for address, node in list(self._nodes.items())}

    def former_stats(self) -> list[Mapping[str, Any]]:
        """Return the counters of the nodes that have left, together, and of each that leaves."""
        return [self._past, *(node.stats() for node in list(self._leaving))]
