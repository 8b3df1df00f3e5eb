"""The timer by which the operations of a pipeline end that take too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# The finest step of the timer, in seconds.
_STEP = 0.005
# The second call of a timer comes so much later, in seconds.
_SECOND = 1.0


class SureTimer:
    """Calls ``call`` once, though an exception may strike before it has done anything.

    A signal handler may raise as the callback begins, and the loop has dropped the timer by then.
    So a second one is set, which is cancelled as soon as ``call`` sets the timer anew, or stops it.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._handles: tuple[asyncio.TimerHandle, ...] = ()

    @property
    def is_set(self) -> bool:
        """Whether it is going to call."""
        return bool(self._handles)

    def start(self, seconds: float) -> None:
        """Call in so many seconds, and not when it was to call before."""
        earlier = self._handles
        call_later = self._loop.call_later
        self._handles = (
            call_later(seconds, self._call),
            call_later(seconds + _SECOND, self._call),
        )
        for handle in earlier:
            handle.cancel()

    def stop(self) -> None:
        """Call no more."""
        earlier, self._handles = self._handles, ()
        for handle in earlier:
            handle.cancel()


class Deadlines:
    """Calls ``expire(now)`` whenever a deadline is past, which returns the next one, or None."""

    def __init__(self, expire: Callable[[float], float | None]) -> None:
        self._expire = expire
        self._timer = SureTimer(self.look)

    def ensure(self, seconds: float) -> None:
        """Look in so many seconds, unless the next look is certain already."""
        if not self._timer.is_set:
            self._timer.start(seconds)

    def look(self) -> None:
        """Look now, and again at the next deadline."""
        self._timer.start(_STEP)  # in any case, whatever is raised below
        now = time.monotonic()
        deadline = self._expire(now)
        if deadline is None:
            self._timer.stop()
        else:
            self._timer.start(max(deadline - now, _STEP))

    def stop(self) -> None:
        """Look no more."""
        self._timer.stop()
