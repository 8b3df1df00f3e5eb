"""Refreshes of ageing records in the background, which wait for their turn (sans-IO).

Records that were loaded together are due together. If all of them were loaded anew at once, calls
that find what they fetch would wait behind that work. So a queue bounds the refreshes of a cache,
and lets some of them share their commands. Only refreshes wait here: a call without a record to
return loads it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import Context
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final
from weakref import WeakSet

from .fetch_terms import Terms
from .loading import Steps

MOST_REFRESHES: Final = 32
"""How many refreshes run at once in a cache; the docs tell it."""

# How many refreshes take their leases by one command. More of them would hold up other calls.
_MOST_TOGETHER: Final = 16
# How many wait. One beyond that is due again at the next check of its age.
_MOST_WAITING: Final = 65_536


@dataclass(frozen=True, slots=True)
class Refresh:
    """A record that is due, with the version of its note, or None.

    A refresh of a bulk has ``steps`` of its own instead, and is done alone.
    """

    load: Callable[..., Any]
    terms: Terms
    context: Context
    note: int | None = None
    steps: Steps | None = None


class Batch:
    """Refreshes that run together; ``left`` has the ones that have not ended."""

    __slots__ = ("__weakref__", "left")

    def __init__(self, left: dict[Any, Refresh]) -> None:
        self.left = left


class RefreshQueue:
    """The refreshes of a cache: some are running, and others wait in the order they came.

    Batches are known for as long as a driver holds them, whatever strikes it.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, Refresh] = {}
        self._batches: WeakSet[Batch] = WeakSet()

    def add(self, key: Hashable, refresh: Refresh) -> None:
        """Let a refresh wait, unless the same one is running; the key is a name, or names."""
        if any(key in batch.left for batch in self._batches):
            return
        if key in self._waiting or len(self._waiting) < _MOST_WAITING:
            self._waiting[key] = refresh  # in its old place: it has waited the longest

    def room(self) -> int:
        """Return how many refreshes may begin, of the ones that wait."""
        running = sum(len(batch.left) for batch in self._batches)
        return min(MOST_REFRESHES - running, len(self._waiting))

    def take(self) -> Batch:
        """Return refreshes to run together, which have equal terms; perhaps none."""
        most = min(_MOST_TOGETHER, self.room())
        taken: dict[Any, Refresh] = {}
        for key, refresh in islice(self._waiting.items(), most):
            first = next(iter(taken.values()), refresh)
            if taken and (first.steps or refresh.steps or refresh.terms != first.terms):
                break
            taken[key] = refresh
        for key in taken:
            del self._waiting[key]
        batch = Batch(taken)
        self._batches.add(batch)
        return batch

    def clear(self) -> None:
        """Drop the refreshes that wait."""
        self._waiting.clear()
