"""The subscriptions of a message node, kept across reconnects, and the gaps in between.

Redis stores no messages. The loss of a connection or slot thus leaves a gap. It begins at the last
moment up to which every message was certainly received, and ends when the subscription is
confirmed again. The begin is the time at which the last answered request was sent: a reply comes
after every message that the server had pushed before it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Final

from ..aio.deadlines import wait_at_most
from ..core.constants import PASSING
from ..errors import ConnectionLost, DscacheError, ReplyError

if TYPE_CHECKING:
    from ..aio.connection import Connection

_logger = logging.getLogger("dscache")

# Limit for the reply to a heartbeat or subscription, in seconds.
_REPLY_TIMEOUT: Final = 4.0
# Pause before a redirected subscription is tried again, in seconds.
_RETRY_AFTER: Final = 0.05


class Subscriptions:
    """The topics that a node wants, and the ones with a confirmed subscription.

    ``on_gap`` is called with the begin and the end of an interval in which messages may have been
    missed, in seconds since the epoch.
    """

    def __init__(self, on_gap: Callable[[float, float], object]) -> None:
        self._on_gap = on_gap
        self.wanted: dict[int, None] = {}
        """The topics that have subscribers."""
        self._heard: dict[int, Listener] = {}
        self._since: dict[int, float] = {}
        self._refused: dict[int, ReplyError] = {}
        self._changed = asyncio.Event()
        self.gaps = 0
        self.last_gap: tuple[float, float] | None = None
        self.missed = 0.0

    @property
    def is_confirmed(self) -> bool:
        return self.wanted.keys() <= self._heard.keys()

    def listens(self, topic: int) -> bool | None:
        """Return whether a topic is subscribed to; None if it is wanted and not confirmed."""
        if topic in self._heard:
            return True
        return None if topic in self.wanted else False

    def add(self, topic: int) -> None:
        self.wanted[topic] = None

    def remove(self, topic: int) -> None:
        self.wanted.pop(topic, None)
        self._since.pop(topic, None)
        self._refused.pop(topic, None)
        self._changed.set()

    async def wait_confirmed(self) -> None:
        """Wait until every wanted topic is confirmed. Raises ReplyError if one is refused."""
        while not self.is_confirmed:
            if self._refused and self._refused.keys() | self._heard.keys() >= self.wanted.keys():
                raise next(iter(self._refused.values()))
            self._changed.clear()
            await self._changed.wait()

    # -- events of the listeners

    def confirmed(self, listener: Listener, topics: Collection[int]) -> None:
        """Record that topics are confirmed, and report the gap before that."""
        since = []
        for topic in topics:
            if topic in self._since:
                since.append(self._since.pop(topic))
            elif (before := self._heard.get(topic)) is not None and before is not listener:
                # The former owner of the slot hasn't reported its loss yet.
                since.append(before.received_until)
            self._refused.pop(topic, None)
            if topic in self.wanted:
                self._heard[topic] = listener
        if since:
            self._report(min(since), time.time())
        self._changed.set()

    def lost(self, listener: Listener, topics: Collection[int], since: float) -> None:
        """Record that topics are lost; messages may have been missed from ``since`` on."""
        for topic in topics:
            if self._heard.get(topic) is listener:
                del self._heard[topic]
                if topic in self.wanted:
                    self._since.setdefault(topic, since)

    def refused(self, topic: int, error: ReplyError, address: str) -> None:
        if str(self._refused.get(topic)) != str(error):
            _logger.error("%s refuses a subscription to topic %d: %s", address, topic, error)
        self._refused[topic] = error
        self._changed.set()

    def _report(self, since: float, until: float) -> None:
        self.gaps += 1
        self.last_gap = since, until
        self.missed += until - since
        _logger.warning("messages of %.3f s may have been missed", until - since)
        try:
            self._on_gap(since, until)
        except Exception:
            _logger.exception("on_gap failed")


class Listener:
    """One connection's share of the subscriptions.

    ``commands`` are the ones that begin and end a subscription, ``topics`` returns the topics of
    this connection. ``heartbeat`` is in seconds. ``moved`` is called when the server redirects a
    topic to another node.
    """

    def __init__(
        self,
        subscriptions: Subscriptions,
        source: Connection,
        topics: Callable[[], Collection[int]],
        *,
        heartbeat: float,
        commands: tuple[str, str] = ("SUBSCRIBE", "UNSUBSCRIBE"),
        moved: Callable[[], object] | None = None,
    ) -> None:
        self._subscriptions = subscriptions
        self._source = source
        self._topics = topics
        self._heartbeat = heartbeat
        self._begin, self._end = commands
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._confirmed: dict[int, None] = {}
        self.received_until = 0.0
        """The time up to which every message was certainly received, in seconds since the epoch."""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def on_topics_changed(self) -> None:
        self._changed.set()

    def on_connected(self) -> None:
        self.on_disconnected()
        self._task = self._loop.create_task(
            self._run(), name=f"dscache listens to {self._source.address}"
        )

    def on_disconnected(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._forget(list(self._confirmed), self.received_until)

    def ended(self, topic: int) -> None:
        self._forget([topic], self.received_until)
        self._changed.set()
        if self._moved is not None:
            self._moved()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _forget(self, topics: Collection[int], since: float) -> None:
        for topic in topics:
            self._confirmed.pop(topic, None)
        self._subscriptions.lost(self, topics, since)

    async def _run(self) -> None:
        """Keep the subscriptions up to date, and check the connection by heartbeats."""
        try:
            while True:
                self._changed.clear()
                later = await self._update()
                seconds = _RETRY_AFTER if later else self._heartbeat
                if not await wait_at_most(self._changed, seconds) and not later:
                    await self._send_heartbeat()
        except ConnectionLost:
            return  # the connection reports its loss
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # A new connection starts afresh after any error.
            reason = error if isinstance(error, DscacheError) else repr(error)
            self._source.leave(f"its subscriptions failed: {reason}")
            if not isinstance(error, Exception):
                raise

    async def _update(self) -> bool:
        """Begin and end subscriptions; return whether one must be retried soon."""
        topics = self._topics()
        missing = [topic for topic in topics if topic not in self._confirmed]
        extra = [topic for topic in self._confirmed if topic not in topics]
        if not missing and not extra:
            return False
        begun = [[self._begin, str(topic)] for topic in missing]
        ended = [[self._end, str(topic)] for topic in extra]
        at, before = time.time(), self.received_until
        replies = await self._ask(*begun, *ended)
        confirmed = []
        later = False
        for topic, reply in zip(missing, replies, strict=False):
            if not isinstance(reply, ReplyError):
                confirmed.append(topic)
            elif reply.code in PASSING:
                later = True
            elif reply.code in ("MOVED", "CLUSTERDOWN", "TRYAGAIN") and self._moved is not None:
                later = True
                self._moved()
            else:
                self._subscriptions.refused(topic, reply, self._source.address)
        self.received_until = at
        self._confirmed.update(dict.fromkeys(confirmed))
        self._subscriptions.confirmed(self, confirmed)
        # A topic that moved to another node may have received its last message here long ago.
        self._forget(extra, before)
        return later

    async def _send_heartbeat(self) -> None:
        """Send a PING; every message sent before its reply has arrived."""
        at = time.time()
        await self._ask(["PING"])
        self.received_until = at

    async def _ask(self, *commands: list[Any]) -> list[Any]:
        try:
            async with asyncio.timeout(_REPLY_TIMEOUT):
                return await self._source.ask(*commands)
        except TimeoutError:
            self._source.leave(f"it did not answer for {_REPLY_TIMEOUT:.0f} s")
            raise ConnectionLost("no answer") from None
