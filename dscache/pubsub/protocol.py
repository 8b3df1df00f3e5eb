"""Topics, actions and messages of deepstream's servers, and the check of a message to them.

Servers exchange messages over ``@deepstream/clusternode-redis``. A server trusts every message: a
wrong one can end all servers, or all clients that are subscribed to its name. ``check`` refuses the
messages that no server sends. It describes server 7.0 with client 7.0. The names and numbers are
those of ``@deepstream/protobuf``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from .._interruptions import raise_interruption
from ..core import tolerant_json
from ..core.models import encode_model
from ..errors import MessageError, shorten
from .encoding import encode_text

# Clients and servers exchange versions as 32-bit integers.
MAX_VERSION: Final = 2**31 - 1


class Topic(IntEnum):
    """The topic of a message, which is the channel it is published on."""

    UNKNOWN = 0
    PARSER = 1
    CONNECTION = 2
    AUTH = 3
    EVENT = 4
    RECORD = 5
    RPC = 6
    PRESENCE = 7
    MONITORING = 8
    CLUSTER = 9
    LOCK = 10
    STATE_REGISTRY = 11
    ERROR = 100


class Registry(IntEnum):
    """A registry: names, and the servers that have each. A message has it as ``registryTopic``.

    ``RECORD_LISTENING`` and ``EVENT_LISTENING`` are topics of messages too.
    """

    SUBSCRIPTIONS = 9
    ONLINE_USERS = 10
    EVENT_SUBSCRIPTIONS = 11
    RECORD_SUBSCRIPTIONS = 12
    RPC_SUBSCRIPTIONS = 13
    PRESENCE_SUBSCRIPTIONS = 14
    RECORD_LISTEN_PATTERNS = 15
    EVENT_LISTEN_PATTERNS = 16
    RECORD_PUBLISHED_SUBSCRIPTIONS = 17
    EVENT_PUBLISHED_SUBSCRIPTIONS = 18
    RECORD_LISTENING = 19
    EVENT_LISTENING = 20
    STATE_REGISTRY = 21
    MONITORING_SUBSCRIPTIONS = 24


class EventAction(IntEnum):
    """Actions on Topic.EVENT."""

    UNKNOWN = 0
    ERROR = 1
    EMIT = 2
    SUBSCRIBE = 3
    UNSUBSCRIBE = 4
    LISTEN = 5
    UNLISTEN = 6
    LISTEN_ACCEPT = 7
    LISTEN_REJECT = 8
    SUBSCRIPTION_HAS_PROVIDER = 9
    SUBSCRIPTION_HAS_NO_PROVIDER = 10
    SUBSCRIPTION_FOR_PATTERN_FOUND = 11
    SUBSCRIPTION_FOR_PATTERN_REMOVED = 12
    INVALID_LISTEN_REGEX = 100
    LISTEN_RESPONSE_TIMEOUT = 101
    LISTEN_UNSUCCESSFUL = 102
    MESSAGE_PERMISSION_ERROR = 103
    MESSAGE_DENIED = 104
    INVALID_MESSAGE_DATA = 105
    MULTIPLE_SUBSCRIPTIONS = 106
    NOT_SUBSCRIBED = 107


class RecordAction(IntEnum):
    """Actions on Topic.RECORD."""

    UNKNOWN = 0
    ERROR = 1
    NOTIFY = 2
    READ = 3
    READ_RESPONSE = 4
    HEAD = 5
    HEAD_RESPONSE = 6
    HEAD_BULK = 7
    HEAD_RESPONSE_BULK = 8
    DELETE = 9
    DELETE_SUCCESS = 10
    DELETE_BULK = 11
    DELETE_BULK_SUCCESS = 12
    DELETED = 13
    WRITE_ACKNOWLEDGEMENT = 14
    CREATE = 15
    CREATEANDUPDATE = 16
    CREATEANDPATCH = 17
    UPDATE = 18
    PATCH = 19
    ERASE = 20
    SUBSCRIBEANDHEAD = 21
    SUBSCRIBEANDREAD = 22
    SUBSCRIBECREATEANDREAD = 23
    SUBSCRIBECREATEANDUPDATE = 24
    SUBSCRIBE = 25
    UNSUBSCRIBE = 26
    LISTEN = 27
    UNLISTEN = 28
    LISTEN_ACCEPT = 29
    LISTEN_REJECT = 30
    SUBSCRIPTION_HAS_PROVIDER = 31
    SUBSCRIPTION_HAS_NO_PROVIDER = 32
    SUBSCRIPTION_FOR_PATTERN_FOUND = 33
    SUBSCRIPTION_FOR_PATTERN_REMOVED = 34
    CACHE_RETRIEVAL_TIMEOUT = 100
    STORAGE_RETRIEVAL_TIMEOUT = 101
    VERSION_EXISTS = 102
    RECORD_LOAD_ERROR = 103
    RECORD_CREATE_ERROR = 104
    RECORD_UPDATE_ERROR = 105
    RECORD_DELETE_ERROR = 106
    RECORD_NOT_FOUND = 107
    INVALID_VERSION = 108
    INVALID_PATCH_ON_HOTPATH = 109
    INVALID_LISTEN_REGEX = 110
    LISTEN_RESPONSE_TIMEOUT = 111
    LISTEN_UNSUCCESSFUL = 112
    RECORD_NOTIFY_ERROR = 113
    MESSAGE_PERMISSION_ERROR = 114
    MESSAGE_DENIED = 115
    INVALID_MESSAGE_DATA = 116
    MULTIPLE_SUBSCRIPTIONS = 117
    NOT_SUBSCRIBED = 118


class RPCAction(IntEnum):
    """Actions on Topic.RPC."""

    UNKNOWN = 0
    ERROR = 1
    REQUEST = 2
    ACCEPT = 4
    RESPONSE = 5
    REJECT = 6
    REQUEST_ERROR = 7
    PROVIDE = 8
    UNPROVIDE = 9
    NO_RPC_PROVIDER = 100
    ACCEPT_TIMEOUT = 101
    MULTIPLE_ACCEPT = 102
    INVALID_RPC_CORRELATION_ID = 103
    RESPONSE_TIMEOUT = 104
    MULTIPLE_RESPONSE = 105
    MESSAGE_PERMISSION_ERROR = 106
    MESSAGE_DENIED = 107
    INVALID_MESSAGE_DATA = 108
    MULTIPLE_PROVIDERS = 109
    NOT_PROVIDED = 110


class PresenceAction(IntEnum):
    """Actions on Topic.PRESENCE, between clients and servers alone."""

    UNKNOWN = 0
    ERROR = 1
    QUERY_ALL = 2
    QUERY_ALL_RESPONSE = 3
    QUERY = 4
    QUERY_RESPONSE = 5
    PRESENCE_JOIN = 6
    PRESENCE_JOIN_ALL = 7
    PRESENCE_LEAVE = 8
    PRESENCE_LEAVE_ALL = 9
    SUBSCRIBE = 10
    UNSUBSCRIBE = 11
    SUBSCRIBE_ALL = 12
    UNSUBSCRIBE_ALL = 13
    INVALID_PRESENCE_USERS = 100
    MESSAGE_PERMISSION_ERROR = 101
    MESSAGE_DENIED = 102
    MULTIPLE_SUBSCRIPTIONS = 103
    NOT_SUBSCRIBED = 104


class ClusterAction(IntEnum):
    """Actions on Topic.CLUSTER."""

    REMOVE = 1
    STATUS = 2


class LockAction(IntEnum):
    """Actions on Topic.LOCK."""

    UNKNOWN = 0
    ERROR = 1
    REQUEST = 2
    RESPONSE = 3
    RELEASE = 4


class StateAction(IntEnum):
    """Actions on Topic.STATE_REGISTRY."""

    UNKNOWN = 0
    ERROR = 1
    ADD = 2
    REMOVE = 3
    REQUEST_FULL_STATE = 4
    FULL_STATE = 5
    CHECKSUM = 6


# -- messages


class _Struct(msgspec.Struct, kw_only=True, rename="camel", frozen=True):
    pass


class Emit(_Struct, frozen=True):
    """An event; ``data`` is JSON text."""

    name: str
    data: str | UnsetType = UNSET
    topic: Topic = Topic.EVENT
    action: EventAction = EventAction.EMIT


class Notify(_Struct, frozen=True):
    """Have servers read records again, and tell their subscribers."""

    names: list[str]
    topic: Topic = Topic.RECORD
    action: RecordAction = RecordAction.NOTIFY


class Update(_Struct, frozen=True):
    """A record was written; ``data`` is the JSON text of an object or array."""

    name: str
    version: int
    data: str
    topic: Topic = Topic.RECORD
    action: RecordAction = RecordAction.UPDATE


class Deleted(_Struct, frozen=True):
    """A record was deleted."""

    name: str
    topic: Topic = Topic.RECORD
    action: RecordAction = RecordAction.DELETED


class RPCMessage(_Struct, frozen=True):
    """A step of a remote procedure call; ``data`` is JSON text."""

    name: str
    correlation_id: str
    action: RPCAction
    data: str | UnsetType = UNSET
    topic: Topic = Topic.RPC


class Status(_Struct, frozen=True):
    """A server is alive. With a ``leader_score`` of at most 0 it is never elected leader."""

    server_name: str
    leader_score: float = -1
    role: str = "deepstream"
    topic: Topic = Topic.CLUSTER
    action: ClusterAction = ClusterAction.STATUS


class Leave(_Struct, frozen=True):
    """A server leaves."""

    server_name: str
    topic: Topic = Topic.CLUSTER
    action: ClusterAction = ClusterAction.REMOVE


class RegistryEntry(_Struct, frozen=True):
    """A server has a name in a registry from now on, or no longer."""

    registry_topic: Registry
    action: StateAction
    name: str
    topic: Topic = Topic.STATE_REGISTRY


class RegistryChecksum(_Struct, frozen=True):
    """The sum of the checksums of all names that a server has in a registry."""

    registry_topic: Registry
    checksum: int | float
    topic: Topic = Topic.STATE_REGISTRY
    action: StateAction = StateAction.CHECKSUM


class FullStateRequest(_Struct, frozen=True):
    """Ask a server for all names that it has in a registry."""

    registry_topic: Registry
    topic: Topic = Topic.STATE_REGISTRY
    action: StateAction = StateAction.REQUEST_FULL_STATE


class FullState(_Struct, frozen=True):
    """All names that a server has in a registry."""

    registry_topic: Registry
    full_state: list[str]
    topic: Topic = Topic.STATE_REGISTRY
    action: StateAction = StateAction.FULL_STATE


# -- the check

# Types whose values hold no others.
_PLAIN: Final = frozenset((str, int, float, bool, type(None)))

_decode_json: Final = msgspec.json.Decoder().decode
# Checks the text without making objects of it.
_skip: Final = msgspec.json.Decoder(msgspec.Raw).decode


def _decode(text: str | bytes) -> Any:
    """Return the value of a JSON text; raises ValueError or RecursionError."""
    try:
        return _decode_json(text)
    except (ValueError, RecursionError) as error:
        raise_interruption(error)
        # JavaScript takes more, such as lone surrogates.
        return tolerant_json.decode(text.encode() if isinstance(text, str) else bytes(text))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_name, value))


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_version(value: object) -> bool:
    return _is_int(value) and 0 <= value <= MAX_VERSION  # type: ignore[operator] # an int


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and value - value == 0)


def _is_score(value: object) -> bool:
    return _is_number(value) and value <= 0  # type: ignore[operator] # a number


def _is_registry(value: object) -> bool:
    return _is_int(value) and value in _REGISTRIES


_REGISTRIES: Final = frozenset(map(int, Registry))

# Values of each field, wherever it stands. Servers write them into messages of fixed types.
_Kind = tuple[Callable[[object], bool], str]
_NAME: Final[_Kind] = (_is_name, "a text that is not empty")
_FIELDS: Final[dict[str, _Kind]] = {
    "name": _NAME,
    "names": (_is_texts, "a list of names"),
    "correlationId": _NAME,
    "path": _NAME,
    "subscription": _NAME,
    "serverName": _NAME,
    "version": (_is_version, f"an int from 0 to {MAX_VERSION}"),
    "isError": (_is_bool, "a bool"),
    "isAck": (_is_bool, "a bool"),
    "isWriteAck": (_is_bool, "a bool"),
    "reason": (_is_text, "a text"),
    "role": (_is_text, "a text"),
    "requestorName": (_is_text, "a text"),
    "originalTopic": (_is_int, "an int"),
    "originalAction": (_is_int, "an int"),
    "registryTopic": (_is_registry, "the number of a registry (see Registry)"),
    "fullState": (_is_texts, "a list of texts"),
    "checksum": (_is_number, "a number"),
    "leaderScore": (
        _is_score,
        "a number of at most 0, or servers elect this process and ask it for locks",
    ),
}


class _Topic(msgspec.Struct, frozen=True):
    """The messages that servers accept on a topic."""

    topic: Topic | Registry
    actions: type[IntEnum]
    """The enumeration of its actions."""
    required: dict[int, tuple[str, ...]]
    """The actions that servers send each other, and the fields that each must have."""


_RPC: Final = ("name", "correlationId")
_REGISTRY: Final = ("registryTopic",)
_UPDATE: Final = int(RecordAction.UPDATE)
_RECORD: Final = _Topic(
    Topic.RECORD,
    RecordAction,
    {
        RecordAction.NOTIFY: ("names",),
        RecordAction.UPDATE: ("name", "version", "data"),
        RecordAction.PATCH: ("name", "version", "path", "data"),
        RecordAction.ERASE: ("name", "version", "path"),
        RecordAction.DELETED: ("name",),
    },
)
_TOPICS: Final[dict[int, _Topic]] = {
    int(rules.topic): rules
    for rules in (
        _Topic(Topic.EVENT, EventAction, {EventAction.EMIT: ("name",)}),
        _RECORD,
        _Topic(
            Topic.RPC,
            RPCAction,
            {
                RPCAction.REQUEST: _RPC,
                RPCAction.ACCEPT: _RPC,
                RPCAction.RESPONSE: _RPC,
                RPCAction.REJECT: _RPC,
                RPCAction.REQUEST_ERROR: _RPC,
                RPCAction.NO_RPC_PROVIDER: _RPC,
                RPCAction.ACCEPT_TIMEOUT: _RPC,
                RPCAction.RESPONSE_TIMEOUT: _RPC,
                RPCAction.MULTIPLE_ACCEPT: _RPC,
            },
        ),
        # Servers send nothing here: all of it is between a client and its server.
        _Topic(Topic.PRESENCE, PresenceAction, {}),
        _Topic(
            Topic.CLUSTER,
            ClusterAction,
            {
                ClusterAction.STATUS: ("serverName", "leaderScore"),
                ClusterAction.REMOVE: ("serverName",),
            },
        ),
        # The leader grants locks, and this process must not become it.
        _Topic(Topic.LOCK, LockAction, {}),
        _Topic(
            Topic.STATE_REGISTRY,
            StateAction,
            {
                StateAction.ADD: (*_REGISTRY, "name"),
                StateAction.REMOVE: (*_REGISTRY, "name"),
                StateAction.REQUEST_FULL_STATE: _REGISTRY,
                StateAction.FULL_STATE: (*_REGISTRY, "fullState"),
                StateAction.CHECKSUM: (*_REGISTRY, "checksum"),
            },
        ),
        _Topic(
            Registry.RECORD_LISTENING,
            RecordAction,
            {RecordAction.LISTEN_UNSUCCESSFUL: ("subscription",)},
        ),
        _Topic(
            Registry.EVENT_LISTENING,
            EventAction,
            {EventAction.LISTEN_UNSUCCESSFUL: ("subscription",)},
        ),
    )
}

CHECKED_TOPICS: Final = frozenset(_TOPICS)
"""The topics on which deepstream's servers take messages from each other."""


