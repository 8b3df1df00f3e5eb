"""Patterns of names: ``*`` stands for any text, ``?`` for one character."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from ..core.failures import check_prefix
from ..errors import UsageError, shorten

_WILDCARD: Final = re.compile(r"[*?]")


def check_pattern(operation: str, pattern: object) -> str:
    """Return a pattern, or raise UsageError."""
    if not isinstance(pattern, str) or not pattern:
        raise UsageError(
            f"{operation}: a pattern must be a text that is not empty, not {shorten(pattern)}"
        )
    check_prefix(operation, prefix_of(pattern))
    return pattern


def prefix_of(pattern: str) -> str:
    """Return the text that all matching names begin with."""
    found = _WILDCARD.search(pattern)
    return pattern if found is None else pattern[: found.start()]


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that tells whether a name matches."""
    if (prefix := prefix_of(pattern)) == pattern:
        return pattern.__eq__
    if pattern == f"{prefix}*":
        return lambda name: name.startswith(prefix)
    parts = {"*": ".*", "?": "."}
    text = "".join(parts.get(one, re.escape(one)) for one in re.sub(r"\*+", "*", pattern))
    compiled = re.compile(text, re.DOTALL)
    return lambda name: compiled.fullmatch(name) is not None
