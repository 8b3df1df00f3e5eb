"""The loop of ``update`` and ``patch``: read, change, write under the version read (sans-IO).

``change_steps`` is a generator. It yields one step at a time, and receives its result. The drivers
of asyncio and of threads execute the steps, and keep the updates of one name in a queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from .. import _backend
from ..errors import (
    DeadlineExceeded,
    RecordDamaged,
    RecordError,
    RecordMissing,
    UsageError,
    shorten,
)
from . import constants as c
from . import failures
from .json_text import decode_as
from .markers import DELETE, KEEP, OMITTED, Omitted, Ttl
from .typed import warn_of_removal

if TYPE_CHECKING:
    from .record import Record


_logger = logging.getLogger("dscache")
_told_of_null: list[str] = []

# The longest pause after the first conflict, and after many, in seconds. Between two attempts of a
# writer the others finish about one write each, which takes a fraction of a millisecond.
FIRST_PAUSE: Final = 0.001
LONGEST_PAUSE: Final = 0.064

FIRST_VERSION: Final = 1
MAX_VERSION: Final = c.MAX_VERSION

# Types of data that can't be awaited; looking further takes as long as a small record's decoding.
PLAIN: Final = frozenset((dict, list, str, int, float, bool, type(None)))

# Steps. The others are operations of a Pipeline, by their names.
CHANGE: Final = "change"
PAUSE: Final = "pause"

Step: TypeAlias = tuple[str, tuple[Any, ...]]
"""The name of a step, and its arguments."""
Steps: TypeAlias = Generator[Step, Any, "Record | None"]
Successor: TypeAlias = Callable[["Record | None"], tuple[int, int | None]]
"""Returns the version and the ttl to write, given the Record read."""


class Timing:
    """The deadline of one update, in seconds of ``clock``, and the pauses between its attempts."""

    __slots__ = ("clock", "deadline", "pause", "timeout")

    def __init__(
        self,
        timeout: float,
        clock: Callable[[], float],
        pause: Callable[[int], float],
        deadline: float | None = None,
    ) -> None:
        self.timeout = timeout
        self.clock = clock
        self.deadline = clock() + timeout if deadline is None else deadline
        self.pause = pause

    def rest(self) -> float:
        """Return the seconds until the deadline; not below zero."""
        return max(0.0, self.deadline - self.clock())


def check_change(operation: str, change: object) -> None:
    """Raise TypeError for a change that can't be called."""
    if not callable(change):
        raise TypeError(f"{operation}: change must be a function, not {shorten(change)}")


def check_arguments(name: str, default: object, ttl: Ttl) -> tuple[str, bytes | Omitted]:
    """Return the name, and the JSON text of the default; raises RecordError if one is bad."""
    name = _backend.core.check_name(name)
    if ttl is not None:
        failures.check_ttl(name, ttl, True)
    return name, OMITTED if default is OMITTED else _backend.core.encode_data(name, default)


def plain_copy(name: str, value: object) -> Any:
    """Return a value as it would be read from the record; raises RecordError if it has no JSON."""
    return _backend.core.Record(name, 0, _backend.core.encode_data(name, value)).data


def data_of(record: Record) -> Any:
    """Return a record's data, decoded for one change: it may alter the data and then keep it."""
    return _backend.core.Record(record.name, record.version, record.raw).data


def text_of(name: str, data: object) -> bytes:
    """Return the JSON text of data; raises RecordError if it has none."""
    return _backend.core.encode_data(name, data)  # type: ignore[no-any-return] # of the core


def record_of(name: str, version: int, text: bytes) -> Record:
    """Return the record that was written."""
    return _backend.core.Record(name, version, text)  # type: ignore[no-any-return] # of the core


def change_steps(
    operation: str,
    name: str,
    default: bytes | Omitted,
    ttl: Ttl,
    timing: Timing,
    if_changed: bool = False,
    type: Any = None,
    successor: Successor | None = None,
) -> Steps:
    """Yield the steps of one update; its result is the Record written, or None if it was removed.

    ``default`` is the JSON text of a missing record, or OMITTED. With ``if_changed``, data that is
    equal to that of the record isn't written. The data and the result are of the ``type``. By
    default the record is written with the next version and ``ttl``; a ``successor`` chooses both.
    """
    core = _backend.core
    conflicts = 0
    while True:
        record = yield "get", (name,)
        if record is not None:
            # Decoded from a Record of its own: the change may alter the data and then keep it.
            if type is not None:
                record = core.Record(name, record.version, record.raw, record.stale, type)
                data = core.Record(name, record.version, record.raw, False, type).data
            else:
                data = data_of(record)
        elif default is OMITTED:
            raise missing(operation, name)
        else:
            data = _data_of_default(core.Record(name, 0, default, False, type), type)
        data = yield CHANGE, (data,)
        if data is KEEP or (data is DELETE and record is None):
            return record  # type: ignore[no-any-return] # of the driver
        if data is None and operation == "update":
            _check_null(name, default if record is None else record.raw, type)
        if timing.clock() >= timing.deadline:
            if conflicts:
                raise always_late(operation, name, conflicts, timing.timeout)
            raise late_change(operation, name, timing.timeout)
        if data is DELETE:
            done = yield "delete", (name, record.version)
            version, text = 0, b""
        else:
            text = core.encode_data(name, data)
            if if_changed and record is not None and _is_same(name, record, text):
                return record  # type: ignore[no-any-return] # of the driver
            if successor is not None:
                version, ttl = successor(record)
            else:
                version = FIRST_VERSION if record is None else record.version + 1
            if version > c.MAX_VERSION:
                raise no_version_above(operation, name)
            written = core.Record(name, version, text, False, type)
            if type is not None and data.__class__ is not msgspec.Raw:
                _check_fit(written)
            # A removal makes the text shorter, unless the change adds as much. The full check takes
            # a twentieth of a typed update.
            if type is not None and record is not None and len(text) < len(record.raw):
                warn_of_removal(name, record.raw, text, type)
            expected = None if record is None else record.version
            done = yield "set", (name, version, msgspec.Raw(text), ttl, False, expected)
        if done:
            return None if data is DELETE else written
        pause = timing.pause(conflicts)
        conflicts += 1
        if timing.clock() + pause >= timing.deadline:
            raise always_late(operation, name, conflicts, timing.timeout)
        yield PAUSE, (pause,)


