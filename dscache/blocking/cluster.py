"""What a thread of a blocking cache borrows for a cluster: a line to each node, all its own.

Theory of operation
-------------------
The Router gives an operation to the pipelines of the nodes that it concerns, and each of those
says so by its node's name. Nearly always that is one node, which is connected: then its line
does the whole exchange. All else is done in rounds (``_run``): what is new of the map is taken
over, what waits is handed to the node that serves it, everything is sent that may be sent, and
only then is waited for whatever comes first, from any node. So a bulk is sent to all nodes before
the first reply is read, nodes are connected to side by side, and a node that is lost keeps none of
the others waiting.

The limbo is a pipeline without a node. There operations wait of which it isn't known yet who
serves them, and those that a node has sent away or put off.

A thread does one operation at a time, and here is nothing of any other: so nothing can overtake
anything, and what is redirected goes on at once.
"""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Final

from ..config import Options
from ..core.constants import ErrorOf
from ..errors import ConnectError
from ..net.backoff import half_jitter, longest_pause
from ..net.cluster_state import ClusterState
from ..net.slots import RETRY_CAP, RETRY_FIRST, parse_redirection
from .connection import IN, OUT, refused
from .foreign_errors import ConnectTimeout
from .node_connection import NodeConnection, milliseconds
from .slot_refresh import SlotRefresh
from .slot_routing import SlotRouter
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

# How soon to look whether another thread has found out who serves a slot: at first, and at last.
_GLANCE_FIRST: Final = 0.002
_GLANCE_LAST: Final = 0.05
# An attempt to connect with less time than this would only hide why the others failed.
_LEAST: Final = 0.005

Closing = Callable[[], ErrorOf | None]
"""Tells how operations fail now, if the cache closes."""


