"""``load()``: the configuration of a cache, from deepstream's file, a mapping or a URL."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from msgspec import UNSET, UnsetType, field
from msgspec.structs import replace

from ..errors import shorten
from .document import Tree
from .model import Config, Options
from .rules import check_cluster, complete
from .sources import (
    ENTRY_KEYS,
    Source,
    is_url,
    missing_section,
    open_source,
    plugins_of,
    read_head,
    read_section,
    sections_of,
    with_url,
)
from .url import ParsedUrl, parse
from .validation import ConfigStruct, Location, is_null, read, text

_logger = logging.getLogger("dscache")

ARGUMENTS: Final = Location("arguments")
_EXAMPLE: Final = "cache: {name: redis, options: {host: localhost, port: 6379}}"
_HOT_PATHS: Final = "storageHotPathPrefixes"
# Options that say which Redis. A cache in memory would ignore them.
_LOGIN: Final = ("username", "password", "sentinelUsername", "sentinelPassword")
_SERVERS: Final = ("url", "host", "port", "path", "sentinels", "name", "nodes", "natMap")
_OF_REDIS: Final = frozenset((*_LOGIN, *_SERVERS, "db", "tls", "redisOptions"))
_REDIS_PLUGINS: Final = ("@deepstream/cache-redis", "deepstream.io-cache-redis")


class PluginHead(ConfigStruct, frozen=True, kw_only=True):
    """The entries of a plug-in's section that choose the plug-in."""

    name: str | UnsetType | None = UNSET
    path: str | None = None
    type: str | None = None


class PluginSection(PluginHead, frozen=True, kw_only=True):
    """A plug-in's section of deepstream's configuration, such as the one of the cache."""

    unknown_remedy: ClassVar[str] = "; an option of Redis belongs below options:"

    options: Options = field(default_factory=Options)


