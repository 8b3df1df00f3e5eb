"""The loads of an AsyncCache: one task for all callers of a name, which no caller's end cancels."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from contextvars import Context
from functools import partial
from inspect import isawaitable
from typing import Any, TypeAlias

from ..core import loading, notes
from ..core.fetch_terms import Checks, Terms
from ..core.flights import Flight
from ..core.loading import Do, Load, Outcome, Step
from ..core.notes import note_of
from ..core.typed import TypedRead
from ..errors import BulkError, ConnectionLost, DscacheError, shorten

_Loader: TypeAlias = Callable[[tuple[str, ...]], Coroutine[Any, Any, object]]
_Key: TypeAlias = tuple[bool, frozenset[str]]
"""Whether it is a refresh, and the names."""


class Loads:
    """The loads under way in one cache. ``entry`` is where the operations of a cache go."""

    def __init__(self, default_ttl: int | None) -> None:
        self.checks = Checks(default_ttl)
        self._tasks: dict[_Key, tuple[asyncio.Task[Outcome], Flight]] = {}

    async def fetch(
        self,
        entry: Any,
        reads: tuple[Awaitable[Any], Awaitable[Any]],
        name: str,
        load: Callable[[str], Any],
        terms: Terms,
    ) -> Any:
        """Return a record read together with its note; begin a refresh if it is due."""
        answers = await asyncio.gather(*reads, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        record, note = answers
        if record is None:
            return await self.load(entry, name, load, terms)
        found = {name: record} if note is None else {name: record, note_of(name): note}
        due = loading.due_names(found, [name], self.checks, terms)
        if due:
            self._begin(True, due, loading.refresh(due, found, terms), _single(load), entry)
        return record

    async def load(self, entry: Any, name: str, load: Callable[[str], Any], terms: Terms) -> Any:
        """Return a record that was missing, once this or another caller's load has made it."""
        begun = self._begin(
            False, [name], loading.load_missing([name], terms), _single(load), entry
        )
        outcome = await self._outcome_of(*begun)
        self.checks.keep_missing(outcome.nothing)
        if terms.refresh_after is not None:
            self.checks.note(name, terms)
        if name in outcome.errors:
            raise copy.copy(outcome.errors[name])
        return loading.another(outcome.records.get(name))

    async def fetch_bulk(
        self, entry: Any, names: list[str], load_many: Callable[[list[str]], Any], terms: Terms
    ) -> dict[str, Any]:
        """Return the records of names; missing ones are loaded in one call, due ones refreshed."""
        aged: list[str] = []
        if terms.refresh_after is not None:
            aged = [name for name in names if not self.checks.is_recent(name)]
        found = await entry.get_bulk([*names, *map(note_of, aged)])
        load = _many(load_many)
        due = loading.due_names(found, aged, self.checks, terms)
        if due:
            self._begin(True, due, loading.refresh(due, found, terms), load, entry)
        records = {name: found[name] for name in names if name in found}
        if self.checks.missing:
            await self.end_missing(entry, records.values())
        missing = [name for name in names if name not in found]
        if not missing:
            return records
        begun = self._begin(False, missing, loading.load_missing(missing, terms), load, entry)
        outcome = await self._outcome_of(*begun)
        self.checks.keep_missing(outcome.nothing)
        records |= {name: loading.another(one) for name, one in outcome.records.items()}
        records = {name: records[name] for name in names if name in records}
        if outcome.errors:
            raise BulkError("fetch_bulk", dict(outcome.errors), records)
        return records

    async def end_missing(self, entry: Any, records: Iterable[Any]) -> None:
        """End the notes of missing records that were read after all."""
        names = [record.name for record in records if not record.stale]
        if ended := self.checks.no_longer_missing(names):
            await _drive(loading.end_missing(ended), _load_nothing, entry, Flight(ended))

    def _begin(
        self, refresh: bool, names: Iterable[str], steps: loading.Steps, load: _Loader, entry: Any
    ) -> tuple[asyncio.Task[Outcome], Flight]:
        """Return the task and the flight of a load, which may be under way already."""
        names = list(names)
        key = refresh, frozenset(names)
        begun = self._tasks.get(key)
        if begun is None or begun[0].done():
            flight = Flight(names)
            task = asyncio.ensure_future(_drive(steps, load, entry, flight))
            # First, so that no exception in between leaves a task here for good.
            task.add_done_callback(partial(self._end, key))
            begun = self._tasks[key] = task, flight
        return begun

    def _end(self, key: _Key, ended: asyncio.Task[Outcome]) -> None:
        begun = self._tasks.get(key)
        if begun is not None and begun[0] is ended:
            del self._tasks[key]
        if not ended.cancelled():
            ended.exception()  # all its callers may have been cancelled

    async def _outcome_of(self, task: asyncio.Task[Outcome], flight: Flight) -> Outcome:
        with flight.waited_for():
            # Not by awaiting the task, which a cancelled caller would cancel.
            await asyncio.wait([task])
        if task.cancelled():
            name = shorten(flight.names[0])
            raise ConnectionLost(f"record {name}: its load was cancelled; fetch it again")
        error = task.exception()
        if isinstance(error, DscacheError):
            raise copy.copy(error)
        return task.result()

    async def close(self, seconds: float) -> None:
        """Cancel all loads, and wait so long for them to give up their leases."""
        tasks = [task for task, _ in self._tasks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)


