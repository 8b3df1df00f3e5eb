"""Reads with a type, whose Records have data of that type. Both cores use this module.

The data is decoded before the caller gets the Record, so that a record that doesn't fit its type
fails the read. That is the work of the read's waiter: pipelines read the record as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BulkError
from . import constants as c
from . import failures, json_text

if TYPE_CHECKING:
    from .record import Record


def check_type(type_: Any) -> None:
    """Raise TypeError if msgspec doesn't know the type."""
    json_text.decoder_of(type_)


def checked(check_name: Callable[[str], str], names: Iterable[str]) -> dict[str, None]:
    """Return the names of a bulk, each once; raises RecordError for a bad one."""
    if isinstance(names, (str, bytes)):
        raise failures.bad_names(c.OPERATIONS[c.GET] + "_bulk", names)
    return dict.fromkeys(map(check_name, names))


def with_type(record: Record, type_: Any) -> Record:
    """Return the Record with its data decoded into a type; raises RecordError if it doesn't fit."""
    # Records of both cores come here.
    found = record.__class__(record.name, record.version, record.raw, record.stale, type_)
    _ = found.data  # which the Record keeps
    return found


def all_with_type(
    records: Mapping[str, Record], errors: Mapping[str, Exception], type_: Any
) -> dict[str, Record]:
    """Return the Records of a bulk with their data decoded into a type.

    Raises BulkError if the data of some doesn't fit, or if there were ``errors`` before.
    """
    found = {}
    misfits: dict[str, Exception] = {}
    for name, record in records.items():
        try:
            found[name] = with_type(record, type_)
        except Exception as error:  # msgspec passes on any exception of a user's own type
            misfits[name] = error
    if errors or misfits:
        raise BulkError(c.OPERATIONS[c.GET] + "_bulk", {**errors, **misfits}, found)
    return found


def get(operations: Any, waiter: Any, name: str, type_: Any) -> None:
    """Queue a read of a checked name, of which ``waiter`` gets the typed Record, or None."""
    check_type(type_)
    operations.read(name, TypedRead(waiter, type_))


def get_bulk(operations: Any, waiter: Any, names: Iterable[str], type_: Any) -> None:
    """Queue a read of checked names, of which ``waiter`` gets a dict of typed Records."""
    check_type(type_)
    operations.read_bulk(c.GET, names, TypedBulkRead(waiter, type_))


class TypedRead:
    """The waiter of a read with a type; ``waiter`` is the caller's, a future."""

    __slots__ = ("_type", "_waiter")

    def __init__(self, waiter: Any, type_: Any) -> None:
        self._waiter = waiter
        self._type = type_

    def set_result(self, record: Record | None, /) -> None:
        if self._waiter.cancelled():
            return
        try:
            found = None if record is None else with_type(record, self._type)
        except Exception as error:  # msgspec passes on any exception of a user's own type
            self._waiter.set_exception(error)
        else:
            self._waiter.set_result(found)

    def set_exception(self, error: Exception, /) -> None:
        self._waiter.set_exception(error)


class TypedBulkRead:
    """The waiter of a bulk read with a type; ``waiter`` is the caller's, a future."""

    __slots__ = ("_type", "_waiter")

    def __init__(self, waiter: Any, type_: Any) -> None:
        self._waiter = waiter
        self._type = type_

    def set_result(self, records: Mapping[str, Record], /) -> None:
        self._settle(records, {})

    def set_exception(self, error: Exception, /) -> None:
        if isinstance(error, BulkError):
            self._settle(error.result, error.errors)
        else:
            self._waiter.set_exception(error)

    def _settle(self, records: Mapping[str, Record], errors: Mapping[str, Exception]) -> None:
        if self._waiter.cancelled():
            return
        try:
            found = all_with_type(records, errors, self._type)
        except BulkError as error:
            self._waiter.set_exception(error)
        else:
            self._waiter.set_result(found)