def load(
    source: Source | Config,
    *,
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration of a cache.

    ``source`` is one of these:

    - the path of a ``.yml``, ``.yaml`` or ``.json`` file, a str or PathLike
    - a mapping, which is empty if ``options`` name the server
    - a URL, ``host:port`` or ``localhost``
    - a Config, which is returned

    A file or mapping is deepstream's whole configuration, or only its section ``cache``. In the
    first case, only that section is read. A mapping may also have just the options. In a file,
    ``${NAME}`` is replaced by the variable of ``environ``, by default the process's environment. A
    mapping and a URL are taken as they are. ``options`` override those of the source. They are
    named as in a file, or in snake_case.

    Raises ConfigError, whose text begins with the place of the mistake.
    """
    given, fields = read_arguments(Options, options or {})
    arguments = {name: ARGUMENTS.at(name) for name in given}
    if isinstance(source, Config):
        return _overridden(source, fields, source.source, os.getcwd()) if fields else source
    opened = open_source(source, environ)
    if isinstance(opened, ParsedUrl):
        stated = Config(options=read(Options, opened.options, Location(opened.shown)))
        return _overridden(stated, fields, opened.shown, os.getcwd())
    is_by_keyword = not source and bool(given.keys() & _OF_REDIS)
    if isinstance(source, Mapping) and (is_by_keyword or has_options_alone(Options, source)):
        place = opened.place
        merged, places = with_url(source, place)
        chosen = replace(read(Options, merged, place), **fields)
        check_cluster(chosen, places | arguments)
        return Config(options=complete(chosen, place, opened.folder), source=place.source)
    path, node = _find_cache(opened)
    entry_place = opened.place._replace(path=path)
    if (head := read_head(PluginHead, opened, node, entry_place)) is not None:
        _name(head, entry_place)
    content = opened.value(node, entry_place)
    section, places = read_section(PluginSection, content, entry_place, _EXAMPLE)
    chosen = replace(section.options, **fields)
    if section.name is UNSET and section.path is None:
        _check_nameless(places | arguments, entry_place)
    check_cluster(chosen, places | arguments)
    return Config(
        name=_name(section, entry_place),
        options=complete(chosen, entry_place.at("options"), opened.folder),
        source=entry_place.source,
        hot_path_prefixes=_hot_paths(opened),
    )


def load_url(url: str, *, options: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration that a URL or ``host:port`` states, as ``load`` does.

    Raises ConfigError, also if it is neither.
    """
    if isinstance(url, str) and not is_url(url):
        parse(url, Location("URL"))
    return load(url, options=options)


def read_arguments(
    struct: type[Options], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that override the source: by name in a file, and as checked fields."""
    names = dict(zip(struct.__struct_fields__, struct.__struct_encode_fields__, strict=True))
    given: dict[str, Any] = {}
    for name, value in options.items():
        encoded = names.get(name, name)
        if encoded in given:
            raise ARGUMENTS.at(encoded).error("given twice, in camelCase and in snake_case")
        if encoded in struct.consumed:
            raise ARGUMENTS.at(encoded).error("is the source itself; pass it as the first argument")
        given[encoded] = value
    checked = read(struct, given, ARGUMENTS)
    by_name = {encoded: field for field, encoded in names.items()}
    # Others were accepted without effect.
    stated = {by_name[name] for name in given.keys() & by_name.keys() if given[name] is not None}
    return given, {field: getattr(checked, field) for field in stated}


def _overridden(config: Config, fields: Mapping[str, Any], source: str, folder: str) -> Config:
    options = complete(replace(config.options, **fields), Location(source), folder)
    return replace(config, options=options, source=source)


def has_options_alone(struct: type[Options], source: Mapping[str, Any]) -> bool:
    """Whether a mapping has options without the section around them."""
    if source.keys() & {"cache", "clusterNode", "plugins", "options", "type"}:
        return False
    if "name" in source and "sentinels" not in source:
        return False
    return bool(source.keys() & ({*struct.__struct_encode_fields__, "url"} - {"name", "path"}))


def _find_cache(tree: Tree) -> tuple[str, object]:
    """Return the path of keys to the cache's section, and the section."""
    sections = sections_of(tree, _EXAMPLE)
    if "cache" in sections and "options" in sections:
        raise tree.place.at("options").error("stands beside cache:; indent it to be part of it")
    if "cache" in sections:
        return "cache", sections["cache"]
    plugins = plugins_of(tree, sections)
    if "cache" in plugins:
        _logger.warning(
            "%s is a section of deepstream 1 to 3, which keep each record under one key, and "
            "dscache reads the two keys of deepstream 4 and newer: the records of such a server "
            "read as missing; run dscache migrate --from deepstream3, and write the section as "
            "cache: at the top of the file",
            tree.place.at("plugins").at("cache"),
        )
        return "plugins.cache", plugins["cache"]
    if sections.keys() & ENTRY_KEYS:
        return "", tree.root
    if not sections:
        # Without a source, as of ``Cache()``, or with an empty mapping in its place.
        raise tree.place.error(
            f"names no server; pass a URL, the path of a file, host=..., or {_EXAMPLE}"
        )
    # A bare word may be a secret whose name and colon are missing.
    shown = {
        name: node
        for name, node in sections.items()
        if name == "plugins" or not tree.is_empty(node)
    }
    raise missing_section("cache", sections, shown, tree, _EXAMPLE)


def _hot_paths(tree: Tree) -> tuple[str, ...]:
    """Return the prefixes of records that deepstream always writes with version 0.

    They are in the section ``record``; deepstream 4 had them at the top.
    """
    sections = tree.keys(tree.root) or {}
    inner = tree.place.at("record")
    record = tree.keys(sections["record"], inner) if "record" in sections else None
    for place, entries in ((inner, record or {}), (tree.place, sections)):
        if _HOT_PATHS in entries:
            here = place.at(_HOT_PATHS)
            written = tree.value(entries[_HOT_PATHS], here)
            if is_null(written):
                return ()
            if not isinstance(written, (list, tuple)):
                raise here.error("must be a list of the beginnings of names")
            return tuple(text(one, here.item(index)) for index, one in enumerate(written))
    return ()


def _check_nameless(places: Mapping[str, Location], place: Location) -> None:
    """Raise ConfigError for a section without a name whose options name a Redis."""
    stated = next((where for name, where in places.items() if name in _OF_REDIS), None)
    if stated is not None:
        option = stated.path.rpartition(".")[2]
        raise place.at("name").error(
            f"is missing, and {option} is for Redis; add name: redis (or name: memory)"
        )


def _name(section: PluginHead, place: Location) -> Literal["redis", "memory"]:
    """Return the kind of cache: deepstream prefers the path to the name, and either to the type."""
    if section.path is not None:
        if section.path not in _REDIS_PLUGINS:
            raise place.at("path").error(
                f'must be "{_REDIS_PLUGINS[0]}", no other plug-in runs here; write name: redis in '
                "its place if the records are in Redis, and the path of a socket below options:"
            )
        return "redis"
    if section.type not in (None, "default"):
        raise place.at("type").error('must be "default"; write name: redis to choose the cache')
    if section.name is UNSET:
        return "memory"
    match (section.name or "").lower():
        case "redis" | "memory" as name:
            return name
    shown = "null" if section.name is None else shorten(section.name)
    raise place.at("name").error(f'must be "redis" or "memory", not {shown}')
