"""Read the configuration: deepstream's file, a mapping or a URL, into typed, frozen Structs.

Each option is declared once, as a field of a Struct; its name in a file is the field's name in
camelCase, as ioredis has it. Times are in milliseconds, ``ttl`` in seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import replace

from . import _url
from ._common import MAX_PENDING, MAX_PENDING_BYTES, MAX_REPLY_BYTES, MAX_TTL, join_address
from ._tls import Tls
from ._typed import Place, Secret, Written, nearest, presentable, read, text
from ._yaml import SUFFIXES, Document
from .errors import ConfigError, shorten

__all__ = [
    "Config",
    "Node",
    "Options",
    "RedisOptions",
    "RetryStrategy",
    "SentinelNode",
    "Tls",
    "load",
]

T = TypeVar("T")

Host = Annotated[
    str,
    Meta(pattern=r"[^\s/@\[\]]+", extra={"wanted": "a host name or an address (a URL is for url)"}),
]
Port = Annotated[int, Meta(ge=1, le=65535)]
# What a 32-bit timer holds, as in JavaScript: 24 days.
Milliseconds = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**40)]
# A falsy ttl is none, as in deepstream's connector.
Seconds = Annotated[int, Meta(ge=1, le=MAX_TTL, extra={"zero_is_none": True})]

_EXAMPLE = "cache: {name: redis, options: {host: localhost, port: 6379}}"
_REDIS_PLUGINS = ("@deepstream/cache-redis", "deepstream.io-cache-redis")

_BUILT_IN = "it is part of how dscache works and can't be switched"
_OWN_RETRY = "dscache retries until commandTimeout, by rules of its own"
_NOT_FOR_SENTINEL = "the Sentinels are asked again before every connection, in the plain"

# Options of ioredis that an existing file may have: why each can be passed over.
_NO_EFFECT = {
    "autoResendUnfulfilledCommands": _OWN_RETRY,
    "autoResubscribe": "a cache subscribes to nothing",
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
    "readOnly": "records are read from the primary",
    "reconnectOnError": _OWN_RETRY,
    "serverName": "no version of deepstream's connector reads it",
    "showFriendlyErrorStack": "errors name the operation that failed",
    "stringNumbers": "versions are always exact integers",
}
_NO_EFFECT_ON_CLUSTERS = {
    "clusterRetryStrategy": _OWN_RETRY,
    "retryDelayOnClusterDown": _OWN_RETRY,
    "retryDelayOnFailover": _OWN_RETRY,
    "retryDelayOnMoved": _OWN_RETRY,
    "retryDelayOnTryAgain": _OWN_RETRY,
    "scaleReads": "records are read from the primary",
    "slotsRefreshInterval": "the topology is refreshed when something tells of a change",
    "slotsRefreshTimeout": "commandTimeout bounds the refresh",
}
_NO_EFFECT_WITH_SENTINEL = {
    "failoverDetector": _NOT_FOR_SENTINEL,
    "sentinelMaxConnections": _NOT_FOR_SENTINEL,
    "sentinelRetryStrategy": _NOT_FOR_SENTINEL,
    "updateSentinels": _NOT_FOR_SENTINEL,
}
# Options that would lead to another server if they were passed over: what to write instead.
_UNSUPPORTED = {
    "enableTLSForSentinelMode": "the Sentinels are asked without TLS",
    "natMap": "let the nodes announce addresses that can be reached from here",
    "useSRVRecords": "give the nodes' own hosts and ports",
}


class Node(Written, frozen=True, kw_only=True):
    """One node of a cluster.

    ``password`` is UNSET if it isn't given (``redisOptions.password`` is the fallback), and
    None if it is null (no password, and no fallback).
    """

    host: Host = "127.0.0.1"
    port: Port = 6379
    username: str | UnsetType | None = UNSET
    password: Secret | UnsetType | None = UNSET

    @property
    def address(self) -> str:
        """Return ``host:port`` for messages."""
        return join_address(self.host, self.port)


class SentinelNode(Written, frozen=True, kw_only=True):
    """One Sentinel."""

    host: Host = "127.0.0.1"
    port: Port = 26379

    @property
    def address(self) -> str:
        """Return ``host:port`` for messages."""
        return join_address(self.host, self.port)


class RetryStrategy(Written, frozen=True, kw_only=True):
    """How long to wait before each attempt to connect.

    A random time of up to ``first`` milliseconds, and up to twice as long after each failure,
    but never more than ``cap``.
    """

    first: Milliseconds = 50
    cap: Milliseconds = 5000


class RedisOptions(Written, frozen=True, kw_only=True):
    """What holds for every node of a cluster; None is not given."""

    no_effect: ClassVar[Mapping[str, str]] = {
        **_NO_EFFECT,
        "db": "a cluster has database 0 alone",
        "keyPrefix": "it belongs beside redisOptions, as with ioredis",
        "retryStrategy": "it belongs beside redisOptions",
    }

    username: str | None = None
    password: Secret | None = None
    tls: Tls | None = None
    connect_timeout: Milliseconds | None = None
    command_timeout: Milliseconds | None = None
    connection_name: str | None = None
    family: Literal[4, 6, 0] | None = None


class Options(Written, frozen=True, kw_only=True):
    """The options of a cache."""

    consumed: ClassVar[tuple[str, ...]] = ("url",)
    no_effect: ClassVar[Mapping[str, str]] = {
        **_NO_EFFECT,
        **_NO_EFFECT_ON_CLUSTERS,
        **_NO_EFFECT_WITH_SENTINEL,
    }
    unsupported: ClassVar[Mapping[str, str]] = _UNSUPPORTED

    host: Host = "localhost"
    port: Port = 6379
    path: str | None = None
    family: Literal[4, 6, 0] = 0
    username: str | None = None
    password: Secret | None = None
    db: Annotated[int, Meta(ge=0)] = 0
    key_prefix: str = ""
    key_layout: Literal["auto", "deepstream", "hashtag"] = "auto"
    ttl: Seconds | None = None
    connection_name: str | None = None
    connect_timeout: Milliseconds = 2000
    command_timeout: Milliseconds = 1000
    close_timeout: Milliseconds = 2000
    retry_strategy: RetryStrategy = field(default_factory=RetryStrategy)
    max_pending: Count = MAX_PENDING
    max_pending_bytes: Count = MAX_PENDING_BYTES
    when_full: Literal["wait", "error"] = "wait"
    max_reply_bytes: Count = MAX_REPLY_BYTES
    tls: Tls | None = None
    sentinels: tuple[SentinelNode, ...] | None = None
    name: str | None = None
    role: Literal["master", "slave"] = "master"
    sentinel_username: str | None = None
    sentinel_password: Secret | None = None
    nodes: tuple[Node, ...] | None = None
    max_redirections: Annotated[int, Meta(ge=0, le=1000)] = 16
    redis_options: RedisOptions = field(default_factory=RedisOptions)

    @property
    def address(self) -> str:
        """Return where the server is, for messages: never with a password."""
        if self.nodes:
            return ",".join(node.address for node in self.nodes)
        if self.sentinels:
            sentinels = ",".join(one.address for one in self.sentinels)
            return f'"{self.name}" of the Sentinels {sentinels}'
        return self.path or join_address(self.host, self.port)


class Config(Written, frozen=True, kw_only=True):
    """A checked configuration: which cache, its options, and where they were read."""

    name: Literal["redis", "memory"]
    options: Options = field(default_factory=Options)
    source: str = "mapping"

    @property
    def address(self) -> str:
        """Return where the records are, for messages: never with a password."""
        return "memory" if self.name == "memory" else self.options.address


class _Entry(Written, frozen=True, kw_only=True):
    """A cache entry of deepstream's configuration."""

    name: str | UnsetType | None = UNSET
    path: str | None = None
    type: str | None = None
    options: Options = field(default_factory=Options)


