"""Conversion of a configuration to typed Structs; a mistake's error has its place and remedy.

msgspec's own conversion refuses the same mistakes, but names neither the file nor the most similar
option, and shows passwords. The Structs remain the one declaration of every option; this module
walks over them.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Final, NamedTuple, NoReturn, TypeVar, cast

import msgspec
from msgspec import inspect

from .._seconds import whole_seconds
from ..errors import ConfigError, shorten

_logger = logging.getLogger("dscache")
_INTEGER = re.compile(r"[-+]?[0-9]{1,100}")
_UNSUITABLE = re.compile("[\0\ud800-\udfff]")

EMPTY: Final = "is empty; is the variable set that it comes from?"

Secret = Annotated[str, msgspec.Meta(extra={"secret": True})]


class Location(NamedTuple):
    """A place in a configuration: the source, such as a file's name, and the path of keys in it."""

    source: str
    path: str = ""

    def at(self, key: str) -> Location:
        """Return the place of ``key`` in this mapping."""
        shown = redact_key(key)
        return Location(self.source, f"{self.path}.{shown}" if self.path else shown)

    def item(self, index: int) -> Location:
        """Return the place of an entry of this list."""
        return Location(self.source, f"{self.path}[{index}]")

    def entry(self, name: str) -> Location:
        """Return the place of an entry of this mapping, whose keys are data and not options."""
        return Location(self.source, f'{self.path}["{name}"]')

    def __str__(self) -> str:
        return f"{self.source}: {self.path}" if self.path else self.source

    def error(self, problem: str) -> ConfigError:
        """Return the ConfigError for a problem; its text begins with this place."""
        return ConfigError(f"{self}: {problem}")


class Scalar(msgspec.Struct, frozen=True):
    """An unquoted number, boolean or null of a file: its value and its source text.

    A password written as ``012345`` is that text, while a port is the number. A null without text
    is that of an empty variable.
    """

    value: bool | int | float | None
    text: str


