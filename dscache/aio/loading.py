"""The loads of an AsyncCache: one task for all callers of a name, which no caller's end cancels."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from inspect import isawaitable
from typing import Any, TypeAlias

from ..core import loading, notes
from ..core.failures import of_call
from ..core.fetch_terms import Checks, Terms
from ..core.flights import Flight
from ..core.loading import Do, Failed, Load, LoadEach, Outcome, Pause, Step
from ..core.notes import note_of
from ..core.refreshes import Batch, Refresh, RefreshQueue
from ..core.typed import TypedRead
from ..errors import BulkError, ConnectionLost, DscacheError, ReplyError, shorten

_Loader: TypeAlias = Callable[[tuple[str, ...]], Coroutine[Any, Any, object]]
_Key: TypeAlias = Hashable
"""The names that are missing, or the task of a refresh."""


class Loads:
    """The loads under way in one cache. ``entry`` is where the operations of a cache go."""

    def __init__(self, default_ttl: int | None) -> None:
        self.checks = Checks(default_ttl)
        self._refreshes = RefreshQueue()
        self._starting: asyncio.Task[Outcome] | None = None
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
            note_version = loading.version_of(note)
            self._refreshes.add(name, Refresh(load, terms, copy_context(), note_version))
            self._refresh_soon(entry)
        return record

    async def load(self, entry: Any, name: str, load: Callable[[str], Any], terms: Terms) -> Any:
        """Return a record that was missing, once this or another caller's load has made it."""
        begun = self._begin([name], loading.load_missing([name], terms), _single(load), entry)
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
        try:
            found = await entry.get_bulk([*names, *map(note_of, aged)])
        except BulkError as error:
            raise loading.bulk_failure(error, names) from error.__cause__
        except DscacheError as error:
            of_call(error, "fetch_bulk")
            raise
        load = _many(load_many)
        due = loading.due_names(found, aged, self.checks, terms)
        if due:
            steps = loading.refresh(due, found, terms)
            self._refreshes.add(frozenset(due), Refresh(load, terms, copy_context(), steps=steps))
            self._refresh_soon(entry)
        records = {name: found[name] for name in names if name in found}
        if self.checks.missing:
            await self.end_missing(entry, records.values())
        missing = [name for name in names if name not in found]
        if not missing:
            return records
        begun = self._begin(missing, loading.load_missing(missing, terms), load, entry)
        try:
            outcome = await self._outcome_of(*begun)
        except ReplyError as error:
            raise loading.refusal_of_missing(error, missing, records) from None
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
        self, names: list[str], steps: loading.Steps, load: _Loader, entry: Any
    ) -> tuple[asyncio.Task[Outcome], Flight]:
        """Return the task and the flight of a load, which may be under way already."""
        key = frozenset(names)
        begun = self._tasks.get(key)
        if begun is None or begun[0].done():
            flight = Flight(names)
            task = asyncio.ensure_future(_drive(steps, load, entry, flight))
            # First, so that no exception in between leaves a task here for good.
            task.add_done_callback(partial(self._end, key))
            begun = self._tasks[key] = task, flight
        return begun

    def _refresh_soon(self, entry: Any) -> None:
        """Begin refreshes that may run, together with the ones that this tick still brings."""
        if self._starting is not None and not self._starting.done():
            return
        if self._refreshes.room() <= 0:
            return
        # Of no caller's context: only the loads have one.
        task = asyncio.get_running_loop().create_task(self._refresh(entry), context=Context())
        task.add_done_callback(partial(self._end, task))
        self._tasks[task] = task, Flight(())
        self._starting = task

    async def _refresh(self, entry: Any) -> Outcome:
        """Do refreshes that wait, as many together as may be."""
        batch = self._refreshes.take()
        self._starting = None
        self._refresh_soon(entry)  # others may have room beside them
        loads = _LoadsApart(batch)
        try:
            first = next(iter(batch.left.items()), None)
            if first is None:
                return Outcome()
            key, refresh = first
            if refresh.steps is not None:
                work = _drive(refresh.steps, _many(refresh.load), entry, Flight(key))
                loop = asyncio.get_running_loop()
                return await loop.create_task(work, context=refresh.context)
            notes = {name: one.note for name, one in batch.left.items()}
            steps = loading.refresh_each(notes, refresh.terms, loads.waits_of)
            return await _drive(steps, loads, entry, Flight(()))
        except asyncio.CancelledError:
            self._refreshes.clear()  # at the end of a loop, or of the cache
            raise
        finally:
            loads.cancel()
            batch.left.clear()
            self._refresh_soon(entry)

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
        self._refreshes.clear()
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
        self._complete_by(work, waiter, name, type_)

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
        context.run(self._complete_by, work, waiter, name, type_)

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
        self, work: Coroutine[Any, Any, Any], waiter: asyncio.Future[Any], name: str, type_: Any
    ) -> None:
        task = self._loop.create_task(work)
        # Twice, as an exception of a signal handler may strike one call.
        task.add_done_callback(partial(_complete, waiter, name, type_))
        task.add_done_callback(partial(_complete, waiter, name, type_))
        waiter.add_done_callback(partial(_cancel, task))


