"""The lines of a blocking cache to a cluster: as many to each node as threads are busy at once.

What one thread borrows is a line to every node. So ``maxConnections`` bounds the connections to
each of them, and nobody who has one waits for another.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from .. import _backend
from ..config import Config
from ..core import stats as counters
from ..core.constants import ErrorOf
from ..errors import ConnectError
from ..net.cluster_state import ClusterState
from ..net.slot_table import NodeInfo
from .cluster import ClusterConnection
from .connection import Connection
from .pool import Pool, closed_meanwhile
from .waiter import BlockingWaiter

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")


class ClusterPool(Pool):
    """The connections to the nodes of a cluster."""

    def __init__(self, config: Config, provider: CredentialProvider | None = None) -> None:
        options = config.options
        first = options.seeds[0]
        # What holds for every node, whichever it is.
        shared = options.for_node(first.host, first.port, first)
        super().__init__(shared, provider)
        self.address = options.address
        self._core = _backend.core
        self._provider = provider
        self._map = ClusterState(config)
        self._departures = 0

    # -- what differs from one server

    def _new_connection(self) -> Connection:
        line = ClusterConnection(self._core, self._map, self._options, self._provider)
        return cast(Connection, line)

    def _run_until_done(self, line: Connection, outcome: BlockingWaiter) -> None:
        """Go on with an operation, with as many nodes as it takes, until its deadline."""
        _cluster(line).run_until_done(outcome, self._closing_error)
        if self._departures != self._map.departures:
            self._departures = self._map.departures
            self._close_departed()

    def _close_departed(self) -> None:
        """Let the lines that nobody uses close what they have to nodes that have left."""
        for line in list(self._idle):
            try:
                self._idle.remove(line)
            except ValueError:
                continue  # who uses it will see
            try:
                _cluster(line).close_departed()
            except BaseException:
                self._drop(line)
                raise
            self._put_back(line)

    def _closing_error(self) -> ErrorOf | None:
        return closed_meanwhile if self._closing else None

    def _make_ready(self, line: Connection, deadline: float) -> Exception | None:
        """Ask for the slots and connect to their nodes; a shard that is down is only logged.

        Returns ConfigError if the server is no cluster, what the nodes say if they all refuse, and
        ConnectError if none can be used by the deadline.
        """
        cluster_map = self._map
        _cluster(line).connect(deadline, self._closing_error)
        if self._closing:
            return closed_meanwhile("connect")
        if not cluster_map.known and cluster_map.refusal is not None:
            return cluster_map.refusal("connect")
        ready = _cluster(line).connected()
        primaries = cluster_map.primaries()
        missing = [place for place in primaries if place.shown not in ready]
        if missing and len(missing) == len(primaries) and all(one.refusal for one in missing):
            return cast(ErrorOf, missing[0].refusal)("connect")
        if len(missing) == len(primaries):
            return ConnectError(
                f"no node of the cluster {self.address} is ready within "
                f"{self._options.connect_timeout} ms: {cluster_map.errors_by_node()}"
            )
        for place in missing:
            _logger.warning(
                "the cluster serves without one of its shards: %s: %s", place.shown, place.trouble
            )
        return None

    def _note_error(self, line: Connection) -> None:
        """Do nothing: the line has told the map what there is to tell."""

    def _count(self, line: Connection) -> None:
        _cluster(line).count()

    def reset_after_fork(self) -> None:
        """Begin anew in a forked child: nothing that the parent uses is touched."""
        self._map.reset_after_fork()
        super().reset_after_fork()

    # -- what it tells

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection to every node that serves slots."""
        places = self._map.primaries()
        connected = {shown for line in self._present() for shown in _cluster(line).connected()}
        return bool(not self._closed and places and {one.shown for one in places} <= connected)

    @property
    def server(self) -> str:
        """The kind and version of the servers, as far as it is known."""
        known = sorted({place.server for place in self._places() if place.server})
        return f"cluster of {', '.join(known)}" if known else ""

    def stats(self) -> dict[str, Any]:
        """Return the counters of all nodes together, and of each under ``nodes``."""
        cluster_map = self._map
        lines = [_cluster(line) for line in self._present()]
        places = self._places()
        parts: dict[str, list[dict[str, Any]]] = {one.shown: [one.counts] for one in places}
        connected = Counter(shown for line in lines for shown in line.connected())
        for line in lines:
            for shown, counts in line.stats_of_nodes().items():
                parts.setdefault(shown, []).append(counts)
        nodes: dict[str, dict[str, Any]] = {}
        for shown, of_node in parts.items():
            nodes[shown] = {**counters.merged(of_node), "connections": connected[shown]}
        for place in places:
            nodes[place.shown] |= {**place.connections(), "last_loss": place.last_loss}
        past = cluster_map.past
        of_none = [line.stats() for line in (*lines, *map(_cluster, list(self._unplaced)))]
        of_all = [past, *nodes.values()]
        return {
            **counters.merged([*of_all, *of_none, {"overloaded": self._overloads}]),
            "waiting": len(self._waiters),
            "connections": connected.total(),
            "connects": sum(one.get("connects", 0) for one in of_all),
            "reconnections": sum(one.get("reconnections", 0) for one in of_all),
            "last_loss": cluster_map.last_loss,
            "redirections": cluster_map.redirections,
            "refreshes": cluster_map.refreshes,
            "nodes": nodes,
        }

    def _places(self) -> list[NodeInfo]:
        with self._map.lock:
            return list(self._map.places.values())


def _cluster(line: Connection) -> ClusterConnection:
    return cast(ClusterConnection, line)
