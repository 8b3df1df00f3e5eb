"""The condition ``if_version`` of a write or removal: its values, checks and guard arguments."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, TypeAlias, cast

from ..errors import RecordError, shorten
from . import constants as c


class AnyVersion(Enum):
    """The type of ``ANY``, the default of ``if_version``: no condition."""

    ANY = "ANY"

    def __repr__(self) -> str:
        return "ANY"

    __str__ = __repr__


ANY: Final = AnyVersion.ANY
"""No condition: the default of ``if_version``, where None means that there must be no record."""

IfVersion: TypeAlias = int | AnyVersion | None
"""A condition on one record."""
IfVersions: TypeAlias = Mapping[str, int | None] | AnyVersion
"""A condition on each record of a ``set_bulk``."""
IfVersionsHeld: TypeAlias = Mapping[str, int] | AnyVersion
"""A condition on each record of a ``delete_bulk``."""


def check_one(name: str, if_newer: object) -> None:
    """Raise RecordError for a write that has ``if_newer`` beside its ``if_version``."""
    if if_newer:
        raise RecordError(
            f"record {shorten(name)}: if_newer and if_version are two conditions; give one of them",
            name=name,
        )


def check_many(operation: str, if_newer: object, if_version: object) -> None:
    """Raise RecordError for a bulk whose ``if_version`` can't be a condition on its records."""
    if if_newer:
        raise RecordError(
            f"{operation}: if_newer and if_version are two conditions; give one of them"
        )
    if not isinstance(if_version, Mapping):
        raise RecordError(
            f"{operation} takes if_version as a mapping of each name to its expected version, "
            f"not {shorten(if_version)}"
        )


def expected_of(operation: str, name: str, if_version: IfVersions | IfVersionsHeld) -> int | None:
    """Return the version expected of one record of a bulk; raises RecordError without any."""
    assert not isinstance(if_version, AnyVersion)  # as check_many has said
    try:
        return if_version[name]
    except KeyError:
        raise RecordError(
            f"record {shorten(name)}: if_version has no version for it; {operation} needs one for "
            "each name",
            name=name,
        ) from None


def guard_of(name: str, expected: object) -> bytes:
    """Return the guard of a write that expects a version, or no record if that is None."""
    return c.EXPECTED if expected is None else guard_of_version(name, expected, c.OR_NONE)


def guard_of_removal(name: str, expected: object) -> bytes:
    """Return the guard of a removal, which can only expect a version."""
    return guard_of_version(name, expected, "")


def guard_of_version(name: str, expected: object, other: str) -> bytes:
    """Return the guard that expects a version; ``other`` names the alternatives."""
    is_int = isinstance(expected, int) and not isinstance(expected, bool)
    if is_int and 0 <= (version := cast("int", expected)) <= c.MAX_VERSION:
        return c.EXPECTED + b"%d" % version
    raise RecordError(
        f"record {shorten(name)}: if_version must be an int from 0 to {c.MAX_VERSION}{other}, "
        f"not {shorten(expected)}",
        name=name,
    )


def repeat_of(guard: bytes) -> bytes:
    """Return the guard of a repeat of a write whose first attempt may have been done."""
    if guard == c.GUARDED:
        return c.GUARDED_REPEAT
    return c.EXPECTED_REPEAT + guard[1:]
