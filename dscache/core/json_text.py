"""JSON text of values, and values or types of JSON text, where msgspec alone does not do."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import msgspec

from .._interruptions import raise_interruption
from ..errors import RecordDamaged, RecordError, shorten
from . import constants as c
from . import tolerant_json
from .models import decode_model, encode_model, is_model

encode_json_into: Final = msgspec.json.Encoder(enc_hook=encode_model).encode_into


def encode_json(value: object) -> bytes:
    """Return the JSON text of a value; raises whatever msgspec or the value's own type raises.

    Raises DeepError or LongError beyond the bounds of depth and size.

    Into buffers of fixed size, each larger than the one before: a value that leads to its parts on
    2**n paths fills the last at most, and msgspec writes into all of them together less than twice
    the longest. And where memory ends, msgspec 0.20's ``encode`` crashes the process.
    """
    # Python fills each with zeros first: 1 MiB takes 600 us, and 10 kB of text 4 us.
    for size in (2**12, 2**15, 2**18, *c.DATA_BUFFERS):
        text = bytearray(size)
        if encode_within(value, text):
            if is_too_deep(text):
                raise tolerant_json.DeepError
            return bytes(text)
        if size == c.DATA_BUFFERS[1]:
            tolerant_json.check_bounds(value, c.DATA_CONTAINERS)
    raise tolerant_json.LongError


def encode_within(value: object, text: bytearray) -> bool:
    """Encode a value into a buffer and cut it to the text; return False if it is too short.

    Its view keeps msgspec from enlarging it.
    """
    with memoryview(text):
        try:
            encode_json_into(value, text)
        except BufferError as error:
            raise_interruption(error)
            if not is_overflow(error):
                raise
            return False
    return True


def is_overflow(error: BufferError) -> bool:
    """Return whether msgspec met the end of the buffer; an object of the data may fail likewise."""
    return str(error).startswith("Existing exports of data")


def is_too_deep(text: bytes | bytearray) -> bool:
    """Return whether a text is nested beyond the bound."""
    return (
        len(text) > c.MAX_DATA_DEPTH
        and text.count(b"[") + text.count(b"{") > c.MAX_DATA_DEPTH
        and tolerant_json.depth_of(text) > c.MAX_DATA_DEPTH
    )


def encode_tolerantly(name: str, data: object) -> bytes:
    """Return the JSON text of data that msgspec's encoder refused.

    Raises RecordError that names the record and the path of the part that can't be encoded.
    """
    try:
        return tolerant_json.encode(data)
    except Exception as error:  # whatever a user's own type raises belongs to this record
        raise_interruption(error)
        remedy = ""
        if "Encoding objects of type" in str(error):
            remedy = "; convert it to a dict, list, str or another type that msgspec encodes"
        raise RecordError(
            f"record {shorten(name)}: data can't be encoded: {error}{remedy}", name=name
        ) from error


def decode_tolerantly(name: str, version: int, raw: bytes) -> Any:
    """Return the value of JSON text that msgspec's decoder refused.

    Raises RecordDamaged if it isn't JSON.
    """
    try:
        return tolerant_json.decode(raw)
    except ValueError as error:
        raise_interruption(error)
        raise RecordDamaged(
            f"record {shorten(name)}, version {version}: the stored data isn't JSON: {error}; "
            "set or delete the record to repair it",
            name=name,
        ) from error


def _new_decoder(type_: Any) -> Callable[[bytes], Any]:
    if is_model(type_):
        return type_.model_validate_json  # type: ignore[no-any-return] # pydantic's
    if isinstance(type_, (str, bytes)):
        raise TypeError(
            f"type must be a class or another type, not the text {shorten(type_)}; write the type "
            "itself, and get_bulk reads several records"
        )
    try:
        return msgspec.json.Decoder(type_, dec_hook=decode_model).decode
    except TypeError as error:
        raise_interruption(error)
        if str(error) == f"Type '{type_!r}' is not supported":
            wrong = (
                f"type must be a class or another type that msgspec decodes, not {shorten(type_)}"
            )
        else:  # a part of the type, or a union of types
            wrong = (
                f"type={shorten(type_)}: {error}; give a class or another type that msgspec decodes"
            )
        raise TypeError(wrong) from error


_known_decoder = lru_cache(maxsize=256)(_new_decoder)


def decoder_of(type_: Any) -> Callable[[bytes], Any]:
    """Return a function that decodes JSON text into a type.

    Raises TypeError if msgspec doesn't know the type.
    """
    try:
        return _known_decoder(type_)
    except TypeError as error:
        raise_interruption(error)
        # The type, or an annotation in it, has no hash; or msgspec refuses it, as it does here.
        return _new_decoder(type_)


def decode_as(name: str, version: int, raw: bytes, type_: Any) -> Any:
    """Return JSON text decoded into ``type_``, which msgspec knows.

    Raises RecordDamaged, with the path of the part that doesn't fit, or for invalid JSON, and
    TypeError if msgspec doesn't know the type.
    """
    decode = decoder_of(type_)
    try:
        return decode(raw)
    except MemoryError:
        raise
    except Exception as error:  # msgspec passes on any exception of a user's own type
        raise_interruption(error)
        value = decode_tolerantly(name, version, raw)
    try:
        # In JSON, the keys of a dict[int, ...] are text.
        return msgspec.convert(value, type_, str_keys=True, dec_hook=decode_model)
    except MemoryError:
        raise
    except Exception as error:
        raise_interruption(error)
        reason = error if isinstance(error, msgspec.ValidationError) else shorten(error)
        raise RecordDamaged(
            f"record {shorten(name)}, version {version}: {reason}", name=name
        ) from error
