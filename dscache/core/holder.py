"""A place that one caller holds, for no longer than its call exists.

An exception can strike between any two lines, for instance out of a signal handler: behind the line
that takes a lock, and before the block that would release it. So a caller holds a place by an
object in its own frame, and the place refers to that weakly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from weakref import ref

from .._locks import make_lock


class Holder:
    """Holds a place for as long as it exists; ``owner`` is a task, a thread or nothing."""

    __slots__ = ("__weakref__", "owner")

    def __init__(self, owner: Any = None) -> None:
        self.owner = owner


def nothing() -> None:
    """Return None, as a reference does whose object is gone."""
    return


class Place:
    """A place for one caller at a time, of any thread."""

    __slots__ = ("_lock", "holder")

    def __init__(self) -> None:
        self._lock = make_lock()
        self.holder: Callable[[], Holder | None] = nothing

    def take(self) -> Holder | None:
        """Return a holder of the place, which frees it by its end; None if another one exists."""
        holder = Holder()
        with self._lock:
            if self.holder() is not None:
                return None
            self.holder = ref(holder)
        return holder


# How often a waiting thread looks whether a holder is gone without a word, in seconds.
GLANCE: Final = 0.05
