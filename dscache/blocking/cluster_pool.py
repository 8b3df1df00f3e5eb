"""The pool of a blocking cache's connections to a cluster.

A thread borrows one ClusterConnection, which has a connection to each node. So ``maxConnections``
bounds the connections to each node, and no thread that has one waits for another.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from .. import _backend
from ..config import Config, Options
from ..core import stats as counters
from ..core.failures import ErrorOf
from ..errors import ConnectError, DscacheError
from ..net.cluster_state import ClusterState
from .cluster import ClusterConnection
from .connection import Connection
from .maintenance import SlotFollower, follow_maintenance
from .pool import Pool, closed_meanwhile
from .slot_routing import SlotRouter
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")

# A name to read, of a record that need not exist.
_ANY_NAME = "dscache"


class ClusterPool(Pool):
    """The connections to the nodes of a cluster."""

    def __init__(self, config: Config, provider: CredentialProvider | None = None) -> None:
        options = config.options
        first = options.seeds[0]
        # The options common to all nodes.
        shared = options.for_node(first.host, first.port, first)
        super().__init__(shared, provider)
        self.address = options.address
        self.state = ClusterState(config)
        self._slot_follower = SlotFollower(self.state, self.announcements)
        self.follow_maintenance = partial(
            follow_maintenance, self.announcements, self._slot_follower.follow
        )
        self._new_routes = partial(
            SlotRouter,
            _backend.core,
            self.state,
            shared,
            self._connector.logins,
            self.follow_maintenance,
        )
        self._departures = 0

    # -- differences from the pool of one server

    def on_moved(self, moved: Callable[[], object]) -> None:
        self._slot_follower.on_moved(moved)

    def _new_connection(self) -> Connection:
        return cast(Connection, ClusterConnection(self.state, self._new_routes()))

    def _run_until_done(self, line: Connection, outcome: BlockingWaiter) -> None:
        """Go on with an operation, with as many nodes as it takes, until its deadline."""
        _cluster(line).run_until_done(outcome, self._closing_error)
        if self._departures != self.state.departures:
            self._departures = self.state.departures
            self._close_departed()

    def _close_departed(self) -> None:
        """Close the connections to departed nodes, of lines that no thread uses."""
        for line in self._idle.copy():  # in one step, unlike a list of it
            # A thread that finds no line idle waits for the lock, and then finds this one.
            with self._lock:
                try:
                    self._idle.remove(line)
                except ValueError:
                    continue  # a thread has borrowed it, and closes them itself
                try:
                    _cluster(line).close_departed()
                except BaseException:
                    self.drop(line)
                    raise
                self._put_back(line)

    def _closing_error(self) -> ErrorOf | None:
        return closed_meanwhile if self._closing else None

    def _make_ready(self, line: Connection, deadline: float) -> Exception | None:
        """Refresh the slots and connect to their nodes; a shard that is down is only logged.

        Returns ConfigError if the server isn't a cluster, the nodes' own error if they all refuse,
        and ConnectError if no node can be used by the deadline.
        """
        state = self.state
        _cluster(line).connect(deadline, self._closing_error)
        if self._closing:
            return closed_meanwhile("connect")
        if not state.known and state.refusal is not None:
            return state.refusal("connect")
        ready = _cluster(line).connected()
        primaries = state.primaries()
        missing = [one for one in primaries if one.shown not in ready]
        if missing and len(missing) == len(primaries) and all(one.refusal for one in missing):
            return cast(ErrorOf, missing[0].refusal)("connect")
        if len(missing) == len(primaries):
            return ConnectError(
                f"no node of the cluster {self.address} is ready within "
                f"{self._options.connect_timeout} ms: {state.errors_by_node()}"
            )
        for one in missing:
            _logger.warning(
                "the cluster serves without one of its shards: %s: %s", one.shown, one.trouble
            )
        return None

    def _note_error(self, line: Connection) -> None:
        """Do nothing: the line has recorded the error in the state already."""

    @property
    def _counting(self) -> AbstractContextManager[object]:
        return self.state.lock

    def _keep_counts(self, line: Connection) -> None:
        _cluster(line).routes.keep_counts()

    def reset_after_fork(self) -> None:
        """Begin again in a forked child, without touching any connection of the parent."""
        self.state.reset_after_fork()
        super().reset_after_fork()

    # -- the nodes, for work on all names

    def options_at(self, shown: str) -> Options:
        """Return the options of a connection to the node at ``host:port``."""
        return self.state.node_at(shown).options

    def owner(self, slot: int) -> str | None:
        """Return the address of the node that serves a slot, or None if none is known."""
        return self.state.table.find(slot, reads=False)

    def primaries(self) -> dict[str, Options]:
        """Return the options of a connection to each node that serves slots, by address."""
        return {shown: self.options_at(shown) for shown in self.state.table.primaries}

    def look_again(self) -> None:
        """Have the slots refreshed soon, since they may have moved."""
        self.state.record_stale()
        self.refresh_slots()

    def refresh_slots(self) -> None:
        """Refresh the slots if that is due."""
        # A thread refreshes the slots beside an operation, so it takes one.
        with suppress(DscacheError):
            self.run("head", _ANY_NAME)

    # -- state and counters

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection to every node that serves slots."""
        primaries = self.state.primaries()
        connected = {shown for line in self._present() for shown in _cluster(line).connected()}
        shown = {one.shown for one in primaries}
        return bool(not self._closed and shown and shown <= connected)

    @property
    def server(self) -> str:
        """The kinds and versions of the servers, as far as they are known."""
        return self.state.server

    def stats(self) -> dict[str, Any]:
        """Return the counters of all nodes together, and of each under ``nodes``."""
        with self._counting:
            lines = [(_cluster(line).routes, line.admitted) for line in self._to_count()]
            infos = list(self.state.nodes.values())
            parts = {one.shown: [counters.merged([one.counts])] for one in infos}
            past: dict[str, Any] = {}
            counters.add(past, self.state.past)
            found = [
                (*item, admitted) for one, admitted in lines for item in list(one.nodes.items())
            ]
        connected: Counter[str] = Counter()
        for shown, node, admitted in found:
            parts.setdefault(shown, []).append(counters.of(node.pipeline, admitted))
            connected[shown] += node.ready
        nodes = {
            shown: {**counters.merged(of_node), "connections": connected[shown]}
            for shown, of_node in parts.items()
        }
        for info in infos:
            nodes[info.shown] |= {**info.connections(), "last_loss": info.last_loss}
        others = [*(counters.of(*line) for line in lines), {"overloaded": self._overloads}]
        return {
            "waiting": len(self._waiters),
            **self.state.stats(nodes, (past,), others),
            "maintenance": self.announcements.stats(),
        }


def _cluster(line: Connection) -> ClusterConnection:
    return cast(ClusterConnection, line)
