"""One thread's connections to the nodes of a cluster, borrowed from the pool.

Theory of operation
-------------------
The Router gives an operation to the pipelines of the nodes that it concerns, and each of these
pipelines notes its node's address. Nearly always that is one node, and it is connected: then its
NodeConnection does the whole exchange. All other cases go in rounds (``_run``). A round follows
the state's changes, moves waiting operations to their nodes, sends all bytes that the sockets
take, and only then waits for the first event of any node. So a bulk is sent to all nodes before
the first reply is read, nodes are connected to side by side, and a lost node delays no other.

``unrouted`` is a pipeline without a node. Operations wait there while their node isn't known yet,
or after a node has redirected them or put them off.

A thread does one operation at a time, and only that operation is under way here. So no operation
can overtake another, and a redirected one goes on at once.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Final

from ..core.failures import ErrorOf
from ..errors import ConnectError
from ..net.backoff import half_jitter, longest_pause
from ..net.cluster_state import ClusterState
from ..net.slots import RETRY_CAP, RETRY_FIRST
from .connection import IN, LEAST_TO_CONNECT, OUT, milliseconds, move_queued, over
from .foreign_errors import ConnectTimeout
from .node_connection import NodeConnection
from .slot_refresh import SlotRefresh
from .slot_routing import SlotRouter
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from ..core.batch import Batch
    from ..core.router import Router

# How often to check whether another thread has found the owner of a slot, in seconds: at first,
# and at last.
_CHECK_FIRST: Final = 0.002
_CHECK_LAST: Final = 0.05

Closing = Callable[[], ErrorOf | None]
"""Returns how operations fail now if the cache closes, else None."""


class ClusterConnection:
    """A Router and the connections to its nodes, with the interface of a Connection.

    ``pipeline`` is the target of operations, and ``routes`` has the connections. The other
    attributes are the same as a Connection's.
    """

    def __init__(self, state: ClusterState, routes: SlotRouter) -> None:
        self.identity = None
        self.admitted = False
        self.ready = True
        self.retired = False
        self.gone = False
        self._state = state
        self.routes = routes
        self.pipeline: Router = routes.router
        self._active: set[NodeConnection] = set()
        self._hold_until = 0.0
        self._deadline = inf
        self._expire_at = -inf
        self._slot_refresh: SlotRefresh | None = None

    # -- one operation

    def send_and_receive(self, outcome: BlockingWaiter) -> bool:
        """Try the common case: one send, one wait and one receive, at one node.

        Returns whether the operation is done. If not, ``run_until_done`` goes on from there.
        """
        routes = self.routes
        pending_nodes = routes.pending_nodes
        if (
            len(pending_nodes) != 1
            or not routes.is_current()
            or time.monotonic() >= self._state.refresh_at
        ):
            return False
        node = routes.nodes.get(pending_nodes[0])
        if node is None or not node.ready:
            return False
        pending_nodes.clear()
        if not node.send_and_receive(outcome):
            return False
        if node.pipeline.in_flight:
            node.give_up()
        elif outcome.error is not None and node.pipeline.away:
            node.check()
        return True

    def run_until_done(self, outcome: BlockingWaiter, closing: Closing) -> None:
        """Go on with an operation, at as many nodes as it takes, until its deadline."""
        self._run(lambda now: outcome.done, closing, inf)

    def connect(self, deadline: float, closing: Closing) -> None:
        """Refresh the slots and connect to all their primaries, except after a repeated refusal."""
        failures: dict[NodeConnection, int] = {}

        def is_done(now: float) -> bool:
            if now >= deadline or closing() is not None:
                return True
            state = self._state
            if not state.known:
                return state.refusal is not None and now < state.refresh_at
            nodes = [self.routes.node(info) for info in state.primaries()]
            for node in nodes:
                # A node that has refused is tried once more: a password may be corrected by now.
                untried = failures.setdefault(node, node.failures) == node.failures
                node.wanted = not node.ready and (untried or node.info.refusal is None)
                self._active.add(node)
            # An outstanding reply would end the connection.
            return not any(node.wanted or node.is_busy for node in nodes)

        self._run(is_done, closing, deadline)
        for node in self.routes.nodes.values():
            node.wanted = False

    def _run(self, is_done: Callable[[float], bool], closing: Closing, limit: float) -> None:
        active = self._active
        active.update(node for node in self.routes.nodes.values() if node.is_busy)
        self._hold_until = 0.0
        self._deadline = limit
        checks = 0
        self._expire_at = -inf
        while True:
            if (error_of := closing()) is not None:
                self.fail_all(error_of)
            now = time.monotonic()
            self._redirect(now)
            self.routes.follow()
            self._hand_on(now)
            active.update(self.routes.take_pending_nodes())
            if now >= self._expire_at:
                # All parts of an operation have the same deadline, and ``expire`` takes time.
                deadline = self.expire(now)
                self._expire_at = inf if deadline is None else deadline
                self._deadline = min(self._expire_at, self._deadline if deadline is None else limit)
            done = is_done(now)
            if self._refresh_slots(now, done):
                continue
            if done and self._slot_refresh is None:
                break
            self._connect_and_send(now)
            checks += self._wait(now, checks)
        self._finish(now)

    def _redirect(self, now: float) -> None:
        """Take back the operations that nodes have redirected or put off."""
        for node in self._active:
            redirected = node.pipeline.redirected
            if not redirected:
                continue
            node.pipeline.redirected = []
            batches = []
            for words, slot, batch in redirected:
                self._note_redirection(node, words, slot, batch, now)
                batches.append(batch)
            self.routes.unrouted.requeue(batches)

    def _note_redirection(
        self, node: NodeConnection, words: str, slot: int, batch: Batch, now: float
    ) -> None:
        self._state.exclude_replica(node.info)
        node.info.redirections += 1
        code, named = self._state.record_redirection(words, slot, node.info.address)
        if named is None:
            pause = half_jitter(RETRY_FIRST, RETRY_CAP, len(batch.redirections))
            self._hold_until = max(self._hold_until, now + pause)
            self.routes.unrouted.down = None
        elif code == "ASK":
            batch.ask(self.routes.node(named).pipeline)

    def _hand_on(self, now: float) -> None:
        """Move unrouted operations to their nodes, as far as these are known."""
        unrouted = self.routes.unrouted
        if not unrouted.queued or now < self._hold_until:
            return
        self.routes.hand_on(unrouted)
        if unrouted.queued:
            state = self._state
            unrouted.down = state.trouble
            if state.known:
                state.record_stale()
            elif state.refusal is not None and now < state.refresh_at:
                message = str(state.refusal("connect"))
                unrouted.fail_all(lambda operation: ConnectError(f"{operation}: {message}"))

    def _refresh_slots(self, now: float, done: bool) -> bool:
        """Refresh the slots if that is due; return whether a refresh has just ended."""
        if self._slot_refresh is None:
            if done or now < self._state.refresh_at:
                return False
            claim = self._state.start_refresh(now)
            if not claim:
                return False
            try:
                self._slot_refresh = self._begin_refresh(claim, now)
            except BaseException:
                self._state.abandon_refresh(claim)  # or no thread could refresh until it expires
                raise
        if done and now >= self._deadline:
            self._slot_refresh.end()
        elif not self._slot_refresh.go_on(now):
            return False
        self._slot_refresh = None
        return True

    def _begin_refresh(self, claim: float, now: float) -> SlotRefresh:
        # First the nodes with an operation under way: they will answer the refresh soon, too.
        ready = [node for node in self.routes.nodes.values() if node.ready]
        random.shuffle(ready)
        ready.sort(key=lambda node: node not in self._active)
        self._look_up_seeds(now)
        infos = self._state.to_ask(node.info.shown for node in ready)
        nodes = [self.routes.node(info) for info in infos]
        self._active.update(nodes)
        return SlotRefresh(self._state, claim, now, nodes)

    def _look_up_seeds(self, now: float) -> None:
        """Look up the addresses of the configured nodes that have credentials of their own."""
        seeds = self._state.seeds
        for seed in seeds.to_look_up(now):
            with suppress(socket.gaierror, UnicodeError):
                seeds.looked_up(seed, socket.getaddrinfo(seed.host, seed.port))

    def _connect_and_send(self, now: float) -> None:
        for node in self._active:
            needed = node.wanted or node.pipeline.queued
            if node.opening is not None:
                if now >= node.limit:
                    node.fail(ConnectTimeout())
                elif not needed:
                    node.give_up()
                elif now >= node.wake_at:
                    node.step()
                continue
            if needed:
                node.check()
            if not node.ready and needed and now >= node.not_before:
                rest = min(self._deadline - now, node.info.options.connect_timeout / 1000)
                if not self.routes.is_primary(node):
                    rest /= 2  # leave time to read from another node if this one fails
                if rest >= LEAST_TO_CONNECT:
                    node.begin(now, now + rest)
            if node.ready:
                node.flush()

    def _wait(self, now: float, checks: int) -> bool:
        """Wait for the first event and take it; return whether another thread may be first."""
        until = self._deadline
        if self._slot_refresh is not None:
            until = min(until, self._slot_refresh.until)
        checking = False
        if self.routes.unrouted.queued:
            if now < self._hold_until:
                until = min(until, self._hold_until)
            else:
                checking = True
        poller = select.poll()
        watched: dict[int, NodeConnection] = {}
        for node in self._active:
            if node.opening is not None:
                until = min(until, node.limit, node.wake_at)
            elif not node.ready:
                if node.wanted or node.pipeline.queued:
                    checking = True
                    if node.not_before > now:
                        until = min(until, node.not_before)
                continue
            elif not (node.pipeline.in_flight or node.unsent):
                continue
            poller.register(node.fd, node.events)
            watched[node.fd] = node
        if checking:
            until = min(until, now + longest_pause(_CHECK_FIRST, _CHECK_LAST, checks))
        rest = until - time.monotonic()
        if not watched:
            time.sleep(min(max(rest, 0.0), _CHECK_LAST))
            return checking
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
                if node.has_new_deadline:
                    node.has_new_deadline = False
                    self._expire_at = -inf
        return checking

    def _finish(self, now: float) -> None:
        """End the sockets with outstanding replies, since no thread waits for them any more."""
        if now >= self._deadline:
            self._state.record_stale()
        for node in self._active:
            pipeline = node.pipeline
            if node.opening is not None or pipeline.in_flight or node.unsent:
                node.give_up()
            elif pipeline.away:
                node.check()
            if pipeline.queued:
                pipeline.fail_all(over)
            pipeline.redirected = []
        unrouted = self.routes.unrouted
        if unrouted.queued:
            unrouted.fail_all(over)
        self._active.clear()
        self.routes.close_departed()

    # -- the interface of a Connection

    def expire(self, now: float) -> float | None:
        """Fail operations whose deadline is past; return the next deadline, or None."""
        deadlines = [self.routes.unrouted.expire(now)]
        deadlines += [node.pipeline.expire(now) for node in self._active]
        return min((one for one in deadlines if one is not None), default=None)

    def fail_all(self, error_of: ErrorOf) -> None:
        """Fail the operation under way."""
        self.routes.unrouted.fail_all(error_of)
        for node in self.routes.nodes.values():
            node.pipeline.fail_all(error_of)

    def clear(self) -> None:
        """Take back an operation that was refused before any of it was sent."""
        self.fail_all(over)
        self.routes.take_pending_nodes()

    def take_over(self, spare: ClusterConnection) -> None:
        """Take over the operation of a line that has no place in the pool."""
        theirs = spare.routes
        for pipeline in (theirs.unrouted, *(node.pipeline for node in theirs.nodes.values())):
            move_queued(pipeline, self.routes.unrouted)
        theirs.take_pending_nodes()

    def connected(self) -> list[str]:
        """Return the addresses of the connected nodes."""
        return [shown for shown, node in list(self.routes.nodes.items()) if node.ready]

    def interrupt(self, reason: Exception) -> None:
        """End the sockets while their thread waits for them."""
        for node in list(self.routes.nodes.values()):
            node.interrupt(reason)

    def leave(self) -> None:
        """Close the sockets without a message to the nodes: another process uses them too."""
        self.admitted = False
        for node in self.routes.nodes.values():
            node.leave()

    def discard(self) -> None:
        """End all connections for good."""
        self.gone = True
        self.ready = False
        for node in list(self.routes.nodes.values()):
            node.discard()
        if self._slot_refresh is not None:
            self._slot_refresh.abandon()
            self._slot_refresh = None

    def close_departed(self) -> None:
        """Close the connections to departed nodes; the caller has taken the line from the pool."""
        self.routes.follow()
        self.routes.close_departed()
