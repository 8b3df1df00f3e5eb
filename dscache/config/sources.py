"""Sources of a configuration: a file, a mapping, a URL or ``host:port``, and the section in it.

A file and a mapping are both trees of sections. The caller picks its section from the tree, and
only that section is evaluated: an unset variable of another section doesn't matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Final, TypeVar, cast

from ..errors import ConfigError
from . import url
from .address import join_address
from .document import SUFFIXES, Document, Tree
from .validation import (
    EMPTY,
    ConfigStruct,
    Location,
    is_emptied,
    is_null,
    nearest,
    read,
    redact_key,
    text,
)

Source = str | os.PathLike[str] | Mapping[str, Any]
NO_SOURCE: Final[Mapping[str, Any]] = {}
"""The source of a cache whose server is named by keyword."""
ENTRY_KEYS = frozenset(("name", "path", "type", "options"))
"""Keys of a deepstream plug-in's section."""
_HEAD_KEYS = ("name", "path", "type")
_UNSET: Final = EMPTY.removeprefix("is empty")


SectionT = TypeVar("SectionT", bound=ConfigStruct)


def open_source(source: Source, environ: Mapping[str, str] | None) -> Tree | url.ParsedUrl:
    """Return the tree of sections in a file or mapping, or the options that a URL states.

    ``environ`` replaces the process's environment in a file. Raises ConfigError.
    """
    if isinstance(source, Mapping):
        return Tree(source, Location("mapping"), os.getcwd())
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"the configuration must be a path, a mapping or a URL, not {type(source).__name__}"
            f"{_UNSET if source is None else ''}"
        )
    if isinstance(source, str) and is_url(source):
        return url.parse(source, Location("URL"))
    path = os.fsdecode(source)
    if not path.strip():
        raise ConfigError(f"the configuration is an empty text{_UNSET}")
    if not path.lower().endswith(SUFFIXES):
        # A mistyped URL may hold a password before the @.
        raise ConfigError(
            f"{path.rpartition('@')[2]}: a configuration is a file ending in "
            f"{', '.join(SUFFIXES)}, a mapping, host:port, or a URL ({url.SCHEMES})"
            f"{_meant_by(path)}"
        )
    place = Location(os.path.basename(path))
    return Document(path, os.environ if environ is None else environ, place)


def _meant_by(word: str) -> str:
    """Return the remedy for a word that is no path, if it is clear what it means."""
    bare = word.strip()
    if bare == "memory":
        return '; for a cache in memory write {"name": "memory"}'
    if bare != word and (is_url(bare) or bare.lower().endswith(SUFFIXES)):
        return "; leave out the space around it"
    if re.fullmatch(r"[A-Za-z0-9.-]+:", bare):
        return f"; the port is missing, write {bare}6379"
    if "@" in bare:
        return "; begin a URL with redis://"
    with suppress(ValueError):
        return f"; for a server at this address write {join_address(str(ip_address(bare)), 6379)}"
    is_name = re.fullmatch(r"[A-Za-z0-9-]+", bare)
    return f"; for a server of this name write {bare}:6379" if is_name else ""


def is_url(source: str) -> bool:
    """Whether a source is a URL, ``host:port`` or ``localhost``, and no path of a file."""
    is_address = url.HOST_AND_PORT.fullmatch(source) or source == url.LOCALHOST
    return "://" in source or bool(is_address)


def sections_of(tree: Tree, example: str) -> Mapping[str, object]:
    """Return the sections of a configuration. Raises ConfigError if it is no mapping."""
    sections = tree.keys(tree.root)
    if sections is None and tree.is_empty(tree.root):
        raise tree.place.error(f"is empty, or has only comments; write {example}")
    if sections is None:
        raise tree.place.error(f"must be a mapping of sections; write {example}")
    return sections


def missing_section(
    name: str, sections: Mapping[str, object], shown: Mapping[str, object], tree: Tree, example: str
) -> ConfigError:
    """Return the error for a configuration without the section ``name``.

    It names the sections in ``shown``, and asks to rename the one of ``sections`` that is most like
    ``name``.
    """
    best = nearest(name, map(str, sections))
    remedy = f'; rename "{best}" to {name}, or' if best else ";"
    present = ", ".join(redact_key(str(key)) for key in shown) or "none"
    if "services" in sections:
        remedy = (
            "; this is a file of docker-compose, so give the configuration that its container of "
            "deepstream has;"
        )
    return tree.place.error(
        f"no section {name}, the sections are: {present}{remedy} write {example}"
    )


def plugins_of(tree: Tree, sections: Mapping[str, object]) -> Mapping[str, object]:
    """Return the entries of the section ``plugins``.

    deepstream 1 to 3 had all connectors there; since 4 it has plug-ins of the user alone.
    """
    if "plugins" not in sections:
        return {}
    return tree.keys(sections["plugins"], tree.place.at("plugins")) or {}


def read_head(struct: type[SectionT], tree: Tree, node: object, place: Location) -> SectionT | None:
    """Return a plug-in's section without its options, or None if it is no mapping.

    The options of another plug-in are thus never evaluated or judged. Raises ConfigError.
    """
    entries = tree.keys(node, place)
    if entries is None:
        return None
    head = {key: tree.value(entries[key], place.at(key)) for key in _HEAD_KEYS if key in entries}
    return read(struct, head, place)


def read_section(
    struct: type[SectionT], entry: object, place: Location, example: str
) -> tuple[SectionT, dict[str, Location]]:
    """Return a plug-in's section, with the options of its ``url``, and the place of each option.

    Raises ConfigError.
    """
    if not isinstance(entry, Mapping):
        raise place.error(f"must be a mapping; write {example}")
    options = entry.get("options")
    inside = place.at("options")
    if isinstance(options, str) and ("://" in options or url.HOST_AND_PORT.fullmatch(options)):
        raise inside.error(
            "must be a mapping of options, not text; write a URL as url: below options, as in "
            "options: {url: ${REDIS_URL}}"
        )
    if not isinstance(options, Mapping):
        return read(struct, entry, place), {}
    merged, places = with_url(options, inside)
    return read(struct, {**entry, "options": merged}, place), places


def with_url(
    options: Mapping[str, object], place: Location
) -> tuple[dict[str, object], dict[str, Location]]:
    """Return options with the ones that their ``url`` states, and the place of each.

    Raises ConfigError.
    """
    here = place.at("url")
    stated: dict[str, object] = {}
    written = options.get("url")
    if written == "" or is_emptied(written):
        raise here.error(EMPTY)
    if written is not None:
        stated = url.parse(text(written, here, secret=True), here).options
    places = {
        name: place.at(name)
        for name, value in options.items()
        if isinstance(name, str) and not is_null(value)
    }
    return _overridden(options, stated), places | dict.fromkeys(stated, here)


def _overridden(options: Mapping[str, object], stated: dict[str, object]) -> dict[str, object]:
    """Return the options, overridden by the ones that their ``url`` states."""
    tls = options.get("tls")
    if "tls" in stated and isinstance(tls, Mapping):
        stated = {**stated, "tls": {**tls, **cast(dict[str, object], stated["tls"])}}
    # The server of the URL is not the one behind the socket.
    without = {"path"} if "host" in stated else set()
    return {**{name: options[name] for name in options if name not in without}, **stated}
