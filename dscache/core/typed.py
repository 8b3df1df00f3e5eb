"""Reads with a type, whose Records have data of that type. Both cores use this module.

The data is decoded before the caller gets the Record, so that a record that doesn't fit its type
fails the read. That is the work of the read's waiter: pipelines read the record as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .._interruptions import raise_interruption
from ..errors import BulkError, shorten
from . import constants as c
from . import failures, json_text
from .models import is_model

if TYPE_CHECKING:
    from .record import Record


def check_type(type_: Any) -> None:
    """Raise TypeError if msgspec doesn't know the type, or a type within it."""
    try:
        _check_known(type_)
    except TypeError as error:
        raise_interruption(error)
        # The type, or an annotation in it, has no hash; or it is refused again here.
        _check(type_)


def _check(type_: Any) -> None:
    json_text.decoder_of(type_)
    if is_model(type_):
        return
    queue, seen = [msgspec.inspect.type_info(type_)], set[int]()
    while queue:
        info = queue.pop()
        if id(info) in seen:
            continue
        seen.add(id(info))
        if isinstance(info, msgspec.inspect.CustomType):
            if not (is_model(info.cls) or any(issubclass(each, info.cls) for each in _PLAIN)):
                raise TypeError(
                    f"type={shorten(type_)}: msgspec can't decode JSON into "
                    f"{info.cls.__qualname__}; give a Struct, a dataclass or another type of its "
                    "documentation"
                )
            continue
        for name in info.__struct_fields__:
            _add_types(getattr(info, name), queue)


def _add_types(value: Any, queue: list[Any]) -> None:
    """Add the types in a part of a type."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, msgspec.inspect.Field):
            queue.append(one.type)
        elif isinstance(one, msgspec.inspect.Type):
            queue.append(one)


_check_known = lru_cache(maxsize=256)(_check)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_WITH_FIELDS: Final = (
    msgspec.inspect.StructType,
    msgspec.inspect.DataclassType,
    msgspec.inspect.TypedDictType,
)
_logger = logging.getLogger("dscache")
# JSON's own types, which may fit an abstract class.
_PLAIN: Final = (dict, list, str, int, float, bool, type(None))


class _Members:
    """The members that a type names, and whether an update has warned of others."""

    __slots__ = ("are_warned_of", "named")

    def __init__(self, named: frozenset[str] | None) -> None:
        self.named = named
        self.are_warned_of = False


# Bounded, as a program may make types all the time.
@lru_cache(maxsize=256)
def _members_of(type_: Any) -> _Members:
    return _Members(_members_named(type_))


def _members_named(type_: Any) -> frozenset[str] | None:
    """Return the members of an object that a type names, or None if it may take others too."""
    if is_model(type_):
        fields = getattr(type_, "model_fields", None)
        if not isinstance(fields, dict):
            return None
        aliases = (getattr(field, "alias", None) for field in fields.values())
        return frozenset((*fields, *filter(None, aliases)))
    info = msgspec.inspect.type_info(type_)
    if isinstance(info, _WITH_FIELDS):
        return frozenset(field.encode_name for field in info.fields)
    return None


def warn_of_removal(name: str, stored: bytes, written: bytes, type_: Any) -> None:
    """Warn once for each type if an update removes members that the type doesn't name."""
    try:
        members = _members_of(type_)
    except TypeError as error:  # without a hash, as an annotation in it may be
        raise_interruption(error)
        return
    named = members.named
    if named is None or members.are_warned_of:
        return
    try:
        unknown = _members(stored).keys() - named
        removed = sorted(unknown - _members(written).keys()) if unknown else ()
    except (msgspec.MsgspecError, RecursionError) as error:  # no object, or odd or deep JSON
        raise_interruption(error)
        return
    if removed:
        members.are_warned_of = True
        _logger.warning(
            "update: record %s: the type %s doesn't name the member %s, which the update "
            "removes; name it in the type, or update without a type (logged once for each type)",
            shorten(name),
            getattr(type_, "__qualname__", type_),
            shorten(removed[0]),
        )


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
    records: Mapping[str, Record],
    errors: Mapping[str, Exception],
    type_: Any,
    operation: str = "get_bulk",
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
            raise_interruption(error)
            misfits[name] = error
    if errors or misfits:
        raise BulkError(operation, {**errors, **misfits}, found)
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
        except Exception as error:
            self._waiter.set_exception(error)
        else:
            self._waiter.set_result(found)
