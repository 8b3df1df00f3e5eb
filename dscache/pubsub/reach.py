"""Two faults that a message node sees in its own messages: a shared name, and absent receivers.

Redis gives each message to the sender too, if it is subscribed. A message of this name that wasn't
sent here comes from another server, which drops the messages of this one as its own. And Redis
tells how many connections each message reached: after a loss of the connection, fewer means that
other servers have not subscribed again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from ..errors import shorten

_logger = logging.getLogger("dscache")

# Seconds between two looks at how many connections a topic reaches.
_INTERVAL: Final = 1.0
# Seconds after which a lower number is taken for the usual one.
_PATIENCE: Final = 60.0
# Topics looked at; a program that uses more of them isn't a server of deepstream.
_MAX_TOPICS: Final = 1024


class Echoes:
    """The messages sent here that may come back, by topic."""

    def __init__(self, server_name: str) -> None:
        self._server_name = server_name
        self.expected: dict[int, int] = {}
        """The number of messages that may still come back, for each topic subscribed to."""
        self.namesakes = 0
        """The messages of this name that were sent elsewhere."""

    def expect(self, topic: int, pending: int) -> None:
        """Expect echoes on a topic from now on; ``pending`` messages are on their way already."""
        self.expected.setdefault(topic, pending)

    def heard(self, topic: int) -> None:
        """Note that a message with this server's name has arrived."""
        left = self.expected.get(topic, 0)
        if left:
            self.expected[topic] = left - 1
            return
        self.namesakes += 1
        if self.namesakes == 1:
            _logger.warning(
                "topic %d: a message of the server %s was not sent here, so another server has the "
                "same name, and each drops the messages of the other as its own: give every server "
                "a name of its own (server_name, or serverName in its file)",
                topic,
                shorten(self._server_name),
            )


class _Reach:
    """How many connections of other servers the messages on a topic reach."""

    __slots__ = ("connects", "count", "due", "fewer_since")

    def __init__(self) -> None:
        self.connects = 0
        self.count = 0
        self.due = 0.0
        self.fewer_since = 0.0


class Receivers:
    """The number of receivers of each topic, before and after a loss of the connection.

    ``connects`` returns how often the sending connection was made, and ``listens`` whether this
    node is subscribed to a topic: None while that isn't confirmed.
    """

    def __init__(self, connects: Callable[[], int], listens: Callable[[int], bool | None]) -> None:
        self._connects = connects
        self._listens = listens
        self._topics: dict[int, _Reach] = {}
        self._warned_at = 0
        self.fewer = 0
        """The messages that reached fewer servers than before the last loss."""

    def watch(self, topic: int, sent: asyncio.Future[int]) -> None:
        """Look at how many connections a message reaches, about once a second and after a loss."""
        reach = self._topics.get(topic)
        if reach is None:
            if len(self._topics) >= _MAX_TOPICS:
                return
            reach = self._topics[topic] = _Reach()
        now = time.monotonic()
        if now >= reach.due or reach.connects != self._connects():
            reach.due = now + _INTERVAL
            sent.add_done_callback(partial(self._note, topic, reach))

    def _note(self, topic: int, reach: _Reach, sent: asyncio.Future[int]) -> None:
        if sent.cancelled() or sent.exception() is not None:
            return
        listens = self._listens(topic)
        if listens is None:
            return  # this node may be the one that is missing
        count = sent.result() - listens
        connects = self._connects()
        if reach.connects == connects or count >= reach.count:
            reach.connects, reach.count, reach.fewer_since = connects, count, 0.0
            return
        now = time.monotonic()
        reach.fewer_since = reach.fewer_since or now
        if now - reach.fewer_since > _PATIENCE:
            reach.connects, reach.count = connects, count
            return
        self.fewer += 1
        if self._warned_at != connects:
            self._warned_at = connects
            _logger.warning(
                "topic %d: a message reached %d other connections, and %d before the connection to "
                "Redis was lost: servers that are not subscribed again miss it; send it anew once "
                "they are back, which the result of send tells",
                topic,
                count,
                reach.count,
            )
