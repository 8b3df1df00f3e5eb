"""The near cache of a Cache on a cluster: a link to each primary, as the slots move."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from ..config import Config
from ..core import constants as c
from ..errors import ConnectError
from ..net.slot_table import SlotTable, reader_of
from .cluster_pool import ClusterPool
from .near_cache import NearFront
from .near_link import NearConnection, NearLink, start_thread
from .pool import Asked, Pool

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from ..core.near_node import NearNode

# How often the slots are refreshed if that is due, although nothing is read, in seconds.
_CHECK_EVERY: Final = 1.0


class NearClusterFront(NearFront):
    """The operations of a ClusterPool, with a near cache before them.

    A thread keeps the links: it begins one to each node that has become a primary, and ends the
    links to all other nodes. Each thread takes over the present slots before it reads.
    """

    def __init__(self, pool: Pool, config: Config, credentials: CredentialProvider | None) -> None:
        self._cluster = cast(ClusterPool, pool)
        super().__init__(pool, config.options, credentials)

    def _begin(self) -> None:
        super()._begin()
        self._table: SlotTable | None = None
        self._seen = 0
        self._nodes: dict[str, NearNode] = {}
        self._by_address: dict[str, NearLink] = {}
        self._wanted = threading.Event()
        self._has_links = threading.Event()
        self._keeper: threading.Thread | None = None

    # -- whose answers are kept

    def _stamp(self) -> object:
        self._follow()
        state = self._cluster.state
        return self._table, self._seen, state.redirections

    def _is_of_owner(self, operation: Asked, stamp: object) -> bool:
        state = self._cluster.state
        table = state.table
        return stamp == (table, len(table.moved), state.redirections) and table is self._table

    def _follow(self) -> None:
        """Take over the slots that are known by now."""
        table = self._cluster.state.table
        if table is self._table and len(table.moved) == self._seen:
            return
        with self._lock:
            table = self._cluster.state.table
            seen = len(table.moved)
            self.core.route(enumerate(self._owners(table, seen)))
            self._table, self._seen = table, seen
        self._wanted.set()

    def _follow_server(self) -> None:
        """Drop the entries of slots that are announced to have moved; their links follow."""
        self._follow()

    def _owners(self, table: SlotTable, seen: int) -> list[NearNode | None]:
        """Return the node whose answers are kept for each slot: that of its primary, if read."""
        owners: list[NearNode | None] = [None] * c.SLOTS
        for shard in table.shards:
            node = self._node_at(shard.primary)
            for slot in range(shard.first, shard.last + 1):
                if not shard.readers or reader_of(shard, slot) == shard.primary:
                    owners[slot] = node
        for slot, shown in table.moved[:seen]:
            owners[slot] = self._node_at(shown)
        return owners

    def _node_at(self, shown: str) -> NearNode:
        # The lock: the link and the slots must have the same one.
        with self._lock:
            node = self._nodes.get(shown)
            if node is None:
                node = self._nodes[shown] = self.core.node()
            return node

    # -- the links

    def _make_links(self) -> list[NearLink]:
        if self._keeper is None:
            self._keeper = self._make_keeper()
        start_thread(self._keeper)
        return []

    def when_ready(self) -> None:
        self._start()
        self._has_links.wait(self._options.connect_timeout / 1000)
        super().when_ready()

    def _make_keeper(self, pause: float = 0.0) -> threading.Thread:
        return threading.Thread(
            target=self._keep, args=(pause,), name="dscache keeps the links", daemon=True
        )

    def _keep(self, pause: float) -> None:
        """Keep the links after a pause in seconds; if an exception ends it, another thread does."""
        try:
            self._wanted.wait(pause)
            while not self._closed:
                self._wanted.clear()
                self._cluster.refresh_slots()
                self._follow()
                self._update()
                self._has_links.set()
                self._wanted.wait(_CHECK_EVERY)
        finally:
            self._has_links.set()  # no caller may wait for a thread that has ended
            if not self._closed:
                self._keeper = self._make_keeper(_CHECK_EVERY)
                start_thread(self._keeper)

    def _update(self) -> None:
        """Have a link to each primary, and to no other node."""
        primaries = self._cluster.primaries()
        for shown in [one for one in self._by_address if one not in primaries]:
            self._by_address.pop(shown).stop()
            with self._lock:
                self._nodes.pop(shown, None)
                # The slots may have been routed to it meanwhile: it is a primary again. Its next
                # link reports to a new NearNode, so they are routed anew.
                self._table = None
        for shown, options in primaries.items():
            if shown in self._by_address or self._closed:
                continue
            link = NearLink(
                options,
                self._credentials,
                self._node_at(shown),
                of_cluster=True,
                on_connected=partial(self._check_identity, shown),
                on_lost=self._cluster.state.record_stale,
                pool=self._cluster,
            )
            self._by_address[shown] = link
            self._links = list(self._by_address.values())
            link.start()
        self._links = list(self._by_address.values())
        if self._closed:
            for link in self._links:
                link.stop()

    def _check_identity(self, shown: str, connection: NearConnection) -> None:
        """Raise ConnectError if the cluster has another node at the address by now."""
        state = self._cluster.state
        greeting = connection.greeting
        if greeting is not None and not state.may_use(state.node_at(shown), greeting.node_id):
            raise ConnectError(f"the cluster has another node at {shown} than the one there")
