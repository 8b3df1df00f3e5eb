"""Topics, envelopes and errors of messages, shared by both cores.

A message travels as ``{"fromServer":"A","message":{...}}``, to one server alone as
``{"fromServer":"A","toServer":"B","message":{...}}``, on a channel called like its topic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from .._interruptions import raise_interruption
from ..errors import MessageError, shorten
from . import json_text, tolerant_json

# Topics are small integers, so that a channel is one as JavaScript and any server write it.
MAX_TOPIC: Final = 2**31 - 1

# The texts around the names in an envelope as JSON.stringify writes it.
FROM: Final = b'{"fromServer":"'
TO: Final = b',"toServer":"'
BODY: Final = b',"message":'
CLOSING: Final = b"}"

PUBLISH: Final = b"*3\r\n$7\r\nPUBLISH\r\n"
SPUBLISH: Final = b"*3\r\n$8\r\nSPUBLISH\r\n"
# The kinds of push that bring a message, and those that answer for a subscription.
MESSAGES: Final = (b"message", b"smessage")
SUBSCRIPTIONS: Final = (b"subscribe", b"unsubscribe", b"ssubscribe", b"sunsubscribe")

# Policies of a full queue.
OVERFLOWS: Final = ("drop_oldest", "drop_newest", "disconnect")
DROP_OLDEST: Final = 0
DROP_NEWEST: Final = 1
DISCONNECT: Final = 2

_encode = msgspec.json.Encoder().encode


class _Opened(msgspec.Struct, rename="camel"):
    from_server: str
    message: msgspec.Raw
    to_server: Any = msgspec.UNSET


_decoder = msgspec.json.Decoder(_Opened)


def envelope_prefix(server_name: str, to: str | None = None) -> bytes:
    """Return the JSON text of an envelope up to the message."""
    addressee = b"" if to is None else b',"toServer":' + _encode(to)
    return b'{"fromServer":' + _encode(server_name) + addressee + BODY


def check_server(name: object, what: str) -> str:
    """Return a server's name, or raise MessageError."""
    if not isinstance(name, str) or not name:
        raise MessageError(f"{what} must be a text that is not empty, not {shorten(name)}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise MessageError(
            f"{what} {shorten(name)} has a lone surrogate, which no server's name may have"
        ) from None
    return str.__str__(name)


def check_topic(topic: object) -> int:
    """Return a topic, or raise MessageError."""
    if not isinstance(topic, int) or isinstance(topic, bool) or not 0 <= topic <= MAX_TOPIC:
        raise MessageError(
            f"a topic must be an int from 0 to {MAX_TOPIC} (deepstream's EVENT is 4), "
            f"not {shorten(topic)}"
        )
    return int(topic)


class _Stated(msgspec.Struct):
    topic: Any = msgspec.UNSET


_decode_stated = msgspec.json.Decoder(_Stated).decode


def stated_topic(channel: int, message: Any) -> int:
    """Return the topic that a received message states; ``channel`` if it states none.

    -1 if that is no topic, so that it has no subscriber.
    """
    try:
        topic = _decode_stated(message.raw).topic
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise_interruption(error)
        try:
            data = message.data
        except MessageError:
            return channel  # its data tells the error
        topic = data.get("topic", msgspec.UNSET) if isinstance(data, dict) else msgspec.UNSET
    if topic is msgspec.UNSET:
        return channel
    if isinstance(topic, float) and topic.is_integer():
        topic = int(topic)  # JSON has one kind of number
    is_topic = isinstance(topic, int) and not isinstance(topic, bool) and 0 <= topic <= MAX_TOPIC
    return topic if is_topic else -1


def topic_of(message: object) -> int:
    """Return the topic that a message states, by key or by attribute; raises MessageError."""
    try:
        topic = message["topic"] if isinstance(message, Mapping) else message.topic  # type: ignore[attr-defined] # a bad one raises
    except (KeyError, AttributeError):
        raise MessageError(
            f"a message must have a topic, and there is none in {shorten(message)}; "
            'write {"topic": 4, ...}, or topic= where it can\'t be seen'
        ) from None
    return check_topic(topic)


def encode_tolerantly(topic: int, message: object) -> bytes:
    """Return the JSON text of a message that msgspec's encoder refused; raises MessageError."""
    try:
        return tolerant_json.encode(message)
    except Exception as error:  # whatever a user's own type raises belongs to this message
        raise_interruption(error)
        raise MessageError(f"message on topic {topic}: it can't be encoded: {error}") from error


def empty_raw(topic: int) -> MessageError:
    """Return the error for a ``msgspec.Raw`` without text."""
    return MessageError(f"message on topic {topic}: it is an empty msgspec.Raw")


def read(payload: bytes) -> tuple[str, Any, bytes] | None:
    """Return sender, addressee (UNSET for everybody) and JSON text of a message.

    None if it is no envelope. It takes any JSON: other spaces, another order, escaped names.
    """
    try:
        opened = _decoder.decode(payload)
        return opened.from_server, opened.to_server, bytes(opened.message)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise_interruption(error)
    try:
        value = tolerant_json.decode(payload)
    except ValueError as error:
        raise_interruption(error)
        return None
    if not isinstance(value, dict) or "message" not in value:
        return None
    sender = value.get("fromServer")
    if not isinstance(sender, str):
        return None
    return sender, value.get("toServer", msgspec.UNSET), tolerant_json.encode(value["message"])


def decode_tolerantly(topic: int, sender: str, raw: bytes, payload: bytes | None) -> Any:
    """Return the value of a message's text that msgspec's decoder refused.

    ``payload`` is the envelope around it, if ``raw`` was cut out of one. Raises MessageError.
    """
    try:
        if payload is None:
            return tolerant_json.decode(raw)
        # More may follow the message than the end of its envelope.
        value = tolerant_json.decode(payload)
        return value["message"]  # type: ignore[index] # a bad one raises
    except (ValueError, LookupError, TypeError) as error:
        raise_interruption(error)
        raise MessageError(
            f"message on topic {topic} from {shorten(sender)}: it isn't JSON: {error}"
        ) from error


def decode_as(topic: int, sender: str, raw: bytes, payload: bytes | None, type_: Any) -> Any:
    """Return a message's text decoded into ``type_``; raises MessageError if it doesn't fit.

    Raises TypeError if msgspec doesn't know the type.
    """
    value = decode_tolerantly(topic, sender, raw, payload)
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        raise_interruption(error)
        raise MessageError(f"message on topic {topic} from {shorten(sender)}: {error}") from error
    except TypeError as error:
        raise_interruption(error)
        json_text.decoder_of(type_)  # raises a TypeError that names the remedy
        raise


def is_plain_message(reply: Any) -> bool:
    """Return whether a reply of RESP2, which has no pushes, is a message."""
    return type(reply) is list and len(reply) == 3 and reply[0] == b"message"
