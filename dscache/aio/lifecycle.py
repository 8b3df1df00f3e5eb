"""Resources of an event loop: ``async with``, and the checks of their loop and process."""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ..errors import ConnectionLost, UsageError

_logger = logging.getLogger("dscache")

# How often a closing cache checks whether all operations are done, in seconds.
_DRAIN_STEP = 0.005


class AsyncResource(ABC):
    """A resource that ``async with`` waits for, and closes."""

    @abstractmethod
    async def when_ready(self) -> None:
        """Wait until it is ready; raises the error that keeps it from that."""

    @abstractmethod
    async def close(self) -> None:
        """Finish the operations under way, and close; a second call does nothing."""

    async def __aenter__(self) -> Self:
        try:
            await self.when_ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class LoopBound:
    """An object of one event loop and one process; ``owner`` names it in errors."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._loop = running_loop(owner)
        self._pid = os.getpid()
        self._closed = False

    def _check_owner(self) -> None:
        check_process(self._pid, self._owner)
        check_loop(self._loop, self._owner)

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionLost("the cache is closed")

    async def _drain(self, is_busy: Callable[[], object], end: float) -> None:
        """Wait until it is no longer busy, or until the end, by the loop's clock."""
        while is_busy() and self._loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_STEP)


# The tasks that close dropped objects: the event loop's own references are weak.
_closing: set[asyncio.Task[None]] = set()


def close_dropped(
    loop: asyncio.AbstractEventLoop, close: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Begin to close the connections of an object that was dropped, from any thread.

    ``close`` must not refer to that object. A closed loop has ended its connections already.
    """

    def begin() -> None:
        task = loop.create_task(close())
        _closing.add(task)
        task.add_done_callback(end)

    def end(task: asyncio.Task[None]) -> None:
        _closing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("a dropped connection was not closed", exc_info=error)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(begin)


def closed(operation: str) -> Exception:
    """Error of an operation that the end of its cache has cut short."""
    return ConnectionLost(f"{operation}: the cache was closed before the answer came")


def running_loop(owner: str) -> asyncio.AbstractEventLoop:
    """Return the event loop on which the owner opens; raises UsageError if none runs."""
    try:
        return asyncio.get_running_loop()
    except RecursionError:  # a RuntimeError too
        raise
    except RuntimeError:
        raise UsageError(
            f"{owner} opens on the event loop that runs, and none does; call it in a coroutine, "
            "such as the main() of asyncio.run(main())"
        ) from None


def check_process(pid: int, owner: str) -> None:
    """Raise UsageError unless this process is the one in which the owner was made."""
    if os.getpid() != pid:
        raise UsageError(f"{owner} can't be used after a fork; open one in the child")


def check_loop(loop: asyncio.AbstractEventLoop, owner: str) -> None:
    """Raise UsageError unless ``loop``, which is the owner's, is the one that is running."""
    try:
        running = asyncio.get_running_loop()
    except RecursionError:  # a RuntimeError too
        raise
    except RuntimeError:
        running = None
    if running is not loop:
        if running:
            place, remedy = "another one", "open one in each loop"
        else:
            place, remedy = "outside of it", "call it in a coroutine that runs on that loop"
            if owner == "an AsyncCache":
                remedy += ", or use a Cache in threads"
        raise UsageError(
            f"{owner} belongs to the event loop it was opened on, and was used from {place}; "
            f"{remedy}"
        )
