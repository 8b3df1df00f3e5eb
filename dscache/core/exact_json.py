"""JSON of values that come back as they were, for the caches of other libraries on records."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from .._interruptions import raise_interruption
from ..errors import shorten

_DEEPEST: Final = 500


def encode(value: Any, remedy: str) -> Any:
    """Return the JSON text of a value. A tuple becomes a list.

    Raises TypeError with the place of a part that would come back as something else.
    """
    try:
        text = msgspec.json.encode(value)
        # Compared in C; the parts are looked at only if something differs.
        if msgspec.json.decode(text) == value:
            return msgspec.Raw(text)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise_interruption(error)
        text = b""
    _check(value, "the value", 0, remedy)
    # The cache refuses the rest, such as text that UTF-8 can't encode.
    return msgspec.Raw(text) if text else value


def _check(value: Any, place: str, depth: int, remedy: str) -> None:
    if depth > _DEEPEST:
        raise TypeError(f"the value is nested more than {_DEEPEST} deep; {remedy}")
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{place} is {value}, and JSON has no such number; {remedy}")
        return
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        for index, one in enumerate(value):
            _check(one, f"{place}[{index}]", depth + 1, remedy)
    elif isinstance(value, dict):
        for key, one in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{place} has the key {shorten(key)}, and keys in JSON are strings; {remedy}"
                )
            _check(one, f"{place}[{shorten(key)}]", depth + 1, remedy)
    else:
        name = type(value).__name__
        raise TypeError(f"{place} is of the type {name}, which isn't JSON; {remedy}")
