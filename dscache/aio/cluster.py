"""A Redis Cluster: the connections to its nodes, the routing of operations, and their changes.

``slot_refresh.py`` asks the nodes for the slots: after a redirection or a lost connection, and
periodically. ``slot_routing.py`` routes operations meanwhile. ``net/cluster_state.py`` has
the known nodes and slots.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from .. import _backend
from ..config import Config, Options
from ..errors import ConnectError
from ..net.backoff import half_jitter
from ..net.cluster_state import ClusterState
from ..net.maintenance import Announcements, Notice
from ..net.slot_table import NodeInfo
from ..net.slots import RETRY_CAP, RETRY_FIRST, Address, SlotRange
from .background_task import BackgroundTask
from .cluster_nodes import ClusterNodes
from .connection import Connection, NodeListener
from .lifecycle import LoopBound
from .resolver import Resolver
from .slot_hold import SlotHold
from .slot_refresh import SlotRefresher
from .slot_routing import SlotRouter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.batch import Batch
    from ..core.message import MessageDispatcher
    from ..core.near_cache import NearCache
    from ..core.router import Router

_logger = logging.getLogger("dscache")


class Cluster(LoopBound, NodeListener):
    """The nodes of a cluster, opened on the running event loop.

    ``inbox`` takes the messages that the nodes push.
    """

    def __init__(
        self,
        config: Config,
        credentials: CredentialProvider | None,
        *,
        inbox: MessageDispatcher | None = None,
    ) -> None:
        super().__init__("an AsyncCache")
        self.options = options = config.options
        first = options.seeds[0]
        self.shared = options.for_node(first.host, first.port, first)
        """The options common to all nodes."""
        self._inbox = inbox
        self._credentials = credentials
        self._reads_replicas = options.scale_reads != "master"
        due = asyncio.Event()
        self.state = ClusterState(config, due.set)
        self.nodes = ClusterNodes(self.state, self._connect)
        self.resolver = Resolver()
        self._announcements = Announcements(options) if inbox is None else None
        self._refresher = SlotRefresher(self, due)
        self._routing = SlotRouter(self)
        self._masters = self._routing.masters  # the same list
        self.pipeline: Router = self._routing.router
        self._near: NearCache | None = None
        if options.near_cache is not None:
            self._near = _backend.core.NearCache(
                self._loop.create_future,
                self.pipeline,
                check=self._check_owner,
                **options.for_near_cache(),
            )
        self._discovered = asyncio.Event()
        self.open_seeds()
        self._keeper = BackgroundTask(self._refresher.keep, f"dscache {options.address}", self._end)

    # -- the interface of a Topology

    @property
    def entry(self) -> Router | NearCache:
        return self.pipeline if self._near is None else self._near

    @property
    def is_ready(self) -> bool:
        """Whether every slot has a node that is ready."""
        masters = set(self._masters)
        if self._routing.unopened and self._masters.count(None) == len(self._routing.unopened):
            masters.discard(None)
        return (
            not self._closed
            and bool(self.nodes.ready())
            and all(one is not None and one.is_ready for one in masters)
        )

    @property
    def server(self) -> str:
        return self.state.server

    @property
    def view(self) -> tuple[SlotRange, ...]:
        """The ranges of slots in the newest view of a node; empty before the first."""
        return self.state.view.ranges

    async def when_discovered(self) -> None:
        """Wait until the slots are known, or known to stay unknown, or the cluster is closed."""
        await self._discovered.wait()

    async def when_ready(self) -> None:
        """Wait until the slots are known and their nodes ready.

        Raises ConfigError if the server isn't a cluster, the nodes' own error if they all refuse,
        and ConnectError if no node can be reached within ``connectTimeout``. While other shards
        are ready, a shard that is down is only logged: its operations fail by themselves.
        """
        self.check_usable()
        timeout = self.shared.connect_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                await self._discovered.wait()
                if not self.state.known and self.state.refusal is not None:
                    raise self.state.refusal("connect")
                waiting = [node.when_ready() for node in set(self._masters) if node is not None]
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            if any(node is not None and node.is_ready for node in self._masters):
                return
            raise ConnectError(
                f"no node of the cluster {self.options.address} is ready within {timeout} ms: "
                f"{self.state.errors_by_node()}"
            ) from None
        self.check_usable()
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(outcomes) and failures:
            raise failures[0]
        for failure in failures:
            _logger.warning("the cluster serves without one of its shards: %s", failure)

    async def close(self) -> None:
        if self._closed:
            return
        self._check_owner()
        self._closed = True
        if self._near is not None:
            self._near.close()
        end = self._loop.time() + self.shared.close_timeout / 1000
        # All answers first, since a command in flight may be redirected to another node.
        await self._drain(self._is_busy, end)
        self._keeper.cancel()
        # The remaining operations have had their time, so the nodes need none for them.
        self._give_up()
        await self.nodes.close()
        await asyncio.wait([self._keeper.task])
        self._give_up()

    def stats(self) -> dict[str, Any]:
        current, leaving, past = self.nodes.counted()
        nodes = {shown: node.stats() for shown, node in current.items()}
        departed = [past, *(node.stats() for node in leaving)]
        stats = self.state.stats(nodes, departed, self._routing.stats())
        if self._near is not None:
            stats["near_cache"] = self._near.stats()
        if self._announcements is not None:
            stats["maintenance"] = self._announcements.stats()
        return stats

    def options_at(self, address: Address) -> Options:
        return self.state.seeds.options_at(address)

    def primaries(self) -> dict[Connection, Options]:
        """Return the nodes that serve slots, with the options of a connection to each."""
        for slot in list(self._routing.unopened):
            self.open_for(slot)
        nodes = dict.fromkeys(node for node in self._masters if node is not None)
        return {node: self.options_at(node.info.address) for node in nodes}

    def ready_nodes(self) -> dict[Connection, Address]:
        """Return the nodes that can be asked, with their addresses."""
        return {node: node.info.address for node in self.nodes.ready()}

    def look_again(self) -> None:
        """Have the slots refreshed soon, since they may have moved."""
        self.state.record_stale()

    def _is_busy(self) -> bool:
        leaving = (node.pipeline for node in self.nodes.leaving)
        return self._routing.is_busy or any(one.queued or one.in_flight for one in leaving)

    # -- events of the connections

    def on_redirected(self, source: Connection) -> None:
        """Send on the operations that a node has redirected."""
        self._keeper.check()
        redirected = source.pipeline.redirected
        fresh: set[SlotHold] = set()
        batches: dict[SlotHold, list[Batch]] = {}
        # The list is cleared last: after a failure, a repeated call skips the batches done already.
        for words, slot, batch in redirected:
            if batch.sent or batch.settled():
                continue
            source.redirections += 1
            hold = self._routing.hold(slot, source, fresh)
            target = self._note_redirection(source, hold, words, slot, batch)
            hold.note(slot, batch, target)
            batches.setdefault(hold, []).append(batch)
        for hold, waiting in batches.items():
            self._routing.requeue(hold, waiting)
        del redirected[:]
        awaited = (one for hold in fresh for one in hold.sources)
        self._routing.resume(*dict.fromkeys((source, *awaited)))

    def _note_redirection(
        self, source: Connection, hold: SlotHold, words: str, slot: int, batch: Batch
    ) -> Connection | None:
        """Note the words of a redirection; return the node to ask, if it is an ASK."""
        self._routing.stop_reading(slot, source)
        code, named = self.state.record_redirection(words, slot, source.info.address)
        if named is None:
            hold.wait(half_jitter(RETRY_FIRST, RETRY_CAP, len(batch.redirections)))
            return None
        target = self.nodes.open(named)
        if code == "ASK":
            return target
        self._masters[slot] = target
        self._routing.unopened.pop(slot, None)
        self._forget([slot])
        return None

    def on_progress(self, source: Connection) -> None:
        """Check whether a node has answered the commands that a hold waits for."""
        self._routing.resume()
        source.watched = self._routing.is_awaited(source)

    def on_slots_moved(self, notice: Notice) -> None:
        """Give slots to the nodes that have them by now, as announced.

        Operations that a former owner has under way end there, or are redirected.
        """
        self._keeper.check()
        if self._closed:
            return
        slots = self.state.record_moves(notice.moves)
        if self._announcements is not None:
            self._announcements.count_slots(len(slots))
        owners = {slot: self.nodes.open(info) for slot, info in slots.items()}
        left = dict.fromkeys(self._masters[slot] for slot in owners)
        for slot in owners:
            self._routing.unopened.pop(slot, None)
        self._forget(list(owners))
        self._routing.hand_slots(owners)
        self._assign_readers()
        self._routing.resume(*left)

    def check_timers(self) -> None:
        self._routing.check_timers()

    def check_identity(self, node: Connection, node_id: str) -> None:
        self.state.check_identity(node.info, node_id)

    def on_connected(self, node: Connection) -> None:
        info = node.info
        info.server, info.trouble, info.refusal = node.server, None, None
        self.state.record_zone(info, node.zone)
        self._refresher.on_node_decided()
        self._assign_readers()

    def on_disconnected(self, node: Connection) -> None:
        """Note a lost node or a failed attempt: another node may have its slots by now."""
        self._keeper.check()
        node.info.trouble, node.info.refusal = node.pipeline.down, node.refusal
        self.state.record_loss(node.info, node.last_loss)
        if not self.state.known:
            # Operations wait for no node yet, and end with the reason of any.
            trouble = ConnectError(f"{node.address}: {node.info.trouble}")
            self._routing.unrouted.pipeline.down = trouble
        if node.refusal is not None:
            self._refresher.on_node_decided()  # the error comes at once if all nodes refuse
        self._assign_readers()
        self._routing.resume(*[node] if self._reads_replicas else [])

    def owner(self, slot: int) -> Connection | None:
        """Return the node that is known to serve a slot."""
        self.open_for(slot)
        return self._masters[slot]

    def _forget(self, slots: list[int]) -> None:
        """Drop the near cache's records of slots that have another owner now."""
        if self._near is not None:
            self._near.slots_moved(slots)

    # -- the nodes

    def _connect(self, info: NodeInfo) -> Connection:
        node = Connection(
            info.options,
            self._credentials,
            cluster=self,
            read_only=self._reads_replicas,
            near=self._near,
            inbox=self._inbox,
            resolver=self.resolver,
            announcements=self._announcements,
        )
        self._routing.join(node)
        return node

    def open_for(self, slot: int) -> None:
        """Connect to the node that serves a slot, if this is the first need of it."""
        shard = self._routing.unopened.get(slot)
        if shard is None or self._closed:
            return
        node = self.nodes.open_shard(shard)
        its = [
            slot
            for slot in range(shard.first, shard.last + 1)
            if self._routing.unopened.get(slot) is shard
        ]
        for slot in its:
            del self._routing.unopened[slot]
        self._routing.hand_slots(dict.fromkeys(its, node))

    def open_seeds(self) -> None:
        """Connect to the configured nodes, and after a failure to all that are known."""
        for info in self.state.fallbacks():
            self.nodes.open(info)

    def _leave(self, node: Connection) -> None:
        """Close a departed node, after its commands in flight are answered."""
        self._routing.leave(node)
        self.nodes.leave(node)

    def _leave_strangers(self) -> None:
        """Disconnect from nodes that aren't the ones that the cluster has at their addresses."""
        for node in list(self.nodes.by_address.values()):
            if not self.state.may_use(node.info, node.info.node_id):
                node.leave("the cluster has another node at its address")

    # -- the view

    def _end(self) -> None:
        """Note that the view is not refreshed any more."""
        self._closed = True
        if not self._loop.is_closed():
            self._give_up()

    def on_refresh_failed(self) -> None:
        """Let waiting operations fail at once if no later refresh can succeed."""
        self._routing.unrouted.pipeline.down = self.state.trouble
        self._leave_strangers()
        if self.state.known:
            return
        refusal = self.state.refusal
        if refusal is None:
            self._discovered.clear()
            self._routing.unrouted.refuse(None)
        else:
            self._discovered.set()
            message = str(refusal("connect"))
            self._routing.unrouted.refuse(lambda operation: ConnectError(f"{operation}: {message}"))

    def on_refreshed(self) -> None:
        """Follow a new view: connect to nodes, give slots their owners, and drop nodes."""
        masters, unopened = self.nodes.masters()
        self._routing.unopened = unopened
        self._routing.unrouted.pipeline.down = self.state.trouble
        changed = [slot for slot, now in enumerate(masters) if now is not self._masters[slot]]
        left = {self._masters[slot] for slot in changed}
        if unopened:
            left.add(None)  # operations may wait there for a node that isn't connected yet
        self._forget(changed)
        self._routing.hand_slots({slot: masters[slot] for slot in changed})
        self._assign_readers()
        self._routing.resume(*left)
        self._routing.unrouted.refuse(None)
        self._discovered.set()
        for shown, node in list(self.nodes.by_address.items()):
            if shown not in self.state.nodes:
                self._leave(node)
        self._leave_strangers()

    # -- small things

    def _assign_readers(self) -> None:
        """Choose the nodes to read from: of each primary, its replicas that are ready."""
        if self._reads_replicas:
            reads_all = self.options.scale_reads == "all"
            self._routing.read_from(self.nodes.readers(also_primary=reads_all))

    def check_usable(self) -> None:
        """Raise UsageError on another event loop, and ConnectionLost on a closed cluster."""
        self._check_owner()
        self._check_open()

    def _give_up(self) -> None:
        self._discovered.set()
        self._routing.end()
