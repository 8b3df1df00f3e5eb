"""Timers that no exception can lose, and the deadlines of a pipeline's operations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

# The finest step of the timer, in seconds.
_STEP = 0.005
# The second call of a timer comes this much later, in seconds.
_SECOND = 1.0


async def wait_at_most(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for an event for this many seconds at most; return whether it came."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await event.wait()
    return False


class SureTimer:
    """Calls ``call`` again if an exception strikes before the call has done anything.

    A signal handler may raise as the callback begins, when the loop has dropped the timer. So each
    timer is set twice. The second one is cancelled when ``call`` starts or stops the timer. On a
    busy machine a handler that raises often can strike both: the callback of another timer
    then calls ``restart_if_lost``.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self.handles: tuple[asyncio.TimerHandle, ...] = ()
        """The timers of the scheduled call, if there is one."""

    def start(self, seconds: float) -> None:
        """Schedule the call after this many seconds, in place of an earlier schedule."""
        earlier = self.handles
        call_later = self._loop.call_later
        self.handles = (
            call_later(seconds, self._call),
            call_later(seconds + _SECOND, self._call),
        )
        for handle in earlier:
            handle.cancel()

    def restart_if_lost(self) -> None:
        """Schedule the call now if both timers are over and neither has called."""
        if self.handles and self.handles[-1].when() < self._loop.time():
            self.start(0)

    def stop(self) -> None:
        earlier, self.handles = self.handles, ()
        for handle in earlier:
            handle.cancel()


class Deadlines(SureTimer):
    """Calls ``expire(now)`` after each deadline; it returns the next deadline, or None."""

    def __init__(self, expire: Callable[[float], float | None]) -> None:
        super().__init__(self.look)
        self._expire = expire

    def ensure(self, seconds: float) -> None:
        """Schedule ``expire`` after this many seconds, unless it is scheduled already."""
        if not self.handles:
            self.start(seconds)

    def look(self) -> None:
        """Call ``expire`` now, and again at the next deadline."""
        self.start(_STEP)  # set first, whatever is raised below
        now = time.monotonic()
        deadline = self._expire(now)
        if deadline is None:
            self.stop()
        else:
            self.start(max(deadline - now, _STEP))
