"""Messages and the queues of their subscribers; the pure twin of ``message.pxi``.

Only the envelope of a push is read: the sender and the addressee. The message itself stays bytes
until its data is read.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Final, NoReturn, TypeVar, overload

import msgspec

from .._interruptions import raise_interruption
from ..errors import shorten
from . import envelope as e
from . import json_text

T = TypeVar("T")

# An envelope as JSON.stringify writes it, up to the message; names without an escape.
_SIMPLE: Final = re.compile(
    b'%b([^"\\\\]*)"(?:%b([^"\\\\]*)")?%b(?=\\{)' % tuple(map(re.escape, (e.FROM, e.TO, e.BODY)))
)
_decode_json = msgspec.json.Decoder().decode


class Message:
    """One message of another server: immutable, with its JSON decoded on first access.

    ``topic`` is the topic on which it came, ``sender`` the name of the server that sent it, and
    ``raw`` its JSON text in bytes. A message can be read as the mapping that it holds:
    ``message["name"]``.
    """

    __slots__ = ("_data", "_payload", "_raw", "_start", "sender", "topic")

    topic: int
    sender: str
    _raw: bytes | None
    _payload: bytes | None
    _start: int
    _data: dict[None, Any]  # as of a Record

    def __init__(self, topic: int, sender: str, raw: bytes) -> None:
        _fill(self, topic, sender, raw, None, 0)

    @property
    def raw(self) -> bytes:
        """The JSON text of the message, without its envelope, in bytes."""
        raw = self._raw
        if raw is None:
            assert self._payload is not None
            raw = self._payload[self._start : -1]
            object.__setattr__(self, "_raw", raw)
        return raw

    @property
    def data(self) -> Any:
        """The decoded JSON: decoded on first access, and shared by all receivers of this message.

        Raises MessageError if the text isn't valid JSON.
        """
        known = self._data
        if known:
            return known[None]
        raw = self.raw
        try:
            data = _decode_json(raw)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise_interruption(error)
            data = e.decode_tolerantly(self.topic, self.sender, raw, self._payload)
        return known.setdefault(None, data)

    @overload
    def decode(self, type: type[T], /) -> T: ...
    @overload
    def decode(self, type: Any, /) -> Any: ...
    def decode(self, type: Any, /) -> Any:
        """Return the data as ``type``: a ``msgspec.Struct``, dataclass or other type of msgspec's.

        Raises MessageError, with the path of the mismatch, if the data doesn't fit, or if the text
        isn't valid JSON.
        """
        return e.decode_as(self.topic, self.sender, self.raw, self._payload, type)

    def get(self, key: str, default: Any = None, /) -> Any:
        """Return one member of the data, or ``default`` if there is none."""
        return self.data.get(key, default)

    def keys(self) -> KeysView[str]:
        """Return the names of the data's members."""
        return self.data.keys()  # type: ignore[no-any-return] # JSON

    def values(self) -> ValuesView[Any]:
        """Return the values of the data's members."""
        return self.data.values()  # type: ignore[no-any-return] # JSON

    def items(self) -> ItemsView[str, Any]:
        """Return the names of the data's members with their values."""
        return self.data.items()  # type: ignore[no-any-return] # JSON

    def __getitem__(self, key: Any, /) -> Any:
        return self.data[key]

    def __contains__(self, key: object, /) -> bool:
        return key in self.data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return self.data == other if isinstance(other, dict) else NotImplemented
        return (self.topic, self.sender, self.raw) == (other.topic, other.sender, other.raw)

    def __hash__(self) -> int:
        return hash((self.topic, self.sender, self.raw))

    def __repr__(self) -> str:
        return f"Message({self.topic}, {shorten(self.sender)}, {shorten(self.raw)})"

    def __reduce__(self) -> tuple[Any, ...]:
        from .._backend import make_message

        return (make_message, (self.topic, self.sender, self.raw))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Message is immutable: {name} can't be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Message is immutable: {name} can't be deleted")


Mapping.register(Message)


def _fill(
    message: Message, topic: int, sender: str, raw: bytes | None, payload: bytes | None, start: int
) -> None:
    set_field = object.__setattr__
    set_field(message, "topic", topic)
    set_field(message, "sender", sender)
    set_field(message, "_raw", raw)
    set_field(message, "_payload", payload)
    set_field(message, "_start", start)
    set_field(message, "_data", {})


class SubscriberQueue:
    """Messages that wait for one subscriber, at most ``max_pending``.

    ``wake`` is called for the first message that arrives while the subscriber isn't ``awake``. The
    subscriber clears ``awake`` when it has taken all messages. When the queue is full, ``overflow``
    says which message is dropped, and ``dropped`` counts it. A queue that ``is_shut`` takes no more
    messages.
    """

    def __init__(self, wake: Callable[[], object], max_pending: int, overflow: int) -> None:
        self.messages: deque[Message] = deque()
        self.awake = False
        self.is_shut = False
        self.dropped = 0
        self.received = 0
        self._wake = wake
        self._max_pending = max_pending
        self._overflow = overflow

    def put(self, message: Message) -> None:
        """Add a message, unless the queue is shut or ``overflow`` drops it."""
        if self.is_shut:
            return
        self.received += 1
        if len(self.messages) >= self._max_pending:
            self.dropped += 1
            if self._overflow == e.DROP_NEWEST:
                return
            if self._overflow == e.DISCONNECT:
                self.is_shut = True
            else:
                self.messages.popleft()
        if not self.is_shut:
            self.messages.append(message)
        if not self.awake:
            self._wake()
            self.awake = True  # behind it, as it may raise


