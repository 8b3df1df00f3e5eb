"""Options as ioredis has them that do nothing here, or nothing beside others, and why.

An existing file of deepstream's must work unchanged, so what ioredis passes over is no error.
But nothing is passed over in silence, and nothing at all that would lead to another server.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .validation import Location

if TYPE_CHECKING:
    from .model import Options

_logger = logging.getLogger("dscache")

_BUILT_IN = "it is part of how dscache works and can't be switched"
_OWN_RETRY = "dscache retries until commandTimeout, by rules of its own"
_NOT_FOR_SENTINEL = "the Sentinels are asked again before every connection, in the plain"

# Options of ioredis that an existing file may have: why each can be passed over.
NO_EFFECT = {
    "autoResendUnfulfilledCommands": _OWN_RETRY,
    "autoResubscribe": "what a cache listens to, it listens to again by itself",
    "disconnectTimeout": "closeTimeout bounds the closing",
    "dropBufferSupport": "replies are always decoded as they are needed",
    "enableAutoPipelining": "operations of one tick always share a pipeline",
    "enableOfflineQueue": _BUILT_IN,
    "enableReadyCheck": _BUILT_IN,
    "keepAlive": "the system's own setting is used",
    "lazyConnect": "the connection is made when the cache is opened",
    "maxLoadingRetryTime": _OWN_RETRY,
    "maxRetriesPerRequest": _OWN_RETRY,
    "noDelay": "Nagle's algorithm is always off",
    "readOnly": "role and scaleReads tell where records are read",
    "reconnectOnError": _OWN_RETRY,
    "serverName": "no version of deepstream's connector reads it",
    "showFriendlyErrorStack": "errors name the operation that failed",
    "stringNumbers": "versions are always exact integers",
}
NO_EFFECT_ON_CLUSTERS = {
    "retryDelayOnClusterDown": _OWN_RETRY,
    "retryDelayOnFailover": _OWN_RETRY,
    "retryDelayOnMoved": _OWN_RETRY,
    "retryDelayOnTryAgain": _OWN_RETRY,
}
NO_EFFECT_WITH_SENTINEL = {
    "failoverDetector": "a cache always hears from the Sentinels of a new primary",
    "sentinelMaxConnections": _NOT_FOR_SENTINEL,
    "sentinelRetryStrategy": _NOT_FOR_SENTINEL,
    "updateSentinels": _NOT_FOR_SENTINEL,
}
# Options that would lead to another server if they were passed over: what to write instead.
UNSUPPORTED = {
    "enableTLSForSentinelMode": "the Sentinels are asked without TLS",
    "useSRVRecords": "give the nodes' own hosts and ports",
}
# What is for a cluster alone.
_WITH_NODES = (
    "maxRedirections",
    "scaleReads",
    "natMap",
    "slotsRefreshTimeout",
    "slotsRefreshInterval",
    "clusterRetryStrategy",
    "redisOptions",
)
# What ioredis passes over if there are nodes, as do we.
_NO_EFFECT_BESIDE_NODES = {
    "host": "the servers are those of nodes",
    "port": "the servers are those of nodes",
    "username": "a node's own holds, or redisOptions.username; write it there",
    "password": "a node's own holds, or redisOptions.password; write it there",
    "tls": "redisOptions.tls holds",
    "role": "scaleReads tells where a cluster's records are read",
}


def check_cluster(options: Options, places: Mapping[str, Location]) -> None:
    """Refuse what makes no sense with nodes, or without, and note what then has no effect.

    ``places`` tells where each option stands that is given.
    """
    if options.nodes is None:
        if options.nat_map and options.sentinels:
            raise places["natMap"].error(
                "is for the nodes of a cluster; let the Sentinels tell addresses that can be "
                "reached from here"
            )
        for name in _WITH_NODES:
            if name in places:
                _logger.info("%s has no effect: there are no nodes of a cluster", places[name])
        return
    shared = options.redis_options
    if options.db:
        raise places["db"].error(
            f"a cluster has database 0 alone, not {options.db}; leave it out, and let keyPrefix "
            "keep records apart"
        )
    if options.path:
        raise places["path"].error("a cluster has no socket; leave it out, or nodes")
    if options.tls and shared.tls is None:
        # Passed over, it would let passwords and records go out in the clear.
        raise places["tls"].error("on a cluster redisOptions.tls holds; write it there")
    _, opened, tag = options.key_prefix.partition("{")
    if options.hash_tag and opened and (not tag or tag.startswith("}")):
        # Behind a lone "{", it is a name that begins with "}" which makes the tag empty.
        raise places["keyPrefix"].error(
            "the { in it begins an empty hash tag, and a cluster would keep the two keys of a "
            'record in different slots; leave it out, or write a whole tag such as "{app}:"'
        )
    notes = {
        (places[name], why): name for name, why in _NO_EFFECT_BESIDE_NODES.items() if name in places
    }
    for (place, why), name in notes.items():
        # Somebody may count on a password that is used nowhere else.
        missed = name in ("username", "password") and getattr(shared, name) is None
        level = logging.WARNING if missed else logging.INFO
        _logger.log(level, "%s has no effect on a cluster: %s", place, why)
