"""Read the configuration of a message node: deepstream's section ``clusterNode``, or a URL.

It is read as the cache's is: the same options, units and errors. The server's name is deepstream's
``serverName``, which stands beside the section.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast

from msgspec import UNSET, UnsetType, field
from msgspec.structs import replace

from ..errors import shorten
from . import ioredis, model
from . import url as urls
from .document import Document
from .model import Milliseconds, Options
from .validation import ConfigStruct, Location, is_null, nearest, read, redact_key, text

__all__ = ["MessageConfig", "MessageOptions", "load"]

_logger = logging.getLogger("dscache")

T = TypeVar("T")

_PLUGIN = "@deepstream/clusternode-redis"
_EXAMPLE = "clusterNode: {name: redis, options: {host: localhost, port: 6379}}"
# What deepstream's own file says where each server is to make a name of its own.
_GENERATED = "UUID"
# Options of records, which messages have nothing of.
_OF_RECORDS = {
    "keyPrefix": "a channel is called like its topic, as with deepstream's connector",
    "keyLayout": "messages have no keys",
    "ttl": "messages are not kept",
    "nearCache": "messages are not kept",
    "maxConnections": "a message node has two connections, or one to each node of a cluster",
    "scaleReads": "nothing is read",
}


class MessageOptions(Options, frozen=True, kw_only=True):
    """The options of a message node: those of a cache, and some of its own."""

    overflow: Literal["drop_oldest", "drop_newest", "disconnect"] = "drop_oldest"
    heartbeat: Milliseconds = 1000
    sharded: bool = False


class MessageConfig(ConfigStruct, frozen=True, kw_only=True):
    """A checked configuration: the server's name, the options, and where they were read."""

    server_name: str
    options: MessageOptions = field(default_factory=MessageOptions)
    source: str = "mapping"

    @property
    def address(self) -> str:
        """Return where messages go, for messages to people: never with a password."""
        return self.options.address


class _NodeSection(ConfigStruct, frozen=True, kw_only=True):
    """The section clusterNode of deepstream's configuration."""

    expected: ClassVar[str] = "a mapping such as {name: redis, options: {...}}"

    name: str | UnsetType | None = UNSET
    path: str | None = None
    type: str | None = None
    options: MessageOptions = field(default_factory=MessageOptions)


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    server_name: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> MessageConfig:
    """Return what a file, a mapping, a URL or ``host:port`` states of a message node.

    A file or mapping is deepstream's whole configuration, of which ``clusterNode`` and
    ``serverName`` are read, or such a section alone. ``server_name`` wins over the one that is
    written; without either, a name is made. Raises ConfigError.
    """
    if server_name is not None:
        server_name = _checked(server_name, Location("server_name"))
    if isinstance(source, Mapping):
        place = Location("mapping")
        path, entry, written = _find(cast(object, source), model._mapping_or_none, place)
        stated = server_name or _name_of(written, place)
        return _from_entry(entry, Location("mapping", path), os.getcwd(), stated)
    file = model._path_of(source)
    if file is not None:
        return _from_file(file, os.environ if environ is None else environ, server_name)
    options, shown = urls.parse(str(source), Location("URL"))
    place = Location(shown)
    read_options = read(MessageOptions, options, place)
    return _config(read_options, place, os.getcwd(), server_name or _name_of(None, place))


def _from_file(path: str, environ: Mapping[str, str], server_name: str | None) -> MessageConfig:
    file = Location(os.path.basename(path))
    document = Document(path, environ, file)
    where, node, named = _find(document.root, document.keys, file)
    if server_name is None:
        here = file.at("serverName")
        server_name = _name_of(None if named is None else document.value(named, here), file)
    place = Location(file.source, where)
    return _from_entry(document.value(node, place), place, document.folder, server_name)


