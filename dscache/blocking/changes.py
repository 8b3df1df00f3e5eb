"""Drives ``update`` and ``patch`` in threads; updates of one name wait for each other."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core import changes as core
from ..net.backoff import full_jitter

if TYPE_CHECKING:
    from ..core.record import Record

_pause_after = partial(full_jitter, core.FIRST_PAUSE, core.LONGEST_PAUSE)


class _Turn:
    """The updates of one name: one at a time, the others wait."""

    __slots__ = ("lock", "owner", "users")

    def __init__(self) -> None:
        # It knows its owner, so that it can be released whatever interrupted the owner where.
        self.lock = threading.RLock()
        self.owner = 0
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
        self._lock = threading.RLock()

    def apply(
        self,
        run: Callable[..., Any],
        operation: str,
        name: str,
        change: Callable[[Any], Any],
        default: bytes | core.Omitted,
        ttl: int | None,
        if_changed: bool = False,
    ) -> Record | None:
        """Do one update; ``run`` does one operation of a Pipeline, by its name."""
        timing = core.Timing(self._timeout, time.monotonic, _pause_after)
        with self._lock:
            turns = self._turns
            turn = turns.setdefault(name, _Turn())
            turn.users += 1
        me = threading.get_ident()
        try:
            if turn.owner == me:
                raise core.nested(operation, name)
            try:
                if not turn.lock.acquire(timeout=timing.rest()):
                    raise core.late_turn(operation, name, self._timeout)
                turn.owner = me
                steps = core.change_steps(operation, name, default, ttl, timing, if_changed)
                return _drive(steps, run, operation, name, change)
            finally:
                if turn.owner == me:
                    turn.owner = 0
                with suppress(RuntimeError):  # it isn't this thread's
                    turn.lock.release()
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users and turns.get(name) is turn:
                    del turns[name]


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
