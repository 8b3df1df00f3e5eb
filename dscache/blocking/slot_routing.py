"""Routing of one thread's operations on a cluster: its Router, kept up to date."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..config import Options
from ..core import constants as c
from ..core import stats as counters
from ..core.split_records import SplitRecords
from ..errors import ConnectError
from ..net.cluster_state import ClusterState
from ..net.slot_table import NodeInfo, SlotTable, reader_of
from .node_connection import NodeConnection
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from ..core.batch import Batch
    from ..core.pipeline import Pipeline
    from ..core.router import Router
    from ..net.credentials import Logins


class SlotRouter:
    """The Router of one thread, and its connections to the nodes that it has needed so far.

    ``unrouted`` is a pipeline without a node. It takes operations whose node isn't known yet, or
    has no connection of this thread yet. A pipeline that gets its first operation appends its
    node's address to ``pending_nodes``; ``unrouted`` appends an empty one. ``follow`` is called
    with each new connection.
    """

    def __init__(
        self,
        core: ModuleType,
        state: ClusterState,
        options: Options,
        logins: Logins,
        follow: Callable[[NodeConnection], None],
    ) -> None:
        self._follow = follow
        self._state = state
        self._logins = logins
        self._new_pipeline = partial(
            core.Pipeline, BlockingWaiter, clustered=True, **options.for_pipeline()
        )
        self._table = SlotTable()
        self._seen = 0
        self.nodes: dict[str, NodeConnection] = {}
        self.pending_nodes: list[str] = []
        self.unrouted: Pipeline = self._new_pipeline(
            partial(self.pending_nodes.append, ""), address=state.address
        )
        self.apart = SplitRecords(
            core, BlockingWaiter, key_prefix=options.key_prefix, ttl=options.ttl or 0
        )
        self.router: Router = core.Router(
            BlockingWaiter,
            self.unrouted,
            self.apart,
            key_prefix=options.key_prefix,
            hash_tag=options.hash_tag,
        )
        if options.scale_reads == "master":
            self.router.readers = self.router.owners
        if not options.hash_tag:
            self.apart.router = self.router

    # -- changes of the state

    def is_current(self) -> bool:
        """Return whether the Router has the state's current slots."""
        table = self._state.table
        return table is self._table and len(table.moved) == self._seen

    def follow(self) -> None:
        """Take over the state's slots, and move operations that wait at the wrong node."""
        if self.is_current():
            return
        if self._state.table is self._table:
            self._route_moved()
        else:
            self._rebuild(self._state.table)
            for node in self.nodes.values():
                node.check_identity()
        for node in list(self.nodes.values()):  # a copy, as moving may add nodes
            if node.pipeline.queued:
                self.hand_on(node.pipeline)

    def _rebuild(self, table: SlotTable) -> None:
        owners, readers = self.router.owners, self.router.readers
        owners[:] = readers[:] = [self.unrouted] * c.SLOTS
        for shard in table.shards:
            first, end = shard.first, shard.last + 1
            owners[first:end] = [self._pipeline(shard.primary)] * (end - first)
            if readers is owners:
                continue
            count = len(shard.readers) or 1
            for slot in range(first, min(first + count, end)):
                shown = reader_of(shard, slot) if shard.readers else shard.primary
                pipelines = [self._pipeline(shown)] * len(range(slot, end, count))
                readers[slot:end:count] = pipelines
        self._table, self._seen = table, 0
        self._route_moved()

    def _route_moved(self) -> None:
        for slot, shown in self._table.moved[self._seen :]:
            self.router.owners[slot] = self.router.readers[slot] = self._pipeline(shown)
            self._seen += 1

    def _pipeline(self, shown: str) -> Pipeline:
        node = self.nodes.get(shown)
        return self.unrouted if node is None else node.pipeline

    # -- nodes

    def node(self, info: NodeInfo) -> NodeConnection:
        """Return this thread's connection to a node, made now if there is none."""
        node = self.nodes.get(info.shown)
        if node is None:
            pipeline = self._new_pipeline(
                partial(self.pending_nodes.append, info.shown), address=info.shown
            )
            pipeline.down = ConnectError("still connecting")
            node = NodeConnection(pipeline, info, self._state, self._logins)
            self._follow(node)
            self.nodes[info.shown] = node
            self._rebuild(self._table)
        return node

    def is_primary(self, node: NodeConnection) -> bool:
        """Return whether a node is known to serve slots."""
        return node.info.shown in self._table.primaries

    def take_pending_nodes(self) -> list[NodeConnection]:
        """Return the nodes that have got operations since the last call."""
        nodes = []
        while self.pending_nodes:
            node = self.nodes.get(self.pending_nodes.pop())
            if node is None:
                self.unrouted.end_tick()
            else:
                node.pipeline.end_tick()
                nodes.append(node)
        return nodes

    def close_departed(self) -> None:
        """End the connections to nodes that have left the cluster."""
        known = self._state.nodes
        self.take_pending_nodes()
        departed = [shown for shown in self.nodes if shown not in known]
        for shown in departed:
            node = self.nodes[shown]
            node.discard()
            with self._state.lock:  # one step for stats()
                del self.nodes[shown]
                self._state.keep_counts(None, node.pipeline.stats())
        if departed:
            self._rebuild(self._table)

    # -- waiting operations

    def hand_on(self, pipeline: Pipeline) -> None:
        """Move the operations of a pipeline that belong to another one by now."""
        batches: dict[Pipeline, list[Batch]] = {}
        for target, batch in pipeline.take_queued(self._target_of):
            batches.setdefault(target, []).append(batch)
        for target, waiting in batches.items():
            target.requeue(waiting)

    def _target_of(self, kind: int, name: str) -> Pipeline:
        pipeline = self.router.target_of(kind, name)
        if pipeline is not self.unrouted:
            return pipeline
        slot = pipeline.slot_of(kind, name)
        shown = self._table.find(slot, kind in (c.GET, c.HEAD, c.READ_KEY))
        return pipeline if shown is None else self.node(self._state.node_at(shown)).pipeline

    # -- counters

    def stats(self) -> dict[str, Any]:
        """Return the counters of no node: of unrouted operations and of split records."""
        return counters.merged([self.unrouted.stats(), self.apart.stats(), self.router.stats()])

    def keep_counts(self) -> None:
        """Let the state keep the counters, at the end of this router."""
        for node in self.nodes.values():
            self._state.keep_counts(node.info, node.pipeline.stats())
        self._state.keep_counts(None, self.stats())
        # They refer to each other, which would keep their memory until a garbage collection.
        self.apart.router = None