def _find(
    root: T, children: Callable[[T], Mapping[str, T] | None], place: Location
) -> tuple[str, T, T | None]:
    """Return the section of a configuration, the path of keys to it, and the server's name."""
    sections = children(root)
    if sections is None:
        raise place.error(f"must be a mapping of sections; write {_EXAMPLE}")
    named = sections.get("serverName")
    if "clusterNode" in sections:
        return "clusterNode", sections["clusterNode"], named
    entry = sections.keys() & {"name", "path", "type", "options"}
    if entry and sections.keys() <= {"name", "path", "type", "options", "serverName"}:
        return "", root, named
    best = nearest("clusterNode", map(str, sections))
    meant = f'; is "{best}" meant to be it?' if best else ""
    there = ", ".join(redact_key(str(name)) for name in sections) or "none"
    raise place.error(f"no section clusterNode, the sections are: {there}{meant}; write {_EXAMPLE}")


def _name_of(written: object, place: Location) -> str:
    """Return the name of a server as it is written, or one that no other server has."""
    if is_null(written):
        return uuid.uuid4().hex
    place = place.at("serverName")
    name = text(written, place)
    return uuid.uuid4().hex if name == _GENERATED else _checked(name, place)


def _checked(name: str, place: Location) -> str:
    if not isinstance(name, str) or not name:
        raise place.error(f"must be a text that is not empty, not {shorten(name)}")
    return text(name, place)


def _from_entry(entry: object, place: Location, folder: str, server_name: str) -> MessageConfig:
    if not isinstance(entry, Mapping):
        raise place.error(f"must be a mapping; write {_EXAMPLE}")
    entry = {name: value for name, value in entry.items() if name != "serverName" or place.path}
    place_of_options = place.at("options")
    options = entry.get("options")
    of_url: dict[str, object] = {}
    if isinstance(options, Mapping):
        of_url = model._stated_by_url(options, place_of_options.at("url"))
        entry = {**entry, "options": model._with_url(options, of_url)}
    read_entry = read(_NodeSection, entry, place)
    _check_plugin(read_entry, place)
    stated = _without_records(read_entry.options)
    if isinstance(options, Mapping):
        places = {name: place_of_options.at(name) for name in options if not is_null(options[name])}
        for name, why in _OF_RECORDS.items():
            if name in places:
                _logger.info("%s has no effect: %s", places[name], why)
        places.update(dict.fromkeys(of_url, place_of_options.at("url")))
        ioredis.check_cluster(stated, places)
    return _config(stated, place_of_options, folder, server_name)


def _without_records(options: MessageOptions) -> MessageOptions:
    """Return the options as if they said nothing of records."""
    return replace(
        options,
        key_prefix="",
        key_layout="auto",
        ttl=None,
        near_cache=None,
        scale_reads="master",
    )


def _check_plugin(entry: _NodeSection, place: Location) -> None:
    # deepstream prefers the path to the name, and either to the type.
    if entry.path is not None:
        if entry.path != _PLUGIN:
            raise place.at("path").error(f'must be "{_PLUGIN}", no other plug-in runs here')
        return
    name = entry.name if isinstance(entry.name, str) else ""
    if name.lower() != "redis":
        shown = "missing" if entry.name is UNSET else shorten(entry.name)
        raise place.at("name").error(f'must be "redis", not {shown}; write {_EXAMPLE}')
    if entry.type not in (None, "default"):
        raise place.at("type").error('must be "default"; name: redis chooses what is used')


def _config(
    options: MessageOptions, place: Location, folder: str, server_name: str
) -> MessageConfig:
    # What is checked there is the same of a cache: the files of TLS, and what excludes what.
    checked = model._config("redis", options, place, folder).options
    assert isinstance(checked, MessageOptions)
    if checked.sharded and not checked.nodes:
        raise place.at("sharded").error("is for a cluster; leave it out, or give its nodes")
    if checked.sentinels and checked.role == "slave":
        raise place.at("role").error(
            "must be master: what is published at a replica gets to those alone who listen there"
        )
    return MessageConfig(server_name=server_name, options=checked, source=place.source)