class ClusterConnection:
    """A Router and the lines to its nodes, in the shape of a Line.

    ``pipeline`` is where operations go. The other attributes are those of a Line.
    """

    __slots__ = (
        "__weakref__",
        "_active",
        "_deadline",
        "_hold_until",
        "_map",
        "_routes",
        "_slot_refresh",
        "admitted",
        "gone",
        "loss",
        "pipeline",
        "ready",
        "retired",
    )

    def __init__(
        self,
        core: Any,
        cluster_map: ClusterState,
        options: Options,
        provider: CredentialProvider | None,
    ) -> None:
        self.admitted = False
        self.ready = True
        self.retired = False
        self.gone = False
        self.loss = ""
        self._map = cluster_map
        self._routes = SlotRouter(core, cluster_map, options, provider)
        self.pipeline: Any = self._routes.router
        self._active: set[NodeConnection] = set()
        self._hold_until = 0.0
        self._deadline = inf
        self._slot_refresh: SlotRefresh | None = None

    # -- one operation

    def send_and_receive(self, outcome: BlockingWaiter) -> bool:
        """Try what nearly every operation takes: one send, one wait, one receive.

        Returns whether it has its outcome. Without it, ``run_until_done`` goes on from there.
        """
        routes = self._routes
        pending_nodes = routes.pending_nodes
        if (
            len(pending_nodes) != 1
            or not routes.is_current()
            or time.monotonic() >= self._map.refresh_at
        ):
            return False
        node = routes.nodes.get(pending_nodes[0])
        if node is None or not node.ready:
            return False
        pending_nodes.clear()
        if not node.send_and_receive(outcome):
            return False
        if node.pipeline.in_flight:
            node.give_up("it was given up")
        return True

    def run_until_done(self, outcome: BlockingWaiter, closing: Closing) -> None:
        """Go on with an operation, with as many nodes as it takes, until its deadline."""
        self._run(lambda now: outcome.done, closing, inf)

    def connect(self, deadline: float, closing: Closing) -> None:
        """Ask for the slots, and connect to all who serve them, as far as that is of any use."""
        failures: dict[NodeConnection, int] = {}

        def is_done(now: float) -> bool:
            if now >= deadline or closing() is not None:
                return True
            cluster_map = self._map
            if not cluster_map.known:
                return cluster_map.refusal is not None and now < cluster_map.refresh_at
            nodes = [self._routes.node(place) for place in cluster_map.primaries()]
            for node in nodes:
                # One that has refused is tried once more, as it may have changed its mind.
                untried = failures.setdefault(node, node.failures) == node.failures
                node.wanted = not node.ready and (untried or node.place.refusal is None)
                self._active.add(node)
            # What is still to come would end the connection.
            return not any(node.wanted or node.is_busy for node in nodes)

        self._run(is_done, closing, deadline)
        for node in self._routes.nodes.values():
            node.wanted = False

    def _run(self, is_done: Callable[[float], bool], closing: Closing, limit: float) -> None:
        active = self._active
        active.update(node for node in self._routes.nodes.values() if node.is_busy)
        self._hold_until = 0.0
        self._deadline = limit
        glances = 0
        look_at = -inf
        while True:
            if (error_of := closing()) is not None:
                self.fail_all(error_of)
            now = time.monotonic()
            self._redirect(now)
            self._routes.follow()
            self._hand_on(now)
            active.update(self._routes.take_pending_nodes())
            if now >= look_at:
                # All of an operation has the same deadline, and to look takes its time.
                deadline = self.expire(now)
                look_at = inf if deadline is None else deadline
                self._deadline = min(look_at, self._deadline if deadline is None else limit)
            done = is_done(now)
            if self._refresh_slots(now, done):
                continue
            if done and self._slot_refresh is None:
                break
            self._connect_and_send(now)
            glances += self._wait(now, glances)
        self._finish(now)

    def _redirect(self, now: float) -> None:
        """Take back what nodes have sent away or put off."""
        for node in self._active:
            redirected = node.pipeline.redirected
            if not redirected:
                continue
            node.pipeline.redirected = []
            batches = []
            for words, slot, batch in redirected:
                self._note_redirection(node, words, slot, batch, now)
                batches.append(batch)
            self._routes.unrouted.requeue(batches)

    def _note_redirection(
        self, node: NodeConnection, words: str, slot: int, batch: Any, now: float
    ) -> None:
        cluster_map = self._map
        code = words.partition(" ")[0]
        address = None
        if code in ("MOVED", "ASK"):
            address = parse_redirection(words, slot, node.place.address)
        cluster_map.exclude_replica(node.place)
        node.place.redirections += 1
        if address is None:
            cluster_map.record_redirected()
            pause = half_jitter(RETRY_FIRST, RETRY_CAP, len(batch.redirections))
            self._hold_until = max(self._hold_until, now + pause)
            self._routes.unrouted.down = None
            if code != "TRYAGAIN":
                cluster_map.record_stale()
            return
        place = cluster_map.announced(address)
        if code == "MOVED":
            cluster_map.record_moved(slot, place)
        else:
            cluster_map.record_redirected()
            batch.ask(self._routes.node(place).pipeline)

    def _hand_on(self, now: float) -> None:
        """Give what waits in limbo to the nodes that are to have it, as far as they are known."""
        unrouted = self._routes.unrouted
        if not unrouted.queued or now < self._hold_until:
            return
        self._routes.hand_on(unrouted)
        if unrouted.queued:
            cluster_map = self._map
            unrouted.down = cluster_map.trouble
            if cluster_map.known:
                cluster_map.record_stale()
            elif cluster_map.refusal is not None and now < cluster_map.refresh_at:
                message = str(cluster_map.refusal("connect"))
                unrouted.fail_all(lambda operation: ConnectError(f"{operation}: {message}"))

    def _refresh_slots(self, now: float, done: bool) -> bool:
        """Ask for the slots if that is due, beside the operation; return whether that has ended."""
        if self._slot_refresh is None:
            if done or now < self._map.refresh_at:
                return False
            claim = self._map.start_refresh(now)
            if not claim:
                return False
            try:
                self._slot_refresh = self._begin_inquiry(claim, now)
            except BaseException:
                self._map.abandon_refresh(claim)  # else nobody would ask until it ends by itself
                raise
        if done and now >= self._deadline:
            self._slot_refresh.end()
        elif not self._slot_refresh.go_on(now):
            return False
        self._slot_refresh = None
        return True

    def _begin_inquiry(self, claim: float, now: float) -> SlotRefresh:
        # A node that has an operation to answer will soon have answered more.
        ready = [node for node in self._routes.nodes.values() if node.ready]
        random.shuffle(ready)
        ready.sort(key=lambda node: node not in self._active)
        places = self._map.to_ask(node.place.shown for node in ready)
        nodes = [self._routes.node(place) for place in places]
        self._active.update(nodes)
        return SlotRefresh(self._map, claim, now, nodes)

    def _connect_and_send(self, now: float) -> None:
        for node in self._active:
            needed = node.wanted or node.pipeline.queued
            if node.opening is not None:
                if now >= node.limit:
                    node.fail(ConnectTimeout())
                elif not needed:
                    node.give_up("it was not needed any more")
                continue
            if needed:
                node.check()
            if not node.ready and needed and now >= node.not_before:
                rest = min(self._deadline - now, node.place.options.connect_timeout / 1000)
                if not self._routes.is_primary(node):
                    rest /= 2  # what can't be read here is still to be read elsewhere
                if rest >= _LEAST:
                    node.begin(now, now + rest)
            if node.ready:
                node.flush()

    def _wait(self, now: float, glances: int) -> bool:
        """Wait for whatever comes first, and take it; return whether it was but a glance."""
        until = self._deadline
        if self._slot_refresh is not None:
            until = min(until, self._slot_refresh.until)
        glance = False
        if self._routes.unrouted.queued:
            if now < self._hold_until:
                until = min(until, self._hold_until)
            else:
                glance = True
        poller = select.poll()
        watched: dict[int, NodeConnection] = {}
        for node in self._active:
            if node.opening is not None:
                until = min(until, node.limit)
            elif not node.ready:
                if node.wanted or node.pipeline.queued:
                    glance = True
                    if node.not_before > now:
                        until = min(until, node.not_before)
                continue
            elif not (node.pipeline.in_flight or node.unsent):
                continue
            poller.register(node.fd, node.events)
            watched[node.fd] = node
        if glance:
            until = min(until, now + longest_pause(_GLANCE_FIRST, _GLANCE_LAST, glances))
        rest = until - time.monotonic()
        if not watched:
            time.sleep(min(max(rest, 0.0), _GLANCE_LAST))
            return glance
        ahead = [fd for fd, node in watched.items() if node.has_more]
        ready = dict(poller.poll(0 if ahead else milliseconds(rest)))
        for fd in ahead:
            ready[fd] = ready.get(fd, 0) | IN
        for fd, event in ready.items():
            node = watched[fd]
            if node.opening is not None:
                node.step()
            elif event != OUT:
                node.receive()
        return glance

    def _finish(self, now: float) -> None:
        """End the sockets over which something is still to come, as nobody will be there for it."""
        if now >= self._deadline:
            self._map.record_stale()
        for node in self._active:
            pipeline = node.pipeline
            if node.opening is not None:
                node.give_up("it was not needed any more")
            elif pipeline.in_flight or node.unsent:
                node.give_up("it was given up")
            if pipeline.queued:
                pipeline.fail_all(_over)
            pipeline.redirected = []
        unrouted = self._routes.unrouted
        if unrouted.queued:
            unrouted.fail_all(_over)
        self._routes.take_pending_nodes()
        self._active.clear()
        self._routes.close_departed()

    # -- in the shape of a Line

    def expire(self, now: float) -> float | None:
        """Fail operations whose deadline is past; return the next deadline of one under way."""
        deadlines = [self._routes.unrouted.expire(now)]
        deadlines += [node.pipeline.expire(now) for node in self._active]
        return min((one for one in deadlines if one is not None), default=None)

    def fail_all(self, error_of: ErrorOf) -> None:
        """Fail the operation that is under way."""
        self._routes.unrouted.fail_all(error_of)
        for node in self._routes.nodes.values():
            node.pipeline.fail_all(error_of)

    def clear(self) -> None:
        """Take back an operation that was refused, as far as it had come; nothing was sent."""
        self.fail_all(refused)
        self._routes.take_pending_nodes()

    def take_over(self, spare: ClusterConnection) -> None:
        """Go on with the operation of a line that has no place."""
        self._routes.requeue_all(spare._routes)

    def connected(self) -> list[str]:
        """Return the addresses of the nodes to which there is a connection."""
        return [shown for shown, node in list(self._routes.nodes.items()) if node.ready]

    def interrupt(self, reason: Exception) -> None:
        """End the sockets under a thread that waits at them."""
        for node in list(self._routes.nodes.values()):
            node.interrupt(reason)

    def leave(self) -> None:
        """Close the sockets without a word to the nodes: they are another process's as well."""
        self.admitted = False
        for node in self._routes.nodes.values():
            node.leave()

    def discard(self) -> None:
        """End the line for good."""
        self.gone = True
        self.ready = False
        for node in list(self._routes.nodes.values()):
            node.discard()
        if self._slot_refresh is not None:
            self._slot_refresh.abandon()
            self._slot_refresh = None

    def close_departed(self) -> None:
        """Close what leads to nodes that have left, of a line that nobody uses."""
        self._routes.follow()
        self._routes.take_pending_nodes()
        self._routes.close_departed()

    def count(self) -> None:
        """Let the map keep what was counted here, of a line that is no more."""
        self._routes.keep_counts()

    def stats(self) -> dict[str, Any]:
        """Return what was counted of no node: what waits, and records that lie apart."""
        return self._routes.stats()

    def stats_of_nodes(self) -> dict[str, dict[str, Any]]:
        """Return what was counted of each node."""
        return {n: node.pipeline.stats() for n, node in list(self._routes.nodes.items())}


def _over(operation: str) -> Exception:
    """Return what nobody is told: whoever asked for it has the outcome already."""
    return ConnectError(f"{operation}: it was over")