def load(
    source: str | os.PathLike[str] | Mapping[str, Any], *, environ: Mapping[str, str] | None = None
) -> Config:
    """Return the configuration that a file, a mapping, a URL or ``host:port`` states.

    A file or mapping is deepstream's whole configuration, of which only the cache is read, or a
    cache entry alone. In a file, ``${NAME}`` is replaced from ``environ`` (the process's own by
    default); a mapping and a URL are taken as they are. Raises ConfigError.
    """
    if isinstance(source, Mapping):
        place = Place("mapping")
        path, entry = _find_cache(cast(object, source), _mapping_or_none, place)
        return _from_entry(entry, Place("mapping", path), os.getcwd())
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"the configuration must be a path, a mapping or a URL, not {type(source).__name__}"
        )
    if isinstance(source, str) and ("://" in source or _url.HOST_AND_PORT.fullmatch(source)):
        stated, shown = _url.parse(source, Place("URL"))
        place = Place(shown)
        return _config("redis", read(Options, stated, place), place, os.getcwd())
    return _from_file(os.fsdecode(source), os.environ if environ is None else environ)


def _from_file(path: str, environ: Mapping[str, str]) -> Config:
    if not path.lower().endswith(SUFFIXES):
        # What was meant as a URL may hold a password before the @.
        raise ConfigError(
            f"{path.rpartition('@')[2]}: a configuration is a file ending in "
            f"{', '.join(SUFFIXES)}, a mapping, host:port, or a URL ({_url.SCHEMES})"
        )
    file = Place(os.path.basename(path))
    document = Document(path, environ, file)
    where, node = _find_cache(document.root, document.keys, file)
    place = Place(file.source, where)
    return _from_entry(document.value(node, place), place, document.folder)


