"""The checks of the section ``clusterNode``, over which servers exchange messages."""

from __future__ import annotations

from contextlib import closing

from ...aio.cluster import Cluster
from ...aio.control import ControlConnection
from ...config.messages import MessageConfig
from ...errors import DscacheError
from ...messages import MessageNode
from ...pubsub.protocol import Topic
from ..cache import AdminCache
from ..server_load import options_by_address
from .findings import Check, Finding, number

# Each server of deepstream subscribes to both.
_TOPICS = (Topic.EVENT, Topic.RECORD)


async def check_messages(config: MessageConfig) -> Finding:
    """Subscribe as a message node does, and count the servers that listen.

    Raises DscacheError if the server can't be reached, or refuses the subscription.
    """
    check = Check("messages")
    async with MessageNode(config) as node:
        for topic in _TOPICS:
            node.subscribe(topic, lambda *_: None)
        await node.when_ready()
        try:
            others = await _listeners(config) - 1
        except DscacheError as error:
            return check.unknown(
                f"subscriptions work; the listening servers can't be counted: {error}",
                "let the user run PUBSUB to see them here",
            )
    if others > 0:
        return check.ok(f"subscriptions work, and {number(others, 'other server')} can be reached")
    return check.warning(
        "subscriptions work, and no other server listens on the topics of events and records",
        "start a deepstream server whose clusterNode leads to this Redis, or correct the address",
    )


async def _listeners(config: MessageConfig) -> int:
    """Return how many connections are subscribed to the topics of events and records."""
    command = "SHARDNUMSUB" if config.options.sharded else "NUMSUB"
    channels = [str(int(topic)) for topic in _TOPICS]
    counts = [0] * len(channels)
    async with AdminCache(config) as cache:
        # Each node of a cluster counts its own. A message node may be at a replica, or at a node
        # that is configured and serves no slots.
        servers = options_by_address(cache)
        if isinstance(cache.topology, Cluster):
            seeds = [(seed.host, seed.port) for seed in config.options.nodes or ()]
            known = map(cache.topology.options_at, seeds)
            servers = {one.address: one for one in known} | servers
        for options in servers.values():
            with closing(await ControlConnection.open(options)) as server:
                reply = await server.execute("PUBSUB", command, *channels)
            counts = [sum(both) for both in zip(counts, reply[1::2], strict=True)]
    return min(counts)


def check_server_name(name: str) -> Finding:
    """Judge a ``serverName`` that the configuration states."""
    return Check("server name").warning(
        f"serverName is {name!r} for every server that reads this file; servers of one name drop "
        "each other's messages",
        "leave serverName out, or give each program one of its own, as by "
        "MessageNode.from_config(file, server_name=...)",
    )
