"""MessageNode: messages between servers, compatible with deepstream's Redis connector."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from weakref import WeakMethod, WeakSet

from . import _backend
from ._cache import warn_of_dropped
from .aio.lifecycle import AsyncResource, check_loop, check_process, close_dropped, running_loop
from .config.messages import MessageConfig, load
from .core import envelope, failures
from .errors import ConnectError, MessageError, UsageError, shorten
from .net.credentials import check_provider
from .pubsub.protocol import CHECKED_TOPICS, check
from .pubsub.reach import Echoes, Receivers
from .pubsub.subscribers import Callback, Messages, Subscriber
from .pubsub.subscriptions import Subscriptions
from .pubsub.transport import PairTransport

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

    from .core.pure import MessageDispatcher, Pipeline, SubscriberQueue
    from .pubsub.sharded import ShardedTransport

    Transport = PairTransport | ShardedTransport

_logger = logging.getLogger("dscache")

Overflow = Literal["drop_oldest", "drop_newest", "disconnect"]

Publish = Callable[[int | None, bytes, Any, bool], asyncio.Future[int]]
"""Publishes a message: topic (None: the message has it), envelope prefix, message, sharded."""

_OWNER: Final = "a MessageNode"
# Number of servers for which the envelope prefix of direct messages is cached.
_MAX_DIRECT_PREFIXES: Final = 1024


class MessageNode(AsyncResource):
    """A server that exchanges messages with other servers, for one asyncio event loop.

    A message is a mapping with a ``topic``, an int. It reaches all other servers, Python's and
    deepstream's, that are subscribed to its topic at that moment. Redis stores no messages, and a
    message is never sent twice.

    ``on_gap(since, until)`` is called after an interval in which messages may have been missed.
    Both times are floats, in seconds since the epoch.

    A call raises one of these:

    - MessageError: a bad topic, message or server name
    - UsageError: the node is closed, or belongs to another event loop
    - Overloaded: ``maxPending`` or ``maxPendingBytes`` is reached, and ``whenFull`` is error

    The future of a message fails with one of these. The text says whether the message may have been
    delivered:

    - ConnectionLost: the connection was lost before the reply, or there was none in time
    - DeadlineExceeded: no reply within ``commandTimeout``, which is in milliseconds from the call
    - ReplyError: Redis returned an error
    - ProtocolError: an invalid reply
    - ConnectError: the server can't be used; nothing was sent
    """

    def __init__(
        self,
        config: MessageConfig,
        credentials: CredentialProvider | None = None,
        on_gap: Callable[[float, float], object] | None = None,
    ) -> None:
        check_provider(credentials)
        if not (on_gap is None or callable(on_gap)):
            raise UsageError(f"on_gap must be a function, not {shorten(on_gap)}")
        if not isinstance(config, MessageConfig):
            raise UsageError(
                f"MessageNode takes a MessageConfig, not {type(config).__name__}; "
                "write MessageNode.from_config(...)"
            )
        self._config = config
        self._credentials = credentials
        self.on_gap = on_gap
        self._prefix = envelope.envelope_prefix(config.server_name)
        self._direct_prefixes: dict[str, bytes] = {}
        self._sharded = config.options.sharded
        self._publish: Publish | None = None
        self._echoes = Echoes(config.server_name)
        self._receivers: Receivers | None = None
        self._transport: Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers: dict[SubscriberQueue, Subscriber] = {}
        # Weak references: a dropped iterator ends its subscription.
        self._readers: WeakSet[Messages] = WeakSet()
        self._pid = os.getpid()
        self._dropped = 0
        self._errors = 0
        self._damage_logged = False
        self._gap_tasks: set[asyncio.Future[Any]] = set()
        self._queues: dict[SubscriberQueue, int] = {}
        self._closed = False

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        server_name: str | None = None,
        credentials: CredentialProvider | None = None,
        on_gap: Callable[[float, float], object] | None = None,
        **options: Any,
    ) -> Self:
        """Return a node configured by a file, a mapping or a URL; it isn't connected yet.

        ``source`` is one of these:

        - the path of deepstream's YAML or JSON file; ``clusterNode`` and ``serverName`` are read
          from it
        - a mapping of the same shape, or of options alone
        - a URL or ``host:port``

        ``server_name``, or ``serverName`` as in a file, overrides the configured name. Each server
        needs a unique name; without one, a random name is generated. ``credentials`` is a
        ``redis.CredentialProvider``, which is called before each connection. ``options`` override
        those of the source. They are named as in a file, or in snake_case. The node connects at the
        first operation, or on entering ``async with``.

        Raises ConfigError for a bad configuration.
        """
        return cls(load(source, server_name, options=options), credentials, on_gap)

    # -- messages

    def send(
        self, message: Any, *, topic: int | None = None, unchecked: bool = False
    ) -> asyncio.Future[int]:
        """Send a message to all other servers; the result is the number of receiving connections.

        ``message`` is any value that msgspec encodes, with a ``topic``. Text that is JSON already
        is passed as ``msgspec.Raw``, together with the argument ``topic``. The message is encoded
        at the call.

        Raises MessageError at the call for a bad message. A message on which deepstream's servers
        or clients could fail raises it too, unless ``unchecked`` is true.
        """
        return self._send(self._prefix, message, topic, unchecked)

    def send_direct(
        self, server: str, message: Any, *, topic: int | None = None, unchecked: bool = False
    ) -> asyncio.Future[int]:
        """Send a message to one server; the result is the number of receiving connections.

        ``server`` is the server's name. Redis delivers the message to all subscribers of its topic,
        and the other servers drop it.

        Raises MessageError at the call for a bad message or name. A message on which deepstream's
        servers or clients could fail raises it too, unless ``unchecked`` is true.
        """
        try:
            prefix = self._direct_prefixes.get(server) or self._direct_prefix(server)
        except TypeError:  # it has no hash
            prefix = self._direct_prefix(server)
        return self._send(prefix, message, topic, unchecked)

    def subscribe(
        self,
        topic: int,
        callback: Callback,
        *,
        max_pending: int | None = None,
        overflow: Overflow | None = None,
    ) -> Callable[[], None]:
        """Call ``callback(message, from_server)`` for each message; return a function to end it.

        If the callback returns an awaitable, it is awaited before the next message. At most
        ``max_pending`` messages wait for the callback. ``overflow`` decides about further ones:
        "drop_oldest", "drop_newest", or "disconnect", which ends the subscription. Both default to
        the configuration. ``when_ready()`` waits until Redis has confirmed the subscription.

        Raises MessageError for a bad argument.
        """
        topic = envelope.check_topic(topic)
        if not callable(callback):
            raise MessageError(
                f"topic {topic}: callback must be a function, not {shorten(callback)}; "
                "messages() needs none"
            )
        limit, policy = self._limits(max_pending, overflow)
        transport = self._ensure_open()
        disconnect = _weak(self._disconnect)
        subscriber = Subscriber(
            topic,
            callback,
            lambda: disconnect(subscriber),
            max_pending=limit,
            overflow=policy,
        )
        self._subscribers[subscriber.queue] = subscriber
        self._subscribe(transport, topic, subscriber.queue)

        def unsubscribe() -> None:
            subscriber.stop()
            self._unsubscribe(subscriber.queue)

        return unsubscribe

    def messages(
        self,
        topic: int,
        *,
        max_pending: int | None = None,
        overflow: Overflow | None = None,
    ) -> Messages:
        """Return an iterator over new messages on a topic: ``async for message, sender in ...``.

        At most ``max_pending`` messages wait for the iteration. ``overflow`` decides about further
        ones: "drop_oldest", "drop_newest", or "disconnect", which makes the iteration raise
        Overloaded. Both default to the configuration. The iteration ends when the node is closed.

        Raises MessageError for a bad argument.
        """
        topic = envelope.check_topic(topic)
        limit, policy = self._limits(max_pending, overflow)
        transport = self._ensure_open()
        queue: SubscriberQueue | None = None
        reader = Messages(
            topic, lambda: self._unsubscribe(queue), max_pending=limit, overflow=policy
        )
        queue = reader.queue
        self._subscribe(transport, topic, queue)
        self._readers.add(reader)
        return reader

    # -- state

    @property
    def config(self) -> MessageConfig:
        """The checked configuration."""
        return self._config

    @property
    def server_name(self) -> str:
        """This server's name among the other servers: str."""
        return self._config.server_name

    @property
    def is_ready(self) -> bool:
        """Whether the node is connected and all subscriptions are confirmed: bool."""
        transport = self._transport
        return transport is not None and transport.is_ready and transport.subscriptions.is_confirmed

    @property
    def description(self) -> str:
        """One line that names the node, its server and the core; contains no password."""
        server = self._transport.server if self._transport is not None else ""
        subject = f"message node {shorten(self.server_name)}"
        return _backend.described(subject, self._config.address, server)

    def stats(self) -> dict[str, Any]:
        """Return counters since the node was opened, as a dict; empty before that.

        - ``received``: messages for subscribers here
        - ``dropped``, ``waiting``: messages dropped because a queue was full, and messages in a
          queue now
        - ``errors``: exceptions of callbacks
        - ``own``, ``foreign``: ignored messages of this server, and to other servers
        - ``namesakes``: ignored messages of another server with this name
        - ``unwanted``, ``damaged``: messages without a subscriber here, and texts that are no
          messages
        - ``fewer``: messages that reached fewer connections than before a loss
        - ``subscribers``, ``topics``: the numbers of subscribers and of their topics now
        - ``gaps``, ``missed_seconds``, ``last_gap``: number of gaps, their total length, and the
          time of the last one
        - ``connects``, ``last_loss``, ``bytes_in``: of all connections

        All other counters count sent messages, as the counters of a cache count records.
        """
        transport = self._transport
        if transport is None:
            return {}
        subscriptions = transport.subscriptions
        counts = transport.dispatcher.stats()
        counts["own"] -= self._echoes.namesakes
        return {
            **counts,
            "namesakes": self._echoes.namesakes,
            "fewer": 0 if self._receivers is None else self._receivers.fewer,
            "dropped": self._dropped + sum(queue.dropped for queue in self._queues),
            "waiting": sum(len(queue.messages) for queue in self._queues),
            "errors": self._errors + sum(one.errors for one in self._subscribers.values()),
            "subscribers": len(self._queues),
            "topics": len(subscriptions.wanted),
            "gaps": subscriptions.gaps,
            "missed_seconds": subscriptions.missed,
            "last_gap": subscriptions.last_gap,
            **transport.stats(),
        }

    # -- lifecycle

    async def when_ready(self) -> None:
        """Wait until the node is connected and every subscription so far is confirmed.

        Raises ConnectError after ``connectTimeout``, and ReplyError at once if the server refuses
        the login or a subscription (WRONGPASS, NOAUTH, NOPERM).
        """
        transport = self._ensure_open()
        await transport.when_ready()
        timeout = self._config.options.connect_timeout
        try:
            async with asyncio.timeout(timeout / 1000):
                await transport.subscriptions.wait_confirmed()
        except TimeoutError:
            raise ConnectError(
                f"{self._config.address} has not confirmed every subscription within {timeout} ms"
            ) from None

    async def close(self) -> None:
        """Close the node, once its messages have been sent or ``closeTimeout`` is over.

        Later operations raise UsageError. A second call does nothing. Raises UsageError on another
        event loop.
        """
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
        for queue in list(self._queues):
            self._unsubscribe(queue)
        await asyncio.gather(*(one.finish(seconds) for one in subscribers))

    def __del__(self) -> None:
        # ``__init__`` may have raised, and a forked child must leave its parent's sockets alone.
        transport = self.__dict__.get("_transport")
        if transport is None or self._loop is None or self._closed:
            return
        if sys.is_finalizing() or self._pid != os.getpid():
            return
        self._closed = True
        try:
            for subscriber in self._subscribers.values():
                subscriber.stop()
            close_dropped(self._loop, transport.close)
        finally:
            warn_of_dropped(self, "use async with, or await its close()")

    def __repr__(self) -> str:
        return f"<MessageNode {shorten(self.server_name)} at {self._config.address}>"

    def _send(
        self, prefix: bytes, message: Any, topic: int | None, unchecked: bool
    ) -> asyncio.Future[int]:
        stated = topic
        if topic is None:
            if isinstance(message, Mapping):
                stated = message.get("topic")
            else:
                stated = getattr(message, "topic", None)
        # Anything but an int is refused below.
        number = stated if isinstance(stated, int) else -1
        if not unchecked and number in CHECKED_TOPICS:
            check(message, topic)
        sent = (self._publish or self._open())(topic, prefix, message, self._sharded)
        expected = self._echoes.expected
        if number in expected:
            expected[number] += 1
        if self._receivers is not None:
            self._receivers.watch(number, sent)
        return sent

    def _ensure_open(self) -> Transport:
        """Bind the node to the running event loop and start connecting, unless that is done."""
        if self._closed:
            raise failures.closed("message node")
        check_process(self._pid, _OWNER)
        if self._loop is not None:
            check_loop(self._loop, _OWNER)
        if self._transport is None:
            self._loop = running_loop(_OWNER)
            dispatcher: MessageDispatcher = _backend.core.MessageDispatcher(
                self.server_name,
                _weak(self._on_push),
                _weak(self._on_damaged),
                _weak(self._is_crowded),
                _weak(self._echoes.heard),
            )
            kind: type[Transport] = PairTransport
            if self._sharded:
                from .pubsub.sharded import ShardedTransport  # most nodes don't need a Cluster

                kind = ShardedTransport
            subscriptions = Subscriptions(_weak(self._report_gap))
            transport = kind(self._config, self._credentials, dispatcher, subscriptions)
            self._transport = transport
            self._receivers = Receivers(lambda: transport.connects, subscriptions.listens)
        return self._transport

    def _open(self) -> Publish:
        publish: Publish = self._ensure_open().pipeline.publish
        self._publish = publish
        return publish

    # -- subscribers

    def _is_crowded(self) -> bool:
        return any(subscriber.is_crowded for subscriber in self._subscribers.values())

    def _limits(self, max_pending: int | None, overflow: Overflow | None) -> tuple[int, Overflow]:
        options = self._config.options
        limit = options.max_pending if max_pending is None else max_pending
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise MessageError(f"max_pending must be an int of at least 1, not {shorten(limit)}")
        chosen = options.overflow if overflow is None else overflow
        if chosen not in envelope.OVERFLOWS:
            known = ", ".join(envelope.OVERFLOWS)
            raise MessageError(f"overflow must be one of {known}, not {shorten(chosen)}")
        return limit, chosen

    def _subscribe(self, transport: Transport, topic: int, queue: SubscriberQueue) -> None:
        self._queues[queue] = topic
        self._echoes.expect(topic, transport.stats()["pending"])
        transport.dispatcher.join(topic, queue)
        transport.subscriptions.add(topic)
        transport.on_topics_changed()

    def _unsubscribe(self, queue: SubscriberQueue | None) -> None:
        topic = None if queue is None else self._queues.pop(queue, None)
        if queue is None or topic is None:
            return
        transport = self._transport
        assert transport is not None
        self._dropped += queue.dropped
        subscriber = self._subscribers.pop(queue, None)
        if subscriber is not None:
            self._errors += subscriber.errors
        if transport.dispatcher.leave(topic, queue):
            transport.subscriptions.remove(topic)
            transport.on_topics_changed()

    def _disconnect(self, subscriber: Subscriber) -> None:
        _logger.error(
            "disconnected a callback on topic %d: too many messages waited for it",
            subscriber.topic,
        )
        self._unsubscribe(subscriber.queue)

    def _direct_prefix(self, server: str) -> bytes:
        name = envelope.check_server(server, "the server to send to")
        if len(self._direct_prefixes) >= _MAX_DIRECT_PREFIXES:
            self._direct_prefixes.clear()
        prefix = self._direct_prefixes[name] = envelope.envelope_prefix(self.server_name, name)
        return prefix

    # -- events of the connections

    def _on_push(self, pipeline: Pipeline, push: list[Any]) -> None:
        """Handle a subscription ended by the server, as happens when a slot moves."""
        kind, channel = push[0], push[1] if len(push) > 1 else None
        is_end = kind in (b"unsubscribe", b"sunsubscribe")
        if is_end and isinstance(channel, bytes) and channel.isdigit() and self._transport:
            self._transport.ended(pipeline, int(channel))

    def _on_damaged(self, topic: int, payload: bytes) -> None:
        if not self._damage_logged:
            self._damage_logged = True
            _logger.error(
                "topic %d: received %s, which isn't a deepstream message; further ones are only "
                "counted",
                topic,
                shorten(payload),
            )

    def _report_gap(self, since: float, until: float) -> None:
        if self.on_gap is None:
            return
        result = self.on_gap(since, until)
        if inspect.isawaitable(result):
            task = asyncio.ensure_future(result)
            self._gap_tasks.add(task)
            task.add_done_callback(self._on_gap_done)

    def _on_gap_done(self, task: asyncio.Future[Any]) -> None:
        self._gap_tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("on_gap failed", exc_info=error)


def _weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a method unless its object is gone.

    A node that the program drops must be freed although its connections are still open.
    """
    held = WeakMethod(method)

    def call(*arguments: Any) -> Any:
        bound = held()
        return None if bound is None else bound(*arguments)

    return call