def _complete(waiter: asyncio.Future[Any], name: str, type_: Any, work: asyncio.Task[Any]) -> None:
    """Give a caller's future the outcome of its task."""
    error = None if work.cancelled() else work.exception()
    if waiter.done():
        return
    if work.cancelled():
        waiter.cancel()
    elif error is not None:
        if isinstance(error, DscacheError):
            of_call(error, "fetch", name)
        waiter.set_exception(error)
    elif type_ is not None:
        TypedRead(waiter, type_).set_result(work.result())
    else:
        waiter.set_result(work.result())


def _cancel(work: asyncio.Task[Any], waiter: asyncio.Future[Any]) -> None:
    """End the task of a caller that was cancelled."""
    if waiter.cancelled():
        work.cancel()


class _LoadsApart:
    """The loads of refreshes that run together, each for itself in the context of its caller."""

    def __init__(self, batch: Batch) -> None:
        self._left = batch.left
        self._flights: dict[str, Flight] = {}
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    def waits_of(self, name: str) -> list[str]:
        """Return the names that the load of a name waits for."""
        return self._flights[name].waited_names()

    async def ended(self, step: LoadEach) -> dict[str, Any]:
        """Begin loads at the first call; return the results of the ones that have ended."""
        for name in [name for name in self._left if name not in step.names]:
            del self._left[name]  # another refresh may begin
        if not self._flights:
            done = {}
            for name in step.names:
                refresh = self._left[name]
                try:
                    done[name] = refresh.context.run(self._begin, name, refresh)
                except Exception as error:
                    done[name] = Failed(error)
            if done := {name: data for name, data in done.items() if name not in self._tasks}:
                return done
        await asyncio.wait(
            self._tasks.values(), timeout=step.seconds, return_when=asyncio.FIRST_COMPLETED
        )
        over = [name for name, task in self._tasks.items() if task.done()]
        return {name: _result_of(self._tasks.pop(name)) for name in over}

    def _begin(self, name: str, refresh: Refresh) -> Any:
        """Call a load, and return its result unless a task awaits it."""
        flight = self._flights[name] = Flight([name])
        with flight.loading():
            data = refresh.load(name)
            if isawaitable(data):
                self._tasks[name] = asyncio.ensure_future(_result(data))
        return data

    def cancel(self) -> None:
        """Cancel the loads that run."""
        for task in self._tasks.values():
            task.cancel()


async def _result(load: Awaitable[Any]) -> Any:
    return await load


def _result_of(load: asyncio.Task[Any]) -> Any:
    """Return the data of a load that is over, or Failed."""
    if load.cancelled():
        return Failed(asyncio.CancelledError())
    error = load.exception()
    return load.result() if error is None else Failed(error)


async def _drive(
    steps: loading.Steps, load: _Loader | _LoadsApart, entry: Any, flight: Flight
) -> Outcome:
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


async def _execute(step: Step, load: _Loader | _LoadsApart, entry: Any, flight: Flight) -> Any:
    if isinstance(step, Do):
        return await getattr(entry, step.operation)(*step.arguments)
    if isinstance(load, _LoadsApart):
        assert isinstance(step, LoadEach)
        return await load.ended(step)
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
    assert isinstance(step, Pause)
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
