"""The options of ``fetch``, and the names whose age a process has checked a moment ago."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import Any, Final

from .._seconds import Lifetime, whole_seconds
from ..errors import RecordError, shorten
from . import constants as c
from .entries import unique
from .failures import bad_ttl, check_iterable
from .keys import NOTE_SUFFIX
from .notes import note_of

# How many names a process remembers having checked, and how many kinds of terms.
_MOST_CHECKS: Final = 65_536
_MOST_TERMS: Final = 1_024

# Children of one parent share the state of the usual generator.
_random = SystemRandom()


@dataclass(frozen=True, slots=True)
class Terms:
    """The checked options of a ``fetch``, with ``ttl`` 0 for none."""

    ttl: int
    refresh_after: int | None
    jitter: float
    keep_missing: int | None

    def lifetime(self, seconds: int) -> int:
        """Return a lifetime with jitter, in whole seconds."""
        if not seconds or not self.jitter:
            return seconds
        spread = seconds * _random.uniform(1 - self.jitter, 1 + self.jitter)
        return min(max(1, int(spread + _random.random())), c.MAX_TTL)

    def settled(self) -> Terms:
        """Return terms whose lifetimes have had their jitter, for records that shall share them."""
        due = self.refresh_after
        return replace(
            self,
            ttl=self.lifetime(self.ttl),
            refresh_after=None if due is None else self.lifetime(due),
            jitter=0.0,
        )

    def check_period(self) -> float:
        """Return after how many seconds a process checks again whether a record is due."""
        return (self.refresh_after or 0) * _random.uniform(0.05, 0.1)


def terms_of(
    ttl: Lifetime | None,
    refresh_after: Lifetime | None,
    jitter: float,
    keep_missing: Lifetime | None,
    default_ttl: int | None,
    operation: str = "fetch",
) -> Terms:
    """Return the checked options of a ``fetch``; raises RecordError."""
    seconds = (default_ttl or 0) if ttl is None else whole_seconds(ttl)
    if seconds is None or not 0 <= seconds <= c.MAX_TTL:
        raise bad_ttl(operation, ttl)
    due = _checked_seconds(operation, "refresh_after", refresh_after)
    if due is not None and seconds and due >= seconds:
        raise RecordError(
            f"{operation}: refresh_after must be less than the ttl of {seconds} s, not {due}; a "
            "record that has expired is loaded anyway"
        )
    kept = _checked_seconds(operation, "keep_missing", keep_missing)
    is_number = type(jitter) is float or _is_int(jitter)
    if not is_number or not 0 <= jitter < 1:
        raise RecordError(
            f"{operation}: jitter must be a number from 0 to less than 1, not {shorten(jitter)}"
        )
    return Terms(seconds, due, float(jitter), kept)


def no_load(operation: str, name: str, load: object) -> TypeError:
    """Return the error of a load that can't be called."""
    return TypeError(f"{operation}: {name} must be a function, not {shorten(load)}")


def is_async(load: Any) -> bool:
    """Return whether a function is a coroutine function, or an object called as one."""
    code = getattr(load, "__code__", None)
    if code is not None:
        return bool(code.co_flags & inspect.CO_COROUTINE)
    return inspect.iscoroutinefunction(load) or inspect.iscoroutinefunction(
        getattr(load, "__call__", None)  # noqa: B004 # of an object; whether it is callable is known
    )


class AwaitedLoad(TypeError):
    """A load of a Cache has returned an awaitable."""


def not_plain(operation: str, name: str) -> TypeError:
    """Return the error of a load that is a coroutine function in a blocking cache."""
    return TypeError(
        f"{operation}: {name} is a coroutine function, and a Cache awaits nothing; give a plain "
        "function, or use an AsyncCache"
    )


def check_plain(load: Any) -> None:
    """Raise TypeError for the load of a blocking ``fetch`` that can't be called, or is async."""
    if not callable(load):
        raise no_load("fetch", "load", load)
    if is_async(load):
        raise not_plain("fetch", "load")


def name_of_note(operation: str, name: str) -> RecordError:
    """Return the error for a name that is that of a note."""
    return RecordError(
        f"{operation}: record {shorten(name)}: names that end with {NOTE_SUFFIX} belong to fetch "
        "itself; name the record otherwise",
        name=name,
    )