def check(message: Any, topic: int | None = None) -> None:
    """Raise MessageError if deepstream's servers or clients could fail on a message.

    ``message`` is a mapping, a Struct, a dataclass, or ``msgspec.Raw`` with JSON text. ``topic`` is
    its channel, by default the topic that it states. On a topic that deepstream doesn't use, any
    message passes. The text of the error names the field. The rules are those of server 7.0 with
    client 7.0.
    """
    if type(message) is not dict:
        message = _as_mapping(message, topic)
    stated = message.get("topic")
    if topic is None:
        topic = stated
    if not _is_int(topic) or topic not in _TOPICS:
        return
    rules = _TOPICS[topic]
    if stated != topic or not _is_int(stated):
        raise _error(rules, f"topic must be {topic:d} in the message too, not {shorten(stated)}")
    action = message.get("action")
    required = rules.required.get(action) if _is_int(action) else None
    if required is None:
        raise _error(rules, _wrong_action(rules, action))
    # The JSON of values that hold others: any of them may be a msgspec.Raw.
    texts: dict[str, str] = {}
    for field in required:
        if field not in message and (field != "data" or "parsedData" not in message):
            raise _error(rules, f"{field} is missing{_hint(field, message)}", action)
    if "names" in required and not _is_names(message["names"]):
        wrong = f"names must be a list of names that is not empty, not {shorten(message['names'])}"
        raise _error(rules, wrong, action)
    for field, value in message.items():
        if (rule := _FIELDS.get(field)) is not None:
            if not rule[0](value):
                raise _error(rules, f"{field} must be {rule[1]}, not {shorten(value)}", action)
        elif type(value) not in _PLAIN and field != "data":
            try:
                texts[field] = encode_text(f"{field} of the message", value)
            except MessageError as error:
                raise _error(rules, str(error), action) from None
    if (bad := _wrong_data(message, action == _UPDATE and rules is _RECORD, texts)) is not None:
        raise _error(rules, bad, action)


