"""A load of every operation on a cache, and a ledger of the answers that are allowed.

Each name has one writer, which writes version after version and records the result of each. The
ledger limits what any read may return: nothing older than acknowledged before the read, nothing
that was refused, nothing of another name.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable
from functools import partial
from types import TracebackType
from typing import Any, Self

import dscache

# A write that may have happened can stay in a stalled network, and arrive as late as this.
_LATE_SECONDS = 60.0
_EXAMPLES = 20


class Ledger:
    """The possible state of one name: kept by its only writer, checked by every reader.

    Step by step it writes version 1, 2, 3 and so on; with ``removes``, every fourth step is a
    removal instead. A ``guarded`` name is written with ``if_newer``. If ``late``, a write with an
    unknown result may still arrive after later ones; a guarded one can't.
    """

    def __init__(
        self, name: str, *, guarded: bool = False, removes: bool = False, late: bool = False
    ) -> None:
        self.name = name
        self.guarded = guarded
        self.removes = removes
        self.late = late and not guarded
        self.issued = 0
        self.acknowledged = 0
        self._never: set[int] = set()
        self._unknown: dict[int, float] = {}

    def is_removal(self, step: int) -> bool:
        """Whether a step leaves no record behind."""
        return step == 0 or (self.removes and step % 4 == 0)

    @property
    def is_certain(self) -> bool:
        """Whether the last acknowledged step is the stored one."""
        return not self._unknown and self.acknowledged + len(self._never) == self.issued

    def data(self, step: int) -> dict[str, Any]:
        """Return the data of a step, which names its owner."""
        return {"name": self.name, "step": step, "text": "x" * (step % 50)}

    def begin(self) -> int:
        """Return the next step, which is about to be issued."""
        self.issued += 1
        return self.issued

    def done(self, step: int) -> None:
        """Record that a step was acknowledged."""
        self.acknowledged = step
        self._never.clear()
        if not self.late:
            self._unknown.clear()

    def refused(self, step: int) -> None:
        """Record that a step was certainly not executed."""
        self._never.add(step)

    def unknown(self, step: int, now: float) -> None:
        """Record that a step may have been executed, or may still be."""
        self._unknown[step] = now
        while len(self._unknown) > 1 and next(iter(self._unknown.values())) < now - _LATE_SECONDS:
            del self._unknown[next(iter(self._unknown))]

    def allows(self, version: int | None, floor: int) -> bool:
        """Whether a read may return this; ``floor`` was acknowledged when the read was issued."""
        if version is None:
            steps = range(floor, self.issued + 1)
            return any(self.is_removal(s) and s not in self._never for s in steps) or any(
                map(self.is_removal, self._unknown)
            )
        if self.is_removal(version) or version in self._never:
            return False
        return floor <= version <= self.issued or version in self._unknown


class Load:
    """Writers and readers on one cache, from ``async with`` on until its end.

    ``wrong`` describes each answer that is not allowed, ``outcomes`` counts operations by the type
    of their error (or "ok", "cancelled"), ``lateness`` is by how many seconds the slowest operation
    missed its deadline (negative if none did). ``flood`` is how many further operations a second
    are issued, whether or not the ones before were answered.
    """

    def __init__(
        self,
        cache: dscache.AsyncCache,
        *,
        timeout: float,
        names: int = 32,
        readers: int = 16,
        pause: float = 0.005,
        late: bool = False,
        guarded_only: bool = False,
        flood: int = 0,
        prefix: str = "load",
    ) -> None:
        self.wrong: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.lateness = -timeout
        self.last_success = 0.0
        self._cache = cache
        self._timeout = timeout
        self._pause = pause
        self._readers = readers
        self._flood = flood
        self._loop = asyncio.get_running_loop()
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []
        self._ledgers = [
            Ledger(
                f"{prefix}/{i}",
                guarded=guarded_only or i % 2 == 0,
                removes=not guarded_only and i % 4 == 1,
                late=late,
            )
            for i in range(names)
        ]
        self._of = {ledger.name: ledger for ledger in self._ledgers}

    @property
    def names(self) -> list[str]:
        """The names that it writes and reads."""
        return list(self._of)

    @property
    def operations(self) -> int:
        """How many operations have ended."""
        return self.outcomes.total()

    @property
    def acknowledged(self) -> int:
        """How many steps of all names were reached."""
        return sum(ledger.acknowledged for ledger in self._ledgers)

    async def __aenter__(self) -> Self:
        self._stop = False
        self._tasks = [asyncio.create_task(self._write(ledger)) for ledger in self._ledgers]
        self._tasks += [asyncio.create_task(self._read()) for _ in range(self._readers)]
        if self._flood:
            self._tasks.append(asyncio.create_task(self._pour()))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop = True
        if exc is not None:
            for task in self._tasks:
                task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def verify(self) -> None:
        """Compare all stored records with the ledger; nothing may be in flight."""
        stored = await self._cache.get_bulk(list(self._of))
        for ledger in self._ledgers:
            self._check(ledger, stored.get(ledger.name), ledger.acknowledged)

    # -- operations

    async def _ended(self, issued: Awaitable[Any]) -> tuple[Any, Exception | None]:
        """Wait for an operation, and count it; return its result or its error."""
        began = self._loop.time()
        result = error = None
        try:
            result = await issued
        except dscache.DscacheError as raised:
            error = raised
            self.outcomes[type(raised).__name__] += 1
            if len(str(raised)) > 2000:
                self._note(f"an error of {len(str(raised))} letters: {str(raised)[:200]}")
        else:
            self.outcomes["ok"] += 1
            self.last_success = self._loop.time()
        self.lateness = max(self.lateness, self._loop.time() - began - self._timeout)
        return result, error

    async def _write(self, ledger: Ledger) -> None:
        while not self._stop:
            certain = ledger.is_certain
            there = not ledger.is_removal(ledger.acknowledged)
            step = ledger.begin()
            removal = ledger.is_removal(step)
            try:
                if removal:
                    issued = self._cache.delete(ledger.name)
                else:
                    ttl = 1000 if step % 3 == 0 else None
                    data = ledger.data(step)
                    issued = self._cache.set(
                        ledger.name, step, data, ttl=ttl, if_newer=ledger.guarded
                    )
            except dscache.DscacheError as error:  # Overloaded: it was not issued
                self.outcomes[type(error).__name__] += 1
                ledger.refused(step)
                await asyncio.sleep(self._pause)
                continue
            result, error = await self._ended(issued)
            if error is None:
                if result is not True and not (removal and not (certain and there)):
                    self._note(f"{ledger.name}: step {step} was answered {result}")
                ledger.done(step)
            elif "may have happened" in str(error):
                ledger.unknown(step, self._loop.time())
            else:
                ledger.refused(step)
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))

    async def _pour(self) -> None:
        """Issue operations at a steady rate; their results are only counted."""
        issued = 0
        began = self._loop.time()
        under_way: set[asyncio.Future[Any]] = set()
        while not self._stop:
            due = int((self._loop.time() - began) * self._flood)
            for i in range(issued, due):
                name = f"flood/{i % 1000}"
                data = {"name": name, "number": i}
                try:
                    waiter = self._cache.get(name) if i % 2 else self._cache.set(name, i, data)
                except dscache.Overloaded:
                    self.outcomes["Overloaded"] += 1
                    continue
                under_way.add(waiter)
                waiter.add_done_callback(under_way.discard)
                waiter.add_done_callback(partial(self._poured, self._loop.time()))
            issued = max(issued, due)
            await asyncio.sleep(0.005)
        if under_way:
            await asyncio.wait(under_way)

    def _poured(self, began: float, waiter: asyncio.Future[Any]) -> None:
        error = waiter.exception()
        self.outcomes["ok" if error is None else type(error).__name__] += 1
        if error is None:
            self.last_success = self._loop.time()
        self.lateness = max(self.lateness, self._loop.time() - began - self._timeout)

    async def _read(self) -> None:
        reads = (self._get, self._head, self._get_bulk, self._head_bulk)
        while not self._stop:
            await random.choice(reads)()
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))

    async def _get(self) -> None:
        ledger = random.choice(self._ledgers)
        floor = ledger.acknowledged
        try:
            issued = self._cache.get(ledger.name)
        except dscache.Overloaded:
            self.outcomes["Overloaded"] += 1
            return
        record, error = await self._ended(issued)
        if error is None:
            self._check(ledger, record, floor)

    async def _head(self) -> None:
        ledger = random.choice(self._ledgers)
        floor = ledger.acknowledged
        try:
            issued = self._cache.head(ledger.name)
        except dscache.Overloaded:
            self.outcomes["Overloaded"] += 1
            return
        version, error = await self._ended(issued)
        if error is None and not ledger.allows(version, floor):
            self._note(f"{ledger.name}: head {version}, {floor} to {ledger.issued} was possible")

    async def _get_bulk(self) -> None:
        await self._bulk(self._cache.get_bulk)

    async def _head_bulk(self) -> None:
        await self._bulk(self._cache.head_bulk)

    async def _bulk(self, ask: Any) -> None:
        some = random.sample(self._ledgers, min(10, len(self._ledgers)))
        floors = [ledger.acknowledged for ledger in some]
        try:
            issued = ask([ledger.name for ledger in some])
        except dscache.Overloaded:
            self.outcomes["Overloaded"] += 1
            return
        found, error = await self._ended(issued)
        if error is not None:
            return
        for ledger, floor in zip(some, floors, strict=True):
            value = found.get(ledger.name)
            if value is None or isinstance(value, int):
                if not ledger.allows(value, floor):
                    self._note(f"{ledger.name}: {value} in bulk, {floor} to {ledger.issued} was so")
            else:
                self._check(ledger, value, floor)

    def _check(self, ledger: Ledger, record: Any, floor: int) -> None:
        version = None if record is None else record.version
        if not ledger.allows(version, floor):
            self._note(f"{ledger.name}: read {version}, {floor} to {ledger.issued} was possible")
        if record is not None and (
            record.name != ledger.name or record.data != ledger.data(record.version)
        ):
            self._note(f"{ledger.name}: read what is another's: {record!r}")

    def _note(self, problem: str) -> None:
        if len(self.wrong) < _EXAMPLES:
            self.wrong.append(problem)
