"""Drives ``update`` and ``patch`` in threads; updates of one name wait for each other."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from .._locks import make_lock
from ..core import changes as core
from ..core.failures import of_call
from ..core.holder import GLANCE, Holder, nothing
from ..core.markers import Omitted, Ttl
from ..errors import DscacheError
from ..net.backoff import full_jitter

if TYPE_CHECKING:
    from ..core.record import Record

_pause_after = partial(full_jitter, core.FIRST_PAUSE, core.LONGEST_PAUSE)


class _Turn:
    """The updates of one name: one at a time, the others wait."""

    __slots__ = ("freed", "holder", "users")

    def __init__(self, lock: threading.RLock) -> None:
        self.freed = threading.Condition(lock)
        self.holder: Callable[[], Holder | None] = nothing
        self.users = 0


class Changes:
    """The updates of one cache. ``timeout`` is that of an operation, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Forget the updates of other threads, which a forked child doesn't have."""
        self._turns: dict[str, _Turn] = {}
        # A signal handler can update a record while its thread holds the lock.
        self._lock = make_lock()

    def apply(
        self,
        run: Callable[..., Any],
        operation: str,
        name: str,
        change: Callable[[Any], Any],
        default: bytes | Omitted,
        ttl: Ttl,
        if_changed: bool = False,
        type: Any = None,
        successor: core.Successor | None = None,
    ) -> Record | None:
        """Do one update; ``run`` does one operation of a Pipeline, by its name."""
        timing = core.Timing(self._timeout, time.monotonic, _pause_after)
        holder = Holder(threading.get_ident())
        try:
            self._take_turn(operation, name, holder, timing)
            steps = core.change_steps(
                operation, name, default, ttl, timing, if_changed, type, successor
            )
            return _drive(steps, run, operation, name, change)
        except DscacheError as error:
            of_call(error, operation, name)
            raise
        finally:
            self._end_turn(name, holder)
            # A traceback may be kept for long, and must not keep the turn.
            del holder

    def _take_turn(self, operation: str, name: str, holder: Holder, timing: core.Timing) -> None:
        """Wait until no other update of that name has the turn."""
        with self._lock:
            turn = self._turns.get(name)
            if turn is None:
                turn = self._turns[name] = _Turn(self._lock)
            turn.users += 1
            try:
                while (other := turn.holder()) is not None:
                    if other.owner == holder.owner:
                        raise core.nested(operation, name)
                    del other
                    rest = timing.rest()
                    if not rest:
                        raise core.late_turn(operation, name, self._timeout)
                    turn.freed.wait(min(rest, GLANCE))
                turn.holder = ref(holder)
            finally:
                turn.users -= 1
                if turn.holder is nothing and not turn.users:
                    del self._turns[name]

    def _end_turn(self, name: str, holder: Holder) -> None:
        """Give the turn to the update that has waited longest."""
        with self._lock:
            turn = self._turns.get(name)
            # It isn't there if the turn was never taken, or in a forked child.
            if turn is not None and turn.holder() is holder:
                turn.holder = nothing
                turn.freed.notify()
                if not turn.users:
                    del self._turns[name]


def _drive(
    steps: core.Steps,
    run: Callable[..., Any],
    operation: str,
    name: str,
    change: Callable[[Any], Any],
) -> Record | None:
    step, arguments = next(steps)
    while True:
        result: Any = None
        if step == core.CHANGE:
            result = change(*arguments)
            if type(result) not in core.PLAIN and inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()  # or Python would warn that it was never awaited
                raise core.not_plain(operation, name)
        elif step == core.PAUSE:
            time.sleep(*arguments)
        else:
            result = run(step, *arguments)
        try:
            step, arguments = steps.send(result)
        except StopIteration as end:
            record: Record | None = end.value
            return record
