"""The cache that commands work with: AsyncCache, with its configuration and its connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from ..aio.connection import Connection
from ..cache import AsyncCache, Topology
from ..config import Config
from ..config.validation import Location
from ..errors import DscacheError
from .cluster_config import on_cluster
from .control import ControlConnection, connect_failure, is_clustered


class AdminCache(AsyncCache):
    """An AsyncCache that shows its configuration and its connections."""

    @property
    def config(self) -> Config:
        """The configuration it was made of."""
        return self._config

    @property
    def topology(self) -> Topology:
        """The connections to its nodes; the first access begins to connect."""
        return self._topology or self._begin()


@asynccontextmanager
async def open_cache(config: Config) -> AsyncIterator[AdminCache]:
    """Open a cache that is ready, on the whole cluster if the configured server is a node of one.

    It reads from primaries only and has no near cache, so that it shows what they hold now. A
    single server gets one connection. Raises ConfigError for a cache in memory, ConnectError if
    the server can't be reached, and ReplyError if it refuses.
    """
    if config.name == "memory":
        raise Location(config.source).error("the cache is inside its process; name a server")
    options = replace(config.options, scale_reads="master", near_cache=None)
    config = replace(config, options=options)
    if not options.nodes and not options.sentinels:
        # A URL can't tell a cluster node from a single server; CLUSTER INFO does.
        cache = AdminCache(config)
        try:
            server = await _connect_once(cache)
            if not await is_clustered(server):
                yield cache
                return
        finally:
            await cache.close()
        config = on_cluster(config)
    async with AdminCache(config) as cache:
        yield cache


async def _connect_once(cache: AdminCache) -> ControlConnection:
    """Wait for the first attempt to connect only, where a cache itself would keep trying."""
    node = cache.topology
    assert isinstance(node, Connection)
    try:
        await node.first_attempt()
    except (OSError, DscacheError) as error:
        raise connect_failure(error, node.address, cache.config.options) from error
    return ControlConnection.share(node)
