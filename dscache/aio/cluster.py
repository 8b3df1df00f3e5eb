"""A Redis Cluster: its nodes, which of them serves which slot, and what follows from changes of it.

``slot_refresh.py`` asks the nodes for the slots: again when one redirects or is lost, and from
time to time. ``slot_routing.py`` has where operations go in between.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any, Protocol

from .. import _backend
from ..config import Config, Options
from ..core import constants
from ..core import stats as counters
from ..errors import ConfigError, ConnectError, ConnectionLost, ReplyError
from ..net.backoff import half_jitter
from ..net.seeds import AT_ONCE, Seeds
from ..net.slots import RETRY_CAP, RETRY_FIRST, Address, SlotRange, parse_redirection
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

_logger = logging.getLogger("dscache")

# How often a cache that closes looks whether all is done, in seconds.
_DRAIN_STEP = 0.005
_OWNER = "an AsyncCache"
_CLOSED = "the cache was closed before the answer came"


class SlotListener(NodeListener, Protocol):
    """Who wants to know of the nodes' comings and goings, and of their slots'."""

    def slots_moved(self) -> None:
        """Some slots have another owner."""


class Cluster:
    """The nodes of a cluster, opened on the running event loop.

    ``inbox`` takes the messages that its nodes push, and ``follower`` is told what becomes of them.
    """

    def __init__(
        self,
        config: Config,
        credentials: CredentialProvider | None,
        *,
        inbox: Any = None,
        follower: SlotListener | None = None,
    ) -> None:
        options = config.options
        self._options = options
        self._inbox = inbox
        self._follower = follower
        self._credentials = credentials
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._closed = False
        # What holds for every node, whichever it is.
        first = options.seeds[0]
        self._shared = options.for_node(first.host, first.port, first)
        self._seeds = Seeds(options)
        self._members = ClusterNodes()
        self._resolver = Resolver()
        self._refresher = SlotRefresher(config, self._seeds, self._members, self._resolver, self)
        self._stale = self._refresher.stale
        self._routing = SlotRouter(
            options, self._shared, self._check_usable, self.look_again, self._open_for
        )
        self._masters = self._routing.masters  # one list
        self.pipeline = self._routing.router
        self._near: Any = None
        if options.near_cache is not None:
            self._near = _backend.core.NearCache(
                self._loop.create_future,
                self.pipeline,
                check=self._check_owner,
                **options.for_near_cache(),
            )
        self.view: tuple[SlotRange, ...] = ()
        """Who serves the slots, as the nodes have told it last."""
        self._reading: dict[Connection, list[Connection]] = {}
        self._redirections = 0
        self._last_loss = ""
        self._refusal: Exception | None = None
        self._discovered = asyncio.Event()
        self.open_seeds()
        self._keeper = BackgroundTask(self._refresher.keep, f"dscache {options.address}", self._end)

    # -- what a cache wants of its topology

    @property
    def entry(self) -> Any:
        """Where operations go: the router, or a near cache before it."""
        return self.pipeline if self._near is None else self._near

    @property
    def is_ready(self) -> bool:
        """Whether every slot has a node that is ready."""
        masters = set(self._masters)
        if self._routing.unopened and self._masters.count(None) == len(self._routing.unopened):
            masters.discard(None)
        return (
            not self._closed
            and bool(self._members.ready())
            and all(one is not None and one.is_ready for one in masters)
        )

    @property
    def server(self) -> str:
        """The kind and version of the servers, as far as it is known."""
        known = self._members.server
        return f"cluster of {known}" if known else ""

    async def when_ready(self) -> None:
        """Wait until the slots are known and their nodes ready.

        Raises ConfigError if the server is no cluster, what the nodes say if they all refuse,
        and ConnectError if no node can be reached within ``connectTimeout``. Where others are
        ready, a shard that is down is only logged: its operations fail by themselves.
        """
        self._check_usable()
        timeout = self._shared.connect_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                await self._discovered.wait()
                if self._refusal is not None:
                    raise self._refusal
                waiting = [node.when_ready() for node in set(self._masters) if node is not None]
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            if any(node is not None and node.is_ready for node in self._masters):
                return
            raise ConnectError(
                f"no node of the cluster {self._options.address} is ready within {timeout} ms: "
                f"{self.errors_by_node()}"
            ) from None
        self._check_usable()
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(outcomes) and failures:
            raise failures[0]
        for failure in failures:
            _logger.warning("the cluster serves without one of its shards: %s", failure)

    async def close(self) -> None:
        """Finish what was issued, within ``closeTimeout``, and close every node."""
        if self._closed:
            return
        self._check_owner()
        self._closed = True
        if self._near is not None:
            self._near.close()
        end = self._loop.time() + self._shared.close_timeout / 1000
        # First all is answered, since what is in flight may be redirected from one to another.
        while self._is_busy() and self._loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_STEP)
        self._keeper.cancel()
        # What is left has had its time, and the nodes need no more for their part.
        self._routing.fail_all(_CLOSED)
        await self._members.close()
        await asyncio.wait([self._keeper.task])
        self._give_up(_CLOSED)

    def stats(self) -> dict[str, Any]:
        """Return the counters of all nodes together, and of each under ``nodes``."""
        nodes = self._members.stats()
        of_nodes = [*self._members.former_stats(), *nodes.values()]
        stats = {
            **counters.merged([*of_nodes, *self._routing.stats()]),
            "connections": sum(one["connections"] for one in nodes.values()),
            "connects": sum(one.get("connects", 0) for one in of_nodes),
            "reconnections": sum(one.get("reconnections", 0) for one in of_nodes),
            "last_loss": self._last_loss,
            "redirections": self._redirections,
            "refreshes": self._refresher.refreshes,
            "nodes": nodes,
        }
        if self._near is not None:
            stats["near_cache"] = self._near.stats()
        return stats

    def options_at(self, address: Address) -> Options:
        """Return the options of a connection to the node at an address."""
        return self._seeds.options_at(address)

    def primaries(self) -> dict[Connection, Options]:
        """Return the nodes that serve slots, with the options of a connection to each."""
        for slot in list(self._routing.unopened):
            self._open_for(slot)
        nodes = dict.fromkeys(node for node in self._masters if node is not None)
        return {node: self.options_at(self._members.address_of(node)) for node in nodes}

    def ready_nodes(self) -> dict[Connection, Address]:
        """Return the nodes that can be asked, and where each is."""
        return {node: self._members.address_of(node) for node in self._members.ready()}

    def look_again(self) -> None:
        """Have the slots asked for again, as somebody has reason to think that they have moved."""
        self._stale.set()

    def _is_busy(self) -> bool:
        leaving = (node.pipeline for node in self._members.leaving())
        return self._routing.is_busy or any(one.queued or one.in_flight for one in leaving)

    # -- what the connections tell

    def on_redirected(self, source: Connection) -> None:
        """Send on what a node has redirected."""
        self._keeper.check()
        redirected = source.pipeline.redirected
        fresh: set[SlotHold] = set()
        batches: dict[SlotHold, list[Any]] = {}
        # They stay there until each has its place: called again, it goes on with what has none.
        for words, slot, batch in redirected:
            if batch.sent or batch.settled():
                continue
            self._redirections += 1
            source.redirections += 1
            hold = self._routing.hold(slot, source, fresh)
            code = words.partition(" ")[0]
            address = None
            if code in ("MOVED", "ASK"):
                address = parse_redirection(words, slot, self._members.address_of(source))
            target = None
            self._routing.stop_reading(slot, source)
            if address is not None:
                target = self._node(self._options.mapped(*address))
                if code == "MOVED":
                    self._masters[slot], target = target, None
                    self._routing.unopened.pop(slot, None)
                    self._forget([slot])
                    self._refresher.moved.add(slot)
                    self._stale.set()
            else:
                hold.wait(half_jitter(RETRY_FIRST, RETRY_CAP, len(batch.redirections)))
                if code != "TRYAGAIN":
                    self._stale.set()
            hold.note(slot, batch, target)
            batches.setdefault(hold, []).append(batch)
        for hold, waiting in batches.items():
            self._routing.requeue(hold, waiting)
        del redirected[:]
        self._routing.resume(source)

    def on_progress(self, source: Connection) -> None:
        """Look whether a node has answered what a room waits for."""
        self._routing.resume()
        source.watched = self._routing.is_awaited(source)

    def on_connected(self, node: Connection) -> None:
        """Note that a node can be asked."""
        self._refresher.node_ready.set()
        if self._options.scale_reads != "master":
            self._assign_readers()
        if self._follower is not None:
            self._follower.on_connected(node)

    def on_disconnected(self, node: Connection) -> None:
        """Note that a node was lost: another one may have its slots by now."""
        self._keeper.check()
        self._last_loss = node.last_loss
        self._stale.set()
        if node.refusal is not None:
            self._refresher.node_ready.set()  # to tell of it, if all refuse
        if self._options.scale_reads != "master":
            self._assign_readers()
            self._routing.resume(node)
        else:
            self._routing.resume()
        if self._follower is not None:
            self._follower.on_disconnected(node)

    def owner(self, slot: int) -> Connection | None:
        """Return the node that is known to serve a slot."""
        self._open_for(slot)
        return self._masters[slot]

    def _forget(self, slots: list[int]) -> None:
        """Let the near cache forget what it has of slots that another node serves by now."""
        if self._near is not None:
            self._near.slots_moved(slots)
        if self._follower is not None and slots:
            self._loop.call_soon(self._follower.slots_moved)

    # -- the nodes

    def _node(self, address: Address) -> Connection:
        """Return the connection to a node, opened if it is a new one."""
        node = self._members.find(address)
        if node is None:
            node = Connection(
                self.options_at(address),
                self._credentials,
                cluster=self,
                read_only=self._options.scale_reads != "master",
                near=self._near,
                inbox=self._inbox,
                resolver=self._resolver,
            )
            self._members.join(address, node)
            self._routing.join(node)
        return node

    def _open_for(self, slot: int) -> None:
        """Open the node that serves a slot, if it wasn't needed before."""
        one = self._routing.unopened.get(slot)
        if one is None or self._closed:
            return
        mapped = self._options.mapped
        node = self._node(mapped(*one.primary))
        if self._options.scale_reads != "master":
            for replica in one.replicas:
                self._node(mapped(*replica))
        its = [
            slot
            for slot in range(one.first, one.last + 1)
            if self._routing.unopened.get(slot) is one
        ]
        for slot in its:
            del self._routing.unopened[slot]
        self._routing.hand_slots(dict.fromkeys(its, node))

    def open_seeds(self) -> None:
        """Connect to the nodes that are configured."""
        for address in self._seeds.addresses:
            self._node(address)

    def _leave(self, node: Connection) -> None:
        """Close a node that is no part of the cluster any more, after what it has in flight."""
        self._routing.leave(node)
        if self._follower is not None:
            self._follower.on_disconnected(node)
        self._members.leave(node)

    # -- the view

    def _end(self) -> None:
        """Note that the view is kept up to date no more."""
        self._closed = True
        if not self._loop.is_closed():
            self._give_up(_CLOSED)

    def record_failure(self, error: Exception) -> None:
        """Tell those who wait for the slots why there are none."""
        self._routing.unrouted.pipeline.down = error
        refusing = isinstance(error, ConfigError | ReplyError)
        if not refusing and (nodes := self._members.all()):
            refusals = [node.refusal for node in nodes]
            if all(refusals):
                refusing, error = True, refusals[0]  # type: ignore[assignment]
        if self.view:
            return
        if refusing and str(error) != str(self._refusal):
            _logger.warning("can't use the cluster %s: %s", self._options.address, error)
        self._refusal = error if refusing else None
        if refusing:
            self._discovered.set()
            message = str(error)
            self._routing.unrouted.refuse(lambda operation: ConnectError(f"{operation}: {message}"))
        else:
            self._discovered.clear()
            self._routing.unrouted.refuse(None)

    def apply(self, view: tuple[SlotRange, ...]) -> None:
        """Take over a view: open nodes, give slots their owners, and let nodes leave."""
        mapped = self._options.mapped
        masters: list[Connection | None] = [None] * constants.SLOTS
        present: set[Connection] = set()
        reads_replicas = self._options.scale_reads != "master"
        announced = {one.primary for one in view}
        if reads_replicas:
            announced.update(replica for one in view for replica in one.replicas)
        at = self._node if len(announced) <= AT_ONCE else self._members.find
        unopened: dict[int, SlotRange] = {}
        for one in view:
            slots = range(one.first, one.last + 1)
            nodes = [at(mapped(*one.primary))]
            if nodes[0] is None:
                unopened.update(dict.fromkeys(slots, one))
            masters[one.first : one.last + 1] = nodes * len(slots)
            if reads_replicas:
                nodes += [at(mapped(*replica)) for replica in one.replicas]
            present.update(node for node in nodes if node is not None)
        for slot in self._refresher.moved:
            # The view may be the older one; the next will tell.
            masters[slot] = self._masters[slot]
        present.update(node for node in masters if node is not None)
        self._routing.unopened = {
            slot: one for slot, one in unopened.items() if masters[slot] is None
        }
        self.view = view
        self._routing.unrouted.pipeline.down = ConnectError(
            "no node of the cluster serves this slot"
        )
        changed = [slot for slot, now in enumerate(masters) if now is not self._masters[slot]]
        left = {self._masters[slot] for slot in changed}
        if self._routing.unopened:
            left.add(None)  # what waits is what its node is opened for
        self._forget(changed)
        self._routing.hand_slots({slot: masters[slot] for slot in changed})
        if self._options.scale_reads != "master":
            self._assign_readers()
        self._routing.resume(*left)
        self._refusal = None
        self._routing.unrouted.refuse(None)
        self._discovered.set()
        self._let_leave(present)

    def _let_leave(self, present: set[Connection]) -> None:
        if not any(node.is_ready for node in present):
            return
        for node, is_gone in self._members.missing(present).items():
            if is_gone:
                self._leave(node)
            else:
                self._stale.set()

    # -- reads from replicas

    def _assign_readers(self) -> None:
        """Choose anew which nodes are read from."""
        reading = self._members.readers(self.view, self._options)
        if reading != self._reading:
            self._reading = reading
            self._routing.read_from(reading)

    # -- small things

    def errors_by_node(self) -> str:
        """Return what keeps the nodes from being ready, each in a few words."""
        return self._members.errors_by_node() or str(self._routing.unrouted.pipeline.down)

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
