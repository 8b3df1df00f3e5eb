"""The typed, frozen Structs of a configuration, in which each option is declared once.

The name of an option in a file is its field's name in camelCase, as in ioredis. Times are in
milliseconds, ``ttl`` in seconds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import replace

from .._limits import (
    MAX_PENDING,
    MAX_PENDING_BYTES,
    MAX_REPLY_BYTES,
    MAX_TTL,
    NEAR_BYTES,
    NEAR_RECORDS,
)
from ..config.address import join_address
from ..errors import DscacheError
from . import ioredis
from .tls import Tls
from .url import HOST
from .validation import ConfigStruct, Secret, SwitchedStruct

_PORT: Final = (
    r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
)


def _host(remedy: str) -> Meta:
    """Return the constraint of a host; the remedy ends the error of a URL in its place."""
    return Meta(
        # One colon is that of a port, and several are those of an IPv6 address.
        pattern=r"(?![^:]*:[0-9]+$)[^\s/@\[\]]+",
        extra={
            "expected": "a host name or an address without a port",
            "remedy": f"for a URL, {remedy}",
        },
    )


_APART: Final = "give its host and port as the options host and port"
Host = Annotated[str, _host("use the option url")]
# An entry of a list has no option url.
NodeHost = Annotated[str, _host(f"{_APART}; rediss:// becomes redisOptions: {{tls: true}}")]
SentinelHost = Annotated[str, _host(f"{_APART}; Sentinels are queried without TLS")]
MappedHost = Annotated[str, _host(_APART)]
Port = Annotated[int, Meta(ge=1, le=65535)]
HostAndPort = Annotated[
    str,
    Meta(
        pattern=rf"{HOST}:{_PORT}",
        extra={"expected": "host:port, with brackets around an IPv6 address"},
    ),
]
# The largest delay of a 32-bit timer, as in JavaScript: 24 days.
_MOST: Final = 2**31 - 1
Milliseconds = Annotated[int, Meta(ge=1, le=_MOST, extra={"unit": "milliseconds"})]
Count = Annotated[int, Meta(ge=1, le=2**40)]
Bytes = Annotated[int, Meta(ge=1, le=2**40, extra={"unit": "bytes"})]
# A falsy interval means never, as in ioredis; a falsy ttl means none, as in deepstream's connector.
Interval = Annotated[
    int, Meta(ge=1, le=_MOST, extra={"unit": "milliseconds", "zero_is_none": True})
]
NamePrefix = Annotated[str, Meta(pattern=r"(?s).+", extra={"expected": "the beginning of names"})]
Seconds = Annotated[int, Meta(ge=1, le=MAX_TTL, extra={"unit": "seconds", "zero_is_none": True})]


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of a text that matches HostAndPort; IPv6 loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def canonical(host: str, port: int) -> tuple[str, int]:
    """Return the address in a form that is equal for every spelling of it."""
    try:
        return str(ipaddress.ip_address(host)), port
    except ValueError as error:
        if isinstance(error, DscacheError):
            raise  # a signal handler's
        return host.lower(), port


class _Server(ConfigStruct, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Port = 6379

    @property
    def address(self) -> str:
        """``host:port``, to be shown."""
        return join_address(self.host, self.port)


class Node(_Server, frozen=True, kw_only=True):
    """One node of a cluster.

    ``username`` and ``password`` are UNSET if they aren't given, so that the ones of
    ``redisOptions`` are used. None means that the node has none.
    """

    expected: ClassVar[str] = "a mapping of options, such as {host: 10.0.0.1, port: 7000}"
    unsupported: ClassVar[Mapping[str, str]] = {"url": "write host: and port: of each node"}

    host: NodeHost = "127.0.0.1"
    username: str | UnsetType | None = UNSET
    password: Secret | UnsetType | None = UNSET


class SentinelNode(_Server, frozen=True, kw_only=True):
    """One Sentinel."""

    expected: ClassVar[str] = "a mapping of options, such as {host: 10.0.0.1, port: 26379}"

    host: SentinelHost = "127.0.0.1"
    port: Port = 26379


class RetryStrategy(ConfigStruct, frozen=True, kw_only=True):
    """The pause before each attempt to connect, in milliseconds.

    It is random, at most ``first``, and its bound doubles with each failure up to ``cap``.
    """

    first: Milliseconds = 50
    cap: Milliseconds = 5000


class ClusterRetryStrategy(RetryStrategy, frozen=True, kw_only=True):
    """The pause between refreshes of a cluster's slots while no node answers."""

    first: Milliseconds = 100
    cap: Milliseconds = 2000


