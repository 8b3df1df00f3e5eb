"""Ask the nodes of a cluster who serves which slot: when somebody has reason to, and at times.

They are asked over the connections that are there anyway, which are logged in, encrypted and
watched already.
"""

from __future__ import annotations

import asyncio
import random
from typing import Protocol

from ..config import Config
from ..errors import ConnectError, DscacheError
from ..net.backoff import full_jitter, half_jitter
from ..net.seeds import Seeds
from ..net.slots import (
    ASKED,
    GAP,
    GAP_CAP,
    GAP_GROWTH,
    QUESTIONS,
    SlotRange,
    View,
    newest,
    read_view,
)
from .cluster_nodes import ClusterNodes
from .connection import Connection
from .resolver import Resolver


class RefreshTarget(Protocol):
    """Who is told the view."""

    @property
    def is_ready(self) -> bool:
        """Whether every slot has a node that is ready."""

    def open_seeds(self) -> None:
        """Connect to the nodes that are configured."""

    def errors_by_node(self) -> str:
        """Return what keeps the nodes from being ready."""

    def apply(self, view: tuple[SlotRange, ...]) -> None:
        """Take over a view."""

    def record_failure(self, error: Exception) -> None:
        """Note why there is none."""


class SlotRefresher:
    """Keeps the view of a cluster up to date, and tells it to a RefreshTarget."""

    def __init__(
        self,
        config: Config,
        seeds: Seeds,
        members: ClusterNodes,
        resolver: Resolver,
        audience: RefreshTarget,
    ) -> None:
        self._options = config.options
        self._source = config.source
        self._seeds = seeds
        self._members = members
        self._resolver = resolver
        self._audience = audience
        self.stale = asyncio.Event()
        """Set while there is reason to ask."""
        self.stale.set()
        self.node_ready = asyncio.Event()
        """Set when another node can be asked, or refuses to be."""
        self.moved: set[int] = set()
        """Slots of which a node has told the owner since the view was asked for."""
        self.refreshes = 0

    async def keep(self) -> None:
        """Ask, again and again, until cancelled."""
        interval = self._options.slots_refresh_interval
        retry = self._options.cluster_retry_strategy
        failures = unready = 0
        while True:
            try:
                async with asyncio.timeout(interval / 1000 if interval else None):
                    await self.stale.wait()
            except TimeoutError:
                pass
            self.stale.clear()
            try:
                self._audience.apply(await self._look())
            except Exception as error:
                # Whatever it is: without a next attempt the cache would never be well again.
                known = isinstance(error, DscacheError)
                self._audience.record_failure(error if known else ConnectError(repr(error)))
                seconds = full_jitter(retry.first / 1000, retry.cap / 1000, failures)
                failures += 1
                self.stale.set()
                await self._pause(seconds)
                continue
            failures = 0
            await asyncio.sleep(half_jitter(GAP, GAP_CAP, unready, GAP_GROWTH))
            unready = 0 if self._audience.is_ready else unready + 1
            if unready:
                self.stale.set()

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until another node can be asked."""
        self.node_ready.clear()
        try:
            async with asyncio.timeout(seconds):
                await self.node_ready.wait()
        except TimeoutError:
            return

    async def _look(self) -> tuple[SlotRange, ...]:
        """Return the newest view that some nodes have; raises what keeps all of them from it."""
        await self._look_up_seeds()
        if not self._members.ready():
            self._audience.open_seeds()
            await self._pause(self._options.slots_refresh_timeout / 1000)
        ready = self._members.ready()
        if not ready:
            raise ConnectError(f"no node can be reached: {self._audience.errors_by_node()}")
        asked = random.sample(ready, min(ASKED, len(ready)))
        self.moved.clear()
        answers = await asyncio.gather(*map(self._view_of, asked), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        views = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not views:
            raise failures[0]
        view = newest(views).ranges
        self.refreshes += 1
        return view

    async def _view_of(self, node: Connection) -> View:
        """Return what a node knows of the cluster."""
        timeout = self._options.slots_refresh_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                slots, info = await node.ask(*map(list, QUESTIONS))
        except TimeoutError:
            raise ConnectError(
                f"{node.address}: no answer to CLUSTER SLOTS in {timeout} ms"
            ) from None
        return read_view(slots, info, self._members.address_of(node), self._source)

    async def _look_up_seeds(self) -> None:
        """Look up which addresses the configured nodes with a login of their own have."""
        loop = asyncio.get_running_loop()
        for seed in self._seeds.to_look_up(loop.time()):
            try:
                async with asyncio.timeout(self._options.slots_refresh_timeout / 1000):
                    found = await self._resolver.look_up(seed.host, seed.port)
            except (OSError, TimeoutError, UnicodeError):
                continue
            self._seeds.looked_up(seed, found)