def _find_cache(
    root: T, children: Callable[[T], Mapping[str, T] | None], place: Place
) -> tuple[str, T]:
    """Return the cache entry of a configuration, and the path of keys to it."""
    sections = children(root)
    if sections is None:
        raise place.error(f"must be a mapping of sections; write {_EXAMPLE}")
    if "cache" in sections:
        return "cache", sections["cache"]
    plugins = children(sections["plugins"]) if "plugins" in sections else None
    if plugins is not None and "cache" in plugins:
        return "plugins.cache", plugins["cache"]
    if sections.keys() & {"name", "path", "type", "options"}:
        return "", root
    best = nearest("cache", map(str, sections))
    meant = f'; is "{best}" meant to be it?' if best else ""
    there = ", ".join(presentable(str(name)) for name in sections) or "none"
    raise place.error(f"no section cache, the sections are: {there}{meant}; write {_EXAMPLE}")


def _mapping_or_none(value: object) -> Mapping[str, object] | None:
    return value if isinstance(value, Mapping) else None


def _from_entry(entry: object, place: Place, folder: str) -> Config:
    if not isinstance(entry, Mapping):
        raise place.error(f"must be a mapping; write {_EXAMPLE}")
    place_of_options = place.at("options")
    options = entry.get("options")
    if isinstance(options, Mapping):
        entry = {**entry, "options": _with_url(options, place_of_options.at("url"))}
    read_entry = read(_Entry, entry, place)
    return _config(_name(read_entry, place), read_entry.options, place_of_options, folder)


def _name(entry: _Entry, place: Place) -> Literal["redis", "memory"]:
    # deepstream prefers the path to the name, and either to the type.
    if entry.path is not None:
        if entry.path not in _REDIS_PLUGINS:
            raise place.at("path").error(
                f'must be "{_REDIS_PLUGINS[0]}", no other plug-in runs here'
            )
        return "redis"
    if entry.type not in (None, "default"):
        raise place.at("type").error('must be "default"; write name: redis to choose the cache')
    if entry.name is UNSET:
        return "memory"
    match (entry.name or "").lower():
        case "redis":
            return "redis"
        case "memory":
            return "memory"
    shown = "null" if entry.name is None else shorten(entry.name)
    raise place.at("name").error(f'must be "redis" or "memory", not {shown}')


def _with_url(options: Mapping[str, object], place: Place) -> Mapping[str, object]:
    """Return ``options`` with what their ``url`` states in place of their own."""
    url = options.get("url")
    if url is None or url == "":
        return options
    stated = _url.parse(text(url, place, secret=True), place).options
    tls = options.get("tls")
    if "tls" in stated and isinstance(tls, Mapping):
        stated["tls"] = {**tls, **cast(dict[str, object], stated["tls"])}
    # A server that the URL names is not the one behind the socket.
    without = {"path"} if "host" in stated else set()
    return {**{name: options[name] for name in options if name not in without}, **stated}


def _config(
    name: Literal["redis", "memory"], options: Options, place: Place, folder: str
) -> Config:
    if options.tls:
        options = replace(options, tls=options.tls.located(folder, place.at("tls")))
    shared = options.redis_options
    if shared.tls:
        tls = shared.tls.located(folder, place.at("redisOptions").at("tls"))
        options = replace(options, redis_options=replace(shared, tls=tls))
    if options.sentinels and not options.name:
        raise place.at("name").error("is missing; it is the group that the Sentinels watch")
    if options.sentinels and options.nodes:
        raise place.at("nodes").error("a cluster has no Sentinels; leave either of them out")
    if options.name and not options.sentinels:
        raise place.at("name").error(
            "is the group that Sentinels watch, and there are no sentinels; the cache's own name "
            "stands above options"
        )
    return Config(name=name, options=options, source=place.source)