class ConfigStruct(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Base of the typed configuration: Structs whose ``repr`` shows no secret.

    ``expected`` describes its form in a file. ``consumed`` names options that are handled before
    the Struct is read. ``no_effect`` maps accepted options without effect to the reason,
    ``unsupported`` options that can't be ignored to the remedy. ``other_names`` maps what other
    clients call an option to its name here, or None without one. ``unknown_remedy`` ends the error
    for an option that is like none of them.
    """

    expected: ClassVar[str] = "a mapping of options"
    consumed: ClassVar[tuple[str, ...]] = ()
    no_effect: ClassVar[Mapping[str, str]] = {}
    unsupported: ClassVar[Mapping[str, str]] = {}
    other_names: ClassVar[Mapping[str, str | None]] = {}
    unknown_remedy: ClassVar[str] = ""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        shown = []
        for field in _fields(type(self)).values():
            value = getattr(self, field.name)
            is_secret = _unwrap(field.type)[1].get("secret")
            shown.append((field.name, "***" if value and is_secret else value))
        return shown

    def __repr__(self) -> str:
        shown = (
            f"{name}={shorten(value) if isinstance(value, str) else repr(value)}"
            for name, value in self.__rich_repr__()
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class SwitchedStruct(ConfigStruct, frozen=True):
    """Base of options that ``true`` switches on, with their defaults, and ``false`` off."""

    expected: ClassVar[str] = "true, false or a mapping of options"


T = TypeVar("T", bound=ConfigStruct)


def read(struct: type[T], written: object, place: Location) -> T:
    """Return a ``struct`` filled from a mapping of options.

    Raises ConfigError for an unknown or missing option, a wrong type and a value out of range.
    """
    if not isinstance(written, Mapping):
        raise place.error(f"must be {struct.expected}, not {_kind(written)}")
    fields = _fields(struct)
    values: dict[str, Any] = {}
    for key, value in written.items():
        if not isinstance(key, str):
            raise place.error(f"the name of an option must be text, not {_kind(key)}")
        here = place.at(key)
        if field := fields.get(key):
            value = _value(field.type, value, here)
            if value is not None or _unwrap(field.type)[2]:
                values[field.name] = value
        elif key in struct.consumed:
            continue
        elif key in struct.no_effect:
            _logger.info("%s has no effect: %s", here, struct.no_effect[key])
        elif key not in struct.unsupported:
            raise _unknown(struct, key, value, place)
        elif _plain(value):
            raise here.error(f"isn't supported: {struct.unsupported[key]}")
    for name, field in fields.items():
        if field.required and field.name not in values:
            raise place.at(name).error("is missing")
    return struct(**values)


def is_null(written: object) -> bool:
    """Return whether a value is null, which means "not given"."""
    return _plain(written) is None


def is_emptied(written: object) -> bool:
    """Return whether a value of a file comes from empty variables alone."""
    return isinstance(written, Scalar) and not written.text


def text(written: object, place: Location, *, secret: bool = False) -> str:
    """Return ``written`` as text; a number or word of a file keeps its source text.

    Raises ConfigError for any other type, for NUL, and for text that UTF-8 can't encode.
    """
    result = written.text if isinstance(written, Scalar) else written
    if isinstance(result, int) and not isinstance(result, bool):
        result = str(result)
    elif isinstance(result, os.PathLike):
        result = os.fspath(result)
    if not isinstance(result, str):
        _refuse(result, place, "text", secret)
    if _UNSUITABLE.search(result):
        raise place.error("must be text without NUL that can be encoded as UTF-8")
    return result


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` most like ``name`` (case, ``_`` and ``-`` aside), or None."""
    folded = {_folded(known): known for known in names}
    found = difflib.get_close_matches(_folded(name), folded, n=1)
    return folded[found[0]] if found else None


def _folded(name: str) -> str:
    return name.lower().translate(str.maketrans("", "", "_-"))


def redact_key(key: str) -> str:
    """Return the part of a key that can be shown safely, at most 80 characters, or ``***``.

    A missing space or colon, as in ``password:secret``, makes a key that contains the secret.
    """
    return re.split(r"[^\w.-]", key, maxsplit=1)[0][:80] or "***"


def _unknown(struct: type[ConfigStruct], key: str, value: object, place: Location) -> ConfigError:
    known = [*_fields(struct), *struct.consumed]
    remedy = "separate a name from its value by a colon and a space"
    if redact_key(key) != key:
        problem = f"unknown option; {remedy}"
    elif (folded := _folded(key)) in struct.other_names:
        meant = struct.other_names[folded]
        problem = "unknown option, leave it out; it has no counterpart here"
        if meant is not None:
            # Other clients count in seconds.
            unit = ", in milliseconds" if meant.endswith("Timeout") else ""
            problem = f'unknown option, did you mean "{meant}"{unit}?'
    elif best := nearest(key, [*known, *struct.no_effect]):
        problem = f'unknown option, did you mean "{best}"?'
    elif is_null(value):
        # A bare word may be a secret whose name and colon are missing.
        return place.error(
            "contains a name without a value that isn't an option; it isn't shown, because it may "
            f"be a secret; {remedy}"
        )
    else:
        problem = f"unknown option; the options are {', '.join(known)}{struct.unknown_remedy}"
    return place.at(key).error(problem)


def _value(kind: inspect.Type, written: object, place: Location) -> object:
    """Return ``written`` converted to the type of a field, or None for null."""
    kind, extra, nullable = _unwrap(kind)
    if isinstance(kind, inspect.StrType):
        # A Scalar is never null here: one whose value is null came from the environment, and a
        # password spelled "null" is a password.
        if written is None or (nullable and (written == "" or is_emptied(written))):
            return None
        secret = bool(extra.get("secret"))
        result = text(written, place, secret=secret)
        if kind.pattern is not None and not re.fullmatch(kind.pattern, result):
            if not result:
                raise place.error(EMPTY)
            _refuse(written, place, str(extra["expected"]), secret, str(extra.get("remedy", "")))
        return result
    plain = _plain(written)
    if isinstance(kind, inspect.VarTupleType):
        # Null is refused too: a list whose entries are all commented out must not silently
        # select another server.
        return _list(kind, plain, place)
    if isinstance(kind, inspect.DictType):
        return _entries(kind, plain, place)
    if plain is None:
        return None
    if isinstance(kind, inspect.StructType):
        struct = cast(type[ConfigStruct], kind.cls)
        if issubclass(struct, SwitchedStruct) and isinstance(plain, bool):
            return struct() if plain else None
        return read(struct, plain, place)
    if isinstance(kind, inspect.LiteralType):
        return _choice(kind.values, written, place)
    if isinstance(kind, inspect.IntType):
        return _integer(kind, extra, written, place)
    if not isinstance(plain, bool):
        _refuse(written, place, "true or false, without quotes")
    return plain


def _integer(
    kind: inspect.IntType, extra: Mapping[str, object], written: object, place: Location
) -> int | None:
    low, high = cast(int, kind.ge), kind.le
    span = f"from {low} to {high}" if high else f"of at least {low}"
    unit = f"of {extra['unit']} " if "unit" in extra else ""
    zero_is_none = extra.get("zero_is_none")
    expected = f"{'0, or ' if zero_is_none else ''}a whole number {unit}{span}"
    # deepstream's connector takes any falsy ttl for none.
    if zero_is_none and _plain(written) in (False, ""):
        return None
    if isinstance(written, timedelta) and extra.get("unit") == "seconds":
        number = whole_seconds(written) or 0
    else:
        number = _number(written, place, expected)
    if zero_is_none and number == 0 and not isinstance(written, timedelta):
        return None
    if number < low or (high is not None and number > high):
        _refuse(written, place, expected)
    return number


def _list(kind: inspect.VarTupleType, written: object, place: Location) -> tuple[object, ...]:
    if not isinstance(written, (list, tuple)):
        raise place.error(f"must be a list, not {_kind(written)}")
    if not written:
        raise place.error("must have at least one entry; leave the option out if there is none")
    return tuple(
        _entry(kind.item_type, item, place.item(index)) for index, item in enumerate(written)
    )


def _entries(
    kind: inspect.DictType, written: object, place: Location
) -> Mapping[str, object] | None:
    """Return a mapping whose keys are data; a falsy value means none, as in ioredis."""
    if not written:
        return None
    if not isinstance(written, Mapping):
        raise place.error(f"must be a mapping, not {_kind(written)}")
    key_type, extra, _ = _unwrap(kind.key_type)
    pattern = cast(str, cast(inspect.StrType, key_type).pattern)
    for name in written:
        if not isinstance(name, str) or not re.fullmatch(pattern, name):
            spaced = isinstance(name, str) and re.search(r"\s", name)
            shown = _kind(name) if spaced else _shown(name)
            raise place.error(f"each name in it must be {extra['expected']}, not {shown}")
    return {name: _entry(kind.value_type, one, place.entry(name)) for name, one in written.items()}


def _entry(kind: inspect.Type, written: object, place: Location) -> object:
    value = _value(kind, written, place)
    if value is None:
        raise place.error("must be a mapping of options, not null")
    return value


def _choice(values: tuple[Any, ...], written: object, place: Location) -> object:
    *shown, last = (str(value) if isinstance(value, int) else f'"{value}"' for value in values)
    expected = f"{', '.join(shown)} or {last}"
    is_number = all(isinstance(value, int) for value in values)
    choice = _number(written, place, expected) if is_number else text(written, place)
    if choice not in values:
        _refuse(written, place, expected)
    return choice


def _number(written: object, place: Location, expected: str) -> int:
    value = _plain(written)
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(written, place, expected)
    return value


def _refuse(
    written: object, place: Location, expected: str, secret: bool = False, remedy: str = ""
) -> NoReturn:
    shown = _kind(written) if secret else _shown(written)
    if isinstance(written, str) and re.search(r"\s//", written):
        remedy = "in YAML, a comment begins with #, not with //"
    raise place.error(f"must be {expected}, not {shown}{remedy and f'; {remedy}'}")


def _shown(written: object) -> str:
    if isinstance(written, Scalar):
        return written.text[:80]
    # Text with an @ may be a misplaced URL, with a password in it.
    if isinstance(written, (bool, int, float, timedelta)) or (
        isinstance(written, str) and "@" not in written
    ):
        return shorten(written)
    return _kind(written)


def _kind(written: object) -> str:
    value = _plain(written)
    if value is None:
        return "null"
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "text"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
    )
    return next((n for types, n in kinds if isinstance(value, types)), type(value).__name__)


def _plain(written: object) -> object:
    return written.value if isinstance(written, Scalar) else written


@functools.cache
def _fields(struct: type[ConfigStruct]) -> dict[str, inspect.Field]:
    described = inspect.type_info(struct)
    assert isinstance(described, inspect.StructType)
    return {field.encode_name: field for field in described.fields}


def _unwrap(kind: inspect.Type) -> tuple[inspect.Type, Mapping[str, object], bool]:
    """Return a field's type without None and UNSET, its ``extra``, and whether None is allowed."""
    nullable = False
    if isinstance(kind, inspect.UnionType):
        nullable = any(isinstance(one, inspect.NoneType) for one in kind.types)
        (kind,) = (one for one in kind.types if not isinstance(one, inspect.NoneType))
    if isinstance(kind, inspect.Metadata):
        return kind.type, kind.extra or {}, nullable
    return kind, {}, nullable
