"""A background task that goes on until it is cancelled, whatever is raised in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

_logger = logging.getLogger("dscache")


class BackgroundTask:
    """Runs ``work()`` as a task, and begins it again when it ends by an exception.

    ``work`` itself handles every error that is expected. What is left are a MemoryError, a
    RecursionError and the exceptions of signal handlers, any of which may strike anywhere. After
    a KeyboardInterrupt or SystemExit the loop may be about to end: then only ``check`` begins
    the task again. ``ended`` is called when the task is cancelled, or left behind by a loop that
    was closed.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        name: str,
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        self._work = work
        self._name = name
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._generation = 0
        self._is_over = False
        self.task: asyncio.Task[None]
        self.begin_again()

    def begin_again(self) -> None:
        """Begin a new task, and cancel the present one without waiting for it."""
        earlier = self.task if self._generation else None
        self._generation += 1
        self.task = self._loop.create_task(self._run(self._generation), name=self._name)
        self.task.add_done_callback(self._done)
        if earlier is not None:
            earlier.cancel()

    def check(self) -> None:
        """Begin again if the task has ended without ``cancel``."""
        if self.task.done() and not self._is_over:
            self.begin_again()

    def cancel(self) -> None:
        """End the task for good."""
        self._is_over = True
        self.task.cancel()

    async def _run(self, generation: int) -> None:
        try:
            await self._work()
        except (asyncio.CancelledError, GeneratorExit):
            if generation == self._generation:
                self._is_over = True
                self._ended()
            raise

    def _done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None or task is not self.task or self._is_over:
            return
        _logger.error("%s was interrupted, and begins again: %r", self._name, error)
        if isinstance(error, Exception):
            self.begin_again()
