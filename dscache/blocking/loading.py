"""The loads of a Cache: in the thread of the first caller of a name, for all that wait."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias
from weakref import ref

from ..core import loading, notes
from ..core.changes import PLAIN
from ..core.failures import of_call
from ..core.fetch_terms import AwaitedLoad, Checks, Terms
from ..core.flights import Flight, in_same_thread
from ..core.holder import GLANCE, Holder
from ..core.loading import Do, Load, Outcome, Pause, Step
from ..core.notes import note_of
from ..core.refreshes import MOST_REFRESHES
from ..errors import BulkError, DscacheError, ReplyError

_Loader: TypeAlias = Callable[[tuple[str, ...]], object]
_Run: TypeAlias = Callable[..., Any]
_Key: TypeAlias = tuple[bool, frozenset[str]]
"""Whether it is a refresh, and the names."""


class _Flight(Flight):
    """A load under way in one thread; without an outcome at its end, the thread was struck."""

    def __init__(self, names: Iterable[str], holder: Holder) -> None:
        super().__init__(names)
        self.ended = threading.Event()
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self._holder = ref(holder)

    def is_over(self) -> bool:
        """Whether the thread has ended the load, or was struck before it could say so."""
        return self.ended.is_set() or self._holder() is None

    def is_of_this_thread(self) -> bool:
        """Whether the calling thread has interrupted its own load, for example by a signal."""
        holder = self._holder()
        return holder is not None and holder.owner == threading.get_ident()


class Loads:
    """The loads under way in one cache. ``run`` does an operation of a cache by its name."""

    def __init__(self, default_ttl: int | None) -> None:
        self.checks = Checks(default_ttl)
        self._flights: dict[_Key, _Flight] = {}

    def fetch(self, run: _Run, name: str, load: Callable[[str], Any], terms: Terms) -> Any:
        """Return a record read together with its note; load it anew if it is due."""
        found = run("get_bulk", [name, note_of(name)])
        if name not in found:
            return self.load(run, name, load, terms)
        due = loading.due_names(found, [name], self.checks, terms)
        return (
            self._refreshed(run, due, found, _single(load), terms).get(name) if due else found[name]
        )

    def load(self, run: _Run, name: str, load: Callable[[str], Any], terms: Terms) -> Any:
        """Return a record that was missing, once this or another caller's load has made it."""
        outcome, is_own = self._fly(
            False, [name], lambda: loading.load_missing([name], terms), _single(load), run
        )
        self.checks.keep_missing(outcome.nothing)
        if terms.refresh_after is not None:
            self.checks.note(name, terms)
        if name in outcome.errors:
            raise copy.copy(outcome.errors[name])
        record = outcome.records.get(name)
        return record if is_own else loading.another(record)

    def fetch_bulk(
        self, run: _Run, names: list[str], load_many: Callable[[list[str]], Any], terms: Terms
    ) -> dict[str, Any]:
        """Return the records of names; missing ones are loaded in one call, due ones in another."""
        aged: list[str] = []
        if terms.refresh_after is not None:
            aged = [name for name in names if not self.checks.is_recent(name)]
        try:
            found = run("get_bulk", [*names, *map(note_of, aged)])
        except BulkError as error:
            raise loading.bulk_failure(error, names) from error.__cause__
        except DscacheError as error:
            of_call(error, "fetch_bulk")
            raise
        records = {name: found[name] for name in names if name in found}

        def load(wanted: tuple[str, ...]) -> object:
            return _plain(load_many(list(wanted)))

        due = loading.due_names(found, aged, self.checks, terms)
        if due:
            anew = self._refreshed(run, due, found, load, terms)
            records = {
                name: anew[name] if name in due else one
                for name, one in records.items()
                if name not in due or name in anew
            }
        if self.checks.missing:
            self.end_missing(run, records.values())
        missing = [name for name in names if name not in found]
        if not missing:
            return records
        try:
            outcome, is_own = self._fly(
                False, missing, lambda: loading.load_missing(missing, terms), load, run
            )
        except ReplyError as error:
            raise loading.refusal_of_missing(error, missing, records) from None
        self.checks.keep_missing(outcome.nothing)
        for name, one in outcome.records.items():
            records[name] = one if is_own else loading.another(one)
        records = {name: records[name] for name in names if name in records}
        if outcome.errors:
            raise BulkError("fetch_bulk", dict(outcome.errors), records)
        return records

    def end_missing(self, run: _Run, records: Iterable[Any]) -> None:
        """End the notes of missing records that were read after all."""
        names = [record.name for record in records if not record.stale]
        if ended := self.checks.no_longer_missing(names):
            _drive(loading.end_missing(ended), dict.fromkeys, run, _Flight(ended, Holder()))

    def reset_after_fork(self) -> None:
        """Forget the loads of the parent's threads, which a forked child lacks."""
        self._flights = {}

    def _refreshed(
        self,
        run: _Run,
        due: Mapping[str, Any],
        found: Mapping[str, Any],
        load: _Loader,
        terms: Terms,
    ) -> Mapping[str, Any]:
        """Return due records, loaded anew unless another thread or process does.

        While many threads do so for other records, the old ones are served until the next check.
        """
        key = True, frozenset(due)
        # A flight that a struck thread has left here is over, and takes no place.
        flights = self._flights.copy().items()
        if sum(one[0] and not flight.is_over() for one, flight in flights) >= MOST_REFRESHES:
            return due
        begun = self._flights.get(key)
        if begun is not None and not begun.is_over():
            return due
        outcome, is_own = self._fly(*key, lambda: loading.refresh(due, found, terms), load, run)
        return outcome.records if is_own else due

    def _fly(
        self,
        refresh: bool,
        names: Iterable[str],
        steps: Callable[[], loading.Steps],
        load: _Loader,
        run: _Run,
    ) -> tuple[Outcome, bool]:
        """Return the outcome of a load, and whether this thread has done it."""
        names = list(names)
        key = refresh, frozenset(names)
        while True:
            holder = Holder(threading.get_ident())
            own = _Flight(names, holder)
            try:
                flight = self._flights.setdefault(key, own)
                if flight is own:
                    try:
                        with own.waited_for():
                            own.outcome = _drive(steps(), load, run, own)
                    except Exception as error:
                        own.error = error
                        raise
                    return own.outcome, True
            finally:
                # Whatever strikes the thread, waiting ones go on.
                self._forget(key, own)
                own.ended.set()
                del holder
            if flight.is_over():
                # Left here by a struck thread, or it has ended now: what it has read may be old.
                self._forget(key, flight)
                continue
            with flight.waited_for():
                if flight.is_of_this_thread():
                    raise in_same_thread(flight)
                while not flight.is_over():
                    flight.ended.wait(GLANCE)
            if isinstance(flight.error, DscacheError):
                raise copy.copy(flight.error)
            if flight.outcome is not None:
                return flight.outcome, False

    def _forget(self, key: _Key, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            with suppress(KeyError):  # another thread does the same
                del self._flights[key]


class SlowFetches:
    """The calls of ``fetch`` that are no plain hits; ``run`` does the operations."""

    def __init__(self, run: _Run, loads: Loads) -> None:
        self._run = run
        self._loads = loads

    def check_age(self, name: str, load: Any, terms: Terms, /) -> Any:
        """Return a record that is read with its note."""
        return self._loads.fetch(self._run, name, load, terms)

    def go_on(self, name: str, load: Any, terms: Terms, found: Any, /) -> Any:
        """Return the record after a read that found the record ``found``, or None."""
        if found is None:
            return self._loads.load(self._run, name, load, terms)
        self._loads.end_missing(self._run, [found])
        return found


def _drive(steps: loading.Steps, load: _Loader, run: _Run, flight: _Flight) -> Outcome:
    reply: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(reply) if error is None else steps.throw(error)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        finally:
            error = None  # its traceback holds this frame
        try:
            reply = _execute(step, load, run, flight)
        except BaseException as raised:
            error, reply = raised, None


def _execute(step: Step, load: _Loader, run: _Run, flight: _Flight) -> Any:
    if isinstance(step, Do):
        return run(step.operation, *step.arguments)
    if isinstance(step, Load):
        return _load(step, load, run, flight)
    assert isinstance(step, Pause)
    # An Event, whose wait a monkey-patched program replaces as well.
    threading.Event().wait(step.seconds)
    return None


def _load(step: Load, load: _Loader, run: _Run, flight: Flight) -> object:
    """Run a load, while a thread renews its leases."""
    ended = threading.Event()
    holder = Holder()
    try:
        threading.Thread(
            target=_renew,
            args=(step.renewal, run, flight, ended, ref(holder)),
            name="dscache lease",
            daemon=True,
        ).start()
        with flight.loading():
            return load(step.names)
    finally:
        ended.set()
        del holder


def _renew(
    renewal: Callable[[list[str]], Do],
    run: _Run,
    flight: Flight,
    ended: threading.Event,
    holder: Callable[[], Holder | None],
) -> None:
    # Without a holder, the thread that loads was struck before it could say that it has ended.
    while not ended.wait(notes.RENEW_SECONDS) and holder() is not None:
        step = renewal(flight.waited_names())
        with suppress(DscacheError):  # the next one may succeed in time
            run(step.operation, *step.arguments)


def _single(load: Callable[[str], Any]) -> _Loader:
    def load_one(names: tuple[str, ...]) -> Mapping[str, Any]:
        (name,) = names
        return {name: _plain(load(name))}

    return load_one


def _plain(result: Any) -> Any:
    """Return the result of a load; raises AwaitedLoad if it is to be awaited."""
    if type(result) not in PLAIN and inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # or Python would warn that it was never awaited
        raise AwaitedLoad(
            "returned an awaitable, and a Cache awaits nothing; give a plain function, or use an "
            "AsyncCache"
        )
    return result
