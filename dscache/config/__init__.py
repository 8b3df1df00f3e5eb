"""The configuration, read into typed, frozen Structs."""

from .model import (
    ClusterRetryStrategy,
    Config,
    NatTarget,
    NearCacheOptions,
    Node,
    Options,
    RedisOptions,
    RetryStrategy,
    SentinelNode,
    Tls,
    load,
)

__all__ = [
    "ClusterRetryStrategy",
    "Config",
    "NatTarget",
    "NearCacheOptions",
    "Node",
    "Options",
    "RedisOptions",
    "RetryStrategy",
    "SentinelNode",
    "Tls",
    "load",
]
