"""Which node serves a name. Outside of a cluster that is one node, always."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import Config
from .connection import Connection
from .errors import ConfigError
from .memory import MemoryNode

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider


def check_supported(config: Config) -> None:
    """Raise ConfigError if a configuration is well-formed but asks for what isn't there yet."""
    if config.options.nodes is not None:
        raise ConfigError(
            f"{config.source}: cache.options.nodes: this version works with one Redis, not with "
            "a cluster; give its host and port instead"
        )


class Topology:
    """The nodes that hold a cache's records, opened on the running event loop."""

    def __init__(self, config: Config, credentials: CredentialProvider | None) -> None:
        self.node: Connection | MemoryNode
        if config.name == "memory":
            self.node = MemoryNode(config.options)
        else:
            # "auto" is deepstream's own layout wherever that is atomic.
            hash_tag = config.options.key_layout == "hashtag"
            self.node = Connection(config.options, hash_tag, credentials)

    def pipeline_of(self, name: str) -> Any:
        """Return the pipeline of the node that serves ``name``."""
        return self.node.pipeline

    @property
    def is_ready(self) -> bool:
        """Whether every node is ready."""
        return self.node.is_ready

    @property
    def server(self) -> str:
        """The server's kind and version, as far as it is known."""
        return self.node.server

    async def when_ready(self) -> None:
        """Wait until every node is ready; raises what keeps it from that."""
        await self.node.when_ready()

    async def close(self) -> None:
        """Finish what was issued, within ``closeTimeout``, and close every node."""
        await self.node.close()

    def stats(self) -> dict[str, Any]:
        """Return the counters of all nodes."""
        return self.node.stats()
