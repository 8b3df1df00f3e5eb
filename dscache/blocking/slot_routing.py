"""Which of a thread's lines an operation on a cluster goes to: its Router, kept up to date."""

from __future__ import annotations

from functools import partial
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
    from redis.credentials import CredentialProvider


class SlotRouter:
    """The Router of one thread, and the lines to the nodes that it has needed so far.

    ``unrouted`` is the pipeline of no node, where operations are of which it isn't known yet who
    serves them; also those of a node that wasn't needed before. A pipeline that gets something
    to do notes its node in ``pending_nodes``.
    """

    __slots__ = (
        "_map",
        "_new_pipeline",
        "_provider",
        "_seen",
        "_table",
        "apart",
        "nodes",
        "pending_nodes",
        "router",
        "unrouted",
    )

    def __init__(
        self,
        core: Any,
        cluster_map: ClusterState,
        options: Options,
        provider: CredentialProvider | None,
    ) -> None:
        self._map = cluster_map
        self._provider = provider
        self._new_pipeline = partial(
            core.Pipeline, BlockingWaiter, clustered=True, **options.for_pipeline()
        )
        self._table = SlotTable()
        self._seen = 0
        self.nodes: dict[str, NodeConnection] = {}
        self.pending_nodes: list[str] = []
        self.unrouted = self._new_pipeline(
            partial(self.pending_nodes.append, ""), address=cluster_map.address
        )
        self.apart = SplitRecords(
            core, BlockingWaiter, key_prefix=options.key_prefix, ttl=options.ttl or 0
        )
        self.router = core.Router(
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

    # -- what is new of the map

    def is_current(self) -> bool:
        """Whether the Router knows what the map knows."""
        table = self._map.table
        return table is self._table and len(table.moved) == self._seen

    def follow(self) -> None:
        """Take over what is new of the map, and move what waits at the wrong node."""
        if self.is_current():
            return
        table = self._map.table
        if table is not self._table:
            self._rebuild(table)
        for slot, shown in table.moved[self._seen :]:
            self._route(slot, shown)
            self._seen += 1
        for node in list(self.nodes.values()):  # there may be more of them soon
            if node.pipeline.queued:
                self.hand_on(node.pipeline)

    def _rebuild(self, table: SlotTable) -> None:
        """Write the Router's tables anew."""
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
        for slot, shown in table.moved.copy():
            self._route(slot, shown)
            self._seen += 1

    def _route(self, slot: int, shown: str) -> None:
        pipeline = self._pipeline(shown)
        self.router.owners[slot] = self.router.readers[slot] = pipeline

    def _pipeline(self, shown: str) -> Any:
        node = self.nodes.get(shown)
        return self.unrouted if node is None else node.pipeline

    # -- nodes

    def node(self, place: NodeInfo) -> NodeConnection:
        """Return the line to a node."""
        node = self.nodes.get(place.shown)
        if node is None:
            pipeline = self._new_pipeline(
                partial(self.pending_nodes.append, place.shown), address=place.shown
            )
            pipeline.down = ConnectError("still connecting")
            node = NodeConnection(pipeline, place, self._map, self._provider)
            self.nodes[place.shown] = node
            self._rebuild(self._table)
        return node

    def is_primary(self, node: NodeConnection) -> bool:
        """Whether a node is known to serve slots."""
        return node.place.shown in self._table.primaries

    def take_pending_nodes(self) -> list[NodeConnection]:
        """Return the nodes that got something to do."""
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
        """End the lines to nodes that are no part of the cluster any more."""
        places = self._map.places
        departed = [shown for shown in self.nodes if shown not in places]
        for shown in departed:
            node = self.nodes.pop(shown)
            node.discard()
            self._map.keep_counts(None, node.pipeline.stats())
        if departed:
            self._rebuild(self._table)

    # -- what waits

    def hand_on(self, pipeline: Any) -> None:
        """Hand over what waits in a pipeline and belongs elsewhere by now."""
        batches: dict[Any, list[Any]] = {}
        for target, batch in pipeline.take_queued(self._target_of):
            batches.setdefault(target, []).append(batch)
        for target, waiting in batches.items():
            target.requeue(waiting)

    def _target_of(self, kind: int, name: str) -> Any:
        pipeline = self.router.target_of(kind, name)
        if pipeline is not self.unrouted:
            return pipeline
        slot = pipeline.slot_of(kind, name)
        shown = self._table.find(slot, kind in (c.GET, c.HEAD, c.READ_KEY))
        return pipeline if shown is None else self.node(self._map.place_at(shown)).pipeline

    def requeue_all(self, other: SlotRouter) -> None:
        """Take over all that waits in others, to be handed on."""
        for pipeline in (other.unrouted, *(node.pipeline for node in other.nodes.values())):
            given = pipeline.take_queued(lambda kind, name: self.unrouted)
            if given:
                self.unrouted.requeue([batch for _, batch in given])
        other.take_pending_nodes()

    # -- counters

    def stats(self) -> dict[str, Any]:
        """Return what was counted of no node: what waits, and records that lie apart."""
        return counters.merged([self.unrouted.stats(), self.apart.stats(), self.router.stats()])

    def keep_counts(self) -> None:
        """Let the map keep what was counted here, as this is no more."""
        for node in self.nodes.values():
            self._map.keep_counts(node.place, node.pipeline.stats())
        self._map.keep_counts(None, self.stats())
        # Each has the other, which would keep their memory until it is collected.
        self.apart.router = None
