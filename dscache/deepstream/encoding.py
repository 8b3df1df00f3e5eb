"""JSON text within messages: deepstream's servers send data as text in a field."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from ..core import tolerant_json
from ..errors import MessageError

_decode: Final = msgspec.json.Decoder().decode
# Checks the text without making objects of it.
_skip: Final = msgspec.json.Decoder(msgspec.Raw).decode
_encode: Final = msgspec.json.Encoder().encode


def encode_text(subject: str, value: Any) -> str:
    """Return the JSON text of a value; raises MessageError for one that has none."""
    try:
        text = _encode(value)
    except Exception:  # msgspec raises whatever a user's own type raises
        try:
            text = tolerant_json.encode(value)
        except Exception as error:
            raise MessageError(f"{subject} can't be encoded as JSON: {error}") from error
    if (reason := flaw(text)) is not None:
        raise MessageError(f"{subject} has a msgspec.Raw in it that is no JSON: {reason}")
    return text.decode()


def flaw(text: bytes) -> str | None:
    """Return the reason for which encoded data is no JSON text, or None.

    Only a ``msgspec.Raw``, at any depth, makes such data. It would end every client that reads it.
    """
    try:
        _skip(text)
        text.decode()
    except (ValueError, RecursionError):
        try:
            tolerant_json.decode(text)
            text.decode()
        except ValueError as error:
            return str(error)
    return None


def decode_text(subject: str, text: str | UnsetType | None, value: Any) -> Any:
    """Return the value of a message's fields ``data`` and ``parsedData``, or None without both.

    Raises MessageError if the text is no JSON.
    """
    if value is not UNSET:
        return value
    if not isinstance(text, str):
        return None
    try:
        return _decode(text)
    except (ValueError, RecursionError):
        pass
    try:
        return tolerant_json.decode(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise MessageError(f"{subject}: its data is no JSON: {error}") from None
