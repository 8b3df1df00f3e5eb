"""Options of ioredis that have no effect here, or none beside other options, and the reasons.

An existing deepstream file must work unchanged, so an option that ioredis ignores is no error.
Every ignored option is logged, and no option that would lead to another server is ignored.
"""

from __future__ import annotations

from typing import Final

_BUILT_IN: Final = "it is part of how dscache works and can't be switched"
_OWN_RETRY: Final = "dscache retries until commandTimeout, by rules of its own"
_NOT_FOR_SENTINEL: Final = "the Sentinels are queried before every connection, without TLS"

# Reasons for which an option of an existing file can be ignored, in redisOptions and outside.
NO_EFFECT: Final = {
    "autoResendUnfulfilledCommands": _OWN_RETRY,
    "autoResubscribe": "lost subscriptions are always restored",
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
    "readOnly": "role and scaleReads select the nodes that serve reads",
    "serverName": "no version of deepstream's connector reads it",
    "showFriendlyErrorStack": "errors name the operation that failed",
    "stringNumbers": "versions are always exact integers",
}
NO_EFFECT_OUTSIDE: Final = {
    **NO_EFFECT,
    "retryDelayOnClusterDown": _OWN_RETRY,
    "retryDelayOnFailover": _OWN_RETRY,
    "retryDelayOnMoved": _OWN_RETRY,
    "retryDelayOnTryAgain": _OWN_RETRY,
    "failoverDetector": "a cache always learns of a new primary from the Sentinels",
    "sentinelMaxConnections": _NOT_FOR_SENTINEL,
    "sentinelRetryStrategy": _NOT_FOR_SENTINEL,
    "updateSentinels": _NOT_FOR_SENTINEL,
}
# Options that would lead to another server or login if they were ignored, with the remedy.
UNSUPPORTED: Final = {
    "credentials": "write username and password; a provider is an argument, credentials=...",
    "enableTLSForSentinelMode": "the Sentinels are queried without TLS",
    "useSRVRecords": "give the nodes' own hosts and ports",
}
# Options of clusters alone.
NEEDS_NODES: Final = (
    "maxRedirections",
    "scaleReads",
    "zone",
    "natMap",
    "slotsRefreshTimeout",
    "slotsRefreshInterval",
    "clusterRetryStrategy",
    "redisOptions",
)
# Options that ioredis ignores when there are nodes; dscache does too.
NO_EFFECT_BESIDE_NODES: Final = {
    "host": "nodes names the servers",
    "port": "nodes names the servers",
    "username": "the node's own username or redisOptions.username is used; write it there",
    "password": "the node's own password or redisOptions.password is used; write it there",
    "tls": "redisOptions.tls is used",
    "role": "scaleReads selects the nodes that serve reads",
    "reconnectOnError": "the primary of a slot is looked up after every READONLY",
}
# Names of redis-py's and other clients' options (case and _ aside), and the options here; None for
# options that have no counterpart. The most similar name would be another option.
OTHER_NAMES: Final = {
    "auth": "password",
    "clientname": "connectionName",
    "cluster": "nodes",
    "connectiontimeout": "connectTimeout",
    "credentialprovider": "credentials",
    "database": "db",
    "decoderesponses": None,
    "defaultttl": "ttl",
    "encoding": None,
    "expire": "ttl",
    "healthcheckinterval": None,
    "prefix": "keyPrefix",
    "protocol": None,
    "retryonerror": None,
    "retryontimeout": None,
    "servicename": "name",
    "socketconnecttimeout": "connectTimeout",
    "socketkeepalive": None,
    "sockettimeout": "commandTimeout",
    "ssl": "tls",
    "sslcacerts": "tls",
    "sslcertfile": "tls",
    "sslcertreqs": "tls",
    "sslcheckhostname": "tls",
    "sslkeyfile": "tls",
    "startupnodes": "nodes",
    "timeout": "commandTimeout",
    "unixsocketpath": "path",
    "user": "username",
}
