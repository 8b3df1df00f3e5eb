"""Drives ``update`` and ``patch`` on an event loop; updates of one name wait for each other."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core import changes as core
from ..net.backoff import full_jitter

if TYPE_CHECKING:
    from ..core.record import Record

_pause_after = partial(full_jitter, core.FIRST_PAUSE, core.LONGEST_PAUSE)


class _Turn:
    """The updates of one name: one at a time, the others in a queue."""

    __slots__ = ("lock", "owner", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.owner: asyncio.Task[Any] | None = None
        self.users = 0


class Changes:
    """The updates of one cache. ``timeout`` is that of an operation, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._turns: dict[str, _Turn] = {}

    async def apply(
        self,
        reader: Any,
        writer: Any,
        operation: str,
        name: str,
        change: Callable[[Any], Any],
        default: bytes | core.Omitted,
        ttl: int | None,
        if_changed: bool = False,
        type: Any = None,
    ) -> Record | None:
        """Do one update; ``reader`` and ``writer`` have the methods of a Pipeline."""
        loop = asyncio.get_running_loop()
        timing = core.Timing(self._timeout, loop.time, _pause_after)
        turn = self._turns.get(name)
        if turn is None:
            turn = self._turns[name] = _Turn()
        task = asyncio.current_task()
        if turn.owner is not None and turn.owner is task:
            raise core.nested(operation, name)
        turn.users += 1
        try:
            if turn.lock.locked():
                try:
                    async with asyncio.timeout_at(timing.deadline):
                        await turn.lock.acquire()
                except TimeoutError:
                    raise core.late_turn(operation, name, self._timeout) from None
            else:
                await turn.lock.acquire()
            turn.owner = task
            try:
                steps = core.change_steps(operation, name, default, ttl, timing, if_changed, type)
                return await _drive(steps, reader, writer, operation, name, change, timing)
            finally:
                turn.owner = None
                turn.lock.release()
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[name]


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