def checked_names(operation: str, names: Iterable[str]) -> list[str]:
    """Return the names of a bulk, each once; raises RecordError for a bad one."""
    try:
        checked = list(unique(operation, names))
    except TypeError as error:
        check_iterable(operation, names, error)
        raise
    for name in checked:
        if name.endswith(NOTE_SUFFIX):
            raise name_of_note(operation, name)
    return checked


def _checked_seconds(operation: str, option: str, value: Lifetime | None) -> int | None:
    seconds = whole_seconds(value)
    if value is not None and (seconds is None or not 1 <= seconds <= c.MAX_TTL):
        raise RecordError(
            f"{operation}: {option} must be whole seconds from 1 to {c.MAX_TTL} as an int or a "
            "timedelta, or None, "
            f"not {shorten(value)}"
        )
    return seconds


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Checks:
    """The terms in use, and the names whose age this process has checked a moment ago.

    ``recent`` has the time until which a name needs no check, in seconds of ``time.monotonic``.
    ``keeps_missing`` is whether any call has remembered that there is nothing. ``missing`` has the
    names of which a note told so that this process has not ended.
    """

    def __init__(self, default_ttl: int | None) -> None:
        self._default_ttl = default_ttl
        self._known: dict[tuple[Any, ...], Terms] = {}
        self._latest: tuple[Any, Any, Any, Any, Terms | None] = (None, None, None, None, None)
        self.recent: dict[str, float] = {}
        self.keeps_missing = False
        self.missing: set[str] = set()

    def terms(
        self,
        ttl: Lifetime | None,
        refresh_after: Lifetime | None,
        jitter: float,
        keep_missing: Lifetime | None,
        operation: str = "fetch",
    ) -> Terms:
        """Return the checked options of a ``fetch``; raises RecordError."""
        given = ttl, refresh_after, jitter, keep_missing
        try:
            terms = self._known.get(given)
        except TypeError:  # one has no hash
            terms_of(*given, self._default_ttl, operation)
            raise
        if terms is None:
            terms = terms_of(*given, self._default_ttl, operation)
            if len(self._known) >= _MOST_TERMS:
                self._known.clear()
            self._known[given] = terms
            if keep_missing is not None:
                self.keeps_missing = True
        return terms

    def terms_of_call(
        self,
        ttl: Lifetime | None,
        refresh_after: Lifetime | None,
        jitter: float,
        keep_missing: Lifetime | None,
    ) -> Terms:
        """Return the checked options of a ``fetch``, known by their identity from the last call."""
        # Compared one by one: hashing the options would cost a hit a tenth of a read.
        known_ttl, known_age, known_jitter, known_missing, terms = self._latest
        if (
            terms is None
            or ttl is not known_ttl
            or refresh_after is not known_age
            or jitter is not known_jitter
            or keep_missing is not known_missing
        ):
            terms = self.terms(ttl, refresh_after, jitter, keep_missing)
            self._latest = ttl, refresh_after, jitter, keep_missing, terms
        return terms

    def keep_missing(self, names: Iterable[str]) -> None:
        """Note that other calls remember of these names that there is nothing."""
        if len(self.missing) >= _MOST_CHECKS:
            self.missing.clear()
        self.missing.update(names)

    def notes_after(self, names: Iterable[str], *, removed: bool) -> list[str]:
        """Return the notes to remove with records that are written or removed.

        A removal ends every process's memory of a name. A write does so only for the names known
        here: while a record exists, it counts more than its note anyway.
        """
        if removed:
            return [note_of(name) for name in names]
        return [note_of(name) for name in self.no_longer_missing(names)]

    def no_longer_missing(self, names: Iterable[str]) -> list[str]:
        """Return the missing ones among the names, and forget that they were missing."""
        ended = [name for name in names if name in self.missing]
        self.missing.difference_update(ended)
        return ended

    def is_recent(self, name: str) -> bool:
        """Return whether the age of a record was checked a moment ago."""
        return self.recent.get(name, 0.0) > time.monotonic()

    def note(self, name: str, terms: Terms) -> None:
        """Note that the age of a record has been checked now."""
        recent = self.recent
        if name not in recent and len(recent) >= _MOST_CHECKS:
            with suppress(KeyError, RuntimeError, StopIteration):  # other threads do the same
                del recent[next(iter(recent))]
        recent[name] = time.monotonic() + terms.check_period()