class NatTarget(ConfigStruct, frozen=True, kw_only=True):
    """The address that reaches a node which announces another one."""

    host: MappedHost
    port: Port


class NearCacheOptions(SwitchedStruct, frozen=True, kw_only=True):
    """The near cache: records kept in the process until Redis reports a change.

    ``max_age`` and ``idle_limit`` are in milliseconds. Only names that begin with one of
    ``prefixes`` are kept; () keeps every name. With ``required``, a server that can't report
    changes is refused. If ``shared``, the processes of a host keep records together.
    """

    max_records: Count = NEAR_RECORDS
    max_bytes: Bytes = NEAR_BYTES
    max_age: Milliseconds = 60_000
    idle_limit: Milliseconds = 1000
    mode: Literal["default", "broadcast"] = "default"
    prefixes: tuple[NamePrefix, ...] = ()
    serve_stale: bool = False
    shared: bool = False
    required: bool = True


class RedisOptions(ConfigStruct, frozen=True, kw_only=True):
    """Options of the connection to every node of a cluster; None means not given."""

    no_effect: ClassVar[Mapping[str, str]] = {
        **ioredis.NO_EFFECT,
        "keyPrefix": "it belongs beside redisOptions, as with ioredis",
        "reconnectOnError": "the primary of a slot is looked up after every READONLY",
        "retryStrategy": "it belongs beside redisOptions",
    }
    unknown_remedy: ClassVar[str] = (
        "; leave redisOptions out, or write redisOptions: {}, which deepstream's connector needs "
        "beside nodes"
    )

    username: str | None = None
    password: Secret | None = None
    tls: Tls | None = None
    connect_timeout: Milliseconds | None = None
    command_timeout: Milliseconds | None = None
    connection_name: str | None = None
    db: Annotated[int, Meta(ge=0)] = 0
    family: Literal[4, 6, 0] | None = None


