"""JSON of values that come back as they were, for the caches of other libraries on records."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import msgspec

from .._interruptions import raise_interruption
from ..errors import shorten

_DEEPEST: Final = 500
# Each type, and a method of it that makes a plain value of an instance of a subclass.
_SCALARS: Final[tuple[tuple[type, Callable[[Any], Any]], ...]] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def encode(value: Any, remedy: str) -> Any:
    """Return the JSON text of a value, or the value made of plain types for the cache to encode.

    A tuple becomes a list, and an instance of a subclass of ``str`` a plain one. Raises TypeError
    with the place of a part that would come back as something else.
    """
    try:
        text = msgspec.json.encode(value)
        # Compared in C; the parts are looked at only if something differs.
        if msgspec.json.decode(text) == value:
            return msgspec.Raw(text)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise_interruption(error)
        text = b""
    plain = _plain(value, "the value", 0, remedy)
    # msgspec refuses subclasses of str, int and float, and text that UTF-8 can't encode.
    return msgspec.Raw(text) if text else plain


def _plain(value: Any, place: str, depth: int, remedy: str) -> Any:
    """Return a value made of Python's own types; raises TypeError for what JSON would alter."""
    if depth > _DEEPEST:
        raise TypeError(f"the value is nested more than {_DEEPEST} deep; {remedy}")
    if value is None or isinstance(value, bool):
        return value
    for type_, plain in _SCALARS:
        if isinstance(value, type_):
            if isinstance(value, float) and not math.isfinite(value):
                raise TypeError(f"{place} is {value}, and JSON has no such number; {remedy}")
            return plain(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        parts = []  # no comprehension, which needs a frame of its own for each level
        for index, one in enumerate(value):
            parts.append(_plain(one, f"{place}[{index}]", depth + 1, remedy))
        return parts
    if isinstance(value, dict):
        members = {}
        for key, one in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{place} has the key {shorten(key)}, and keys in JSON are strings; {remedy}"
                )
            members[str.__str__(key)] = _plain(one, f"{place}[{shorten(key)}]", depth + 1, remedy)
        return members
    name = type(value).__name__
    raise TypeError(f"{place} is of the type {name}, which isn't JSON; {remedy}")
