"""Read the configuration: deepstream's file, a mapping or a URL, into typed, frozen Structs.

Each option is declared once, as a field of a Struct; its name in a file is the field's name in
camelCase, as ioredis has it. Times are in milliseconds, ``ttl`` in seconds.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import replace
from yaml.nodes import ScalarNode

from ..core.constants import (
    MAX_PENDING,
    MAX_PENDING_BYTES,
    MAX_REPLY_BYTES,
    MAX_TTL,
    NEAR_BYTES,
    NEAR_RECORDS,
    join_address,
)
from ..errors import ConfigError, shorten
from . import ioredis
from . import url as urls
from .document import SUFFIXES, Document
from .tls import Tls
from .validation import ConfigStruct, Location, Secret, is_null, nearest, read, redact_key, text

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

T = TypeVar("T")

Host = Annotated[
    str,
    Meta(
        pattern=r"[^\s/@\[\]]+", extra={"expected": "a host name or an address (a URL is for url)"}
    ),
]
Port = Annotated[int, Meta(ge=1, le=65535)]
_PORT = r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
HostAndPort = Annotated[
    str,
    Meta(
        pattern=rf"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@\[\]]+):{_PORT}",
        extra={"expected": "host:port, with brackets around an IPv6 address"},
    ),
]
# What a 32-bit timer holds, as in JavaScript: 24 days.
_MOST = 2**31 - 1
Milliseconds = Annotated[int, Meta(ge=1, le=_MOST, extra={"unit": "milliseconds"})]
Count = Annotated[int, Meta(ge=1, le=2**40)]
Bytes = Annotated[int, Meta(ge=1, le=2**40, extra={"unit": "bytes"})]
# A falsy interval is never, as in ioredis, and a falsy ttl is none, as in deepstream's connector.
Interval = Annotated[
    int, Meta(ge=1, le=_MOST, extra={"unit": "milliseconds", "zero_is_none": True})
]
NamePrefix = Annotated[str, Meta(pattern=r"(?s).+", extra={"expected": "the beginning of names"})]
Seconds = Annotated[int, Meta(ge=1, le=MAX_TTL, extra={"unit": "seconds", "zero_is_none": True})]

_EXAMPLE = "cache: {name: redis, options: {host: localhost, port: 6379}}"
_REDIS_PLUGINS = ("@deepstream/cache-redis", "deepstream.io-cache-redis")


class Node(ConfigStruct, frozen=True, kw_only=True):
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


class SentinelNode(ConfigStruct, frozen=True, kw_only=True):
    """One Sentinel."""

    host: Host = "127.0.0.1"
    port: Port = 26379

    @property
    def address(self) -> str:
        """Return ``host:port`` for messages."""
        return join_address(self.host, self.port)


class RetryStrategy(ConfigStruct, frozen=True, kw_only=True):
    """How long to wait before each attempt to connect.

    A random time of up to ``first`` milliseconds, and up to twice as long after each failure,
    but never more than ``cap``.
    """

    first: Milliseconds = 50
    cap: Milliseconds = 5000


class ClusterRetryStrategy(ConfigStruct, frozen=True, kw_only=True):
    """How long to wait before a cluster's slots are asked for again, if no node tells them.

    A random time of up to ``first`` milliseconds, and up to twice as long after each failure,
    but never more than ``cap``.
    """

    first: Milliseconds = 100
    cap: Milliseconds = 2000


class NatTarget(ConfigStruct, frozen=True, kw_only=True):
    """Where a node is reached from here that announces another address."""

    host: Host
    port: Port


class NearCacheOptions(ConfigStruct, frozen=True, kw_only=True):
    """What is kept in the process of what was read, for as long as Redis tells of no change.

    ``prefixes`` are of names; () keeps records of any name. ``required``: a server that can't tell
    of changes is refused.
    """

    max_records: Count = NEAR_RECORDS
    max_bytes: Bytes = NEAR_BYTES
    max_age: Milliseconds = 60_000
    idle_limit: Milliseconds = 1000
    mode: Literal["default", "broadcast"] = "default"
    prefixes: tuple[NamePrefix, ...] = ()
    serve_stale: bool = False
    required: bool = True

    expected: ClassVar[str] = "true, false or a mapping of options"

    @classmethod
    def expand_shorthand(cls, written: object) -> object:
        if isinstance(written, bool):
            return {} if written else None
        return written


class RedisOptions(ConfigStruct, frozen=True, kw_only=True):
    """What holds for every node of a cluster; None is not given."""

    no_effect: ClassVar[Mapping[str, str]] = {
        **ioredis.NO_EFFECT,
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


class Options(ConfigStruct, frozen=True, kw_only=True):
    """The options of a cache."""

    consumed: ClassVar[tuple[str, ...]] = ("url",)
    no_effect: ClassVar[Mapping[str, str]] = {
        **ioredis.NO_EFFECT,
        **ioredis.NO_EFFECT_ON_CLUSTERS,
        **ioredis.NO_EFFECT_WITH_SENTINEL,
    }
    unsupported: ClassVar[Mapping[str, str]] = ioredis.UNSUPPORTED

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
    max_pending_bytes: Bytes = MAX_PENDING_BYTES
    when_full: Literal["wait", "error"] = "wait"
    max_reply_bytes: Bytes = MAX_REPLY_BYTES
    max_connections: Annotated[int, Meta(ge=1, le=65535)] = 64
    near_cache: NearCacheOptions | None = None
    tls: Tls | None = None
    sentinels: tuple[SentinelNode, ...] | None = None
    name: str | None = None
    role: Literal["master", "slave"] = "master"
    sentinel_username: str | None = None
    sentinel_password: Secret | None = None
    nodes: tuple[Node, ...] | None = None
    max_redirections: Annotated[int, Meta(ge=0, le=1000)] = 16
    scale_reads: Literal["master", "slave", "all"] = "master"
    nat_map: Mapping[HostAndPort, NatTarget] | None = None
    slots_refresh_timeout: Milliseconds = 1000
    slots_refresh_interval: Interval | None = 5000
    cluster_retry_strategy: ClusterRetryStrategy = field(default_factory=ClusterRetryStrategy)
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

    @property
    def hash_tag(self) -> bool:
        """Whether a record's keys are ``{<name>}_v`` and ``{<name>}_d``."""
        # "auto" is deepstream's own layout wherever that is atomic.
        return self.key_layout == "hashtag" or (self.key_layout == "auto" and bool(self.nodes))

    def for_pipeline(self) -> dict[str, Any]:
        """Return what a Pipeline is given of these options."""
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
        """Return what a NearCache is given of these options."""
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
        """The configured nodes in their order, each once; of those that stand twice the last."""
        return tuple({_same(node.host, node.port): node for node in self.nodes or ()}.values())

    def mapped(self, host: str, port: int) -> tuple[str, int]:
        """Return where a node is reached that announces this address: ``natMap`` may tell."""
        expected = _same(host, port)
        for announced, target in (self.nat_map or {}).items():
            its_host, _, its_port = announced.rpartition(":")
            if _same(its_host.strip("[]"), int(its_port)) == expected:
                return target.host, target.port
        return host, port

    def for_node(self, host: str, port: int, node: Node | None = None) -> Options:
        """Return the options of the connection to one node of a cluster.

        They are those of a single server. ``node`` is the configured node that it is; without
        it, the one with the same address, if there is one.
        """
        if node is None:
            here = _same(host, port)
            node = next((one for one in self.seeds if _same(one.host, one.port) == here), Node())
        shared = self.redis_options
        username = shared.username if node.username is UNSET else node.username
        password = shared.password if node.password is UNSET else node.password
        if node.password is None and node.username is UNSET:
            # A name without its password would be refused.
            username = None
        return replace(
            self,
            host=host,
            port=port,
            username=username,
            password=password,
            tls=shared.tls,
            family=self.family if shared.family is None else shared.family,
            connect_timeout=shared.connect_timeout or self.connect_timeout,
            command_timeout=shared.command_timeout or self.command_timeout,
            connection_name=shared.connection_name or self.connection_name,
            # Here "auto" would be another one than on the cluster.
            key_layout="hashtag" if self.hash_tag else "deepstream",
            nodes=None,
            nat_map=None,
            redis_options=RedisOptions(),
        )


