"""``load()``: the configuration of a cache, from deepstream's file, a mapping or a URL."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec import UNSET, UnsetType, field

from ..errors import shorten
from .document import Tree
from .model import Config, Options
from .rules import check_cluster, complete
from .sources import (
    ENTRY_KEYS,
    missing_section,
    open_source,
    plugins_of,
    read_head,
    read_section,
    sections_of,
)
from .url import ParsedUrl
from .validation import ConfigStruct, Location, is_null, read, text

_logger = logging.getLogger("dscache")

_EXAMPLE: Final = "cache: {name: redis, options: {host: localhost, port: 6379}}"
_HOT_PATHS: Final = "storageHotPathPrefixes"
_REDIS_PLUGINS: Final = ("@deepstream/cache-redis", "deepstream.io-cache-redis")


class PluginHead(ConfigStruct, frozen=True, kw_only=True):
    """The entries of a plug-in's section that choose the plug-in."""

    name: str | UnsetType | None = UNSET
    path: str | None = None
    type: str | None = None


class PluginSection(PluginHead, frozen=True, kw_only=True):
    """A plug-in's section of deepstream's configuration, such as the one of the cache."""

    options: Options = field(default_factory=Options)


def load(
    source: str | os.PathLike[str] | Mapping[str, Any], *, environ: Mapping[str, str] | None = None
) -> Config:
    """Return the configuration of a cache.

    ``source`` is the path of a ``.yml``, ``.yaml`` or ``.json`` file (str or PathLike), a mapping,
    a URL or ``host:port``. A file or mapping is either deepstream's whole configuration, of which
    only the cache's section is read, or that section alone. In a file, ``${NAME}`` is replaced by
    the variable of ``environ``, by default the process's environment. A mapping and a URL are
    taken as they are.

    Raises ConfigError, which begins with the place of the mistake.
    """
    opened = open_source(source, environ)
    hot_paths: tuple[str, ...] = ()
    if isinstance(opened, ParsedUrl):
        place, folder = Location(opened.shown), os.getcwd()
        name: Literal["redis", "memory"] = "redis"
        options = read(Options, opened.options, place)
    else:
        path, node = _find_cache(opened)
        entry_place, folder = opened.place._replace(path=path), opened.folder
        place = entry_place.at("options")
        if (head := read_head(PluginHead, opened, node, entry_place)) is not None:
            _name(head, entry_place)
        content = opened.value(node, entry_place)
        section, places = read_section(PluginSection, content, entry_place, _EXAMPLE)
        check_cluster(section.options, places)
        name, options = _name(section, entry_place), section.options
        hot_paths = _hot_paths(opened)
    return Config(
        name=name,
        options=complete(options, place, folder),
        source=place.source,
        hot_path_prefixes=hot_paths,
    )


def _find_cache(tree: Tree) -> tuple[str, object]:
    """Return the path of keys to the cache's section, and the section."""
    sections = sections_of(tree, _EXAMPLE)
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


def _name(section: PluginHead, place: Location) -> Literal["redis", "memory"]:
    """Return the kind of cache: deepstream prefers the path to the name, and either to the type."""
    if section.path is not None:
        if section.path not in _REDIS_PLUGINS:
            raise place.at("path").error(
                f'must be "{_REDIS_PLUGINS[0]}", no other plug-in runs here'
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
