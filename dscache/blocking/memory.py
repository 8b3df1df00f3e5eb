"""The cache ``name: memory`` for threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .._forks import after_fork_in_child
from .._locks import make_lock
from ..config import Options
from ..core.memory import NO_CONNECTIONS, MemoryPipeline
from .waiter import BlockingWaiter


class MemoryPool:
    """Takes the place of a Pool: for any number of threads, always ready until it is closed."""

    server = ""

    def __init__(self, options: Options) -> None:
        self._pipeline = MemoryPipeline(BlockingWaiter, lambda: None, options.ttl)
        # A signal handler may use the cache in the middle of an operation of its own thread.
        self._lock = make_lock()
        after_fork_in_child(self, MemoryPool.reset_after_fork)

    @property
    def is_ready(self) -> bool:
        """Whether it has not been closed."""
        return not self._pipeline.closed

    def run(self, operation: str, *arguments: Any) -> Any:
        """Do one operation of a Pipeline, by its name; return its result or raise its error."""
        with self._lock:
            outcome: BlockingWaiter = getattr(self._pipeline, operation)(*arguments)
        return outcome.take()

    def names(self) -> list[str]:
        """Return the names of all records, in no order."""
        with self._lock:
            return self._pipeline.names()

    def seconds_to_expiry(self) -> float | None:
        """Return the seconds until the next record may end; None without any that does."""
        with self._lock:
            return self._pipeline.seconds_to_expiry()

    def expire(self) -> None:
        """Remove the records that have ended, and tell the listeners."""
        with self._lock:
            self._pipeline.expire()

    def listen(self, listener: Callable[[Iterable[str]], object]) -> None:
        """Have a function called with the names of records that change; it must not block."""
        with self._lock:
            self._pipeline.listen(listener)

    def forget(self, listener: Callable[[Iterable[str]], object]) -> None:
        """Remove a listener; does nothing if it isn't there."""
        with self._lock:
            self._pipeline.forget(listener)

    def when_ready(self) -> None:
        """Return at once; raises UsageError if it was closed."""
        self._pipeline.check_open()

    def close(self) -> None:
        """Forget all records."""
        with self._lock:
            self._pipeline.close()

    def reset_after_fork(self) -> None:
        """Replace the lock in a forked child, which lacks the thread that held it."""
        self._lock = make_lock()

    def stats(self) -> dict[str, Any]:
        """Return the counters, named as those of a pool."""
        return {**self._pipeline.stats(), "waiting": 0, **NO_CONNECTIONS}