class Options(ConfigStruct, frozen=True, kw_only=True):
    """The options of a cache: times in milliseconds, ``ttl`` in seconds, None for not given."""

    consumed: ClassVar[tuple[str, ...]] = ("url",)
    no_effect: ClassVar[Mapping[str, str]] = ioredis.NO_EFFECT_OUTSIDE
    unsupported: ClassVar[Mapping[str, str]] = ioredis.UNSUPPORTED
    other_names: ClassVar[Mapping[str, str | None]] = ioredis.OTHER_NAMES

    host: Host = "localhost"
    port: Port = 6379
    path: str | None = None
    family: Literal[4, 6, 0] = 0
    username: str | None = None
    password: Secret | None = None
    db: Annotated[int, Meta(ge=0)] = 0
    key_prefix: str = ""
    key_layout: Literal["auto", "deepstream", "hashtag"] = "auto"
    proxied: bool | None = None
    ttl: Seconds | None = None
    connection_name: str | None = None
    connect_timeout: Milliseconds = 2000
    command_timeout: Milliseconds = 1000
    close_timeout: Milliseconds = 2000
    reconnect_on_error: bool = True
    retry_strategy: RetryStrategy = field(default_factory=RetryStrategy)
    max_pending: Count = MAX_PENDING
    max_pending_bytes: Bytes = MAX_PENDING_BYTES
    when_full: Literal["wait", "error"] = "wait"
    max_reply_bytes: Bytes = MAX_REPLY_BYTES
    max_connections: Annotated[int, Meta(ge=1, le=65535)] = 64
    near_cache: NearCacheOptions | None = None
    maint_notifications: Literal["auto", "on", "off"] = "auto"
    tls: Tls | None = None
    sentinels: tuple[SentinelNode, ...] | None = None
    name: str | None = None
    role: Literal["master", "slave"] = "master"
    sentinel_username: str | None = None
    sentinel_password: Secret | None = None
    nodes: tuple[Node, ...] | None = None
    max_redirections: Annotated[int, Meta(ge=0, le=1000)] = 16
    scale_reads: Literal["master", "slave", "all", "zone"] = "master"
    zone: str | None = None
    nat_map: Mapping[HostAndPort, NatTarget] | None = None
    slots_refresh_timeout: Milliseconds = 1000
    slots_refresh_interval: Interval | None = 5000
    cluster_retry_strategy: ClusterRetryStrategy = field(default_factory=ClusterRetryStrategy)
    redis_options: RedisOptions = field(default_factory=RedisOptions)

    @property
    def address(self) -> str:
        """The server, nodes or Sentinels, to be shown; contains no password."""
        if self.nodes:
            return ",".join(node.address for node in self.nodes)
        if self.sentinels:
            sentinels = ",".join(one.address for one in self.sentinels)
            return f'"{self.name}" of the Sentinels {sentinels}'
        return self.path or join_address(self.host, self.port)

    @property
    def hash_tag(self) -> bool:
        """Whether the keys of a record are ``{<name>}_v`` and ``{<name>}_d``."""
        # "auto" is deepstream's own layout wherever that layout is atomic.
        is_sharded = bool(self.nodes) or bool(self.proxied)
        return self.key_layout == "hashtag" or (self.key_layout == "auto" and is_sharded)

    @property
    def leaves_replicas(self) -> bool:
        """Whether a server that refuses writes as a replica is left, and writes are sent again."""
        return self.reconnect_on_error and self.role == "master"

    def for_pipeline(self) -> dict[str, Any]:
        """Return the keyword arguments of a Pipeline; times in seconds."""
        return {
            "key_prefix": self.key_prefix,
            "hash_tag": self.hash_tag,
            "ttl": self.ttl or 0,
            "timeout": self.command_timeout / 1000,
            "max_pending": self.max_pending,
            "max_pending_bytes": self.max_pending_bytes,
            "max_reply_bytes": self.max_reply_bytes,
            "max_redirections": self.max_redirections,
        }

    def for_near_cache(self) -> dict[str, Any]:
        """Return the keyword arguments of a NearCache; times in seconds."""
        near = self.near_cache or NearCacheOptions()
        return {
            "key_prefix": self.key_prefix,
            "hash_tag": self.hash_tag,
            "clustered": bool(self.nodes),
            "timeout": self.command_timeout / 1000,
            "max_records": near.max_records,
            "max_bytes": near.max_bytes,
            "max_age": near.max_age / 1000,
            "idle_limit": near.idle_limit / 1000,
            "prefixes": near.prefixes,
            "serve_stale": near.serve_stale,
        }

    @property
    def seeds(self) -> tuple[Node, ...]:
        """The configured nodes in their order; a node given twice counts as its last entry."""
        return tuple({canonical(node.host, node.port): node for node in self.nodes or ()}.values())

    def mapped(self, host: str, port: int) -> tuple[str, int]:
        """Return the address that reaches a node which announces this one, by ``natMap``."""
        if not self.nat_map:
            return host, port
        expected = canonical(host, port)
        for announced, target in self.nat_map.items():
            if canonical(*split_address(announced)) == expected:
                return target.host, target.port
        return host, port

    def for_node(self, host: str, port: int, node: Node | None = None) -> Options:
        """Return the options of the connection to one node of a cluster, as for a single server.

        ``node`` is the node's entry in the configuration. By default it is the entry with the
        same address, if there is one.
        """
        if node is None:
            here = canonical(host, port)
            node = next(
                (one for one in self.seeds if canonical(one.host, one.port) == here), Node()
            )
        shared = self.redis_options
        username = shared.username if node.username is UNSET else node.username
        password = shared.password if node.password is UNSET else node.password
        if node.password is None and node.username is UNSET:
            # The server would refuse a username without its password.
            username = None
        return replace(
            self,
            host=host,
            port=port,
            username=username,
            password=password,
            tls=shared.tls,
            db=shared.db,
            family=self.family if shared.family is None else shared.family,
            connect_timeout=shared.connect_timeout or self.connect_timeout,
            command_timeout=shared.command_timeout or self.command_timeout,
            connection_name=shared.connection_name or self.connection_name,
            # For a single server "auto" would choose another layout than on the cluster.
            key_layout="hashtag" if self.hash_tag else "deepstream",
            nodes=None,
            nat_map=None,
            redis_options=RedisOptions(),
        )


class Config(ConfigStruct, frozen=True, kw_only=True):
    """A checked configuration: the kind of cache (``name``), its ``options``, and their ``source``.

    ``hot_path_prefixes`` are deepstream's ``storageHotPathPrefixes``. Its servers write records
    whose names begin with one of them with version 0 at every write.
    """

    name: Literal["redis", "memory"] = "redis"
    options: Options = field(default_factory=Options)
    source: str = "mapping"
    hot_path_prefixes: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """The servers that hold the records, to be shown; contains no password."""
        return "memory" if self.name == "memory" else self.options.address