def _error(rules: _Topic, text: str, action: int | None = None) -> MessageError:
    named = "" if action is None else f", {rules.actions(action).name}"
    return MessageError(f"message on topic {rules.topic:d} ({rules.topic.name}{named}): {text}")


def _wrong_data(
    message: Mapping[str, Any], must_be_record: bool, texts: Mapping[str, str]
) -> str | None:
    """Return a text about data that clients can't read, or None."""
    field = "data"
    text = message.get("data", UNSET)
    if text is not UNSET:
        remedy = "; write data=json.dumps(value), or parsedData=value"
        if not isinstance(text, str):
            return f"data must be JSON text, not {shorten(text)}{remedy}"
        try:
            _skip(text)
        except (ValueError, RecursionError) as error:
            raise_interruption(error)
            try:
                # JavaScript takes more, such as lone surrogates.
                tolerant_json.decode(text.encode())
            except ValueError as refusal:
                raise_interruption(refusal)
                return f"data must be JSON text, not {shorten(text)} ({refusal}){remedy}"
    if "parsedData" in message:
        field, text = "parsedData", texts.get("parsedData", UNSET)
    if must_be_record and (text is UNSET or text.lstrip()[:1] not in ("{", "[")):
        shown = shorten(message.get(field))
        return f"{field} must be an object or an array, as a record's data is, not {shown}"
    return None


