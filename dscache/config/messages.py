"""The configuration of a message node: deepstream's section ``clusterNode``, or a URL.

Options, units and errors are the same as for a cache. The server's name is deepstream's
``serverName``, beside the section.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec import UNSET, field
from msgspec.structs import replace

from ..errors import shorten
from .document import Tree
from .loader import ARGUMENTS, PluginHead, PluginSection, has_options_alone, read_arguments
from .model import Config, Milliseconds, Options
from .rules import check_cluster, complete
from .sources import (
    ENTRY_KEYS,
    missing_section,
    open_source,
    plugins_of,
    read_head,
    read_section,
    sections_of,
    with_url,
)
from .url import ParsedUrl
from .validation import Location, is_null, read, text

_logger = logging.getLogger("dscache")

_PLUGIN: Final = "@deepstream/clusternode-redis"
_EXAMPLE: Final = "clusterNode: {name: redis, options: {host: localhost, port: 6379}}"
# deepstream's own file has this where each server is to generate a name of its own.
_GENERATED: Final = "UUID"

RECORD_OPTIONS: Final = {
    "keyPrefix": "the name of a channel is its topic, as with deepstream's connector",
    "keyLayout": "messages have no keys",
    "proxied": "messages have no keys",
    "ttl": "messages are not kept",
    "nearCache": "messages are not kept",
    "maxConnections": "a message node has two connections, or one to each node of a cluster",
    "scaleReads": "nothing is read",
    "zone": "nothing is read",
}
"""Options of records, and the reasons for which they have no effect on messages."""


class MessageOptions(Options, frozen=True, kw_only=True):
    """The options of a cache, and the ones that only a message node has.

    ``heartbeat`` is in milliseconds.
    """

    overflow: Literal["drop_oldest", "drop_newest", "disconnect"] = "drop_oldest"
    heartbeat: Milliseconds = 1000
    sharded: bool = False


class MessageConfig(Config, frozen=True, kw_only=True):
    """A checked configuration: the server's name, the options, and their source."""

    server_name: str
    options: MessageOptions = field(default_factory=MessageOptions)


class _NodeSection(PluginSection, frozen=True, kw_only=True):
    """The section clusterNode of deepstream's configuration."""

    options: MessageOptions = field(default_factory=MessageOptions)


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    server_name: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> MessageConfig:
    """Return the configuration of a message node.

    ``source`` is the path of a file, a mapping, a URL or ``host:port``. A file or mapping is
    either deepstream's whole configuration, of which ``clusterNode`` and ``serverName`` are read,
    or the section ``clusterNode`` alone; a mapping may also have just the options. ``server_name``
    overrides the written one; without either, a random name is generated. ``environ`` and
    ``options`` are as for a cache's configuration.

    Raises ConfigError, which begins with the place of the mistake.
    """
    server_name, options = with_server_name(server_name, options or {})
    given, fields = read_arguments(MessageOptions, options)
    arguments = {name: ARGUMENTS.at(name) for name in given}
    if server_name is not None:
        server_name = _checked_name(server_name, Location("server_name"))
    opened = open_source(source, environ)
    if isinstance(opened, ParsedUrl):
        place, folder = Location(opened.shown), os.getcwd()
        chosen = replace(read(MessageOptions, opened.options, place), **fields)
        chosen = _without_records(chosen, arguments)
        name = server_name or _server_name(None, place)
    elif isinstance(source, Mapping) and has_options_alone(MessageOptions, source):
        place, folder = opened.place, opened.folder
        name = server_name or _server_name(source.get("serverName"), place.at("serverName"))
        stated = {key: value for key, value in source.items() if key != "serverName"}
        merged, places = with_url(stated, place)
        chosen = replace(read(MessageOptions, merged, place), **fields)
        chosen = _without_records(chosen, places | arguments)
    else:
        path, node, name_node = _find_section(opened)
        named = opened.place.at("serverName")
        if server_name is None and name_node is not None:
            name_node = opened.value(name_node, named)
        name = server_name or _server_name(name_node, named)
        entry_place, folder = opened.place._replace(path=path), opened.folder
        place = entry_place.at("options")
        if (head := read_head(PluginHead, opened, node, entry_place)) is not None:
            _check_plugin(head, entry_place)
        content = opened.value(node, entry_place)
        chosen = _read_options(content, entry_place, fields, arguments)
    chosen = complete(chosen, place, folder)
    if chosen.sharded and not chosen.nodes:
        raise arguments.get("sharded", place.at("sharded")).error(
            "is for a cluster; leave it out, or give its nodes"
        )
    if chosen.sentinels and chosen.role == "slave":
        raise arguments.get("role", place.at("role")).error(
            "must be master: a message published at a replica reaches only that replica's "
            "subscribers"
        )
    return MessageConfig(server_name=name, options=chosen, source=place.source)


