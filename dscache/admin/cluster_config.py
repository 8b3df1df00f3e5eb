"""The configuration of a cluster, derived from that of one of its nodes."""

from __future__ import annotations

import msgspec

from ..config import Config, Node, RedisOptions
from ..config.validation import Location
from ..errors import ReplyError
from .control import ControlConnection


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
    options = msgspec.structs.replace(
        options, nodes=nodes, redis_options=shared, username=None, password=None, tls=None
    )
    return msgspec.structs.replace(config, options=options)


async def as_cluster(config: Config) -> Config:
    """Return the configuration of the cluster that the configured server belongs to.

    Asks the server with CLUSTER INFO. Raises ConfigError as ``on_cluster`` does and if the server
    runs without cluster support, and ConnectError or ReplyError if it can't be asked.
    """
    cluster = on_cluster(config)
    if not config.options.nodes:
        server = await ControlConnection.open(config.options)
        try:
            (reply,) = await server.execute_many(["CLUSTER", "INFO"])
        finally:
            server.close()
        if isinstance(reply, ReplyError) and "cluster support disabled" in reply.message.lower():
            raise Location(config.source).error(
                f'{config.address} is not a cluster node (it says "{reply.message}"); '
                "use dscache doctor for a single server"
            )
    return cluster
