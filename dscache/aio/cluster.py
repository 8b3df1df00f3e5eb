"""A Redis Cluster: the connections to its nodes, the routing of operations, and their changes.

``slot_refresh.py`` asks the nodes for the slots: after a redirection or a lost connection, and
periodically. ``slot_routing.py`` routes operations meanwhile. ``net/cluster_state.py`` has
the known nodes and slots.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, Protocol

from .. import _backend
from ..config import Config, Options
from ..errors import ConnectError, ConnectionLost
from ..net.backoff import half_jitter
from ..net.cluster_state import ClusterState
from ..net.slot_table import NodeInfo
from ..net.slots import RETRY_CAP, RETRY_FIRST, Address, SlotRange
from .background_task import BackgroundTask
from .cluster_nodes import ClusterNodes
from .connection import Connection, NodeListener
from .lifecycle import check_loop, check_process
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

# How often a closing cache checks whether all operations are done, in seconds.
_DRAIN_STEP = 0.005
_OWNER = "an AsyncCache"
_CLOSED = "the cache was closed before the answer came"


class SlotListener(NodeListener, Protocol):
    """Listener for nodes that connect and disconnect, and for slots that move."""

    def slots_moved(self) -> None:
        """React to slots that have another owner now."""


class Cluster:
    """The nodes of a cluster, opened on the running event loop.

    ``inbox`` takes the messages that the nodes push, and ``listener`` is called at changes.
    """

    def __init__(
        self,
        config: Config,
        credentials: CredentialProvider | None,
        *,
        inbox: MessageDispatcher | None = None,
        listener: SlotListener | None = None,
    ) -> None:
        self.options = options = config.options
        self._inbox = inbox
        self._listener = listener
        self._credentials = credentials
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._closed = False
        # The options common to all nodes.
        first = options.seeds[0]
        self._shared = options.for_node(first.host, first.port, first)
        self._reads_replicas = options.scale_reads != "master"
        self._state = ClusterState(config, self._on_refresh_due)
        self._nodes = ClusterNodes(self._state, self._connect)
        self._resolver = Resolver()
        self._refresher = SlotRefresher(config, self._state, self._nodes, self._resolver, self)
        self._routing = SlotRouter(
            options, self._shared, self._check_usable, self.look_again, self._open_for
        )
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
        self._reading: dict[Connection, list[Connection]] = {}
        self._discovered = asyncio.Event()
        self.open_seeds()
        self._keeper = BackgroundTask(self._refresher.keep, f"dscache {options.address}", self._end)

    # -- the interface of a Topology

    @property
    def entry(self) -> Router | NearCache:
        """The target of operations: the Router, or the near cache before it."""
        return self.pipeline if self._near is None else self._near

    @property
    def is_ready(self) -> bool:
        """Whether every slot has a node that is ready."""
        masters = set(self._masters)
        if self._routing.unopened and self._masters.count(None) == len(self._routing.unopened):
            masters.discard(None)
        return (
            not self._closed
            and bool(self._nodes.ready())
            and all(one is not None and one.is_ready for one in masters)
        )

    @property
    def server(self) -> str:
        """The kinds and versions of the servers, as far as they are known."""
        return self._state.server

    @property
    def view(self) -> tuple[SlotRange, ...]:
        """The ranges of slots in the newest view of a node; empty before the first."""
        return self._state.view.ranges

    async def when_discovered(self) -> None:
        """Wait until the slots are known, or known to stay unknown, or the cluster is closed."""
        await self._discovered.wait()

    async def when_ready(self) -> None:
        """Wait until the slots are known and their nodes ready.

        Raises ConfigError if the server is no cluster, the nodes' own error if they all refuse,
        and ConnectError if no node can be reached within ``connectTimeout``. While other shards
        are ready, a shard that is down is only logged: its operations fail by themselves.
        """
        self._check_usable()
        timeout = self._shared.connect_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                await self._discovered.wait()
                if not self._state.known and self._state.refusal is not None:
                    raise self._state.refusal("connect")
                waiting = [node.when_ready() for node in set(self._masters) if node is not None]
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            if any(node is not None and node.is_ready for node in self._masters):
                return
            raise ConnectError(
                f"no node of the cluster {self.options.address} is ready within {timeout} ms: "
                f"{self._state.errors_by_node()}"
            ) from None
        self._check_usable()
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(outcomes) and failures:
            raise failures[0]
        for failure in failures:
            _logger.warning("the cluster serves without one of its shards: %s", failure)

    async def close(self) -> None:
        """Finish the operations under way, within ``closeTimeout``, and close every node."""
        if self._closed:
            return
        self._check_owner()
        self._closed = True
        if self._near is not None:
            self._near.close()
        end = self._loop.time() + self._shared.close_timeout / 1000
        # All answers first, since a command in flight may be redirected to another node.
        while self._is_busy() and self._loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_STEP)
        self._keeper.cancel()
        # The remaining operations have had their time, so the nodes need none for them.
        self._routing.fail_all(_CLOSED)
        await self._nodes.close()
        await asyncio.wait([self._keeper.task])
        self._give_up(_CLOSED)

    def stats(self) -> dict[str, Any]:
        """Return the counters of all nodes together, and of each under ``nodes``."""
        leaving = [node.stats() for node in self._nodes.leaving()]
        stats = self._state.stats(self._nodes.stats(), leaving, self._routing.stats())
        if self._near is not None:
            stats["near_cache"] = self._near.stats()
        return stats

    def options_at(self, address: Address) -> Options:
        """Return the options of a connection to the node at an address."""
        return self._state.seeds.options_at(address)

    def primaries(self) -> dict[Connection, Options]:
        """Return the nodes that serve slots, with the options of a connection to each."""
        for slot in list(self._routing.unopened):
            self._open_for(slot)
        nodes = dict.fromkeys(node for node in self._masters if node is not None)
        return {node: self.options_at(self._nodes.address_of(node)) for node in nodes}

    def ready_nodes(self) -> dict[Connection, Address]:
        """Return the nodes that can be asked, with their addresses."""
        return {node: self._nodes.address_of(node) for node in self._nodes.ready()}

    def look_again(self) -> None:
        """Have the slots refreshed soon, since they may have moved."""
        self._state.record_stale()

    def _is_busy(self) -> bool:
        leaving = (node.pipeline for node in self._nodes.leaving())
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
        self._routing.resume(source)

    def _note_redirection(
        self, source: Connection, hold: SlotHold, words: str, slot: int, batch: Batch
    ) -> Connection | None:
        """Note the words of a redirection; return the node to ask, if it is an ASK."""
        self._routing.stop_reading(slot, source)
        code, named = self._state.record_redirection(words, slot, self._nodes.address_of(source))
        if named is None:
            hold.wait(half_jitter(RETRY_FIRST, RETRY_CAP, len(batch.redirections)))
            return None
        target = self._nodes.open(named)
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

    def on_connected(self, node: Connection) -> None:
        """Use a node that can be asked now."""
        info = self._nodes.info_of(node)
        info.server, info.trouble, info.refusal = node.server, None, None
        self._refresher.on_node_decided()
        if self._reads_replicas:
            self._assign_readers()
        if self._listener is not None:
            self._listener.on_connected(node)

    def on_disconnected(self, node: Connection) -> None:
        """Note a lost node or a failed attempt: another node may have its slots by now."""
        self._keeper.check()
        info, refusal = self._nodes.info_of(node), node.refusal
        info.trouble = node.pipeline.down
        info.refusal = None if refusal is None else lambda operation: refusal
        self._state.record_loss(info, node.last_loss)
        if refusal is not None:
            self._refresher.on_node_decided()  # the error comes at once if all nodes refuse
        if self._reads_replicas:
            self._assign_readers()
            self._routing.resume(node)
        else:
            self._routing.resume()
        if self._listener is not None:
            self._listener.on_disconnected(node)

    def owner(self, slot: int) -> Connection | None:
        """Return the node that is known to serve a slot."""
        self._open_for(slot)
        return self._masters[slot]

    def _forget(self, slots: list[int]) -> None:
        """Drop the near cache's records of slots that have another owner now."""
        if self._near is not None:
            self._near.slots_moved(slots)
        if self._listener is not None and slots:
            self._loop.call_soon(self._listener.slots_moved)

    # -- the nodes

    def _connect(self, info: NodeInfo) -> Connection:
        """Return a new connection to a node."""
        node = Connection(
            info.options,
            self._credentials,
            cluster=self,
            read_only=self._reads_replicas,
            near=self._near,
            inbox=self._inbox,
            resolver=self._resolver,
        )
        self._routing.join(node)
        return node

    def _open_for(self, slot: int) -> None:
        """Connect to the node that serves a slot, if this is the first need of it."""
        shard = self._routing.unopened.get(slot)
        if shard is None or self._closed:
            return
        node = self._nodes.open_shard(shard)
        its = [
            slot
            for slot in range(shard.first, shard.last + 1)
            if self._routing.unopened.get(slot) is shard
        ]
        for slot in its:
            del self._routing.unopened[slot]
        self._routing.hand_slots(dict.fromkeys(its, node))

    def open_seeds(self) -> None:
        """Connect to the configured nodes."""
        for address in self._state.seeds.addresses:
            self._nodes.open(self._state.node(address))

    def _leave(self, node: Connection) -> None:
        """Close a departed node, after its commands in flight are answered."""
        self._routing.leave(node)
        if self._listener is not None:
            self._listener.on_disconnected(node)
        self._nodes.leave(node)

    # -- the view

    def _on_refresh_due(self) -> None:
        self._refresher.on_due()

    def _end(self) -> None:
        """Note that the view is not refreshed any more."""
        self._closed = True
        if not self._loop.is_closed():
            self._give_up(_CLOSED)

    def on_refresh_failed(self) -> None:
        """Let waiting operations fail at once if no later refresh can succeed."""
        self._routing.unrouted.pipeline.down = self._state.trouble
        if self._state.known:
            return
        refusal = self._state.refusal
        if refusal is None:
            self._discovered.clear()
            self._routing.unrouted.refuse(None)
        else:
            self._discovered.set()
            message = str(refusal("connect"))
            self._routing.unrouted.refuse(lambda operation: ConnectError(f"{operation}: {message}"))

    def on_refreshed(self) -> None:
        """Follow a new view: connect to nodes, give slots their owners, and drop nodes."""
        masters, unopened = self._nodes.masters()
        self._routing.unopened = unopened
        self._routing.unrouted.pipeline.down = self._state.trouble
        changed = [slot for slot, now in enumerate(masters) if now is not self._masters[slot]]
        left = {self._masters[slot] for slot in changed}
        if unopened:
            left.add(None)  # operations may wait there for a node that isn't connected yet
        self._forget(changed)
        self._routing.hand_slots({slot: masters[slot] for slot in changed})
        if self._reads_replicas:
            self._assign_readers()
        self._routing.resume(*left)
        self._routing.unrouted.refuse(None)
        self._discovered.set()
        for node in self._nodes.departed():
            self._leave(node)

    # -- reads from replicas

    def _assign_readers(self) -> None:
        """Choose the nodes to read from: of each primary, its replicas that are ready."""
        reading = self._nodes.readers(also_primary=self.options.scale_reads == "all")
        if reading != self._reading:
            self._reading = reading
            self._routing.read_from(reading)

    # -- small things

    def _check_owner(self) -> None:
        check_process(self._pid, _OWNER)
        check_loop(self._loop, _OWNER)

    def _check_usable(self) -> None:
        self._check_owner()
        if self._closed:
            raise ConnectionLost("the cache is closed")

    def _give_up(self, reason: str) -> None:
        self._discovered.set()
        self._routing.end(reason)
