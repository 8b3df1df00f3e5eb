"""Hear of records as they change: by client tracking in broadcast mode, from every primary.

The server tells which keys have changed, and not to what: their versions are read a moment later.
So of changes that follow each other quickly only the last is seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..aio.cluster import Cluster
from ..cache import AsyncCache
from ..config import Options
from ..errors import BulkError, DscacheError, RecordError, ReplyError
from ..net.backoff import full_jitter
from .control import ControlConnection, RawCommand
from .key_layout import Layout

CHANGED, DELETED, DAMAGED = "changed", "deleted", "damaged"
FLUSHED, GAP, RESUMED = "flushed", "gap", "resumed"

# Seconds for which changes of one name are one, as all below.
_GATHER = 0.02
_AT_ONCE = 1000
# Names that wait to be read; with more of them, one reads all anyway.
_MOST = 100_000
# How often the nodes of a cluster are looked up, and each asked whether it is still a primary.
_LOOK = 1.0
_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


@dataclass(frozen=True, slots=True)
class Event:
    """What happened: to a record, to all of them, or to the watch itself."""

    kind: str
    name: str | None = None
    version: int | None = None
    node: str | None = None
    reason: str | None = None


class Watch:
    """The records of a cache whose names begin with a prefix; ``told`` is given each event."""

    def __init__(self, cache: AsyncCache, prefix: str, told: Callable[[Event], None]) -> None:
        self._cache = cache
        self._told = told
        self._prefix = prefix
        self._layout = Layout.of(cache.config.options)
        starts = [start for start in self._layout.starts(prefix) if start]
        self._track: RawCommand = [
            *("CLIENT", "TRACKING", "ON", "BCAST"),
            *(word for start in starts for word in ("PREFIX", start)),
        ]
        self._names: dict[str, None] = {}
        self._is_news = asyncio.Event()
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._lost: set[str] = set()

    async def run(self, started: Callable[[list[str]], None]) -> None:
        """Watch until cancelled; ``started`` is given the addresses when all are listened to.

        Raises ReplyError if a server can't tell of changes, and ConnectError if one can't be
        reached at first. Later, each is tried again and again.
        """
        listening: dict[str, asyncio.Task[None]] = {}
        reading = asyncio.create_task(self._read())
        try:
            self._follow(listening)
            first = [self._ready[address] for address in listening]
            await asyncio.gather(*first)
            started(list(listening))
            while True:
                await asyncio.wait(
                    [reading, *listening.values()],
                    timeout=_LOOK,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in (reading, *listening.values()):
                    if task.done():
                        task.result()
                self._follow(listening)
        finally:
            ended = [reading, *listening.values(), *self._ready.values()]
            for one in ended:
                one.cancel()
            await asyncio.gather(*ended, return_exceptions=True)

    # -- which servers

    def _follow(self, listening: dict[str, asyncio.Task[None]]) -> None:
        """Listen to all that are primaries now, and to no others."""
        wanted = self._places()
        for address in listening.keys() - wanted.keys():
            listening.pop(address).cancel()
            if self._ready[address].done():
                self._tell_lost(address, "it is no primary of the cluster any more")
        is_first = not listening
        for address in wanted.keys() - listening.keys():
            self._ready[address] = asyncio.get_running_loop().create_future()
            if not is_first:
                self._tell_lost(address, "it has become a primary of the cluster")
            listening[address] = asyncio.create_task(
                self._listen(address, wanted[address], is_first=is_first)
            )

    def _places(self) -> Mapping[str, Options]:
        topology = self._cache._topology
        places = [self._cache.config.options]
        if isinstance(topology, Cluster):
            places = list(topology.primaries().values())
        return {options.address: options for options in places}

    # -- one server

    async def _listen(self, address: str, options: Options, *, is_first: bool) -> None:
        """Keep listening to one server; only what happens at first is raised."""
        ready = self._ready[address]
        failures = 0
        while True:
            try:
                server = await ControlConnection.open(options, self._take)
                try:
                    await self._check_role(server, options)
                    failures = 0
                    await server.execute(*self._track)
                    if not ready.done():
                        ready.set_result(None)
                    if address in self._lost:
                        self._lost.discard(address)
                        self._told(Event(RESUMED, node=address))
                    await self._stay(server, options)
                finally:
                    server.close()
            except DscacheError as error:
                if is_first and not ready.done():
                    ready.set_exception(error)
                    return
                self._tell_lost(address, str(error))
                if isinstance(self._cache._topology, Cluster):
                    # Another node may be the primary by now, which the timer would find out late.
                    self._cache._topology.look_again()
            await asyncio.sleep(full_jitter(_PAUSE, _LONGEST_PAUSE, failures))
            failures += 1

    async def _stay(self, server: ControlConnection, options: Options) -> None:
        """Wait until a server is lost, hangs, or is no primary any more; raises why."""
        while True:
            await asyncio.wait([server.lost], timeout=_LOOK)
            await self._check_role(server, options)

    async def _check_role(self, server: ControlConnection, options: Options) -> None:
        """Raise ReplyError if a server is no primary, and is to be one."""
        (role,) = await server.execute_many(["ROLE"])
        if isinstance(role, list) and role[0] != b"master" and options.role == "master":
            raise ReplyError(f"{server.address} has become a replica")

    def _tell_lost(self, address: str, reason: str) -> None:
        if address not in self._lost:
            self._lost.add(address)
            self._told(Event(GAP, node=address, reason=reason))

    # -- what they tell

    def _take(self, push: list[Any]) -> None:
        if len(push) != 2 or push[0] != b"invalidate":
            return
        keys = push[1]
        if keys is None:
            self._names.clear()
            self._told(Event(FLUSHED))
            return
        for key in keys:
            name = self._layout.name_of(key)
            if name is not None and name.startswith(self._prefix):
                self._names[name] = None
        if len(self._names) > _MOST:
            self._names.clear()
            self._told(Event(GAP, reason=f"more than {_MOST:,} records changed at once"))
        if self._names:
            self._is_news.set()

    async def _read(self) -> None:
        """Tell of names that changed, with the versions that they have now."""
        while True:
            await self._is_news.wait()
            await asyncio.sleep(_GATHER)
            self._is_news.clear()
            names, self._names = list(self._names), {}
            for first in range(0, len(names), _AT_ONCE):
                await self._tell_versions(names[first : first + _AT_ONCE])

    async def _tell_versions(self, names: list[str]) -> None:
        damaged: Mapping[str, Exception] = {}
        try:
            versions = await self._cache.head_bulk(names)
        except BulkError as error:
            versions, damaged = error.result, error.errors
        except DscacheError as error:
            damaged, versions = dict.fromkeys(names, error), {}
        for name in names:
            reason = damaged.get(name)
            if isinstance(reason, RecordError):
                self._told(Event(DAMAGED, name, reason=str(reason)))
            elif reason is not None:
                # It has changed, and nobody can tell to what.
                self._told(Event(CHANGED, name, reason=str(reason)))
            elif (version := versions.get(name)) is not None:
                self._told(Event(CHANGED, name, version))
            else:
                self._told(Event(DELETED, name))