def with_server_name(
    server_name: str | None, options: Mapping[str, Any]
) -> tuple[str | None, Mapping[str, Any]]:
    """Return the server's name, which may be given as ``serverName``, and the other options.

    Raises ConfigError if it is given twice.
    """
    if options.get("serverName") is None:
        return server_name, options
    if server_name is not None:
        raise ARGUMENTS.at("serverName").error("given twice, in camelCase and in snake_case")
    others = {name: value for name, value in options.items() if name != "serverName"}
    return options["serverName"], others


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options by keyword that a cache takes, and the ones that a node takes."""
    fields = MessageOptions.__struct_fields__, MessageOptions.__struct_encode_fields__
    names = dict(zip(*fields, strict=True))
    for_messages = {*fields[1]} - {*Options.__struct_encode_fields__}
    of_cache, of_node = {}, {}
    for name, value in options.items():
        encoded = names.get(name, name)
        if encoded not in for_messages:
            of_cache[name] = value
        if encoded not in RECORD_OPTIONS:
            of_node[name] = value
    return of_cache, of_node


def load_beside(source: str | os.PathLike[str]) -> tuple[MessageConfig, bool] | None:
    """Return the message node of a file that a cache is configured by, if it has ``clusterNode``.

    The second item is whether the file states ``serverName``. Raises ConfigError as ``load`` does.
    """
    opened = open_source(source, None)
    if isinstance(opened, ParsedUrl):
        return None
    sections = sections_of(opened, _EXAMPLE)
    if "clusterNode" not in sections:
        return None
    return load(source), sections.get("serverName") is not None


def _find_section(tree: Tree) -> tuple[str, object, object]:
    """Return the path of keys to the section, the section, and the server's name or None."""
    sections = sections_of(tree, _EXAMPLE)
    name = sections.get("serverName")
    if "clusterNode" in sections:
        return "clusterNode", sections["clusterNode"], name
    if sections.keys() & ENTRY_KEYS and sections.keys() <= {*ENTRY_KEYS, "serverName"}:
        return "", tree.root, name
    if "message" in plugins_of(tree, sections):
        place = tree.place.at("plugins").at("message")
        raise place.error(
            "is the message connector of deepstream 1 to 3, whose protocol is another one; with "
            f"deepstream 4 or newer write {_EXAMPLE}"
        )
    raise missing_section("clusterNode", sections, sections, tree, _EXAMPLE)


def _server_name(written: object, place: Location) -> str:
    """Return the written name of a server, or a random one."""
    name = _GENERATED if is_null(written) else text(written, place)
    return uuid.uuid4().hex if name == _GENERATED else _checked_name(name, place)


def _checked_name(name: str, place: Location) -> str:
    if not isinstance(name, str) or not name:
        raise place.error(f"must be a text that is not empty, not {shorten(name)}")
    return text(name, place)


def _read_options(
    entry: object, place: Location, fields: Mapping[str, Any], arguments: dict[str, Location]
) -> MessageOptions:
    if isinstance(entry, Mapping) and not place.path:
        entry = {name: value for name, value in entry.items() if name != "serverName"}
    section, places = read_section(_NodeSection, entry, place, _EXAMPLE)
    _check_plugin(section, place)
    return _without_records(replace(section.options, **fields), places | arguments)


def _without_records(chosen: MessageOptions, places: dict[str, Location]) -> MessageOptions:
    """Return options that concern messages alone, checked; the others get their defaults."""
    options = replace(
        chosen,
        key_prefix="",
        key_layout="auto",
        proxied=None,
        ttl=None,
        near_cache=None,
        scale_reads="master",
        zone=None,
    )
    for name, why in RECORD_OPTIONS.items():
        if name in places:
            _logger.info("%s has no effect: %s", places[name], why)
    check_cluster(options, places)
    return options


def _check_plugin(section: PluginHead, place: Location) -> None:
    """Raise ConfigError for any plug-in but Redis; deepstream prefers the path to the name."""
    if section.path is not None:
        if section.path != _PLUGIN:
            raise place.at("path").error(f'must be "{_PLUGIN}", no other plug-in runs here')
        return
    name = section.name if isinstance(section.name, str) else ""
    if name.lower() != "redis":
        shown = "missing" if section.name is UNSET else shorten(section.name)
        raise place.at("name").error(f'must be "redis", not {shown}; write {_EXAMPLE}')
    if section.type not in (None, "default"):
        raise place.at("type").error('must be "default"; name: redis chooses the plug-in')
