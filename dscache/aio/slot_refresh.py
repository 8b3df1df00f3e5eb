"""The task that refreshes the slots of a cluster: when they may be outdated, and periodically.

It asks over the connections that operations use: they are authenticated, encrypted and watched
already.
"""

from __future__ import annotations

import asyncio
import random
import time
from math import inf
from typing import TYPE_CHECKING

from ..errors import ConnectError, DscacheError
from ..net.foreign_errors import foreign
from ..net.slot_table import SlotTable
from ..net.slots import ASKED, QUESTIONS, View, read_view
from .connection import Connection
from .deadlines import wait_at_most

if TYPE_CHECKING:
    from .cluster import Cluster


class SlotRefresher:
    """Keeps the view of a ClusterState up to date, and lets a Cluster follow.

    ``due`` is set when the state's next refresh is due earlier.
    """

    def __init__(self, cluster: Cluster, due: asyncio.Event) -> None:
        self._cluster = cluster
        self._state = cluster.state
        self._nodes = cluster.nodes
        self._due = due
        self._node_ready = asyncio.Event()

    def on_node_decided(self) -> None:
        """Note that another node can be asked, or has refused the connection for good."""
        self._node_ready.set()
        self._state.expedite_refresh()

    async def keep(self) -> None:
        """Refresh the slots whenever that is due, until cancelled."""
        state = self._state
        while True:
            await self._until_due()
            claim = state.start_refresh(time.monotonic())
            if not claim:
                continue
            try:
                if not await self._refresh():
                    continue
            except BaseException:
                state.abandon_refresh(claim)
                state.record_stale()  # the cluster may not follow a view that came
                raise
            await asyncio.sleep(state.gap())
            if not self._cluster.is_ready:
                state.record_unready()

    async def _until_due(self) -> None:
        while (seconds := self._state.refresh_at - time.monotonic()) > 0:
            self._due.clear()
            await wait_at_most(self._due, None if seconds == inf else seconds)

    async def _refresh(self) -> bool:
        """Refresh the slots once; return whether a view came."""
        try:
            view, table, moved = await self._ask()
            self._state.apply(view, table, moved, self._nodes.is_up)
            self._cluster.on_refreshed()
        except Exception as error:
            # Of any kind: without a next attempt the cache would never recover.
            known = isinstance(error, DscacheError) and foreign(error) is None
            self._cluster.open_seeds()
            self._state.record_failure(error if known else ConnectError(repr(error)))
            self._cluster.on_refresh_failed()
            return False
        return True

    async def _ask(self) -> tuple[View, SlotTable, int]:
        """Return the newest view of some nodes, and the slots that were known before.

        Raises the error of the first one if none has a view, and ConnectError if all are of
        another cluster.
        """
        await self._look_up_seeds()
        if not self._nodes.ready():
            self._cluster.open_seeds()
            self._node_ready.clear()
            await wait_at_most(self._node_ready, self._state.timeout / 1000)
        ready = self._nodes.ready()
        if not ready:
            raise ConnectError(f"no node can be reached: {self._state.errors_by_node()}")
        asked = random.sample(ready, min(ASKED, len(ready)))
        table = self._state.table
        moved = len(table.moved)
        answers = await asyncio.gather(*map(self._view_of, asked), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        views = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not views:
            raise failures[0]
        return self._state.choose(views), table, moved

    async def _view_of(self, node: Connection) -> View:
        timeout = self._state.timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                slots, info = await node.ask(*map(list, QUESTIONS))
        except TimeoutError:
            raise ConnectError(
                f"{node.address}: no answer to CLUSTER SLOTS in {timeout} ms"
            ) from None
        return read_view(slots, info, node.info.address, self._state.source, node.info.node_id)

    async def _look_up_seeds(self) -> None:
        """Look up the addresses of the configured nodes that have credentials of their own."""
        seeds = self._state.seeds
        for seed in seeds.to_look_up(time.monotonic()):
            try:
                async with asyncio.timeout(self._state.timeout / 1000):
                    found = await self._cluster.resolver.look_up(seed.host, seed.port)
            except (OSError, TimeoutError, UnicodeError):
                continue
            seeds.looked_up(seed, found)
