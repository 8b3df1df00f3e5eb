"""The calls of ``fetch`` up to a hit; the compiled twin is ``fetcher.pxi``.

A hit of ``fetch`` costs about as much as one of ``get``: the options are checked once for each call
in a program's text, and the read's own waiter finds out that there is nothing more to do. All other
calls are left to ``slow``, which reads notes and loads.

The core calls a Fetcher's ``fetch`` through the function that ``quick`` returns. In the compiled
core it knows the options of a call by the identity of their names and values.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Protocol

from .._seconds import Lifetime
from ..errors import DscacheError
from . import typed
from .failures import of_call
from .fetch_terms import Checks, Terms, check_plain, name_of_note, no_load
from .keys import NOTE_SUFFIX
from .record import check_name
from .typed import TypedRead


class SlowFetches(Protocol):
    """The calls of an AsyncCache that are no plain hits."""

    def check_age(self, waiter: Any, name: str, load: Any, terms: Terms, type: Any, /) -> object:
        """Read a record with its note, in the caller's context; complete the future ``waiter``."""

    def go_on(
        self, waiter: Any, name: str, load: Any, terms: Terms, type: Any, found: Any,
        context: Context, /,
    ) -> object:  # fmt: skip
        """Complete the future after a read that found the record ``found``, or None."""


class BlockingFetches(Protocol):
    """The calls of a Cache that are no plain hits."""

    def check_age(self, name: str, load: Any, terms: Terms, /) -> Any:
        """Return a record that is read with its note."""

    def go_on(self, name: str, load: Any, terms: Terms, found: Any, /) -> Any:
        """Return the record after a read that found the record ``found``, or None."""


class Fetcher:
    """``fetch`` of an AsyncCache; ``entry`` has the operations of a Pipeline."""

    def __init__(
        self, entry: Any, create_waiter: Callable[[], Any], checks: Checks, slow: SlowFetches
    ) -> None:
        self._entry = entry
        self._create_waiter = create_waiter
        self._checks = checks
        self._slow = slow

    def quick(self) -> Callable[..., Any]:
        """Return the function that programs call."""
        return self.fetch

    def fetch(
        self,
        name: str,
        load: Any,
        *,
        ttl: Lifetime | None,
        refresh_after: Lifetime | None = None,
        jitter: float = 0.1,
        keep_missing: Lifetime | None = None,
        type: Any = None,
    ) -> Any:
        """Read a record, or load it if it is missing; the result is a Record, or None.

        ``AsyncCache.fetch`` describes the arguments and errors.
        """
        terms = self._checks.terms_of_call(ttl, refresh_after, jitter, keep_missing)
        if type is not None:
            typed.check_type(type)
        if not callable(load):
            raise no_load("fetch", "load", load)
        name = check_name(name)
        if name.endswith(NOTE_SUFFIX):
            raise name_of_note("fetch", name)
        waiter = self._create_waiter()
        if refresh_after is not None and not self._checks.is_recent(name):
            self._slow.check_age(waiter, name, load, terms, type)
        else:
            self._entry.read(name, FetchRead(self, waiter, name, load, terms, type))
        return waiter

    def take(self, read: FetchRead, record: Any) -> None:
        """Complete the waiter of a call with the record, or leave it to ``slow``."""
        if record is None or read.name in self._checks.missing:
            self._slow.go_on(
                *(read.waiter, read.name, read.load, read.terms, read.type, record, read.context)
            )
        elif read.type is not None:
            TypedRead(read.waiter, read.type).set_result(record)
        else:
            read.waiter.set_result(record)


class FetchRead:
    """The waiter of the read of one ``fetch``; ``waiter`` is the caller's."""

    __slots__ = ("context", "fetcher", "load", "name", "terms", "type", "waiter")

    def __init__(
        self, fetcher: Fetcher, waiter: Any, name: str, load: Any, terms: Terms, type: Any
    ) -> None:
        self.fetcher = fetcher
        self.waiter = waiter
        self.name = name
        self.load = load
        self.terms = terms
        self.type = type
        self.context = copy_context()

    def set_result(self, record: Any, /) -> None:
        self.fetcher.take(self, record)

    def set_exception(self, error: Exception, /) -> None:
        of_call(error, "fetch", self.name)
        self.waiter.set_exception(error)

    def exception(self) -> object:
        """Take the error of the caller's waiter, so that no event loop logs it."""
        return self.waiter.exception()


class BlockingFetcher:
    """``fetch`` of a Cache; ``run`` does an operation by its name, and ``near`` has the cached."""

    def __init__(
        self, run: Callable[..., Any], near: Any, checks: Checks, slow: BlockingFetches
    ) -> None:
        self._get: Callable[[str], Any] = partial(run, "get") if near is None else near.get
        self._checks = checks
        self._slow = slow
        self._plain: object = None  # the code of the latest load that is no coroutine function

    def quick(self) -> Callable[..., Any]:
        """Return the function that programs call."""
        return self.fetch

    def fetch(
        self,
        name: str,
        load: Any,
        *,
        ttl: Lifetime | None,
        refresh_after: Lifetime | None = None,
        jitter: float = 0.1,
        keep_missing: Lifetime | None = None,
        type: Any = None,
    ) -> Any:
        """Read a record, or load it if it is missing; return a Record, or None.

        ``Cache.fetch`` describes the arguments and errors.
        """
        terms = self._checks.terms_of_call(ttl, refresh_after, jitter, keep_missing)
        if type is not None:
            typed.check_type(type)
        code = getattr(load, "__code__", None)
        if code is None or code is not self._plain:
            check_plain(load)
            self._plain = code
        name = check_name(name)
        if name.endswith(NOTE_SUFFIX):
            raise name_of_note("fetch", name)
        try:
            if refresh_after is not None and not self._checks.is_recent(name):
                record = self._slow.check_age(name, load, terms)
            else:
                record = self._get(name)
                if record is None or name in self._checks.missing:
                    record = self._slow.go_on(name, load, terms, record)
        except DscacheError as error:
            of_call(error, "fetch", name)
            raise
        return record if type is None or record is None else typed.with_type(record, type)
