"""Events: messages by name, to clients and peers that are subscribed at that moment."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import msgspec
from msgspec import UNSET, UnsetType

from ..core import envelope
from ..core.failures import closed
from ..errors import MessageError, Overloaded, UsageError, shorten
from ..pubsub.encoding import decode_text, encode_text
from .arrivals import Arrivals
from .patterns import check_pattern, matcher
from .protocol import Emit, EventAction, Topic

if TYPE_CHECKING:
    from ..core.pure import Message
    from ..messages import MessageNode

_logger = logging.getLogger("dscache")

Overflow = Literal["drop_oldest", "drop_newest", "disconnect"]


class Event(msgspec.Struct, frozen=True):
    """An event: its ``name``, decoded ``data``, and ``sender``, the server that it came from."""

    name: str
    data: Any
    sender: str


class _Received(msgspec.Struct, rename="camel"):
    action: int
    name: str
    data: str | UnsetType | None = UNSET
    parsed_data: Any = UNSET


class Listening(Arrivals[Event]):
    """The events of a pattern, by ``async for``; made by ``peer.events.listen``.

    It receives events from its creation until it or the peer is closed. ``dropped`` counts the
    events that were dropped because ``max_pending`` others waited.
    """

    def __init__(
        self,
        pattern: str,
        on_close: Callable[[Listening], object],
        max_pending: int,
        overflow: str,
    ) -> None:
        super().__init__("listen", on_close)
        self.pattern = pattern
        self.matches = matcher(pattern)
        self.dropped = 0
        self._max_pending = max_pending
        self._overflow = overflow
        self._events: deque[Event] = deque()
        self._is_overloaded = False

    def put(self, event: Event) -> None:
        """Add an event, unless the iteration is closed or ``overflow`` drops it."""
        if self._is_closed:
            return
        if len(self._events) >= self._max_pending:
            if not self.dropped:
                _logger.warning(
                    "events of %s are dropped: %d wait already (%s); count them by .dropped",
                    shorten(self.pattern),
                    self._max_pending,
                    self._overflow,
                )
            self.dropped += 1
            if self._overflow == "disconnect":
                self._is_overloaded = True
                self.close()
                return
            if self._overflow == "drop_newest":
                return
            self._events.popleft()
        self._events.append(event)
        self._news.set()

    def _has_waiting(self) -> bool:
        return bool(self._events)

    def _take(self) -> Event:
        return self._events.popleft()

    def _check_end(self) -> None:
        if self._is_overloaded:
            self._is_overloaded = False
            raise Overloaded(
                f"{self._max_pending} events of {shorten(self.pattern)} were waiting; the "
                "subscription was ended by overflow: disconnect"
            )


class Events:
    """The events of a peer: ``peer.events``."""

    def __init__(self, node: MessageNode) -> None:
        self._node = node
        # Weak references: an iterator that its consumer drops needs no more events.
        self._listening: WeakSet[Listening] = WeakSet()
        self._unsubscribe: Callable[[], None] | None = None
        self._is_damage_logged = False
        self._is_closed = False
        self.emitted = self.received = self.damaged = 0

    async def emit(self, name: str, data: Any = None) -> int:
        """Emit an event to all servers; the result is the number of receiving connections.

        The servers pass the event on to clients that are subscribed to its name. The listeners of
        this peer get it too. ``data`` is any value that msgspec encodes.

        Raises MessageError for a bad name or data. The call also raises the errors of
        ``MessageNode.send``.
        """
        self._check_open()
        if not isinstance(name, str) or not name:
            raise MessageError(
                f"emit: the name of an event must be a text that is not empty, not {shorten(name)}"
            )
        text = encode_text(f"emit {shorten(name)}: the data", data)
        sent = self._node.send(Emit(name=name, data=text), unchecked=True)  # it has been checked
        self.emitted += 1
        if any(one.matches(name) for one in self._listening):
            self._deliver(name, decode_text("emit", text, UNSET), self._node.server_name)
        return await sent

    def listen(
        self, pattern: str, *, max_pending: int | None = None, overflow: Overflow | None = None
    ) -> Listening:
        """Return an iterator over the events whose names match: ``async for event in ...``.

        In the pattern ``*`` stands for any text, and ``?`` for one character. At most
        ``max_pending`` events wait to be taken. ``overflow`` decides about further ones:
        "drop_oldest", "drop_newest", or "disconnect", which makes the iteration raise Overloaded.
        Both default to the configuration. Redis has the subscription once ``peer.when_ready()``
        returns.

        Raises UsageError for a bad argument.
        """
        self._check_open()
        check_pattern("listen", pattern)
        options = self._node.config.options
        limit = options.max_pending if max_pending is None else max_pending
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise UsageError(f"listen: max_pending must be at least 1, not {shorten(limit)}")
        policy = options.overflow if overflow is None else overflow
        if policy not in envelope.OVERFLOWS:
            known = ", ".join(envelope.OVERFLOWS)
            raise UsageError(f"listen: overflow must be one of {known}, not {shorten(policy)}")
        if self._unsubscribe is None:
            self._unsubscribe = self._node.subscribe(Topic.EVENT, self._on_message)
        opened = Listening(pattern, self._forget, limit, policy)
        self._listening.add(opened)
        return opened

    def _forget(self, listening: Listening) -> None:
        self._listening.discard(listening)
        self._end_unused()

    def _end_unused(self) -> None:
        if not self._listening and self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def _on_message(self, message: Message, sender: str) -> None:
        if not self._listening:
            self._end_unused()  # the last iterator was dropped
            return
        try:
            received = message.decode(_Received)
            if received.action != EventAction.EMIT:
                return
            if not any(one.matches(received.name) for one in self._listening):
                return
            shown = f"event {shorten(received.name)} from {shorten(sender)}"
            data = decode_text(shown, received.data, received.parsed_data)
        except MessageError as error:
            self.damaged += 1
            if not self._is_damage_logged:
                self._is_damage_logged = True
                _logger.warning("an event was ignored; further ones are only counted: %s", error)
            return
        self._deliver(received.name, data, sender)

    def _deliver(self, name: str, data: Any, sender: str) -> None:
        self.received += 1
        event = Event(name, data, sender)
        for one in list(self._listening):
            if one.matches(name):
                one.put(event)

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed("peer")

    def close(self) -> None:
        """End all iterations."""
        self._is_closed = True
        for one in list(self._listening):
            one.close()

    def stats(self) -> dict[str, int]:
        """Return the counts of events."""
        return {
            "events_emitted": self.emitted,
            "events_received": self.received,
            "events_damaged": self.damaged,
            "listening": len(self._listening),
        }
