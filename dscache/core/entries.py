"""Entries of batches: checked content of operations; the pure twin of ``entries.pxi``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._interruptions import raise_interruption
from . import constants as c
from . import failures
from .batch import Bulk, Write
from .condition import (
    ANY,
    IfVersion,
    IfVersions,
    IfVersionsHeld,
    check_many,
    check_one,
    expected_of,
    guard_of,
    guard_of_removal,
)
from .markers import Ttl
from .record import check_name, check_version, encode_data


def make_writes(
    default_ttl: int,
    records: Mapping[str, tuple[int, Any]],
    ttl: Ttl,
    if_newer: bool,
    if_version: IfVersions,
) -> tuple[dict[str, Any], int, int]:
    """Return the contents of a ``set_bulk``, their ttl, and how much text they are."""
    if not isinstance(records, Mapping):
        raise failures.bad_records(records)
    if if_version is not ANY:
        check_many("set_bulk", if_newer, if_version)
    writes: dict[str, Any] = {}
    write_ttl = size = 0
    for name, pair in records.items():
        name = check_name(name)
        version, data = check_pair(name, pair)
        expected: IfVersion = ANY
        if if_version is not ANY:
            expected = expected_of("set_bulk", name, if_version)
        write = make_write(default_ttl, name, version, data, ttl, if_newer, expected)
        writes[name] = write
        write_ttl = write.ttl
        size += len(write.text)
    return writes, write_ttl, size


def make_write(
    default_ttl: int,
    name: str,
    version: int,
    data: Any,
    ttl: Ttl,
    if_newer: bool,
    if_version: IfVersion,
) -> Write:
    """Return the checked and encoded content of a record; raises RecordError."""
    number = check_version(name, version)
    conditional = bool(if_newer) or if_version is not ANY
    seconds = default_ttl if ttl is None else failures.check_ttl(name, ttl, conditional)
    text = encode_data(name, data)
    guard = c.GUARDED if if_newer else c.UNGUARDED
    if if_version is not ANY:
        check_one(name, if_newer)
        guard = guard_of(name, if_version)
    return Write(number, text, seconds, guard)


def new_bulk(kind: int, records: dict[str, Any], waiter: Any, shared: bool = False) -> Bulk:
    """Return the bulk operation of that kind; the names of a read get their records in place."""
    result: Any = set()
    if kind == c.GET:
        result = records  # the names are in their order already
    elif kind == c.HEAD:
        result = {}
    elif c.DELETE_IF <= kind <= c.DELETE:
        result = 0
    return Bulk(f"{c.OPERATIONS[kind]}_bulk", waiter, result, len(records), shared)


def check_pair(name: str, pair: Any) -> tuple[Any, Any]:
    """Return the version and data of an item of ``set_bulk``, or raise RecordError."""
    try:
        version, data = pair
    except (TypeError, ValueError) as error:
        raise_interruption(error)
        raise failures.bad_pair(name, pair) from None
    return version, data


def make_removal(name: str, if_version: IfVersion) -> Write:
    """Return a removal with a condition, as a write without data; raises RecordError."""
    return Write(0, b"", 0, guard_of_removal(name, if_version))


def make_removals(names: Iterable[str], if_version: IfVersionsHeld) -> dict[str, Any]:
    """Return the removals of a ``delete_bulk`` with conditions; raises RecordError."""
    check_many("delete_bulk", False, if_version)
    return {
        name: make_removal(name, expected_of("delete_bulk", name, if_version)) for name in names
    }


def kind_of(ttl: int, guarded: bool) -> int:
    if guarded:
        return c.SET_IF_NEWER
    return c.SET_TTL if ttl else c.SET


def unique(operation: str, names: Iterable[str]) -> dict[str, Any]:
    """Return the names as keys, each once and checked."""
    if isinstance(names, (str, bytes)):
        raise failures.bad_names(operation, names)
    if type(names) in (list, tuple) and set(map(type, names)) == {str}:
        # In C what check_name does with each, in a tenth of the time.
        records = dict.fromkeys(names)
        if "" not in records and "".join(records).isascii():
            return records
    return dict.fromkeys(map(check_name, names))
