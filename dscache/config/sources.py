"""Sources of a configuration: a file, a mapping, a URL or ``host:port``, and the section in it.

A file and a mapping are both trees of sections. The caller picks its section from the tree, and
only that section is evaluated: an unset variable of another section doesn't matter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

from ..errors import ConfigError
from . import url
from .address import HOST_AND_PORT
from .document import SUFFIXES, Document
from .validation import ConfigStruct, Location, is_null, nearest, read, redact_key, text

Source = str | os.PathLike[str] | Mapping[str, Any]
ENTRY_KEYS = frozenset(("name", "path", "type", "options"))
"""Keys of a deepstream plug-in's section."""


SectionT = TypeVar("SectionT", bound=ConfigStruct)


class Tree(Protocol):
    """A configuration of sections, as a file or a mapping holds it."""

    place: Location
    folder: str
    """Start of relative paths."""

    @property
    def root(self) -> object:
        """The outermost node."""

    def keys(self, node: object) -> Mapping[str, object] | None:
        """Return the child nodes of a mapping by their names, or None for any other node."""

    def is_empty(self, node: object) -> bool:
        """Return whether a node is a name without a value."""

    def value(self, node: object, place: Location) -> object:
        """Return the evaluated content of a node. Raises ConfigError."""


class MappingTree:
    """A mapping that a program passed; its values are taken as they are."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.place = Location("mapping")
        self.folder = os.getcwd()
        self.root: object = content

    def keys(self, node: object) -> Mapping[str, object] | None:
        return node if isinstance(node, Mapping) else None

    def is_empty(self, node: object) -> bool:
        return is_null(node)

    def value(self, node: object, place: Location) -> object:
        return node


def open_source(source: Source, environ: Mapping[str, str] | None) -> Tree | url.ParsedUrl:
    """Return the tree of sections in a file or mapping, or the options that a URL states.

    ``environ`` replaces the process's environment in a file. Raises ConfigError.
    """
    if isinstance(source, Mapping):
        return MappingTree(source)
    path = _path_of(source)
    if path is None:
        return url.parse(str(source), Location("URL"))
    place = Location(os.path.basename(path))
    return Document(path, os.environ if environ is None else environ, place)


def _path_of(source: object) -> str | None:
    """Return the path of a configuration file, or None for a URL or ``host:port``.

    Raises ConfigError for any other source.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"the configuration must be a path, a mapping or a URL, not {type(source).__name__}"
        )
    if isinstance(source, str) and ("://" in source or HOST_AND_PORT.fullmatch(source)):
        return None
    path = os.fsdecode(source)
    if not path.lower().endswith(SUFFIXES):
        # A mistyped URL may hold a password before the @.
        raise ConfigError(
            f"{path.rpartition('@')[2]}: a configuration is a file ending in "
            f"{', '.join(SUFFIXES)}, a mapping, host:port, or a URL ({url.SCHEMES})"
        )
    return path


def sections_of(tree: Tree, example: str) -> Mapping[str, object]:
    """Return the sections of a configuration. Raises ConfigError if it is no mapping."""
    sections = tree.keys(tree.root)
    if sections is None:
        raise tree.place.error(f"must be a mapping of sections; write {example}")
    return sections


def missing_section(
    name: str, sections: Mapping[str, object], shown: Mapping[str, object], tree: Tree, example: str
) -> ConfigError:
    """Return the error for a configuration without the section ``name``.

    It names the sections in ``shown``, and suggests the one of ``sections`` most like ``name``.
    """
    best = nearest(name, map(str, sections))
    suggestion = f'; did you mean "{best}"?' if best else ""
    present = ", ".join(redact_key(str(key)) for key in shown) or "none"
    return tree.place.error(
        f"no section {name}, the sections are: {present}{suggestion}; write {example}"
    )


def read_section(
    struct: type[SectionT], entry: object, place: Location, example: str
) -> tuple[SectionT, dict[str, Location]]:
    """Return a plug-in's section, with the options of its ``url``, and the place of each option.

    Raises ConfigError.
    """
    if not isinstance(entry, Mapping):
        raise place.error(f"must be a mapping; write {example}")
    options = entry.get("options")
    if not isinstance(options, Mapping):
        return read(struct, entry, place), {}
    inside = place.at("options")
    stated = _stated_by_url(options, inside.at("url"))
    section = read(struct, {**entry, "options": _with_url(options, stated)}, place)
    places = {name: inside.at(name) for name in options if not is_null(options[name])}
    places.update(dict.fromkeys(stated, inside.at("url")))
    return section, places


def _stated_by_url(options: Mapping[str, object], place: Location) -> dict[str, object]:
    """Return the options that the option ``url`` states."""
    written = options.get("url")
    if written is None or written == "":
        return {}
    return url.parse(text(written, place, secret=True), place).options


def _with_url(options: Mapping[str, object], stated: dict[str, object]) -> Mapping[str, object]:
    """Return the options, overridden by the ones that their ``url`` states."""
    tls = options.get("tls")
    if "tls" in stated and isinstance(tls, Mapping):
        stated = {**stated, "tls": {**tls, **cast(dict[str, object], stated["tls"])}}
    # The server of the URL is not the one behind the socket.
    without = {"path"} if "host" in stated else set()
    return {**{name: options[name] for name in options if name not in without}, **stated}