def _wrong_action(rules: _Topic, action: object) -> str:
    known = ", ".join(f"{rules.actions(one).name} {one:d}" for one in rules.required)
    shown = shorten(action)
    if _is_int(action) and action in set(rules.actions):
        named = next(one for one in rules.actions if one == action)
        shown = f"{named.name} {named:d}"
    if not known:
        return f"action {shown}: servers take no message here"
    if action is None:
        return f"action is missing; servers take {known}"
    return f"action must be one that servers take, {known}, not {shown}"


def _hint(field: str, message: Mapping[str, Any]) -> str:
    other = {"names": "name", "name": "names", "serverName": "name"}.get(field)
    if other in message:
        return f"; {other} is not enough"
    if field == "data":
        return "; write data=json.dumps(value), or parsedData=value"
    return ""


def _as_mapping(message: Any, topic: int | None) -> Mapping[str, Any]:
    """Return the fields of a message as they will be in its JSON text."""
    if isinstance(message, msgspec.Raw):
        try:
            message = _decode(message)
        except (ValueError, RecursionError) as error:
            raise_interruption(error)
            raise MessageError(f"message on topic {topic}: it isn't JSON: {error}") from None
    elif not isinstance(message, Mapping):
        try:
            message = msgspec.to_builtins(
                message, builtin_types=(msgspec.Raw,), str_keys=True, enc_hook=encode_model
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise_interruption(error)
            raise MessageError(f"message on topic {topic}: it can't be encoded: {error}") from None
    if not isinstance(message, Mapping):
        if topic in _TOPICS:
            raise MessageError(
                f"message on topic {topic}: it must be an object, not {shorten(message)}"
            )
        return {}
    return message