class SlowFetches:
    """The calls of ``fetch`` that are no plain hits; a task completes the future of each."""

    def __init__(self, loop: asyncio.AbstractEventLoop, entry: Any, loads: Loads) -> None:
        self._loop = loop
        self._entry = entry
        self._loads = loads

    def check_age(
        self, waiter: asyncio.Future[Any], name: str, load: Any, terms: Terms, type_: Any, /
    ) -> None:
        """Read a record with its note, in the caller's context; complete the future ``waiter``."""
        # Both join the tick's batch of reads.
        reads = self._entry.get(name), self._entry.get(note_of(name))
        work = self._loads.fetch(self._entry, reads, name, load, terms)
        self._complete_by(work, waiter, type_)

    def go_on(
        self,
        waiter: asyncio.Future[Any],
        name: str,
        load: Any,
        terms: Terms,
        type_: Any,
        found: Any,
        context: Context,
        /,
    ) -> None:
        """Complete the future after a read that found the record ``found``, or None."""
        work = self._after(waiter, name, load, terms, found)
        context.run(self._complete_by, work, waiter, type_)

    async def _after(
        self, waiter: asyncio.Future[Any], name: str, load: Any, terms: Terms, found: Any
    ) -> Any:
        # The pipeline is in the middle of its replies, also where tasks begin eagerly.
        await asyncio.sleep(0)
        if waiter.done():  # its caller was cancelled
            return None
        if found is None:
            return await self._loads.load(self._entry, name, load, terms)
        await self._loads.end_missing(self._entry, [found])
        return found

    def _complete_by(
        self, work: Coroutine[Any, Any, Any], waiter: asyncio.Future[Any], type_: Any
    ) -> None:
        task = self._loop.create_task(work)
        # Twice, as an exception of a signal handler may strike one call.
        task.add_done_callback(partial(_complete, waiter, type_))
        task.add_done_callback(partial(_complete, waiter, type_))
        waiter.add_done_callback(partial(_cancel, task))


def _complete(waiter: asyncio.Future[Any], type_: Any, work: asyncio.Task[Any]) -> None:
    """Give a caller's future the outcome of its task."""
    error = None if work.cancelled() else work.exception()
    if waiter.done():
        return
    if work.cancelled():
        waiter.cancel()
    elif error is not None:
        waiter.set_exception(error)
    elif type_ is not None:
        TypedRead(waiter, type_).set_result(work.result())
    else:
        waiter.set_result(work.result())


def _cancel(work: asyncio.Task[Any], waiter: asyncio.Future[Any]) -> None:
    """End the task of a caller that was cancelled."""
    if waiter.cancelled():
        work.cancel()


async def _drive(steps: loading.Steps, load: _Loader, entry: Any, flight: Flight) -> Outcome:
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
            reply = await _execute(step, load, entry, flight)
        except BaseException as raised:
            error, reply = raised, None


async def _execute(step: Step, load: _Loader, entry: Any, flight: Flight) -> Any:
    if isinstance(step, Do):
        return await getattr(entry, step.operation)(*step.arguments)
    if isinstance(step, Load):
        renewing: list[asyncio.Task[None]] = []
        driver = asyncio.current_task()

        def begin() -> None:
            renewing.append(asyncio.ensure_future(_renew(step.renewal, entry, flight, driver)))

        # Most loads end before it is due.
        timer = asyncio.get_running_loop().call_later(notes.RENEW_SECONDS, begin)
        try:
            with flight.loading():
                return await load(step.names)
        finally:
            timer.cancel()
            for task in renewing:
                task.cancel()
    return await asyncio.sleep(step.seconds)


async def _renew(
    renewal: Callable[[list[str]], Do],
    entry: Any,
    flight: Flight,
    driver: asyncio.Task[Any] | None,
) -> None:
    """Renew leases until cancelled, or until the task that has them is done."""
    while driver is None or not driver.done():
        step = renewal(flight.waited_names())
        with suppress(DscacheError):  # the next one may succeed in time
            await getattr(entry, step.operation)(*step.arguments)
        await asyncio.sleep(notes.RENEW_SECONDS)


async def _load_nothing(_names: tuple[str, ...]) -> object:
    return {}


def _single(load: Callable[[str], Any]) -> _Loader:
    async def load_one(names: tuple[str, ...]) -> Mapping[str, Any]:
        (name,) = names
        data = load(name)
        return {name: await data if isawaitable(data) else data}

    return load_one


def _many(load_many: Callable[[list[str]], Any]) -> _Loader:
    async def load_all(names: tuple[str, ...]) -> object:
        data = load_many(list(names))
        return await data if isawaitable(data) else data

    return load_all
