"""The changes of ``patch``: JSON merge patch (RFC 7396), and one value by deepstream's path."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, TypeAlias

from ..errors import RecordError, shorten
from .changes import plain_copy
from .markers import OMITTED

Steps: TypeAlias = list[str | int]
"""A path: the names of members, and the indexes of elements."""

# deepstream's client fills a new list up to an index with null, however many that takes.
MAX_FILL: Final = 1_000_000

# The characters that JavaScript trims.
_SPACE: Final = (
    "\t\n\v\f\r \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_BRACKET: Final = re.compile(r"[\[\]]")
# JavaScript's integers are exact up to 16 digits.
_INDEX: Final = re.compile(r"[-+]?[0-9]{1,15}")
_ELEMENT: Final = re.compile(r"0|[1-9][0-9]{0,14}")


def patch_of(name: str, merge: object, path: str | None, value: object) -> Callable[[Any], Any]:
    """Return the change of a patch; raises RecordError for arguments that say none."""
    if path is None:
        if merge is OMITTED or value is not OMITTED:
            raise _bad(name, "patch takes either a merge patch, or a path and its value")
        changes = plain_copy(name, merge)
        return lambda data: merged(data, changes)
    if merge is not OMITTED:
        raise _bad(name, "a merge patch and a path are two changes; give one of them")
    steps = parse_path(name, path)
    content = value if value is OMITTED else plain_copy(name, value)
    return lambda data: with_value(name, data, path, steps, content)


def merged(data: Any, changes: Any) -> Any:
    """Return the data changed by a merge patch. Alters ``data``, and not ``changes``."""
    if not isinstance(changes, dict):
        return changes
    root: dict[str, Any] = data if isinstance(data, dict) else {}
    # A stack and no recursion: JSON may be nested however deep.
    pairs = [(root, changes)]
    while pairs:
        members, patch = pairs.pop()
        for key, value in patch.items():
            if value is None:
                members.pop(key, None)
            elif isinstance(value, dict):
                inner = members.get(key)
                if not isinstance(inner, dict):
                    inner = members[key] = {}
                pairs.append((inner, value))
            else:
                members[key] = value
    return root


def parse_path(name: str, path: object) -> Steps:
    """Return the steps of a path such as ``a.b[0]``; raises RecordError for a bad one."""
    if not isinstance(path, str):
        raise _bad(name, f"a path must be a str, not {shorten(path)}")
    steps: Steps = []
    for part in path.split("."):
        part = part.strip(_SPACE)
        if not part:
            continue
        member, *indexes = _BRACKET.split(part)
        steps.append(member)
        for text in indexes:
            if not text:
                continue
            digits = text.strip(_SPACE)
            if not _INDEX.fullmatch(digits):
                raise _bad(name, f"path {shorten(path)}: {shorten(text)} isn't an index of a list")
            steps.append(int(digits))
    if not steps:
        raise _bad(name, f"path {shorten(path)} names nothing; such as 'a.b[0]' does")
    return steps


def with_value(name: str, data: Any, path: str, steps: Steps, value: object) -> Any:
    """Return the data with the value at a path, or without it if the value is OMITTED.

    Alters ``data``. Objects and lists that the path needs are created, also in place of a value
    that is neither. Raises RecordError if a list has no place for the value. The client ignores
    such a value, but a caller would take it for written.
    """
    if not isinstance(data, dict | list):
        raise _bad(name, f"path {shorten(path)}: the data is {shorten(data)}, which has no members")
    node = data
    for step, following in pairwise(steps):
        inner = _get(name, path, node, step)
        if not isinstance(inner, dict | list):
            inner = {}
            if isinstance(following, int):
                inner = []
                # As the client does; without a value there will be no element at the index.
                _extend(name, path, inner, _index(name, path, following))
            _put(name, path, node, step, inner)
        node = inner
    if value is OMITTED:
        _remove(node, steps[-1])
    else:
        _put(name, path, node, steps[-1], value)
    return data


def _get(name: str, path: str, node: dict[str, Any] | list[Any], step: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(str(step))
    index = _index(name, path, step)
    return node[index] if index < len(node) else None


def _put(
    name: str, path: str, node: dict[str, Any] | list[Any], step: str | int, value: object
) -> None:
    if isinstance(node, dict):
        node[str(step)] = value
        return
    index = _index(name, path, step)
    _extend(name, path, node, index + 1)
    node[index] = value


def _extend(name: str, path: str, elements: list[Any], length: int) -> None:
    """Make a list that long, with null for each element that it lacks."""
    missing = length - len(elements)
    if missing > MAX_FILL:
        raise _bad(
            name,
            f"path {shorten(path)}: it would add {missing} elements to a list of {len(elements)}; "
            f"at most {MAX_FILL} are added",
        )
    elements.extend([None] * missing)


def _remove(node: dict[str, Any] | list[Any], step: str | int) -> None:
    if isinstance(node, dict):
        node.pop(str(step), None)
    elif (index := _index_or_none(step)) is not None and index < len(node):
        # The others keep their indexes, as in JavaScript.
        node[index] = None


def _index(name: str, path: str, step: str | int) -> int:
    """Return the index of an element; raises RecordError for a step that a list can't have."""
    index = _index_or_none(step)
    if index is None:
        raise _bad(
            name,
            f"path {shorten(path)}: a list has no element {shorten(step)}; indexes begin with 0",
        )
    return index


def _index_or_none(step: str | int) -> int | None:
    if isinstance(step, int):
        return step if step >= 0 else None
    return int(step) if _ELEMENT.fullmatch(step) else None


def _bad(name: str, text: str) -> RecordError:
    return RecordError(f"record {shorten(name)}: {text}", name=name)
