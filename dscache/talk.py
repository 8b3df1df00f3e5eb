"""What a Connection says on its link beside the operations: questions, and PING when it is idle."""

from __future__ import annotations

import asyncio
from typing import Any

from .credentials import Hidden, masked, packed, revealed
from .errors import ConnectionLost, ReplyError
from .link import Link

# A PING goes out on a link that was idle for so long, in seconds, and must be answered within the
# other. Together they find a dead peer within 10 s although nothing is asked of it.
_PING_AFTER = 5.0
_PING_ANSWER = 4.0


async def ask(link: Link, pipeline: Any, *commands: list[Any]) -> list[Any]:
    """Send commands at once; return the replies, errors of Redis among them."""
    waiters: list[asyncio.Future[Any]] = []
    link.write(packed(pipeline, commands, waiters))
    answers = asyncio.gather(*waiters, return_exceptions=True)
    either: list[asyncio.Future[Any]] = [answers, link.lost]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not answers.done():
        raise link.lost.result()
    replies = answers.result()
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, ReplyError):
            raise reply
    return replies


def say(link: Link, pipeline: Any, *command: str | Hidden) -> None:
    """Send a command whose refusal ends the link, and whose reply says nothing else."""

    def settled(waiter: asyncio.Future[Any]) -> None:
        error = None if waiter.cancelled() else waiter.exception()
        if isinstance(error, ReplyError):
            secrets = [word for word in command if isinstance(word, Hidden)]
            link.cut(ConnectionLost(f"{command[0]} was refused: {masked(str(error), secrets)}"))

    output, waiter = pipeline.command(*revealed(command))
    waiter.add_done_callback(settled)
    link.write(output)


class Pulse:
    """Looks after an idle link: asks for a sign of life, and cuts it if none comes.

    ``idle_limit`` says for how many seconds at most nothing may be heard on a link that is well.
    """

    def __init__(self, pipeline: Any, idle_limit: float | None) -> None:
        self._pipeline = pipeline
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ping_after = _PING_AFTER
        if idle_limit is not None:
            # Something is answered twice within the time that it may not.
            self._ping_after = min(_PING_AFTER, idle_limit / 2)

    def watch(self, link: Link) -> None:
        """Look after a link from now on."""
        # Changes that are told say nothing of those that are not yet.
        wait = self._ping_after - max(link.idle(), self._pipeline.unknown())
        if wait <= 0:
            silence = link.silence()
            if silence >= _PING_ANSWER:
                link.cut(ConnectionLost(f"the server did not answer for {silence:.0f} s"))
                return
            if not silence:
                say(link, self._pipeline, "PING")
            wait = min(_PING_ANSWER - silence, self._ping_after)
        self._timer = self._loop.call_later(wait, self.watch, link)

    def stop(self) -> None:
        """Look after it no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
