"""Drives ``update`` and ``patch`` on an event loop; updates of one name wait for each other."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary, ref

from ..core import changes as core
from ..core.holder import Holder
from ..net.backoff import full_jitter

if TYPE_CHECKING:
    from ..core.record import Record

_pause_after = partial(full_jitter, core.FIRST_PAUSE, core.LONGEST_PAUSE)


# How often a waiting update looks whether those before it are gone without a word, in seconds.
_GLANCE: Final = 0.25


class _Update(Holder):
    """One update in the queue of its name; ``turn`` is what it waits for, if it does."""

    __slots__ = ("is_over", "turn")

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        super().__init__(task)
        self.turn: asyncio.Future[None] | None = None
        self.is_over = False


class _Queue:
    """The updates of one name; the first that still exists has the turn.

    An exception may strike an update anywhere. It leaves the queue by the end of its ``_Update``.
    """

    __slots__ = ("__weakref__", "_updates")

    def __init__(self) -> None:
        self._updates: deque[Callable[[], _Update | None]] = deque()

    def join(self, update: _Update) -> None:
        self._updates.append(ref(update))

    def first(self) -> _Update | None:
        """Return the update that has the turn."""
        while self._updates:
            update = self._updates[0]()
            if update is not None and not update.is_over:
                return update
            self._updates.popleft()
        return None

    def is_first(self, update: _Update) -> bool:
        """Return whether an update has the turn."""
        return self.first() is update

    def wake(self) -> None:
        """Let the first update go on."""
        update = self.first()
        if update is not None and update.turn is not None and not update.turn.done():
            update.turn.set_result(None)


class Changes:
    """The updates of one cache. ``timeout`` is that of an operation, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        # A queue exists as long as an update is in it.
        self._queues: WeakValueDictionary[str, _Queue] = WeakValueDictionary()

    async def apply(
        self,
        reader: Any,
        writer: Any,
        operation: str,
        name: str,
        change: Callable[[Any], Any],
        default: bytes | core.Omitted,
        ttl: int | timedelta | None,
        if_changed: bool = False,
        type: Any = None,
    ) -> Record | None:
        """Do one update; ``reader`` and ``writer`` have the methods of a Pipeline."""
        loop = asyncio.get_running_loop()
        timing = core.Timing(self._timeout, loop.time, _pause_after)
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue()
        task = asyncio.current_task()
        first = queue.first()
        if first is not None and first.owner is task:
            raise core.nested(operation, name)
        del first
        update = _Update(task)
        try:
            queue.join(update)
            while not queue.is_first(update):
                rest = timing.rest()
                if not rest:
                    raise core.late_turn(operation, name, self._timeout)
                update.turn = loop.create_future()
                await asyncio.wait([update.turn], timeout=min(rest, _GLANCE))
            steps = core.change_steps(operation, name, default, ttl, timing, if_changed, type)
            return await _drive(steps, reader, writer, operation, name, change, timing)
        finally:
            update.is_over = True
            # A traceback may be kept for long, and must not keep the turn or the queue.
            del update
            queue.wake()
            del queue


async def _drive(
    steps: core.Steps,
    reader: Any,
    writer: Any,
    operation: str,
    name: str,
    change: Callable[[Any], Any],
    timing: core.Timing,
) -> Record | None:
    step, arguments = next(steps)
    while True:
        result: Any = None
        if step == "get":
            result = await reader.get(*arguments)
        elif step == core.CHANGE:
            result = change(*arguments)
            if type(result) not in core.PLAIN and inspect.isawaitable(result):
                timeout = asyncio.timeout_at(timing.deadline)
                try:
                    async with timeout:
                        result = await result
                except TimeoutError:
                    if not timeout.expired():
                        raise  # of the change itself
                    raise core.late_change(operation, name, timing.timeout) from None
        elif step == core.PAUSE:
            await asyncio.sleep(*arguments)
        else:
            result = await getattr(writer, step)(*arguments)
        try:
            step, arguments = steps.send(result)
        except StopIteration as end:
            record: Record | None = end.value
            return record
