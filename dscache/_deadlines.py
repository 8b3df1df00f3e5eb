"""The timer by which the operations of a pipeline end that take too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# The finest step of the timer, in seconds.
_STEP = 0.005


class Deadlines:
    """Calls ``expire(now)`` whenever a deadline is past, which returns the next one, or None."""

    def __init__(self, expire: Callable[[float], float | None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._expire = expire
        self.timer: asyncio.TimerHandle | None = None
        """Set while it is to look again."""

    def start(self, seconds: float) -> None:
        """Look in so many seconds."""
        self.timer = self._loop.call_later(seconds, self.look)

    def look(self) -> None:
        """Look now, and again at the next deadline."""
        self.stop()
        now = time.monotonic()
        deadline = self._expire(now)
        if deadline is not None:
            self.start(max(deadline - now, _STEP))

    def stop(self) -> None:
        """Look no more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
