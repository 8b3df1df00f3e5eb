"""An endpoint that connects to any reachable node of a cluster.

The nodes forward every published message to each other, so one connection to any of them is
enough. Messages over one connection arrive in order.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

from ..aio.endpoint import Ask, Endpoint
from ..config import Options
from ..errors import ConfigError, ConnectError, ReplyError
from ..net.connect_errors import UnsuitableServer
from ..net.foreign_errors import foreign
from ..net.handshake import ServerInfo
from ..net.slots import GONE_AFTER, QUESTIONS, Address, View, read_view

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


class AnyNode(Endpoint):
    """The nodes of a cluster, tried one after the other."""

    def __init__(self, options: Options, provider: CredentialProvider | None, source: str) -> None:
        self._cluster = options
        self._source = source
        self._seeds = [(seed.host, seed.port) for seed in options.seeds]
        # Nodes to be tried next, in reverse order.
        self._untried: list[Address] = []
        self._known: list[Address] = []
        self._current: Address = random.choice(self._seeds)
        self._cut_off = 0
        self._view = View(-1, ())
        self._node_id = ""
        # The attempts to connect since the last good one, and when the first of them began.
        self._attempts = 0
        self._lost_at = 0.0
        self.is_healthy = True
        super().__init__(options.for_node(*self._current), provider, of_cluster=True)

    async def open(self, protocol: asyncio.BufferedProtocol) -> None:
        """Open a socket to the next node. Raises OSError."""
        if not self._attempts:
            self._lost_at = time.monotonic()
        self._attempts += 1
        if not self._untried:
            # The configured nodes are included, and their names are resolved again.
            others = {*self._seeds, *self._known} - {self._current}
            # The lost node comes last, as it may be the cause.
            self._untried = [self._current, *random.sample(sorted(others), len(others))]
        self._current = self._untried.pop()
        self._options = self._cluster.for_node(*self._current)
        self.address = self.named = self._options.address
        await super().open(protocol)

    async def greet(self, ask: Ask) -> ServerInfo:
        """Log in to the node and return its ServerInfo.

        Raises ReplyError if the node refuses, and ConnectError if it belongs to no cluster or to
        another one, or is cut off from the others.
        """
        server_info = await super().greet(ask)
        self._node_id = server_info.node_id
        try:
            is_ours = self.update_nodes(*await ask(*map(list, QUESTIONS)))
        except ConfigError as error:
            if foreign(error) is not None:
                raise
            raise UnsuitableServer(str(error)) from None
        if not is_ours:
            raise ConnectError(f"{self.address} belongs to another cluster by now")
        # If every node is cut off, any of them will do.
        if not self.is_healthy and self._cut_off < len(self._seeds) + len(self._known):
            self._cut_off += 1
            raise ConnectError(f"{self.address} is cut off from its cluster")
        self._cut_off = self._attempts = 0
        self._untried = []
        return server_info

    def update_nodes(self, slots: object, info: object) -> bool:
        """Update the known nodes, and whether this one ``is_healthy``.

        ``slots`` and ``info`` are the node's replies to QUESTIONS. Returns whether it belongs to
        the same cluster as before: they share a node, or all known nodes are gone and it is a
        configured one. Raises ConfigError if it belongs to no cluster, and ProtocolError for an
        invalid reply.
        """
        try:
            view = read_view(slots, info, self._current, self._source, self._node_id)
        except ReplyError as error:
            if error.code != "NOPERM":  # a user without the permission does without
                raise
            return True
        is_ours = view.is_kin(self._view) or view.is_heir({*self._view.nodes, self._view.node_id})
        if not is_ours and not self._is_replaced():
            self.is_healthy = False
            return False
        addresses = [
            self._cluster.mapped(*address)
            for one in view.ranges
            for address in (one.primary, *one.replicas)
        ]
        if addresses:
            self._known = list(dict.fromkeys(addresses))
            self._view = view
        is_said = not isinstance(info, bytes) or b"cluster_state:ok" in info
        self.is_healthy = bool(addresses) and is_said
        return True

    def _is_replaced(self) -> bool:
        """Return whether a configured node may be of a new cluster: all known ones are gone."""
        nodes = {*self._seeds, *self._known}
        is_gone = self._attempts > len(nodes) and time.monotonic() > self._lost_at + GONE_AFTER
        return is_gone and self._current in self._seeds
