"""Timers that no exception can lose, and the deadlines of a pipeline's operations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# The finest step of the timer, in seconds.
_STEP = 0.005
# The second call of a timer comes this much later, in seconds.
_SECOND = 1.0


class SureTimer:
    """Calls ``call`` again if an exception strikes before the call has done anything.

    A signal handler may raise as the callback begins, when the loop has dropped the timer. So each
    timer is set twice. The second one is cancelled when ``call`` starts or stops the timer.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self.handles: tuple[asyncio.TimerHandle, ...] = ()
        """The timers of the outstanding call, if there is one."""

    def start(self, seconds: float) -> None:
        """Call in so many seconds, in place of any earlier time."""
        earlier = self.handles
        call_later = self._loop.call_later
        self.handles = (
            call_later(seconds, self._call),
            call_later(seconds + _SECOND, self._call),
        )
        for handle in earlier:
            handle.cancel()

    def stop(self) -> None:
        """Cancel the call."""
        earlier, self.handles = self.handles, ()
        for handle in earlier:
            handle.cancel()


class Deadlines:
    """Calls ``expire(now)`` when a deadline is past; it returns the next deadline, or None."""

    def __init__(self, expire: Callable[[float], float | None]) -> None:
        self._expire = expire
        self._timer = SureTimer(self.look)

    def ensure(self, seconds: float) -> None:
        """Call ``expire`` in so many seconds, unless a call is outstanding."""
        if not self._timer.handles:
            self._timer.start(seconds)

    def look(self) -> None:
        """Call ``expire`` now, and again at the next deadline."""
        self._timer.start(_STEP)  # set first, whatever is raised below
        now = time.monotonic()
        deadline = self._expire(now)
        if deadline is None:
            self._timer.stop()
        else:
            self._timer.start(max(deadline - now, _STEP))

    def stop(self) -> None:
        """Cancel the next call."""
        self._timer.stop()
