"""What a message node is subscribed to: kept on its connections, and what was missed in between.

Redis keeps nothing for the absent. So each time that a connection, or a slot, was lost, there is a
gap from the last moment up to which all was certainly heard until the subscription was confirmed
again. That moment is when the last question was sent that was answered: of all that the server
had told before it, the answer brings the last word.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

from ..errors import ConnectionLost, DscacheError, ReplyError

_logger = logging.getLogger("dscache")

# How long a server may take to answer a heartbeat, in seconds as all below.
_ANSWER = 4.0
# How soon a topic is asked for again that a server has sent elsewhere.
_AGAIN = 0.05


class PushConnection(Protocol):
    """A connection over which messages come."""

    @property
    def address(self) -> str: ...
    @property
    def is_ready(self) -> bool: ...
    async def ask(self, *commands: list[Any]) -> list[Any]: ...
    def leave(self, reason: str) -> None: ...


class Subscriptions:
    """The topics that a node wants, and which of them it hears.

    ``on_gap`` is called with two times, as ``time.time()`` has them, between which messages may
    have been missed.
    """

    def __init__(self, on_gap: Callable[[float, float], object]) -> None:
        self._on_gap = on_gap
        self._loop = asyncio.get_running_loop()
        self._wanted: dict[int, None] = {}
        self._heard: dict[int, Listener] = {}
        self._since: dict[int, float] = {}
        self._refused: dict[int, ReplyError] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self.gaps = 0
        self.last_gap: tuple[float, float] | None = None
        self.missed = 0.0

    @property
    def wanted(self) -> Collection[int]:
        """The topics that are wanted."""
        return self._wanted

    @property
    def is_whole(self) -> bool:
        """Whether every topic that is wanted is heard."""
        return self._wanted.keys() <= self._heard.keys()

    def add(self, topic: int) -> None:
        """Want a topic."""
        self._wanted[topic] = None

    def remove(self, topic: int) -> None:
        """Want a topic no more."""
        self._wanted.pop(topic, None)
        self._since.pop(topic, None)
        self._refused.pop(topic, None)
        self._tell()

    async def wait_confirmed(self) -> None:
        """Wait until every topic that is wanted is heard; raises ReplyError if one is refused."""
        while not self.is_whole:
            if self._refused and self._refused.keys() | self._heard.keys() >= self._wanted.keys():
                raise next(iter(self._refused.values()))
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    # -- what the listeners tell

    def confirmed(self, listener: Listener, topics: Collection[int]) -> None:
        """Note that topics are heard from now on, and report what was missed before."""
        since = []
        for topic in topics:
            if topic in self._since:
                since.append(self._since.pop(topic))
            elif (before := self._heard.get(topic)) is not None and before is not listener:
                # Of its slot's former owner we have not heard yet that it is no more.
                since.append(before.whole)
            self._refused.pop(topic, None)
            if topic in self._wanted:
                self._heard[topic] = listener
        if since:
            self._report(min(since), time.time())
        self._tell()

    def lost(self, listener: Listener, topics: Collection[int], since: float) -> None:
        """Note that topics are heard no more, and since when perhaps."""
        for topic in topics:
            if self._heard.get(topic) is listener:
                del self._heard[topic]
                if topic in self._wanted:
                    self._since.setdefault(topic, since)

    def refused(self, topic: int, error: ReplyError, address: str) -> None:
        """Note that a server refuses a topic."""
        if str(self._refused.get(topic)) != str(error):
            _logger.error("%s refuses a subscription to topic %d: %s", address, topic, error)
        self._refused[topic] = error
        self._tell()

    def _report(self, since: float, until: float) -> None:
        self.gaps += 1
        self.last_gap = since, until
        self.missed += until - since
        _logger.warning("messages of %.3f s may have been missed", until - since)
        try:
            self._on_gap(since, until)
        except Exception:
            _logger.exception("on_gap failed")

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Listener:
    """One connection's part of the subscriptions.

    ``words`` are the commands that begin and end one, ``goal`` returns the topics that belong
    here. ``moved`` is called when the server says that a topic is another node's.
    """

    def __init__(
        self,
        subscriptions: Subscriptions,
        source: PushConnection,
        goal: Callable[[], Collection[int]],
        *,
        heartbeat: float,
        words: tuple[str, str] = ("SUBSCRIBE", "UNSUBSCRIBE"),
        moved: Callable[[], object] | None = None,
    ) -> None:
        self._subscriptions = subscriptions
        self._source = source
        self._goal = goal
        self._heartbeat = heartbeat
        self._begin, self._end = words
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._here: dict[int, None] = {}
        self.whole = 0.0
        """Up to when all was certainly heard."""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Look whether other topics belong here."""
        self._changed.set()

    def on_connected(self) -> None:
        """Subscribe, on a connection that is new."""
        self.on_disconnected()
        self._task = self._loop.create_task(
            self._keep(), name=f"dscache listens to {self._source.address}"
        )

    def on_disconnected(self) -> None:
        """Note that nothing is heard any more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._forget(list(self._here), self.whole)

    def ended(self, topic: int) -> None:
        """Note that the server has ended the subscription to a topic."""
        self._forget([topic], self.whole)
        self._changed.set()
        if self._moved is not None:
            self._moved()

    async def close(self) -> None:
        """Listen no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _forget(self, topics: Collection[int], since: float) -> None:
        for topic in topics:
            self._here.pop(topic, None)
        self._subscriptions.lost(self, topics, since)

    async def _keep(self) -> None:
        """Keep the subscriptions what they should be, and look that the link is whole."""
        try:
            while True:
                self._changed.clear()
                later = await self._adjust()
                try:
                    async with asyncio.timeout(_AGAIN if later else self._heartbeat):
                        await self._changed.wait()
                except TimeoutError:
                    if not later:
                        await self._beat()
        except ConnectionLost:
            return  # and that is told
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # Another connection begins anew, whatever it was.
            reason = error if isinstance(error, DscacheError) else repr(error)
            self._source.leave(f"its subscriptions failed: {reason}")
            if not isinstance(error, Exception):
                raise

    async def _adjust(self) -> bool:
        """Begin and end subscriptions; return whether to try again soon."""
        goal = self._goal()
        missing = [topic for topic in goal if topic not in self._here]
        extra = [topic for topic in self._here if topic not in goal]
        if not missing and not extra:
            return False
        begun = [[self._begin, str(topic)] for topic in missing]
        ended = [[self._end, str(topic)] for topic in extra]
        at, before = time.time(), self.whole
        replies = await self._ask(*begun, *ended)
        confirmed = []
        later = False
        for topic, reply in zip(missing, replies, strict=False):
            if not isinstance(reply, ReplyError):
                confirmed.append(topic)
            elif reply.code in ("MOVED", "CLUSTERDOWN", "TRYAGAIN") and self._moved is not None:
                later = True
                self._moved()
            else:
                self._subscriptions.refused(topic, reply, self._source.address)
        self.whole = at
        self._here.update(dict.fromkeys(confirmed))
        self._subscriptions.confirmed(self, confirmed)
        # Of those that are another node's by now, this one may have said the last word long ago.
        self._forget(extra, before)
        return later

    async def _beat(self) -> None:
        """See whether the link is whole."""
        at = time.time()
        await self._ask(["PING"])
        self.whole = at

    async def _ask(self, *commands: list[Any]) -> list[Any]:
        try:
            async with asyncio.timeout(_ANSWER):
                return await self._source.ask(*commands)
        except TimeoutError:
            self._source.leave(f"it did not answer for {_ANSWER:.0f} s")
            raise ConnectionLost("no answer") from None
