"""The servers that hold the records, for work on all keys: a single server, or every primary."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .. import _backend
from ..aio.cluster import Cluster
from ..aio.connection import Connection
from ..aio.control import ControlConnection, RawCommand, Reply
from ..core.constants import SLOTS
from ..errors import ConnectError
from .cache import AdminCache


@dataclass(slots=True)
class Primary:
    """A primary server, measured when the job begins."""

    server: ControlConnection
    address: str
    size: int
    """The number of keys at the start."""


class Primaries:
    """All servers that hold records: one, or every primary of a cluster."""

    def __init__(self, primaries: list[Primary], by_slot: list[Primary] | None) -> None:
        self.all = primaries
        self._by_slot = by_slot

    @property
    def size(self) -> int:
        """The number of keys at the start."""
        return sum(primary.size for primary in self.all)

    @property
    def is_cluster(self) -> bool:
        """Whether the keys are distributed by slots."""
        return self._by_slot is not None

    async def execute_by_key(self, commands: Sequence[tuple[bytes, RawCommand]]) -> list[Reply]:
        """Return the replies to commands in order, each from the server that holds its key.

        Raises ConnectionLost.
        """
        if self._by_slot is None:
            return await self.all[0].server.execute_many(*(command for _, command in commands))
        slot = _backend.core.slot_of_key
        by_server: dict[ControlConnection, list[int]] = {}
        for number, (key, _) in enumerate(commands):
            owner = self._by_slot[slot(key)]
            by_server.setdefault(owner.server, []).append(number)
        replies: dict[int, Reply] = {}

        async def execute_on(server: ControlConnection, numbers: list[int]) -> None:
            these = await server.execute_many(*(commands[number][1] for number in numbers))
            replies.update(zip(numbers, these, strict=True))

        await asyncio.gather(*(execute_on(*one) for one in by_server.items()))
        return [replies[number] for number in range(len(commands))]


@asynccontextmanager
async def open_primaries(cache: AdminCache) -> AsyncIterator[Primaries]:
    """Connect to all servers that hold the records of a cache, which must be ready.

    Shares the connection to a single server with a cache that has no near cache. Raises
    ConnectError if a primary can't be reached or a slot has none: records would be missed.
    """
    topology = cache.topology
    if isinstance(topology, Cluster):
        by_slot = [topology.owner(slot) for slot in range(SLOTS)]
        missing = sum(node is None for node in by_slot)
        if missing:
            raise ConnectError(f"{missing} slots of the cluster have no primary")
        nodes = topology.primaries()
        opened = await asyncio.gather(
            *map(ControlConnection.open, nodes.values()), return_exceptions=True
        )
    else:
        assert isinstance(topology, Connection)
        options = cache.config.options
        by_slot, nodes = [], {topology: options}
        # CLIENT TRACKING on a shared socket would disturb a near cache.
        opened = [
            ControlConnection.share(topology)
            if options.near_cache is None
            else await ControlConnection.open(options)
        ]
    servers = [one for one in opened if isinstance(one, ControlConnection)]
    try:
        for one in opened:
            if isinstance(one, BaseException):
                raise one
        primaries = await asyncio.gather(*map(_measure, servers))
        by_node = dict(zip(nodes, primaries, strict=True))
        owners = [by_node[node] for node in by_slot if node is not None]
        yield Primaries(primaries, owners or None)
    finally:
        for server in servers:
            server.close()


async def _measure(server: ControlConnection) -> Primary:
    (size,) = await server.execute_many(["DBSIZE"])
    return Primary(server, server.address, size if isinstance(size, int) else 0)
