"""Values that stand for something else than data: ``KEEP``, ``DELETE``, an omitted argument."""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from typing import Final, Literal, TypeAlias


class Outcome(Enum):
    """The type of ``KEEP`` and ``DELETE``.

    A change returns ``dscache.KEEP`` to leave the record as it is, and ``dscache.DELETE`` to remove
    it. As the ``ttl`` of a write, ``dscache.KEEP`` keeps what is left of the record's lifetime.
    """

    KEEP = "KEEP"
    DELETE = "DELETE"

    def __repr__(self) -> str:
        return f"dscache.{self.name}"


class Omitted(Enum):
    """The type of an argument that was not given, where None is a value."""

    OMITTED = "OMITTED"

    def __repr__(self) -> str:
        return "..."

    __str__ = __repr__


KEEP: Final = Outcome.KEEP
"""Leaves a record as it is, if a change returns it; keeps its lifetime, as the ttl of a write."""
DELETE: Final = Outcome.DELETE
"""A change returns it to remove the record."""
OMITTED: Final = Omitted.OMITTED

Ttl: TypeAlias = int | timedelta | Literal[Outcome.KEEP] | None
"""The ttl of a write: seconds, 0 for no expiry, KEEP for what is left, None for the default."""
