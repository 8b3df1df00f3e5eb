"""Subscribers to the messages of a topic: callbacks and async iterators.

Each subscriber has its own bounded queue, which the core fills while it parses replies. Callbacks
run later, from the event loop and in turns, so that no callback interrupts the parsing of replies.
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
    from ..core.pure import Message, SubscriberQueue

_logger = logging.getLogger("dscache")

Callback = Callable[["Message", str], Any]

# Duration of a subscriber's turn, in seconds: as long as the event loop spent on everything else
# since its last turn, within these bounds.
_SHORTEST = 0.0005
_LONGEST = 0.005


def _nothing() -> None:
    """Do nothing: the callback of a subscriber that has left already."""


class _Reader:
    """A bounded queue of messages, and ``on_leave``, which is called once."""

    def __init__(
        self,
        topic: int,
        on_leave: Callable[[], object],
        wake: Callable[[], object],
        max_pending: int,
        overflow: str,
    ) -> None:
        self.topic = topic
        # Set before ``_on_leave``, as ``__del__`` needs both even if this method is interrupted.
        self._loop = asyncio.get_running_loop()
        self._on_leave = on_leave
        self._max_pending = max_pending
        self.queue: SubscriberQueue = _backend.core.SubscriberQueue(
            wake, max_pending, envelope.OVERFLOWS.index(overflow)
        )

    def _leave(self) -> None:
        on_leave, self._on_leave = self._on_leave, _nothing
        on_leave()


class Subscriber(_Reader):
    """A callback and the queue of messages that wait for it.

    An awaitable that the callback returns is awaited before the next message. ``on_leave`` is
    called when the queue overflows under the policy ``disconnect``.
    """

    def __init__(
        self,
        topic: int,
        callback: Callback,
        on_leave: Callable[[], object],
        *,
        max_pending: int,
        overflow: str,
    ) -> None:
        self._callback = callback
        self._task: asyncio.Task[None] | None = None
        self._turn = 0
        self._rested_since = 0.0
        self.errors = 0
        super().__init__(topic, on_leave, self._wake, max_pending, overflow)

    @property
    def is_crowded(self) -> bool:
        """Whether the queue is more than half full while the callback runs in turns.

        A callback that is being awaited doesn't count: it is as slow as its own work, and the
        other subscribers don't wait for it.
        """
        return self._task is None and len(self.queue.messages) > self._max_pending // 2

    def stop(self) -> None:
        """Stop calling the callback; a call that is being awaited continues."""
        self._on_leave = _nothing
        self.queue.is_shut = True
        self.queue.messages.clear()

    async def finish(self, seconds: float) -> None:
        """Wait for a call that is being awaited, and cancel it after ``seconds``."""
        task = self._task
        if task is not None and task is not asyncio.current_task():
            await asyncio.wait([task], timeout=seconds)
            task.cancel()

    def _wake(self) -> None:
        """Schedule a turn, and a check that it ended."""
        self._turn += 1
        self._loop.call_soon(self._run)
        self._loop.call_soon(self._check, self._turn)

    def _check(self, turn: int) -> None:
        """Schedule a turn if an exception, such as a signal handler's, has ended this one."""
        if turn == self._turn:
            self._go_on()

    def _go_on(self) -> None:
        """Schedule a turn: at once, or when the awaited call has ended."""
        if self._task is None:
            self._wake()
        else:
            self._task.add_done_callback(self._served)

    def _run(self) -> None:
        """Call the callback for waiting messages, for one turn."""
        if self._task is not None:
            return
        again = True
        now = self._rested_since
        try:
            queue = self.queue
            messages = queue.messages
            now = time.monotonic()
            end = now + min(max(now - self._rested_since, _SHORTEST), _LONGEST)
            while messages:
                message = messages.popleft()
                result = self._call(message)
                if result is not None and inspect.isawaitable(result):
                    work = self._serve(result)
                    self._task = self._loop.create_task(work, name=f"dscache topic {self.topic}")
                    return
                if (now := time.monotonic()) > end:
                    return
            again = False
            if queue.is_shut:
                self._leave()
            queue.awake = False
            self._turn += 1
        finally:
            self._rested_since = now
            if again:  # messages are left, or a callback's BaseException passes through
                self._go_on()

    async def _serve(self, result: Awaitable[Any]) -> None:
        """Await the callback's result, then call it for the waiting messages."""
        messages = self.queue.messages
        await self._await(result)
        while messages:
            following = self._call(messages.popleft())
            if following is not None and inspect.isawaitable(following):
                await self._await(following)
            else:
                await asyncio.sleep(0)

    def _served(self, task: asyncio.Task[None]) -> None:
        """Schedule a turn after the end of a task.

        It is called twice for each task, by ``_run`` and by ``_check``, as an exception may strike
        before either call has done anything.
        """
        if task is self._task:
            self._wake()
            self._task = None

    def _call(self, message: Message) -> Any:
        try:
            return self._callback(message, message.sender)
        except Exception:
            self._log_failure(message)
            return None

    async def _await(self, result: Awaitable[Any]) -> None:
        try:
            await result
        except Exception:
            self._log_failure(None)

    def _log_failure(self, message: Message | None) -> None:
        self.errors += 1
        sender = "" if message is None else f" from {shorten(message.sender)}"
        name = getattr(self._callback, "__qualname__", None) or repr(self._callback)
        _logger.exception(
            "the callback %s failed for a message%s on topic %d", name, sender, self.topic
        )


class Messages(_Reader):
    """An iterator over the messages of a topic: ``async for message, sender in ...``.

    Made by ``MessageNode.messages``. It receives messages from its creation until it is closed or
    garbage-collected. Each item is a Message and the name of its sender. It serves one consumer: a
    second one that iterates at the same time gets UsageError.
    """

    def __init__(
        self,
        topic: int,
        on_leave: Callable[[], object],
        *,
        max_pending: int,
        overflow: str,
    ) -> None:
        self._is_awaited = False
        # The queue must not refer to this object, or it would never be garbage-collected.
        self._arrived = asyncio.Event()
        self._closed = False
        super().__init__(topic, on_leave, self._arrived.set, max_pending, overflow)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Message, str]:
        messages = self.queue.messages
        while not messages:
            if self.queue.is_shut:
                self._end()
            if self._is_awaited:
                raise UsageError(
                    f"topic {self.topic}: this iterator is already being awaited; "
                    "call messages() once per consumer"
                )
            self.queue.awake = False
            self._arrived.clear()
            self._is_awaited = True
            try:
                await self._arrived.wait()
            finally:
                self._is_awaited = False
        message: Message = messages.popleft()
        return message, message.sender

    async def aclose(self) -> None:
        """Do the same as ``close``."""
        self.close()

    def close(self) -> None:
        """Receive no more messages; the iteration ends after the waiting ones."""
        self._closed = True
        self.queue.is_shut = True
        self._arrived.set()
        self._leave()

    def _end(self) -> None:
        if self._closed:
            raise StopAsyncIteration
        self.close()
        raise Overloaded(
            f"{self._max_pending} messages on topic {self.topic} were waiting, the limit of "
            "maxPending; the subscription was ended by overflow: disconnect"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        on_leave = getattr(self, "_on_leave", _nothing)
        if on_leave is not _nothing:
            # The garbage collector may run in any thread, and after the loop was closed.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(on_leave)
