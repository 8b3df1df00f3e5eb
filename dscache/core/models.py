"""Models of pydantic in records: read and written by their own methods, without its import."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .._interruptions import raise_interruption

# The flag of a class that was created at run time.
_HEAP_TYPE: Final = 1 << 9

_encode = msgspec.json.Encoder().encode


def encode_model(value: Any) -> msgspec.Raw:
    """Return the JSON text of a model; msgspec calls it for each object that it doesn't know.

    Raises TypeError, with msgspec's own text, for any other object, and ValueError for a model that
    writes NaN.
    """
    if not hasattr(type(value), "model_dump_json"):
        raise TypeError(f"Encoding objects of type {_name_of(type(value))} is unsupported")
    # By alias, as the model reads it again.
    text: bytes = value.model_dump_json(by_alias=True).encode()
    if b"NaN" in text or b"Infinity" in text:
        _check_words(type(value), text)
    return msgspec.Raw(text)


def _check_words(class_: type, text: bytes) -> None:
    """Raise ValueError if a word such as NaN stands in a text, and not in a string of it."""
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise_interruption(error)
        raise ValueError(
            f"the model {class_.__name__} writes NaN or Infinity, which isn't JSON; set its "
            'ser_json_inf_nan to "null" or "strings"'
        ) from error


def _name_of(class_: type) -> str:
    """Return the name by which C code knows a class: of its own classes, the module as well."""
    if class_.__flags__ & _HEAP_TYPE or class_.__module__ == "builtins":
        return class_.__name__
    return f"{class_.__module__}.{class_.__name__}"


def is_model(type_: Any) -> bool:
    """Return whether a type is a model."""
    return isinstance(type_, type) and hasattr(type_, "model_validate_json")


def decode_model(type_: Any, value: Any) -> Any:
    """Return a model made of a decoded value; msgspec calls it for each type it doesn't know.

    Raises ValueError if the value doesn't fit. A value of any other type is returned, and msgspec
    refuses it.
    """
    if not is_model(type_):
        return value
    try:
        # From JSON, of which a model accepts more than of Python's own objects.
        return type_.model_validate_json(_encode(value))
    except ValueError as error:
        raise_interruption(error)
        raise ValueError(_misfits(error)) from error


def _misfits(error: ValueError) -> str:
    """Return pydantic's reasons in one line, without the values that don't fit."""
    if not hasattr(error, "errors"):
        return str(error)
    first, *more = error.errors(include_url=False, include_input=False, include_context=False)
    path = ".".join(map(str, first["loc"]))
    reason = f"{path}: {first['msg']}" if path else first["msg"]
    return f"{reason} and {len(more)} more" if more else reason
