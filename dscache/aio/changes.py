"""Drives ``update`` and ``patch`` on an event loop; updates of one name wait for each other."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import ref

from msgspec import Raw

from ..core import changes as core
from ..core.failures import of_call
from ..core.holder import Holder
from ..core.markers import Omitted, Ttl
from ..errors import DscacheError
from ..net.backoff import full_jitter

if TYPE_CHECKING:
    from ..core.record import Record

_pause_after = partial(full_jitter, core.FIRST_PAUSE, core.LONGEST_PAUSE)


# How often a waiting update looks whether those before it are gone without a word, in seconds.
_GLANCE: Final = 0.25


# How many names may have a queue before those that struck updates have left behind are removed.
_MOST_LEFT: Final = 1024


class _Update(Holder):
    """One update in the queue of its name; ``turn`` is what it waits for, if it does."""

    __slots__ = ("is_over", "turn")

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self.owner = task
        self.turn: asyncio.Future[None] | None = None
        self.is_over = False


# The updates of one name. An exception may strike an update anywhere: it leaves the queue by the
# end of its _Update. A list, as most queues hold one update, and a deque takes longer to make.
_Queue: TypeAlias = list[Callable[[], _Update | None]]


def _first(queue: _Queue) -> _Update | None:
    """Return the update that has the turn: the first that still exists."""
    while queue:
        update = queue[0]()
        if update is not None and not update.is_over:
            return update
        del queue[0]
    return None


class Changes:
    """The updates of one cache. ``timeout`` is that of an operation, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._queues: dict[str, _Queue] = {}
        self._most = _MOST_LEFT

    async def apply(
        self,
        loop: asyncio.AbstractEventLoop,
        reader: Any,
        writer: Any,
        operation: str,
        name: str,
        change: Callable[[Any], Any],
        default: bytes | Omitted,
        ttl: Ttl,
        if_changed: bool = False,
        type: Any = None,
    ) -> Record | None:
        """Do one update; ``reader`` and ``writer`` have the methods of a Pipeline.

        ``loop`` is the running one, which Python 3.11 finds only by a system call.
        """
        deadline = loop.time() + self._timeout
        timing: core.Timing | None = None
        task = asyncio.current_task(loop)
        queue = self._queues.get(name)
        is_first = queue is None
        if queue is None:
            queue = self._new_queue(name)
        else:
            first = _first(queue)
            if first is not None and first.owner is task:
                raise core.nested(operation, name)
            del first
        update = _Update(task)
        try:
            queue.append(ref(update))
            if not is_first:
                timing = core.Timing(self._timeout, loop.time, _pause_after, deadline)
                while _first(queue) is not update:
                    rest = timing.rest()
                    if not rest:
                        raise core.late_turn(operation, name, self._timeout)
                    update.turn = loop.create_future()
                    await asyncio.wait([update.turn], timeout=min(rest, _GLANCE))
            known: list[Any] = []
            if type is None and not if_changed:
                # The usual steps, without the generator, which would add a tenth to them. If
                # anything else is to be done, the generator gets the results so far, and goes on.
                record = await reader.get(name)
                known.append(record)
                if record is not None:
                    version = record.version
                    data = change(core.data_of(record))
                    known.append(data)
                    if (
                        data.__class__ in core.PLAIN
                        and data is not None
                        and version < core.MAX_VERSION
                        and loop.time() < deadline
                    ):
                        text = core.text_of(name, data)
                        done = await writer.set(name, version + 1, Raw(text), ttl, False, version)
                        if done:
                            return core.record_of(name, version + 1, text)
                        known.append(done)
            if timing is None:
                timing = core.Timing(self._timeout, loop.time, _pause_after, deadline)
            steps = core.change_steps(operation, name, default, ttl, timing, if_changed, type)
            step, arguments = next(steps)
            known.reverse()
            while True:
                if known:
                    result: Any = known.pop()
                    if step == core.CHANGE:
                        result = await _awaited(result, operation, name, timing)
                elif step == "get":
                    result = await reader.get(*arguments)
                elif step == core.CHANGE:
                    result = await _awaited(change(*arguments), operation, name, timing)
                elif step == core.PAUSE:
                    await asyncio.sleep(*arguments)
                    result = None
                else:
                    result = await getattr(writer, step)(*arguments)
                try:
                    step, arguments = steps.send(result)
                except StopIteration as end:
                    changed: Record | None = end.value
                    return changed
        except DscacheError as error:
            of_call(error, operation, name)
            raise
        finally:
            update.is_over = True
            if len(queue) == 1 and queue[0]() is update and self._queues.get(name) is queue:
                del self._queues[name]  # as most updates wait for none
                queue = None
            # A traceback may be kept for long, and must not keep the turn.
            del update
            if queue is not None:
                self._end_turn(name, queue)

    def _new_queue(self, name: str) -> _Queue:
        if len(self._queues) >= self._most:
            for one, queue in list(self._queues.items()):
                if _first(queue) is None:
                    del self._queues[one]
            self._most = _MOST_LEFT + 2 * len(self._queues)
        queue = self._queues[name] = []
        return queue

    def _end_turn(self, name: str, queue: _Queue) -> None:
        """Let the next update of a name go on."""
        update = _first(queue)
        if update is not None:
            if update.turn is not None and not update.turn.done():
                update.turn.set_result(None)
        elif self._queues.get(name) is queue:
            del self._queues[name]


async def _awaited(result: Any, operation: str, name: str, timing: core.Timing) -> Any:
    """Return the data that a change has returned, or will return."""
    if result.__class__ not in core.PLAIN and inspect.isawaitable(result):
        return await _in_time(result, operation, name, timing)
    return result


async def _in_time(result: Awaitable[Any], operation: str, name: str, timing: core.Timing) -> Any:
    """Return the result of an async change; raises DeadlineExceeded."""
    timeout = asyncio.timeout_at(timing.deadline)
    try:
        async with timeout:
            return await result
    except TimeoutError:
        if not timeout.expired():
            raise  # of the change itself
        raise core.late_change(operation, name, timing.timeout) from None
