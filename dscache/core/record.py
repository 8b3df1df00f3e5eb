"""Records, and the checks of their names, versions and data; the pure twin of ``record.pxi``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, overload

import msgspec

from .._interruptions import raise_interruption
from ..errors import shorten
from . import constants as c
from . import failures, json_text

if TYPE_CHECKING:
    # Only type checkers know a default before Python 3.13; they bring their own module for it.
    import typing_extensions

    DataT = typing_extensions.TypeVar("DataT", covariant=True, default=Any)

    class Pair(tuple[int, DataT]):
        """To type checkers a Record is a tuple: of nothing else do they unpack several types."""

        def __new__(cls, *arguments: Any, **options: Any) -> Self: ...

else:
    DataT = TypeVar("DataT", covariant=True)
    Pair = Generic

T = TypeVar("T")

_decode_json = msgspec.json.Decoder().decode


class Record(Pair[DataT]):
    """One record as Redis held it: immutable, with its JSON decoded on first access.

    ``name`` is its name, and ``version`` an int from 0 to 2^63-1. ``raw`` is the JSON text exactly
    as stored, in bytes. ``stale`` is true only for a last known record that a near cache returned
    while Redis was away. A record unpacks: ``version, data = record``.

    The ``data`` of a record that was read with ``type=User`` is a User, and the record is a
    ``Record[User]``. Copies and pickles keep the type. Records are equal if name, version and text
    are equal.
    """

    __slots__ = ("_data", "_type", "name", "raw", "stale", "version")

    name: str
    version: int
    raw: bytes
    stale: bool
    _data: dict[None, Any]  # at most one: the first thread to decode it fills it for all
    _type: Any

    @overload
    def __init__(
        self, name: str, version: int, raw: bytes, stale: bool = ..., type: None = None
    ) -> None: ...
    @overload
    def __init__(
        self, name: str, version: int, raw: bytes, stale: bool = ..., *, type: type[DataT]
    ) -> None: ...
    @overload
    def __init__(
        self, name: str, version: int, raw: bytes, stale: bool = ..., type: Any = ...
    ) -> None: ...
    def __init__(
        self, name: str, version: int, raw: bytes, stale: bool = False, type: Any = None
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "name", name)
        set_field(self, "version", version)
        set_field(self, "raw", raw)
        set_field(self, "stale", stale)
        set_field(self, "_data", {})
        set_field(self, "_type", type)

    @property
    def data(self) -> DataT:
        """The decoded JSON: decoded on first access, then cached, and shared with no other call.

        Raises RecordDamaged if the stored text isn't valid JSON, or doesn't fit the record's type.
        """
        known = self._data
        if known:
            return known[None]  # type: ignore[no-any-return] # of the type, or JSON
        if self._type is not None:
            data = json_text.decode_as(self.name, self.version, self.raw, self._type)
        else:
            try:
                data = _decode_json(self.raw)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                raise_interruption(error)
                data = json_text.decode_tolerantly(self.name, self.version, self.raw)
        return known.setdefault(None, data)  # type: ignore[no-any-return] # as above

    @overload
    def decode(self, type: type[T], /) -> T: ...
    @overload
    def decode(self, type: Any, /) -> Any: ...
    def decode(self, type: Any, /) -> Any:
        """Return the data as ``type``: a ``msgspec.Struct``, dataclass or other supported type.

        Each call decodes anew. Raises RecordDamaged, with the path of the mismatch, if the data
        doesn't fit, or if the text isn't valid JSON. Raises TypeError for a type that msgspec
        doesn't know.
        """
        return json_text.decode_as(self.name, self.version, self.raw, type)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.version, self.data))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return (self.version, self.name, self.raw) == (other.version, other.name, other.raw)

    def __hash__(self) -> int:
        return hash((self.version, self.name, self.raw))

    def __repr__(self) -> str:
        stale = ", stale=True" if self.stale else ""
        return f"Record({shorten(self.name)}, {self.version}, {shorten(self.raw)}{stale})"

    def __reduce__(self) -> tuple[Any, ...]:
        from .._backend import make_record

        fields = (self.name, self.version, self.raw, self.stale)
        return (make_record, fields if self._type is None else (*fields, self._type))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Record is immutable: {name} can't be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Record is immutable: {name} can't be deleted")


class Draft(Pair[DataT]):
    """A record in the making: to finish it, set its class to Record, which has the same slots.

    To set six fields like this and then the class takes a fifth of the time of ``Record()``, which
    has to go around its own ``__setattr__``.
    """

    __slots__ = Record.__slots__


def new_record(name: str, version: int, raw: bytes) -> Record[Any]:
    """Return a record that a server holds."""
    record: Any = Draft()
    record.name = name
    record.version = version
    record.raw = raw
    record.stale = False
    record._data = {}
    record._type = None
    record.__class__ = Record
    return record  # type: ignore[no-any-return] # its class is set above


# -- checks and texts


def check_name(name: object) -> str:
    """Return the name as an exact str, or raise RecordError."""
    if not isinstance(name, str):
        raise failures.bad_name(name)
    if type(name) is not str:
        name = str.__str__(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise failures.bad_name(name) from None
    if not name:
        raise failures.bad_name(name)
    return name


def check_version(name: str, version: object) -> int:
    """Return the version as an int, or raise RecordError."""
    if not isinstance(version, int) or isinstance(version, bool):
        raise failures.bad_version(name, version)
    if not 0 <= version <= c.MAX_VERSION:
        raise failures.bad_version(name, version)
    return int(version)


def encode_data(name: str, data: object) -> bytes:
    """Return the JSON text of a record's data, or raise RecordError."""
    try:
        text = json_text.encode_json(data)
    except Exception as error:  # msgspec passes on any exception of a user's own type
        raise_interruption(error)
        return json_text.encode_tolerantly(name, data)
    if not text:
        raise failures.empty_raw(name)
    return text


def parse_version(text: bytes) -> int:
    """Return the version written in decimal digits, or -1 if the text is no version."""
    if not text.isdigit():
        return -1
    digits = text.lstrip(b"0")
    if len(digits) > 19:
        return -1
    version = int(digits or b"0")
    return version if version <= c.MAX_VERSION else -1
