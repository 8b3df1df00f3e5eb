"""Flights: the loads of ``fetch`` under way, and the rings in which they would wait for each other.

The theory of operation stands in ``core/loading.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from ..errors import LoadError, UsageError, shorten
from .notes import LOADING, RENEW_SECONDS, content_of, note_of, state_of

# How long a ring of leases must last: what a note tells is as old as its last renewal.
_RING_SECONDS: Final = 2 * RENEW_SECONDS
# The most names that a note tells, and that are followed from note to note.
_MOST_WAITED: Final = 100


class Flight:
    """A load under way in this process, and the other ones that it waits for."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._waits: list[Flight] = []

    def waited_names(self) -> list[str]:
        """Return names that the load waits for at the moment."""
        names = dict.fromkeys(name for one in list(self._waits) for name in one.names)
        return list(names)[:_MOST_WAITED]

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """Note within the block that the calling load, if any, waits for this flight.

        Raises UsageError if this flight is that load's own, or waits for it.
        """
        caller = _current.get()
        if caller is None:
            yield
            return
        # Noted before the look: of two threads that close a ring together, one sees it.
        caller._waits.append(self)
        try:
            if self._needs(caller):
                raise _ring(self, caller)
            yield
        finally:
            caller._waits.remove(self)

    def _needs(self, other: Flight) -> bool:
        seen = {self}
        queue = [self]
        while queue:
            one = queue.pop()
            if one is other:
                return True
            new = {*one._waits} - seen
            seen |= new
            queue += new
        return False

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Say within the block that the calling code is the load of this flight."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[Flight | None] = ContextVar("dscache_load", default=None)
"""The flight whose load is the calling code; tasks and ``asyncio.to_thread`` inherit it."""


def _ring(wanted: Flight, caller: Flight) -> UsageError:
    name = shorten(wanted.names[0])
    if wanted is caller:
        return UsageError(
            f"record {name}: its load fetches the same record, and would wait for itself; read "
            "the source in it"
        )
    return UsageError(
        f"record {name}: its load waits for that of {shorten(caller.names[0])}, which fetches it "
        "and would wait for itself; read the source in one of the loads"
    )


def in_same_thread(wanted: Flight) -> UsageError:
    """Return the error of a call that has interrupted the load for which it would wait."""
    return UsageError(
        f"record {shorten(wanted.names[0])}: fetched by a signal handler or a finalizer that has "
        "interrupted a fetch of the same record, for which it would wait; fetch it in another "
        "thread"
    )


class Rings:
    """The rings that a caller finds among the leases for which it waits."""

    def __init__(self) -> None:
        self.others: list[str] = []
        """Names whose notes are read as well, as the leases wait for them."""
        self._since: dict[str, float] = {}

    def look(
        self, waiting: Iterable[str], found: Mapping[str, Any], errors: dict[str, Exception]
    ) -> None:
        """Fail the names whose leases have waited for themselves for a while."""
        names = dict.fromkeys([*waiting, *self.others])
        waits = {name: _waited_names(found.get(note_of(name))) for name in names}
        others = dict.fromkeys(other for name in waiting for other in _reached(name, waits))
        self.others = [name for name in others if name not in waiting][:_MOST_WAITED]
        now = time.monotonic()
        ringed = [name for name in waiting if waits[name] and name in _reached(name, waits)]
        self._since = {name: self._since.get(name, now) for name in ringed}
        for name, began in self._since.items():
            if now - began >= _RING_SECONDS:
                errors[name] = LoadError(
                    f"record {shorten(name)}: its load, in another call, fetches a record whose "
                    "load fetches this one; read the source in one of the loads",
                    name=name,
                )


def _waited_names(note: Any) -> list[str]:
    """Return the names that the load of a lease waits for."""
    names = content_of(note).get("waits")
    if not isinstance(names, list) or state_of(note) != LOADING:
        return []
    return [name for name in names[:_MOST_WAITED] if isinstance(name, str) and name]


def _reached(name: str, waits: Mapping[str, list[str]]) -> dict[str, None]:
    """Return the names to which ``waits`` leads from a name, itself only if it is among them."""
    seen: dict[str, None] = {}
    queue = [name]
    while queue:
        for other in waits.get(queue.pop(), ()):
            if other not in seen:
                seen[other] = None
                queue.append(other)
    return seen