class MessageDispatcher:
    """Gives each message that is pushed to one server to its subscribers of the topic.

    ``on_ended`` is called with the pipeline and the push when a server ends a subscription by
    itself. ``on_damaged`` is called with a topic and a payload that is no envelope. ``on_own`` is
    called with the topic of a message from the server of this name. ``is_crowded`` returns whether
    the subscribers have enough to do.

    A message belongs to the topic that it states, as in deepstream's connector. One that states
    none, which only Python sends, belongs to its channel.
    """

    def __init__(
        self,
        server_name: str,
        on_ended: Callable[[Any, list[Any]], object],
        on_damaged: Callable[[int, bytes], object],
        is_crowded: Callable[[], bool] = lambda: False,
        on_own: Callable[[int], object] = lambda topic: None,
    ) -> None:
        self.is_crowded = is_crowded
        self._name = server_name
        self._own = server_name.encode()
        self.on_ended = on_ended
        self._on_damaged = on_damaged
        self._on_own = on_own
        self._topics: dict[bytes, tuple[int, list[SubscriberQueue]]] = {}
        self._counts = dict.fromkeys(("received", "own", "foreign", "unwanted", "damaged"), 0)

    def join(self, topic: int, queue: SubscriberQueue) -> None:
        """Give a queue the messages of a topic from now on."""
        self._topics.setdefault(b"%d" % topic, (topic, []))[1].append(queue)

    def leave(self, topic: int, queue: SubscriberQueue) -> bool:
        """Give a queue no more messages of a topic; return whether it was the last of the topic."""
        channel = b"%d" % topic
        queues = self._topics[channel][1]
        queues.remove(queue)
        if not queues:
            del self._topics[channel]
        return not queues

    def stats(self) -> dict[str, int]:
        """Return the counts of messages: delivered, own, for others, without subscribers."""
        return dict(self._counts)

    def take(self, channel: bytes, payload: bytes) -> None:
        """Give a message to its subscribers."""
        counts = self._counts
        found = self._topics.get(channel)
        if found is None:
            counts["unwanted"] += 1
            return
        topic, queues = found
        message = self._open(topic, payload)
        if message is None:
            return
        text = message.raw if message._payload is None else message._payload
        if not text.startswith(b'{"topic":%b,' % channel, message._start):
            stated = e.stated_topic(topic, message)
            if stated != topic:
                found = self._topics.get(b"%d" % stated)
                if found is None:
                    counts["unwanted"] += 1
                    return
                message = Message(stated, message.sender, message.raw)
                queues = found[1]
        counts["received"] += 1
        # One that is disconnected leaves the list.
        for queue in queues if len(queues) == 1 else list(queues):
            queue.put(message)

    def _open(self, topic: int, payload: bytes) -> Message | None:
        """Return the message of an envelope, unless it is from here or for others."""
        simple = _SIMPLE.match(payload) if payload.endswith(b"}}") else None
        if simple is None:
            return self._read(topic, payload)
        sender, to = simple.groups()
        if sender == self._own:
            self._counts["own"] += 1
            self._on_own(topic)
            return None
        if to is not None and to != self._own:
            self._counts["foreign"] += 1
            return None
        message = Message.__new__(Message)
        _fill(message, topic, sender.decode("utf-8", "replace"), None, payload, simple.end())
        return message

    def _read(self, topic: int, payload: bytes) -> Message | None:
        """Do as ``_open``, with an envelope that JSON.stringify doesn't write."""
        opened = e.read(payload)
        if opened is None:
            self._counts["damaged"] += 1
            self._on_damaged(topic, payload)
            return None
        sender, to, raw = opened
        if sender == self._name:
            self._counts["own"] += 1
            self._on_own(topic)
            return None
        if to is not msgspec.UNSET and to != self._name:
            self._counts["foreign"] += 1
            return None
        return Message(topic, sender, raw)


def pack_message(topic: int, opening: bytes, message: Any, sharded: bool) -> bytes:
    """Return the command that sends a message, or raise MessageError."""
    try:
        body = json_text.encode_json(message)
    except Exception as error:  # msgspec raises whatever a user's own type raises
        raise_interruption(error)
        body = e.encode_tolerantly(topic, message)
    if not body:
        raise e.empty_raw(topic)
    channel = b"%d" % topic
    command = e.SPUBLISH if sharded else e.PUBLISH
    size = len(opening) + len(body) + len(e.CLOSING)
    return b"%b$%d\r\n%b\r\n$%d\r\n%b%b}\r\n" % (
        *(command, len(channel), channel),
        *(size, opening, body),
    )