def _check_null(name: str, before: bytes | Omitted, type: Any) -> None:
    """Raise RecordError if ``null`` doesn't fit the type; warn once if it replaces other data."""
    if type is not None:
        try:
            decode_as(name, 0, b"null", type)
        except RecordDamaged:
            raise null_of_type(name) from None
    elif before != b"null" and not _told_of_null:
        _told_of_null.append(name)
        _logger.warning(
            "update: record %s: the function returned None, so null replaces the data; end the "
            "function with return and the new data (logged once)",
            shorten(name),
        )


def _data_of_default(default: Record, type: Any) -> Any:
    """Return the data of a default; raises RecordError if it isn't JSON or doesn't fit the type."""
    try:
        return default.data
    except RecordDamaged as error:
        said = f"the default doesn't fit the type: {_misfit(error, default)}; give a default of it"
        if type is None:
            said = "the default is a msgspec.Raw whose text isn't JSON"
        raise RecordError(f"update {shorten(default.name)}: {said}", name=default.name) from error


def _check_fit(written: Record) -> None:
    """Raise RecordError if the data to write doesn't fit the type, as all later reads would fail.

    The data is decoded for the caller, who gets the Record.
    """
    try:
        _ = written.data
    except RecordDamaged as error:
        said = (
            f"the function returned data that doesn't fit the type: {_misfit(error, written)}; "
            "return data of the type, or update without a type"
        )
        raise RecordError(f"update {shorten(written.name)}: {said}", name=written.name) from error


def _misfit(error: RecordDamaged, record: Record) -> str:
    return str(error).removeprefix(f"record {shorten(record.name)}, version {record.version}: ")


def _is_same(name: str, record: Record, text: bytes) -> bool:
    return text == record.raw or text == _backend.core.encode_data(name, record.data)


# -- errors


def missing(operation: str, name: str) -> RecordMissing:
    """Return the error of an update of a record that doesn't exist and has no default."""
    return RecordMissing(
        f"{operation} {shorten(name)}: there is no such record; give a default to create it",
        name=name,
    )


def null_of_type(name: str) -> RecordError:
    """Return the error of a typed update whose change returned None, which doesn't fit the type."""
    return RecordError(
        f"update {shorten(name)}: the function returned None, which doesn't fit the type; end it "
        "with return and the new data, or with return dscache.DELETE to remove the record",
        name=name,
    )


def no_version_above(operation: str, name: str) -> RecordError:
    """Return the error of an update of a record at the highest version."""
    return RecordError(
        f"{operation} {shorten(name)}: the record has version {c.MAX_VERSION}, and no version is "
        "above that; set it with a lower version, or delete it",
        name=name,
    )


def always_late(operation: str, name: str, conflicts: int, timeout: float) -> DeadlineExceeded:
    """Return the error of an update that lost to another writer until its deadline."""
    times = "once" if conflicts == 1 else f"{conflicts} times"
    return DeadlineExceeded(
        f"{operation} {shorten(name)}: another writer was first, {times} within "
        f"{timeout * 1000:.0f} ms; nothing was written"
    )


def late_change(operation: str, name: str, timeout: float) -> DeadlineExceeded:
    """Return the error of an update whose change took all of its time."""
    return DeadlineExceeded(
        f"{operation} {shorten(name)}: reading the record and changing its data took longer than "
        f"{timeout * 1000:.0f} ms; nothing was written"
    )


def late_turn(operation: str, name: str, timeout: float) -> DeadlineExceeded:
    """Return the error of an update that waited for earlier ones of its name until its deadline."""
    return DeadlineExceeded(
        f"{operation} {shorten(name)}: earlier updates of this record in this process took longer "
        f"than {timeout * 1000:.0f} ms; nothing was written"
    )


def nested(operation: str, name: str) -> UsageError:
    """Return the error of an update within the change of another one of the same record."""
    return UsageError(
        f"{operation} {shorten(name)}: called by the change of an update of the same record, for "
        "which it would wait; return the new data from the change instead"
    )


def not_plain(operation: str, name: str) -> UsageError:
    """Return the error of an async change in a blocking cache."""
    return UsageError(
        f"{operation} {shorten(name)}: the change returned an awaitable, and a Cache awaits "
        "nothing; use a plain function, or an AsyncCache"
    )
