"""The configuration of the cluster that a server is a node of."""

from __future__ import annotations

import msgspec

from ..config import Config, Node, RedisOptions
from ..config.validation import Location
from ..errors import ReplyError
from .control import ControlConnection
from .primaries import is_clustered


def on_cluster(config: Config) -> Config:
    """Return the configuration of the cluster that the configured server is a node of.

    Its host and port become the one known node, and what it logs in with holds for all. One with
    ``nodes`` is returned as it is. Raises ConfigError for what can be no node of a cluster.
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
    # What else holds for one server is the fallback on a cluster anyway.
    options = msgspec.structs.replace(
        options, nodes=nodes, redis_options=shared, username=None, password=None, tls=None
    )
    return msgspec.structs.replace(config, options=options)


async def as_cluster(config: Config) -> Config:
    """Return what ``on_cluster`` does, of a server that is a node of a cluster.

    Raises ConfigError if it is none, what keeps it from being asked, and what ``on_cluster`` does.
    """
    cluster = on_cluster(config)
    if not config.options.nodes:
        server = await ControlConnection.open(config.options)
        try:
            (answer,) = await server.execute_many(["CLUSTER", "INFO"])
        finally:
            server.close()
        if isinstance(answer, ReplyError) and "cluster support disabled" in answer.message.lower():
            raise Location(config.source).error(
                f'{config.address} is no node of a cluster (it says "{answer.message}"); '
                "dscache doctor looks at a single server"
            )
    return cluster


async def detect_cluster(config: Config) -> Config:
    """Return the configuration of the cluster that a server turns out to be a node of.

    A URL can't say that it is one. Raises ConfigError if the records are in no server, and what
    keeps the server from being asked.
    """
    options = config.options
    if config.name == "memory":
        raise Location(config.source).error("the cache is inside its process; name a server")
    if options.nodes or options.sentinels:
        return config
    server = await ControlConnection.open(options)
    try:
        return on_cluster(config) if await is_clustered(server) else config
    finally:
        server.close()
