"""MessageNode: messages between servers, as deepstream's Redis connector passes them on."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self
from weakref import WeakSet

from . import _backend
from .aio.lifecycle import AsyncResource, check_loop, check_process, running_loop
from .config.messages import MessageConfig, load
from .core import envelope
from .errors import ConnectError, ConnectionLost, MessageError, shorten
from .pubsub.subscribers import Callback, Messages, Subscriber
from .pubsub.subscriptions import Subscriptions
from .pubsub.transport import MessageTransport, open_transport

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

_logger = logging.getLogger("dscache")

Overflow = Literal["drop_oldest", "drop_newest", "disconnect"]

_OWNER = "a MessageNode"
# For so many servers the beginning of what is sent to them alone is kept.
_ADDRESSEES = 1024


class MessageNode(AsyncResource):
    """One server among others that tell each other things, for one asyncio event loop.

    A message is a mapping with a ``topic``, a small integer. What is sent on a topic gets to all
    other servers that have subscribed to it at that moment, Python's and deepstream's. Redis keeps
    nothing for those who are absent: ``on_gap(since, until)`` is called when it may be that
    something was missed, with the two times in seconds since the epoch.

    An operation raises at the call: MessageError for a bad topic, message or addressee,
    ConnectionLost if the node is closed, UsageError on another event loop. The future of a message
    may end in ConnectionLost, DeadlineExceeded, ReplyError or ProtocolError, or in ConnectError if
    the server can't be used, each saying if it may have been delivered all the same. It is never
    sent a second time.
    """

    def __init__(
        self,
        config: MessageConfig,
        credentials: CredentialProvider | None = None,
        on_gap: Callable[[float, float], object] | None = None,
    ) -> None:
        self._config = config
        self._credentials = credentials
        self.on_gap = on_gap
        self._opening = envelope.envelope_prefix(config.server_name)
        self._openings: dict[str, bytes] = {}
        self._sharded = config.options.sharded
        self._publish: Any = None
        self._transport: MessageTransport | None = None
        self._inbox: Any = None
        self._subscriptions: Subscriptions | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers: dict[Any, Subscriber] = {}
        # Nobody who has dropped one wants its messages any more.
        self._readers: WeakSet[Messages] = WeakSet()
        self._pid = os.getpid()
        self._dropped = 0
        self._errors = 0
        self._damage_logged = False
        self._telling: set[asyncio.Future[Any]] = set()
        self._mailboxes: dict[Any, int] = {}
        self._closed = False

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        server_name: str | None = None,
        credentials: CredentialProvider | None = None,
        on_gap: Callable[[float, float], object] | None = None,
    ) -> Self:
        """Return a node as a file, a mapping or a URL configures it.

        ``source`` is the path of deepstream's YAML or JSON file, of which the section
        ``clusterNode`` and ``serverName`` are read, a mapping of the same shape, a URL or
        ``host:port``. ``server_name`` wins over what is written there; each server needs one of its
        own, and without any it gets one that nobody has. It connects when it is first used, or
        entered by ``async with``. Raises ConfigError.
        """
        return cls(load(source, server_name), credentials, on_gap)

    # -- messages

    def send(self, message: Any, *, topic: int | None = None) -> asyncio.Future[int]:
        """Send a message to all other servers; return how many connections Redis gave it to.

        ``message`` is anything msgspec encodes, with a ``topic``, or ``msgspec.Raw`` for text that
        is JSON already, with ``topic`` said beside it. It is encoded at the call.
        """
        return (self._publish or self._open())(  # type: ignore[no-any-return]
            topic, self._opening, message, self._sharded
        )

    def send_direct(
        self, server: str, message: Any, *, topic: int | None = None
    ) -> asyncio.Future[int]:
        """Send a message to one server; return how many connections Redis gave it to.

        It goes to all who have subscribed to its topic, and the others drop it.
        """
        opening = self._openings.get(server) or self._opening_for(server)
        return (self._publish or self._open())(  # type: ignore[no-any-return]
            topic, opening, message, self._sharded
        )

    def subscribe(
        self,
        topic: int,
        callback: Callback,
        *,
        max_pending: int | None = None,
        overflow: Overflow | None = None,
    ) -> Callable[[], None]:
        """Have ``callback(message, from_server)`` called for each message on a topic.

        Returns what ends it. What the callback returns is awaited before the next message, if it
        can be. ``max_pending`` messages may wait for it, and ``overflow`` decides on those beyond:
        by default as configured. ``when_ready`` tells when Redis has confirmed it.
        """
        topic = envelope.check_topic(topic)
        options = self._limits(max_pending, overflow)
        self._begin_if_new()
        subscriber = Subscriber(topic, callback, lambda: self._disconnect(subscriber), **options)
        self._subscribers[subscriber.mailbox] = subscriber
        self._join(topic, subscriber.mailbox)

        def unsubscribe() -> None:
            subscriber.stop()
            self._leave(subscriber.mailbox)

        return unsubscribe

    def messages(
        self,
        topic: int,
        *,
        max_pending: int | None = None,
        overflow: Overflow | None = None,
    ) -> Messages:
        """Return the messages on a topic from now on: ``async for message, sender in ...``.

        The iteration ends when the node is closed. With ``overflow="disconnect"`` it raises
        Overloaded when too many have waited.
        """
        topic = envelope.check_topic(topic)
        options = self._limits(max_pending, overflow)
        self._begin_if_new()
        mailbox: Any = None
        reader = Messages(topic, lambda: self._leave(mailbox), **options)
        mailbox = reader.mailbox
        self._join(topic, mailbox)
        self._readers.add(reader)
        return reader

    # -- what there is to know

    @property
    def server_name(self) -> str:
        """The name by which other servers know this one."""
        return self._config.server_name

    @property
    def is_ready(self) -> bool:
        """Whether messages go to the server at once, and those of every topic are heard."""
        carrier, subscriptions = self._transport, self._subscriptions
        return (
            carrier is not None
            and subscriptions is not None
            and carrier.is_ready
            and subscriptions.is_whole
        )

    @property
    def description(self) -> str:
        """What this node is and where its messages go, in one line and without passwords."""
        server = self._transport.server if self._transport is not None else ""
        what = f"message node {shorten(self.server_name)}"
        return _backend.described(what, self._config.address, server)

    def stats(self) -> dict[str, Any]:
        """Return counters since the node was opened; before that, nothing.

        Heard: ``received`` for somebody here, ``own`` and ``foreign`` (for other servers) that were
        passed over, ``unwanted damaged``; ``dropped`` for want of room, ``waiting`` now, and
        ``errors`` of callbacks. ``gaps``, ``missed_seconds`` and ``last_gap`` of what may have been
        missed. Sent: ``commands flushes``, now ``queued in_flight pending pending_bytes``.
        Connections: ``bytes_out bytes_in connects last_loss``.
        """
        carrier, subscriptions = self._transport, self._subscriptions
        if carrier is None or subscriptions is None:
            return {}
        return {
            **self._inbox.stats(),
            "dropped": self._dropped + sum(mailbox.dropped for mailbox in self._mailboxes),
            "waiting": sum(len(mailbox.messages) for mailbox in self._mailboxes),
            "errors": self._errors + sum(one.errors for one in self._subscribers.values()),
            "subscribers": len(self._mailboxes),
            "topics": len(subscriptions.wanted),
            "gaps": subscriptions.gaps,
            "missed_seconds": subscriptions.missed,
            "last_gap": subscriptions.last_gap,
            **carrier.stats(),
        }

    # -- its life

    async def when_ready(self) -> None:
        """Wait until the node is connected, and every subscription so far is confirmed.

        Raises ConnectError if it isn't within ``connectTimeout``, and at once what the server
        says if it refuses (ReplyError: WRONGPASS, NOAUTH, NOPERM).
        """
        self._begin_if_new()
        assert self._transport is not None
        assert self._subscriptions is not None
        await self._transport.when_ready()
        timeout = self._config.options.connect_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                await self._subscriptions.wait_confirmed()
        except TimeoutError:
            raise ConnectError(
                f"{self._config.address} has not confirmed every subscription within {timeout} ms"
            ) from None

    async def close(self) -> None:
        """Finish what was sent, within ``closeTimeout``, and close; the second time, nothing."""
        if self._loop is not None:
            check_loop(self._loop, _OWNER)
        already, self._closed = self._closed, True
        self._publish = None
        if already or self._transport is None:
            return
        await self._transport.close()
        seconds = self._config.options.close_timeout / 1000
        subscribers = list(self._subscribers.values())
        for subscriber in subscribers:
            subscriber.stop()
        for reader in list(self._readers):
            reader.close()
        for mailbox in list(self._mailboxes):
            self._leave(mailbox)
        await asyncio.gather(*(one.finish(seconds) for one in subscribers))

    def __repr__(self) -> str:
        return f"<MessageNode {shorten(self.server_name)} at {self._config.address}>"

    def _begin_if_new(self) -> None:
        """Bind the node to the running event loop, and begin to connect."""
        if self._closed:
            raise ConnectionLost("the message node is closed")
        check_process(self._pid, _OWNER)
        if self._loop is not None:
            check_loop(self._loop, _OWNER)
            return
        self._loop = running_loop(_OWNER)
        self._inbox = _backend.core.MessageDispatcher(
            self.server_name, self._ended, self._complain, self._is_crowded
        )
        self._subscriptions = Subscriptions(self._tell_gap)
        self._transport = open_transport(
            self._config, self._credentials, self._inbox, self._subscriptions
        )

    def _open(self) -> Any:
        self._begin_if_new()
        assert self._transport is not None
        self._publish = self._transport.entry.publish
        return self._publish

    # -- those who listen

    def _is_crowded(self) -> bool:
        return any(subscriber.is_crowded for subscriber in self._subscribers.values())

    def _limits(self, max_pending: int | None, overflow: Overflow | None) -> dict[str, Any]:
        options = self._config.options
        limit = options.max_pending if max_pending is None else max_pending
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise MessageError(f"max_pending must be an int of at least 1, not {shorten(limit)}")
        chosen = options.overflow if overflow is None else overflow
        if chosen not in envelope.OVERFLOWS:
            known = ", ".join(envelope.OVERFLOWS)
            raise MessageError(f"overflow must be one of {known}, not {shorten(chosen)}")
        return {"max_pending": limit, "overflow": chosen}

    def _join(self, topic: int, mailbox: Any) -> None:
        assert self._transport is not None
        assert self._subscriptions is not None
        self._mailboxes[mailbox] = topic
        self._inbox.join(topic, mailbox)
        self._subscriptions.add(topic)
        self._transport.look()

    def _leave(self, mailbox: Any) -> None:
        topic = self._mailboxes.pop(mailbox, None)
        if topic is None:
            return
        assert self._transport is not None
        assert self._subscriptions is not None
        self._dropped += mailbox.dropped
        subscriber = self._subscribers.pop(mailbox, None)
        if subscriber is not None:
            self._errors += subscriber.errors
        if self._inbox.leave(topic, mailbox):
            self._subscriptions.remove(topic)
            self._transport.look()

    def _disconnect(self, subscriber: Subscriber) -> None:
        _logger.error(
            "a callback on topic %d was disconnected: too many messages waited for it",
            subscriber.topic,
        )
        self._leave(subscriber.mailbox)

    def _opening_for(self, server: str) -> bytes:
        name = envelope.check_server(server, "the server to send to")
        if len(self._openings) >= _ADDRESSEES:
            self._openings.clear()
        opening = self._openings[name] = envelope.envelope_prefix(self.server_name, name)
        return opening

    # -- what the connections tell

    def _ended(self, pipeline: Any, push: list[Any]) -> None:
        """Note that a server has ended a subscription unasked, as one does whose slots move."""
        kind, channel = push[0], push[1] if len(push) > 1 else None
        is_end = kind in (b"unsubscribe", b"sunsubscribe")
        if is_end and isinstance(channel, bytes) and channel.isdigit() and self._transport:
            self._transport.ended(pipeline, int(channel))

    def _complain(self, topic: int, payload: bytes) -> None:
        if not self._damage_logged:
            self._damage_logged = True
            _logger.error(
                "on topic %d there was %s, which is no message of deepstream's; further ones are "
                "only counted",
                topic,
                shorten(payload),
            )

    def _tell_gap(self, since: float, until: float) -> None:
        if self.on_gap is None:
            return
        outcome = self.on_gap(since, until)
        if inspect.isawaitable(outcome):
            task = asyncio.ensure_future(outcome)
            self._telling.add(task)
            task.add_done_callback(self._gap_told)

    def _gap_told(self, task: asyncio.Future[Any]) -> None:
        self._telling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("on_gap failed", exc_info=error)
