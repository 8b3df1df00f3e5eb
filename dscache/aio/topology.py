"""The choice of a topology: memory, one node, or the nodes of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..config import Config
from .connection import Connection
from .memory import MemoryNode

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


class Topology(Protocol):
    """The nodes that a cache or a message node uses, opened on the running event loop."""

    @property
    def entry(self) -> Any:
        """The target of operations: a Pipeline, or an object with its operations."""

    @property
    def is_ready(self) -> bool:
        """Whether every node is ready."""

    @property
    def server(self) -> str:
        """The server's kind and version, as far as they are known."""

    async def when_ready(self) -> None:
        """Wait until every node is ready; raises the error that prevents it."""

    async def close(self) -> None:
        """Finish the operations under way, within ``closeTimeout``, and close every node."""

    def stats(self) -> dict[str, Any]:
        """Return the counters of all nodes."""


def open_topology(config: Config, credentials: CredentialProvider | None) -> Topology:
    """Return the topology that a configuration names, and begin to connect."""
    if config.name == "memory":
        return MemoryNode(config.options)
    if config.options.nodes:
        from .cluster import Cluster  # most caches don't need it, and importing it takes time

        return Cluster(config, credentials)
    return Connection(config.options, credentials)