class Config(ConfigStruct, frozen=True, kw_only=True):
    """A checked configuration: which cache, its options, and where they were read."""

    name: Literal["redis", "memory"]
    options: Options = field(default_factory=Options)
    source: str = "mapping"

    @property
    def address(self) -> str:
        """Return where the records are, for messages: never with a password."""
        return "memory" if self.name == "memory" else self.options.address


class _CacheSection(ConfigStruct, frozen=True, kw_only=True):
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
        place = Location("mapping")
        path, entry = _find_cache(cast(object, source), _mapping_or_none, place)
        return _from_entry(entry, Location("mapping", path), os.getcwd())
    file = _path_of(source)
    if file is not None:
        return _from_file(file, os.environ if environ is None else environ)
    stated, shown = urls.parse(str(source), Location("URL"))
    place = Location(shown)
    return _config("redis", read(Options, stated, place), place, os.getcwd())


def _path_of(source: object) -> str | None:
    """Return the path of a configuration's file, or None if it is a URL.

    Raises ConfigError if it is neither.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"the configuration must be a path, a mapping or a URL, not {type(source).__name__}"
        )
    if isinstance(source, str) and ("://" in source or urls.HOST_AND_PORT.fullmatch(source)):
        return None
    path = os.fsdecode(source)
    if not path.lower().endswith(SUFFIXES):
        # What was meant as a URL may hold a password before the @.
        raise ConfigError(
            f"{path.rpartition('@')[2]}: a configuration is a file ending in "
            f"{', '.join(SUFFIXES)}, a mapping, host:port, or a URL ({urls.SCHEMES})"
        )
    return path


def _from_file(path: str, environ: Mapping[str, str]) -> Config:
    file = Location(os.path.basename(path))
    document = Document(path, environ, file)
    where, node = _find_cache(document.root, document.keys, file)
    place = Location(file.source, where)
    return _from_entry(document.value(node, place), place, document.folder)


def _find_cache(
    root: T, children: Callable[[T], Mapping[str, T] | None], place: Location
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
    # A bare word may be a secret, with its name and colon forgotten.
    there = ", ".join(redact_key(str(k)) for k, v in sections.items() if not _is_bare(k, v))
    raise place.error(
        f"no section cache, the sections are: {there or 'none'}{meant}; write {_EXAMPLE}"
    )


def _is_bare(name: object, value: object) -> bool:
    """Return whether a section is but a name, and no known one."""
    return name != "plugins" and is_null(
        value.value or None if isinstance(value, ScalarNode) else value
    )


def _mapping_or_none(value: object) -> Mapping[str, object] | None:
    return value if isinstance(value, Mapping) else None


def _from_entry(entry: object, place: Location, folder: str) -> Config:
    if not isinstance(entry, Mapping):
        raise place.error(f"must be a mapping; write {_EXAMPLE}")
    place_of_options = place.at("options")
    options = entry.get("options")
    of_url: dict[str, object] = {}
    if isinstance(options, Mapping):
        of_url = _stated_by_url(options, place_of_options.at("url"))
        entry = {**entry, "options": _with_url(options, of_url)}
    read_entry = read(_CacheSection, entry, place)
    if isinstance(options, Mapping):
        places = {name: place_of_options.at(name) for name in options if not is_null(options[name])}
        places.update(dict.fromkeys(of_url, place_of_options.at("url")))
        ioredis.check_cluster(read_entry.options, places)
    return _config(_name(read_entry, place), read_entry.options, place_of_options, folder)


def _name(entry: _CacheSection, place: Location) -> Literal["redis", "memory"]:
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


def _stated_by_url(options: Mapping[str, object], place: Location) -> dict[str, object]:
    """Return the options that the ``url`` among them states."""
    url = options.get("url")
    if url is None or url == "":
        return {}
    return urls.parse(text(url, place, secret=True), place).options


def _with_url(options: Mapping[str, object], stated: dict[str, object]) -> Mapping[str, object]:
    """Return ``options`` with what their ``url`` states in place of their own."""
    tls = options.get("tls")
    if "tls" in stated and isinstance(tls, Mapping):
        stated = {**stated, "tls": {**tls, **cast(dict[str, object], stated["tls"])}}
    # A server that the URL names is not the one behind the socket.
    without = {"path"} if "host" in stated else set()
    return {**{name: options[name] for name in options if name not in without}, **stated}


def _same(host: str, port: int) -> tuple[str, int]:
    """Return what is equal for two spellings of one address."""
    try:
        return str(ipaddress.ip_address(host)), port
    except ValueError:
        return host.lower(), port


def _config(
    name: Literal["redis", "memory"], options: Options, place: Location, folder: str
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
    if options.near_cache:
        _check_near_cache(options, options.near_cache, place.at("nearCache"))
    return Config(name=name, options=options, source=place.source)


def _check_near_cache(options: Options, near: NearCacheOptions, place: Location) -> None:
    if near.mode == "broadcast":
        here = place.at("prefixes")
        for i, one in enumerate(near.prefixes):
            for other in near.prefixes[:i]:
                if one.startswith(other) or other.startswith(one):
                    raise here.item(i).error(
                        f"{shorten(one)} and {shorten(other)} overlap, which Redis refuses in the "
                        "mode broadcast; leave the longer one out"
                    )
    of_replicas = {"role": options.role, "scaleReads": options.scale_reads}
    for name, value in of_replicas.items():
        applies = options.sentinels if name == "role" else options.nodes
        if value == "slave" and applies and near.required:
            raise place.error(
                f"with {name}: slave all is read from replicas, and what they hold is not kept; "
                "leave one of the two out"
            )
