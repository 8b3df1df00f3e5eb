"""Changes of records as they happen, by client tracking in broadcast mode on every primary.

The server reports changed keys without their values. The watch reads their versions a moment
later, so of several changes in quick succession it sees the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass

from ..aio.cluster import Cluster
from ..aio.control import ControlConnection, RawCommand, Reply
from ..config import Options
from ..errors import BulkError, DscacheError, RecordError, ReplyError
from ..net.backoff import full_jitter
from .cache import AdminCache
from .key_layout import Layout
from .progress import cancel_all

CHANGED, DELETED, DAMAGED = "changed", "deleted", "damaged"
FLUSHED, GAP, RESUMED = "flushed", "gap", "resumed"

# Seconds within which changes of one name count as one, as all below.
_GATHER = 0.02
# Names in one request for versions.
_BATCH = 1000
# Names that may wait for their versions; beyond it, the watch reports a gap.
_MOST = 100_000
# The interval between two checks of the primaries, and of the role of each.
_CHECK_INTERVAL = 1.0
# Backoff between attempts to reconnect: the first limit, and the highest.
_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a record, of all records, or of the watch itself."""

    kind: str
    name: str | None = None
    version: int | None = None
    node: str | None = None
    reason: str | None = None


class Watch:
    """A watch on the records whose names begin with a prefix.

    Calls ``on_event`` with each event.
    """

    def __init__(self, cache: AdminCache, prefix: str, on_event: Callable[[Event], None]) -> None:
        self._cache = cache
        self._on_event = on_event
        self._prefix = prefix
        self._layout = Layout.of(cache.config.options)
        starts = [start for start in self._layout.starts(prefix) if start]
        self._tracking: RawCommand = [
            *("CLIENT", "TRACKING", "ON", "BCAST"),
            *(word for start in starts for word in ("PREFIX", start)),
        ]
        self._names: dict[str, None] = {}
        self._is_news = asyncio.Event()
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._lost: set[str] = set()

    async def run(self, started: Callable[[list[str]], None]) -> None:
        """Watch until cancelled; calls ``started`` with the addresses when tracking is on.

        Raises ReplyError if a server refuses tracking, and ConnectError if one can't be reached
        at the start. Later failures are retried without end.
        """
        listening: dict[str, asyncio.Task[None]] = {}
        reading = asyncio.create_task(self._read())
        try:
            self._update(listening)
            await asyncio.gather(*(self._ready[address] for address in listening))
            started(list(listening))
            while True:
                await asyncio.wait(
                    [reading, *listening.values()],
                    timeout=_CHECK_INTERVAL,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in (reading, *listening.values()):
                    if task.done():
                        task.result()
                self._update(listening)
        finally:
            await cancel_all([reading, *listening.values(), *self._ready.values()])

    # -- the servers

    def _update(self, listening: dict[str, asyncio.Task[None]]) -> None:
        """Listen to the current primaries, and to no others."""
        topology = self._cache.topology
        nodes: Iterable[Options] = [self._cache.config.options]
        if isinstance(topology, Cluster):
            nodes = topology.primaries().values()
        wanted = {options.address: options for options in nodes}
        for address in listening.keys() - wanted.keys():
            listening.pop(address).cancel()
            if self._ready[address].done():
                self._report_gap(address, "it is no longer a primary of the cluster")
        is_first = not listening
        for address in wanted.keys() - listening.keys():
            self._ready[address] = asyncio.get_running_loop().create_future()
            if not is_first:
                self._report_gap(address, "it has become a primary of the cluster")
            listening[address] = asyncio.create_task(
                self._listen(address, wanted[address], is_first=is_first)
            )

    # -- one server

    async def _listen(self, address: str, options: Options, *, is_first: bool) -> None:
        """Listen to one server, and reconnect when it is lost.

        A failure before tracking was first on goes to the future in ``_ready``.
        """
        ready = self._ready[address]
        failures = 0
        while True:
            try:
                with closing(await ControlConnection.open(options, self._take)) as server:
                    await self._check_role(server, options)
                    failures = 0
                    await server.execute(*self._tracking)
                    if not ready.done():
                        ready.set_result(None)
                    if address in self._lost:
                        self._lost.discard(address)
                        self._on_event(Event(RESUMED, node=address))
                    while True:
                        await asyncio.wait([server.lost], timeout=_CHECK_INTERVAL)
                        # Raises the reason if the server is lost, hangs or is a replica now.
                        await self._check_role(server, options)
            except DscacheError as error:
                if is_first and not ready.done():
                    ready.set_exception(error)
                    return
                self._report_gap(address, str(error))
                if isinstance(self._cache.topology, Cluster):
                    # Another node may be the primary by now; the next timer would be late.
                    self._cache.topology.look_again()
            await asyncio.sleep(full_jitter(_PAUSE, _LONGEST_PAUSE, failures))
            failures += 1

    async def _check_role(self, server: ControlConnection, options: Options) -> None:
        """Raise ReplyError if a server that should be a primary is a replica."""
        (role,) = await server.execute_many(["ROLE"])
        if isinstance(role, list) and role[0] != b"master" and options.role == "master":
            raise ReplyError(f"{server.address} has become a replica")

    def _report_gap(self, address: str, reason: str) -> None:
        if address not in self._lost:
            self._lost.add(address)
            self._on_event(Event(GAP, node=address, reason=reason))

    # -- events

    def _take(self, push: list[Reply]) -> None:
        if len(push) != 2 or push[0] != b"invalidate":
            return
        keys = push[1]
        if keys is None:
            self._names.clear()
            self._on_event(Event(FLUSHED))
            return
        for key in keys:
            name = self._layout.name_of(key)
            if name is not None and name.startswith(self._prefix):
                self._names[name] = None
        if len(self._names) > _MOST:
            self._names.clear()
            self._on_event(Event(GAP, reason=f"more than {_MOST:,} records changed at once"))
        if self._names:
            self._is_news.set()

    async def _read(self) -> None:
        """Report changed names with their current versions, until cancelled."""
        while True:
            await self._is_news.wait()
            await asyncio.sleep(_GATHER)
            self._is_news.clear()
            names, self._names = list(self._names), {}
            for first in range(0, len(names), _BATCH):
                await self._report_versions(names[first : first + _BATCH])

    async def _report_versions(self, names: list[str]) -> None:
        damaged: Mapping[str, Exception] = {}
        try:
            versions = await self._cache.head_bulk(names)
        except BulkError as error:
            versions, damaged = error.result, error.errors
        except DscacheError as error:
            damaged, versions = dict.fromkeys(names, error), {}
        for name in names:
            reason, version = damaged.get(name), versions.get(name)
            if isinstance(reason, RecordError):
                kind = DAMAGED
            else:
                # With a reason, it has changed, but its version can't be read.
                kind = DELETED if reason is None and version is None else CHANGED
            self._on_event(Event(kind, name, version, reason=str(reason) if reason else None))
