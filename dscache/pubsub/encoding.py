"""JSON text within messages: deepstream's servers send data as text in a field."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from .._interruptions import raise_interruption
from ..core import json_text, tolerant_json
from ..errors import MessageError

_decode: Final = msgspec.json.Decoder().decode
# Checks the text without making objects of it.
_skip: Final = msgspec.json.Decoder(msgspec.Raw).decode


def encode_text(subject: str, value: Any) -> str:
    """Return the JSON text of a value; raises MessageError for one that has none."""
    try:
        text = json_text.encode_json(value)
    except Exception as refusal:  # msgspec raises whatever a user's own type raises
        raise_interruption(refusal)
        try:
            text = tolerant_json.encode(value)
        except Exception as error:
            raise_interruption(error)
            raise MessageError(f"{subject} can't be encoded as JSON: {error}") from error
    if (reason := flaw(text)) is not None:
        raise MessageError(f"{subject} holds a msgspec.Raw that isn't JSON: {reason}")
    return text.decode()


def flaw(text: bytes) -> str | None:
    """Return why encoded data isn't JSON text, or None if it is.

    Only a ``msgspec.Raw``, at any depth, makes such data. It would end every client that reads it.
    """
    try:
        _skip(text)
        text.decode()
    except (ValueError, RecursionError) as refusal:
        raise_interruption(refusal)
        try:
            tolerant_json.decode(text)
            text.decode()
        except ValueError as error:
            raise_interruption(error)
            return str(error)
    return None


def decode_text(subject: str, text: str | UnsetType | None, value: Any) -> Any:
    """Return the value of a message's fields ``data`` and ``parsedData``, or None without both.

    Raises MessageError if the text isn't JSON.
    """
    if value is not UNSET:
        return value
    if not isinstance(text, str):
        return None
    try:
        return _decode(text)
    except (ValueError, RecursionError) as error:
        raise_interruption(error)
    try:
        return tolerant_json.decode(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise_interruption(error)
        raise MessageError(f"{subject}: its data isn't JSON: {error}") from None
