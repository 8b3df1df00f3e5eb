"""What a Connection says on its link beside the operations: questions, and PING when it is idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..errors import ConnectionLost, ReplyError
from ..net.credentials import Hidden, masked
from .deadlines import SureTimer
from .protocol import SocketProtocol

# A PING goes out on a link that was idle for so long, in seconds, and must be answered within the
# other. Together they find a dead peer within 10 s although nothing is asked of it.
_PING_AFTER = 5.0
_PING_ANSWER = 4.0


async def request(link: SocketProtocol, *commands: list[Any]) -> list[Any]:
    """Send commands at once; return the replies, errors of Redis among them."""
    answers = asyncio.gather(*link.request(*commands), return_exceptions=True)
    either: list[asyncio.Future[Any]] = [answers, link.lost]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not answers.done():
        raise link.lost.result()
    replies = answers.result()
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, ReplyError):
            raise reply
    return replies


def send_control(link: SocketProtocol, *command: str | Hidden) -> None:
    """Send a command whose refusal ends the link, and whose reply says nothing else."""

    def settled(waiter: asyncio.Future[Any]) -> None:
        error = None if waiter.cancelled() else waiter.exception()
        if isinstance(error, ReplyError):
            secrets = [word for word in command if isinstance(word, Hidden)]
            link.abort(ConnectionLost(f"{command[0]} was refused: {masked(str(error), secrets)}"))

    (waiter,) = link.request(list(command))
    waiter.add_done_callback(settled)


class Heartbeat:
    """Looks after an idle link: asks for a sign of life, and cuts it if none comes.

    It beats as long as there is a Connection, whether or not it has a link just then.

    ``idle_limit`` says for how many seconds at most nothing may be heard on a link that is well.
    ``check`` is called each time.
    """

    def __init__(
        self, pipeline: Any, idle_limit: float | None, check: Callable[[], object]
    ) -> None:
        self._pipeline = pipeline
        self._check = check
        self._timer = SureTimer(self._beat)
        self._link: SocketProtocol | None = None
        self._ping_after = _PING_AFTER
        if idle_limit is not None:
            # Something is answered twice within the time that it may not.
            self._ping_after = min(_PING_AFTER, idle_limit / 2)

    def watch(self, link: SocketProtocol | None) -> None:
        """Look after a link from now on, or after none."""
        self._link = link
        self._beat()

    def _beat(self) -> None:
        # Again in any case, whatever is raised below.
        self._timer.start(self._ping_after)
        self._check()
        link = self._link
        if link is None or link.is_cut:
            return
        # Changes that are told say nothing of those that are not yet.
        wait = self._ping_after - max(link.idle(), self._pipeline.unknown())
        if wait <= 0:
            silence = link.unanswered_for()
            if silence >= _PING_ANSWER:
                link.abort(ConnectionLost(f"the server did not answer for {silence:.0f} s"))
                return
            if not silence:
                send_control(link, "PING")
            wait = min(_PING_ANSWER - silence, self._ping_after)
        self._timer.start(wait)

    def stop(self) -> None:
        """Beat no more."""
        self._timer.stop()
