"""The configuration: files, mappings and URLs, read into typed, frozen Structs."""

from .loader import load, load_url
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
)
from .tls import Tls

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
    "load_url",
]
