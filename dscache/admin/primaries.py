"""The servers that hold the records, for work on all of them: every primary, and its keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ..aio.cluster import Cluster
from ..cache import AsyncCache
from ..config import Options
from ..core.constants import SLOTS
from ..core.keys import slot_of_key
from ..errors import ConnectError, clean
from ..net.slots import SlotRange, parse_slots
from .control import ControlConnection

# How many keys a server looks at before it answers somebody else.
SCAN_COUNT = 1000


async def is_clustered(server: ControlConnection) -> bool:
    """Return whether a server is a node of a cluster; not, if it doesn't tell."""
    (answer,) = await server.execute_many(["CLUSTER", "INFO"])
    return isinstance(answer, bytes)


@dataclass(slots=True)
class Primary:
    """One server whose keys no other one has."""

    server: ControlConnection
    address: str
    run_id: str
    """Another one after each start; empty if it doesn't tell."""
    size: int
    """How many keys it had at first."""


class Primaries:
    """All servers that hold records: one, or every primary of a cluster."""

    def __init__(self, shards: list[Primary], owners: list[Primary] | None) -> None:
        self.all = shards
        self._owners = owners

    @property
    def size(self) -> int:
        """How many keys there were at first."""
        return sum(shard.size for shard in self.all)

    @property
    def is_cluster(self) -> bool:
        """Whether the keys are shared by slots."""
        return self._owners is not None

    def owner(self, key: bytes) -> ControlConnection:
        """Return the server that a key is on."""
        if self._owners is None:
            return self.all[0].server
        return self._owners[slot_of_key(key)].server

    async def slots(self) -> list[SlotRange]:
        """Return who serves which slots now; nothing of a single server.

        Raises ReplyError and ConnectionLost.
        """
        if self._owners is None:
            return []
        # Where a server doesn't know its own host, it is the same one at each time.
        reply = await self.all[0].server.execute("CLUSTER", "SLOTS")
        return sorted(parse_slots(reply, ("", 0)), key=lambda one: one.first)


@asynccontextmanager
async def open_primaries(cache: AsyncCache) -> AsyncIterator[Primaries]:
    """Connect to all servers that hold the records of a cache, which is ready.

    Raises ConnectError if one of them can't be reached: what it holds would be missed.
    """
    topology = cache._topology
    places: list[Options]
    if isinstance(topology, Cluster):
        masters = [topology.owner(slot) for slot in range(SLOTS)]
        missing = sum(master is None for master in masters)
        if missing:
            raise ConnectError(f"{missing} slots of the cluster have no primary")
        primaries = topology.primaries()
        nodes, places = list(primaries), list(primaries.values())
    else:
        masters, nodes = [], []
        places = [cache._config.options]
    opened = await asyncio.gather(*map(ControlConnection.open, places), return_exceptions=True)
    servers = [one for one in opened if isinstance(one, ControlConnection)]
    try:
        for one in opened:
            if isinstance(one, BaseException):
                raise one
        shards = await asyncio.gather(*map(_shard, servers))
        by_node = dict(zip(nodes, shards, strict=False))
        owners = [by_node[node] for node in masters if node is not None]
        yield Primaries(shards, owners or None)
    finally:
        for server in servers:
            server.close()


async def _shard(server: ControlConnection) -> Primary:
    size, info = await server.execute_many(["DBSIZE"], ["INFO", "server"])
    return Primary(
        server=server,
        address=server.address,
        run_id=parse_info(info).get("run_id", ""),
        size=size if isinstance(size, int) else 0,
    )


def parse_info(reply: Any) -> dict[str, str]:
    """Return the ``name:value`` lines of a reply; none of a refusal."""
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode(errors="replace").splitlines()
    return {
        clean(name): clean(value)
        for name, colon, value in (one.partition(":") for one in lines)
        if colon
    }
