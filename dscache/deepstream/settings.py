"""Settings of deepstream's servers that a peer must share, read from their configuration file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from ..config.document import Tree
from ..config.sources import Source, open_source
from ..config.url import ParsedUrl
from ..config.validation import Location, Scalar, is_null

# Largest number of milliseconds that a timer of Node takes.
_MAX_MS: Final = 2**31 - 1


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, and the prefixes of names whose records servers keep at version 0."""

    hot_path_prefixes: tuple[str, ...] = ()
    ack_timeout: float = 1.0
    response_timeout: float = 10.0
    keep_alive: float = 5.0
    inactive_timeout: float = 6.0

    def is_hot(self, name: str) -> bool:
        """Return whether servers keep the record at version 0."""
        return name.startswith(self.hot_path_prefixes) if self.hot_path_prefixes else False


def load(source: Source, environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings in a file or mapping, or deepstream's defaults. Raises ConfigError."""
    opened = open_source(source, os.environ if environ is None else environ)
    if isinstance(opened, ParsedUrl):
        return Settings()
    values: dict[str, Any] = {}
    for section, option, field in (
        ("rpc", "ackTimeout", "ack_timeout"),
        ("rpc", "responseTimeout", "response_timeout"),
        ("clusterRegistry", "keepAliveInterval", "keep_alive"),
        ("clusterRegistry", "nodeInactiveTimeout", "inactive_timeout"),
    ):
        options, place = _section(opened, section)
        if section == "clusterRegistry":
            place = place.at("options")
            options = options.get("options") or {}
        if isinstance(options, Mapping) and not is_null(options.get(option)):
            values[field] = _seconds(options[option], place.at(option))
    options, place = _section(opened, "record")
    if not is_null(prefixes := options.get("storageHotPathPrefixes")):
        values["hot_path_prefixes"] = _prefixes(prefixes, place.at("storageHotPathPrefixes"))
    return Settings(**values)


def _section(tree: Tree, name: str) -> tuple[Mapping[str, Any], Location]:
    """Return the content of a section and its place; empty if there is none."""
    place = tree.place.at(name)
    sections = tree.keys(tree.root) or {}
    if name not in sections:
        return {}, place
    content = tree.value(sections[name], place)
    if is_null(content):
        return {}, place
    if not isinstance(content, Mapping):
        raise place.error("must be a mapping of options")
    return content, place


def _seconds(written: object, place: Location) -> float:
    value = written.value if isinstance(written, Scalar) else written
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= _MAX_MS:  # type: ignore[arg-type, operator] # a number
        raise place.error("must be a number of milliseconds above 0")
    return value / 1000  # type: ignore[operator] # a number


def _prefixes(written: object, place: Location) -> tuple[str, ...]:
    texts = [one.text if isinstance(one, Scalar) else one for one in _listed(written)]
    if not texts and not isinstance(written, (list, tuple)):
        raise place.error("must be a list of prefixes of names")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise place.item(index).error("must be a text, the beginning of names")
    return tuple(texts)


def _listed(written: object) -> list[Any]:
    return list(written) if isinstance(written, (list, tuple)) else []
