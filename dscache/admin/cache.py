"""The cache that commands work with, on the whole cluster if its server is a node of one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from msgspec.structs import replace

from ..aio.connection import Connection
from ..aio.control import ControlConnection, is_clustered
from ..cache import AsyncCache, Topology
from ..config import Config, Node, RedisOptions
from ..config.validation import Location
from ..errors import DscacheError, ReplyError
from ..net.connect_errors import connect_failure


class AdminCache(AsyncCache):
    """An AsyncCache that shows its connections."""

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
        raise connect_failure(error, node.address, node.pipeline.down or error) from error
    return ControlConnection.share(node)


def on_cluster(config: Config) -> Config:
    """Return the configuration of the cluster that the configured server belongs to.

    The server's host and port become the only seed, and its credentials apply to all nodes. A
    configuration with ``nodes`` is returned unchanged. Raises ConfigError if the configuration
    can't name a cluster node: memory, Sentinels, a unix socket, or a database other than 0.
    """
    options = config.options
    if options.nodes:
        return config
    place = Location(config.source)
    if config.name == "memory":
        raise place.error("the cache is inside its process; name a node of a cluster")
    if options.sentinels:
        raise place.error("a cluster has no Sentinels; name one of its nodes")
    if options.path:
        raise place.error("a cluster has no socket; name one of its nodes by host and port")
    if options.db:
        raise place.error(f"a cluster has database 0 alone, not {options.db}; leave it out")
    shared = RedisOptions(username=options.username, password=options.password, tls=options.tls)
    nodes = (Node(host=options.host, port=options.port),)
    # A cluster falls back to the other options of the single server anyway.
    options = replace(
        options, nodes=nodes, redis_options=shared, username=None, password=None, tls=None
    )
    return replace(config, options=options)


async def as_cluster(config: Config) -> Config:
    """Return the configuration of the cluster that the configured server belongs to.

    Asks the server with CLUSTER INFO. Raises ConfigError as ``on_cluster`` does and if the server
    runs without cluster support, and ConnectError or ReplyError if it can't be asked.
    """
    cluster = on_cluster(config)
    if not config.options.nodes:
        with closing(await ControlConnection.open(config.options)) as server:
            (reply,) = await server.execute_many(["CLUSTER", "INFO"])
        if isinstance(reply, ReplyError) and "cluster support disabled" in reply.message.lower():
            raise Location(config.source).error(
                f'{config.address} is not a cluster node (it says "{reply.message}"); '
                "use dscache doctor for a single server"
            )
    return cluster
