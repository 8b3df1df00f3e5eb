"""Those who want the messages of a topic: callbacks, and loops that iterate over them.

Each has a mailbox of its own, bounded, which the core fills while it reads. Callbacks are called
from the event loop later on, in turns, so that whatever they do comes between no reply and whom it
belongs to.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from .. import _backend
from ..core import envelope
from ..errors import Overloaded, UsageError, shorten

if TYPE_CHECKING:
    from ..core.pure import Message

_logger = logging.getLogger("dscache")

Callback = Callable[["Message", str], Any]

# How long callbacks go on before others have their turn, in seconds: as long as the others took
# since their last one, within these bounds.
_SHORTEST = 0.0005
_LONGEST = 0.005


class Subscriber:
    """A callback and the messages that wait for it.

    One that returns an awaitable has it awaited before the next message. ``left`` is called when
    it is disconnected because too many wait.
    """

    def __init__(
        self,
        topic: int,
        callback: Callback,
        left: Callable[[], object],
        *,
        max_pending: int,
        overflow: str,
    ) -> None:
        self.topic = topic
        self._callback = callback
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._room = max_pending
        self._turn = 0
        self._rested_since = 0.0
        self.errors = 0
        self.mailbox: Any = _backend.core.SubscriberQueue(
            self._wake, max_pending, envelope.OVERFLOWS.index(overflow)
        )

    @property
    def is_crowded(self) -> bool:
        """Whether half of its room is taken while it is called in turns, as fast as the loop can.

        One whose calls are awaited is as slow as what it waits for, and the others don't wait.
        """
        return self._task is None and len(self.mailbox.messages) > self._room // 2

    def stop(self) -> None:
        """Call it no more; a call that is under way goes on."""
        self._left = _nothing
        self.mailbox.is_shut = True
        self.mailbox.messages.clear()

    async def finish(self, seconds: float) -> None:
        """Wait for a call that is under way, and cancel it after so long."""
        if self._task is not None and self._task is not asyncio.current_task():
            await asyncio.wait([self._task], timeout=seconds)
            if self._task is not None:
                self._task.cancel()

    def _wake(self) -> None:
        """Schedule a turn, and a check that it ended."""
        self._turn += 1
        self._loop.call_soon(self._run)
        self._loop.call_soon(self._check, self._turn)

    def _check(self, turn: int) -> None:
        """Schedule a turn that an exception ended as it began, such as a signal handler's."""
        if turn == self._turn and self._task is None:
            self._wake()

    def _run(self) -> None:
        """Call it for what waits, for one turn."""
        if self._task is not None:
            return
        again = True
        now = self._rested_since
        try:
            mailbox = self.mailbox
            messages = mailbox.messages
            now = time.monotonic()
            end = now + min(max(now - self._rested_since, _SHORTEST), _LONGEST)
            while messages:
                message = messages.popleft()
                outcome = self._call(message)
                if outcome is not None and inspect.isawaitable(outcome):
                    again = False
                    work = self._serve(outcome)
                    self._task = self._loop.create_task(work, name=f"dscache topic {self.topic}")
                    return
                if (now := time.monotonic()) > end:
                    return
            again = False
            if mailbox.is_shut:
                self._disconnect()
            mailbox.awake = False
            self._turn += 1
        finally:
            self._rested_since = now
            if again:  # there is more, or what a callback raised goes through here
                self._wake()

    async def _serve(self, outcome: Awaitable[Any]) -> None:
        """Await what the callback returned, and go on with what waits."""
        messages = self.mailbox.messages
        try:
            await self._settle(outcome)
            while messages:
                following = self._call(messages.popleft())
                if following is not None and inspect.isawaitable(following):
                    await self._settle(following)
                else:
                    await asyncio.sleep(0)
        finally:
            self._task = None
            if self._loop.is_running():
                self._wake()

    def _call(self, message: Message) -> Any:
        try:
            return self._callback(message, message.sender)
        except Exception:
            self._complain(message)
            return None

    async def _settle(self, outcome: Awaitable[Any]) -> None:
        try:
            await outcome
        except Exception:
            self._complain(None)

    def _complain(self, message: Message | None) -> None:
        self.errors += 1
        sender = "" if message is None else f" from {shorten(message.sender)}"
        name = getattr(self._callback, "__qualname__", None) or repr(self._callback)
        _logger.exception(
            "the callback %s failed at a message%s on topic %d", name, sender, self.topic
        )

    def _disconnect(self) -> None:
        """Tell of a mailbox that took no more; not of one that was left."""
        left, self._left = self._left, _nothing
        left()


def _nothing() -> None:
    """Be what is called of somebody who has left."""


class Messages:
    """The messages of a topic, to be iterated over: ``async for message, sender in ...``.

    It takes messages from when it is made until it is closed, or nobody has it any more.
    """

    def __init__(
        self,
        topic: int,
        left: Callable[[], object],
        *,
        max_pending: int,
        overflow: str,
    ) -> None:
        self.topic = topic
        # Before ``_left``, with which ``__del__`` has something to do, even if this is interrupted.
        self._loop = asyncio.get_running_loop()
        self._left = left
        self._waiter: asyncio.Future[None] | None = None
        # What the mailbox knows must not be this, or nobody would ever have it no more.
        self._notifier = _Notifier()
        self._limit = max_pending
        self._is_over = False
        self.mailbox: Any = _backend.core.SubscriberQueue(
            self._notifier.ring, max_pending, envelope.OVERFLOWS.index(overflow)
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Message, str]:
        messages = self.mailbox.messages
        while not messages:
            if self.mailbox.is_shut:
                self._end()
            if self._notifier.waiter is not None:
                raise UsageError(
                    f"the messages of topic {self.topic} are waited for already; "
                    "let each who wants them have messages() of its own"
                )
            self.mailbox.awake = False
            waiter = self._notifier.waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                self._notifier.waiter = None
        message: Message = messages.popleft()
        return message, message.sender

    async def aclose(self) -> None:
        """Take no more messages."""
        self.close()

    def close(self) -> None:
        """Take no more messages, and end the iteration when those that wait are taken."""
        self._is_over = True
        self.mailbox.is_shut = True
        self._notifier.ring()
        left, self._left = self._left, _nothing
        left()

    def _end(self) -> None:
        if self._is_over:
            raise StopAsyncIteration
        self.close()
        raise Overloaded(
            f"{self._limit} messages on topic {self.topic} waited to be taken, which is all that "
            "maxPending allows; the subscription has ended, as overflow: disconnect wants it"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        left = getattr(self, "_left", _nothing)
        if left is not _nothing:
            # It may be found to be garbage in any thread, and on a loop that is closed.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(left)


class _Notifier:
    """Wakes who waits for a message."""

    def __init__(self) -> None:
        self.waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
