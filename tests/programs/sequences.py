"""Operations of several steps that ``injection.py`` strikes: update, patch, fetch, scan and watch.

After each strike, everything that such an operation holds must be given back: the turn of a name,
the lease of a record that is loaded, the place of the one caller of a scan or a watch. A scan or
watch that goes on behind the strike must miss nothing.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import redis as redis_py

import dscache
from dscache.aio import loading

SCANNED = [f"owner/{i}" for i in range(100)]
# Seconds until a call counts as endless: the lease of a load that was struck hard ends by itself.
PATIENCE = 11.0
STRIKES = 20
KINDS = ("update", "patch", "fetch", "refresh", "fetch_bulk", "scan", "scan-names", "watch")
# The coroutine in which a load runs.
LOADS = (loading._drive.__qualname__, loading.Loads._refresh.__qualname__)
# Threads of one fetch or watch; a near cache has others.
OWN_THREADS = ("dscache lease", "dscache watch")
# A message as its caller's finding.
Note = Callable[[str], object]

_numbers = itertools.count(1)


def fits(name: str, record: Any) -> bool:
    """Return whether a record is that of its owner, or missing."""
    return record is None or (record.name == name and record.data["name"] == name)


def load(name: str) -> dict[str, Any]:
    return {"name": name}


def load_many(names: list[str]) -> dict[str, Any]:
    return {name: {"name": name} for name in names}


def changed(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "changes": data.get("changes", 0) + 1}


def forget_frames(error: BaseException) -> None:
    """Raise an error again that isn't injected; otherwise drop its traceback, as callers do.

    The program keeps each injected error, and by its traceback all frames that it has struck.
    """
    if "injected" not in str(error):
        raise error
    error.__traceback__ = None


class Sequences:
    """The operations on one cache, by the name of their action, and the checks behind a strike."""

    def __init__(self, cache: Any, options: Mapping[str, Any], note: Note) -> None:
        self.cache = cache
        self.note = note
        address = {"host": options.get("host"), "port": options.get("port")}
        # The key of a record on a cluster holds its name as a hash tag.
        self._key = "{%s}" if "nodes" in options else "%s"
        if "nodes" in options:
            address = dict(options["nodes"][0])
            self.writer: Any = redis_py.RedisCluster(**address)
        else:
            self.writer = redis_py.Redis(**address)
        self.name = ""

    def calls(self, action: str) -> list[Callable[[], Any]]:
        """Return the operations to issue together."""
        cache, number = self.cache, next(_numbers)
        self.name = name = f"loaded/{number}"
        # Long: a refresh gives its ttl to records that all actions need.
        terms: dict[str, Any] = {"ttl": 3600, "refresh_after": 1800}
        if action == "update":
            return [partial(cache.update, "owner/1", changed)] * 2
        if action == "patch":
            path = partial(cache.patch, "owner/2", path="list[1].n", value=number)
            return [partial(cache.patch, "owner/2", {"n": number}), path]
        if action == "fetch":
            return [partial(cache.fetch, name, load, **terms, keep_missing=5)] * 2
        if action == "refresh":
            self.store(name, 1)
            return [partial(cache.fetch, name, load, **terms)]
        if action == "fetch_bulk":
            self.store(f"{name}/held", 1)
            names = [name, f"{name}/held", "owner/3"]
            return [partial(cache.fetch_bulk, names, load_many, **terms)]
        if action == "watch":
            return [partial(self.watch)]
        return [partial(self.scan, action == "scan")]

    def store(self, name: str, version: int) -> None:
        """Write a record past the cache."""
        text = f'{{"name":"{name}"}}'
        key = self._key % name
        self.writer.set(f"{key}_v", version)
        self.writer.set(f"{key}_d", text)

    def scan(self, records: bool) -> Any:
        raise NotImplementedError

    def watch(self) -> Any:
        raise NotImplementedError

    def check_scan(self, found: list[Any], records: bool) -> None:
        """Note records of others, and names that were missed."""
        names = [one.name for one in found] if records else found
        if missed := set(SCANNED) - set(names):
            self.note(f"the scan missed {len(missed)} names: {sorted(missed)[:3]}")
        if records and not all(fits(one.name, one) for one in found):
            self.note(f"WRONG OWNER: the scan gave {found!r}")


class AsyncSequences(Sequences):
    """The operations of an AsyncCache."""

    async def scan(self, records: bool) -> None:
        scan = self.cache.scan("owner/", records=records, count=10)
        found: list[Any] = []
        for _ in range(STRIKES):
            try:
                async for one in scan:
                    found.append(one)
                break
            except BaseException as error:
                forget_frames(error)
        self.check_scan(found, records)

    async def watch(self) -> None:
        name = f"watched/{next(_numbers)}"
        version = 0
        watch = self.cache.watch("watched/", records=True)
        try:
            async with watch:
                for _ in range(STRIKES):
                    try:
                        self.store(name, version + 1)
                        version += 1
                        async with asyncio.timeout(PATIENCE):
                            if not await self._await_version(watch, name, version):
                                return
                        if version > 2:
                            return
                    except TimeoutError:
                        self.note("the watch missed a change")
                        return
                    except dscache.UsageError as error:
                        self.note(f"the watch is held: {error}")
                        return
                    except BaseException as error:
                        forget_frames(error)
        finally:
            await watch.close()  # perhaps again

    async def _await_version(self, watch: Any, name: str, version: int) -> bool:
        """Take changes until one tells the version or has all read again; False at the end."""
        async for change in watch:
            if change.record is not None and not fits(change.name, change.record):
                self.note(f"WRONG OWNER: the watch gave {change!r}")
            if change.is_loss or (change.name == name and change.version == version):
                return True
        return False

    async def check(self, action: str) -> None:
        """Check behind a strike that nothing is held."""
        gc.collect()  # struck frames refer to each other, and hold what was struck
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(PATIENCE):
                # A refresh goes on in the background, and would load a record that is deleted.
                while tasks := self._under_way():
                    await asyncio.wait(tasks)
                    await asyncio.sleep(0)
                if action in ("update", "patch"):
                    for name in ("owner/1", "owner/2"):
                        await self.cache.update(name, changed)
                elif action in ("fetch", "fetch_bulk", "refresh"):
                    await self._check_loads()
        except TimeoutError:
            self.note(f"{action} again had no end")
        except BaseException as error:
            self.note(f"{action} again: {error!r}")
        await asyncio.sleep(0)
        gc.collect()
        # A struck update may leave its queue behind, without anything in it.
        queues = self.cache._changes._queues
        if turns := [name for name, queue in queues.items() if any(one() for one in queue)]:
            self.note(f"turns are held: {turns}")
        if tasks := self._under_way():
            self.note(f"loads are held: {tasks}")
        for task in asyncio.all_tasks():
            if task.get_coro().__qualname__ == "_renew":
                await asyncio.wait([task], timeout=2.0)  # it looks every 1.5 s
                if not task.done():
                    self.note("a lease is renewed for ever")
                    task.cancel()
            elif (task.get_name() or "").startswith("dscache watch"):
                await asyncio.sleep(0.01)
                if not task.done():
                    self.note(f"a watch listens for ever: {task}")
                    task.cancel()

    def _under_way(self) -> list[asyncio.Task[Any]]:
        """Return the loads that have not ended, also those that a strike has hidden."""
        own = (task for task in asyncio.all_tasks() if not task.done())
        return [task for task in own if task.get_coro().__qualname__ in LOADS]

    async def _check_loads(self) -> None:
        """Fetch what was loaded, and once more when it is gone."""
        for name in (self.name, f"{self.name}/held"):
            record = await self._fetched(name, 0)
            if not fits(name, record):
                self.note(f"WRONG OWNER: fetch {name} gave {record!r}")
            await self.cache.delete(name)
            number = next(_numbers)
            record = await self._fetched(name, number)
            if record is None or record.data.get("number") != number:
                self.note(f"fetch {name} gave {record!r}, not the new load's {number}")

    async def _fetched(self, name: str, number: int) -> Any:
        async def again(name: str) -> dict[str, Any]:
            return {"name": name, "number": number}

        while True:  # a failed load is not repeated for a second
            try:
                return await self.cache.fetch(name, again, ttl=60)
            except dscache.LoadError:
                await asyncio.sleep(0.05)


class BlockingSequences(Sequences):
    """The operations of a Cache."""

    def scan(self, records: bool) -> None:
        found: list[Any] = []
        with self.cache.scan("owner/", records=records, count=10) as scan:
            for _ in range(STRIKES):
                try:
                    for one in scan:
                        found.append(one)
                    break
                except BaseException as error:
                    forget_frames(error)
        self.check_scan(found, records)

    def watch(self) -> None:
        name = f"watched/{next(_numbers)}"
        version = 0
        watch = self.cache.watch("watched/", records=True)
        late = threading.Timer(PATIENCE, watch.close)
        late.daemon = True
        late.start()
        try:
            with watch:
                for _ in range(STRIKES):
                    try:
                        self.store(name, version + 1)
                        version += 1
                        if not self._await_version(watch, name, version):
                            self.note("the watch missed a change")
                            break
                        if version > 2:
                            break
                    except dscache.UsageError as error:
                        self.note(f"the watch is held: {error}")
                        break
                    except BaseException as error:
                        forget_frames(error)
        finally:
            late.cancel()
            late.join()
            watch.close()  # perhaps again

    def _await_version(self, watch: Any, name: str, version: int) -> bool:
        """Take changes until one tells the version or has all read again; False at the end."""
        for change in watch:
            if change.record is not None and not fits(change.name, change.record):
                self.note(f"WRONG OWNER: the watch gave {change!r}")
            if change.is_loss or (change.name == name and change.version == version):
                return True
        return False

    def check(self, action: str) -> None:
        """Check behind a strike that nothing is held."""
        gc.collect()  # struck frames refer to each other, and hold what was struck
        ended = threading.Event()
        problem: list[BaseException] = []

        def again() -> None:
            try:
                if action in ("update", "patch"):
                    for name in ("owner/1", "owner/2"):
                        self.cache.update(name, changed)
                elif action in ("fetch", "fetch_bulk", "refresh"):
                    self._check_loads()
            except BaseException as error:
                problem.append(error)
            ended.set()

        # Another thread: what the struck one holds for good would be its own to take again.
        threading.Thread(target=again, daemon=True).start()
        if not ended.wait(PATIENCE):
            self.note(f"{action} again had no end")
        for error in problem:
            self.note(f"{action} again: {error!r}")
        # A struck thread may leave its turn or its load behind, which the next one takes over.
        turns = self.cache._changes._turns
        if held := [name for name, turn in turns.items() if turn.holder() is not None]:
            self.note(f"turns are held: {held}")
        flights = self.cache._loads._flights
        if held := [key for key, flight in flights.items() if not flight.is_over()]:
            self.note(f"loads are held: {held}")
        end = time.monotonic() + 2.0
        while names := [t.name for t in threading.enumerate() if t.name.startswith(OWN_THREADS)]:
            if time.monotonic() > end:
                self.note(f"threads are left: {names}")
                break
            time.sleep(0.005)

    def _check_loads(self) -> None:
        for name in (self.name, f"{self.name}/held"):
            record = self._fetched(name, 0)
            if not fits(name, record):
                self.note(f"WRONG OWNER: fetch {name} gave {record!r}")
            self.cache.delete(name)
            number = next(_numbers)
            record = self._fetched(name, number)
            if record is None or record.data.get("number") != number:
                self.note(f"fetch {name} gave {record!r}, not the new load's {number}")

    def _fetched(self, name: str, number: int) -> Any:
        while True:
            try:
                return self.cache.fetch(name, lambda name: {"name": name, "number": number}, ttl=60)
            except dscache.LoadError:
                time.sleep(0.05)
