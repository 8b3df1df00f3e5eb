"""The choice of a topology: memory, one node, or the nodes of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ..config import Config
from .connection import Connection
from .memory import MemoryNode

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .cluster import Cluster

Topology: TypeAlias = "MemoryNode | Connection | Cluster"
"""The nodes that a cache uses, opened on the running event loop."""


def open_topology(config: Config, credentials: CredentialProvider | None) -> Topology:
    """Return the topology that a configuration names, and begin to connect."""
    if config.name == "memory":
        return MemoryNode(config.options)
    if config.options.nodes:
        from .cluster import Cluster  # most caches don't need it, and importing it takes time

        return Cluster(config, credentials)
    return Connection(config.options, credentials)
