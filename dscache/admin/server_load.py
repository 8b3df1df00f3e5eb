"""The load of servers as they count it: operations, hits, times, memory and clients of each.

Two looks at the counters of a server make rates. Replicas are looked at too, since a slow one makes
reads with ``scaleReads`` slow, and writes with WAIT.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Final

from ..aio.cluster import Cluster
from ..aio.control import ControlConnection
from ..config import Config, Options
from ..errors import DscacheError
from ..net.slots import parse_info
from .cache import AdminCache, open_cache

_PINGS: Final = 3
_SECTIONS: Final = (
    *("server", "clients", "memory", "stats", "replication"),
    *("commandstats", "latencystats"),
)
# A node is slow if it takes this many times as long as the median of the others, and this long.
_SLOWER: Final = 3.0
_LEAST_ROUND_TRIP: Final = 1.0
_LEAST_MICROSECONDS: Final = 500.0
# Times that are slow in themselves, as dscache doctor sees it.
_LATE_MS: Final = 10.0
_FULL: Final = 0.9
# The commands that read and write records, whose slowest percentiles are shown.
_OF_RECORDS: Final = ("mget", "mset", "msetex", "evalsha")
_CALLS: Final = re.compile(r"calls=(\d+),usec=(\d+)")
_P99: Final = re.compile(r"p99=([\d.]+)")


@dataclass(frozen=True, slots=True)
class CommandLoad:
    """The calls of one command by all clients."""

    per_second: float
    microseconds: float
    """The server's time for one call."""
    busy: float
    """The share of one processor that the calls take."""


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """The load of one server since the look before; a figure that it doesn't tell is None."""

    address: str
    role: str = ""
    down: str | None = None
    """Why it can't be reached."""
    operations: float | None = None
    """Commands in a second, of all clients."""
    hits: float | None = None
    """The share of the keys read that were there."""
    microseconds: float | None = None
    """The server's mean time for a command."""
    p99_microseconds: float | None = None
    """The slowest of the commands for records, one call in a hundred, since it began to count."""
    round_trip_ms: float | None = None
    """The median of some PINGs from here."""
    used_memory: int | None = None
    max_memory: int | None = None
    """None without a limit."""
    clients: int | None = None
    max_clients: int | None = None
    received: float | None = None
    """Bytes in a second."""
    sent: float | None = None
    """Bytes in a second."""
    evicted: float | None = None
    """Keys in a second."""
    slow: str = ""
    """Why it is slow, or soon will be; empty if it isn't."""
    commands: Mapping[str, CommandLoad] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The load of all servers of a configuration."""

    nodes: tuple[NodeLoad, ...]

    @property
    def commands(self) -> dict[str, CommandLoad]:
        """The calls of each command on all nodes, the one that takes most time first."""
        merged: dict[str, list[CommandLoad]] = {}
        for node in self.nodes:
            for name, load in node.commands.items():
                merged.setdefault(name, []).append(load)
        sums = {name: _merged(loads) for name, loads in merged.items()}
        return dict(sorted(sums.items(), key=lambda one: (-one[1].busy, one[0])))


def _merged(loads: Sequence[CommandLoad]) -> CommandLoad:
    rate = sum(load.per_second for load in loads)
    busy = sum(load.busy for load in loads)
    return CommandLoad(rate, busy * 1e6 / rate if rate else 0.0, busy)


class Watched:
    """The servers of a cache, looked at again and again."""

    def __init__(self, cache: AdminCache) -> None:
        self._cache = cache
        self._nodes: dict[str, _Node] = {}

    async def look(self) -> ServerLoad:
        """Return the load since the last look; rates are None at the first.

        A server that can't be reached is a part of the result, and no error.
        """
        wanted = options_by_address(self._cache)
        for address in self._nodes.keys() - wanted.keys():
            self._nodes.pop(address).close()
        for address, options in wanted.items():
            if address not in self._nodes:
                self._nodes[address] = _Node(address, options)
        loads = await asyncio.gather(*(self._nodes[address].look() for address in wanted))
        return ServerLoad(tuple(_with_slow(loads)))

    def close(self) -> None:
        """Close the connections."""
        for node in self._nodes.values():
            node.close()


@asynccontextmanager
async def watched_servers(config: Config) -> AsyncIterator[Watched]:
    """Look at all servers of a configuration, of a cluster all nodes that serve slots.

    Raises ConfigError for a cache in memory, ConnectError if no server can be reached, and
    ReplyError if it refuses.
    """
    async with open_cache(config) as cache:
        watched = Watched(cache)
        try:
            yield watched
        finally:
            watched.close()


def options_by_address(cache: AdminCache) -> dict[str, Options]:
    """Return the options of a connection to each server, primaries before replicas."""
    topology = cache.topology
    options = cache.config.options
    if not isinstance(topology, Cluster):
        return {options.address: options}
    primaries = dict.fromkeys(options.mapped(*one.primary) for one in topology.view)
    replicas = (options.mapped(*place) for one in topology.view for place in one.replicas)
    found: dict[str, Options] = {}
    for place in (*primaries, *sorted(replicas)):
        each = topology.options_at(place)
        found.setdefault(each.address, each)
    return found


@dataclass(frozen=True, slots=True)
class _Sample:
    """The counters of a server at one time."""

    at: float
    info: Mapping[str, str]
    commands: Mapping[str, tuple[int, int]]
    """The calls of each command, and their microseconds."""

    def number(self, name: str) -> int | None:
        """Return a number of INFO, or None if the server doesn't tell it."""
        with suppress(ValueError):
            return int(self.info.get(name, ""))
        return None


class _Node:
    def __init__(self, address: str, options: Options) -> None:
        self._address = address
        self._options = options
        self._server: ControlConnection | None = None
        self._last: _Sample | None = None

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def look(self) -> NodeLoad:
        try:
            if self._server is None:
                self._server = await ControlConnection.open(self._options)
            server = self._server
            times = [await _ping(server) for _ in range(_PINGS)]
            replies = await server.execute_many(*(["INFO", one] for one in _SECTIONS))
        except DscacheError as error:
            self.close()
            self._last = None
            return NodeLoad(self._address, down=str(error))
        info: dict[str, str] = {}
        for reply in replies:
            info.update(parse_info(reply))
        sample = _Sample(time.monotonic(), info, _calls(info))
        last, self._last = self._last, sample
        if last is not None and last.info.get("run_id") != info.get("run_id"):
            last = None  # restarted, and counts from zero
        load = _load(server.address, sample, last)
        return replace(load, round_trip_ms=round(statistics.median(times) * 1000, 3))


async def _ping(server: ControlConnection) -> float:
    began = time.perf_counter()
    await server.execute_many(["PING"])  # a refusal takes the same time
    return time.perf_counter() - began


def _calls(info: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    found = {}
    for name, value in info.items():
        if name.startswith("cmdstat_") and (match := _CALLS.match(value)):
            found[name.removeprefix("cmdstat_")] = int(match[1]), int(match[2])
    return found


def _load(address: str, sample: _Sample, last: _Sample | None) -> NodeLoad:
    limit = sample.number("maxmemory")
    percentiles = [
        float(match[1])
        for name in _OF_RECORDS
        if (match := _P99.search(sample.info.get(f"latency_percentiles_usec_{name}", "")))
    ]
    load = NodeLoad(
        address,
        role={"master": "primary", "slave": "replica"}.get(sample.info.get("role", ""), ""),
        p99_microseconds=max(percentiles, default=None),
        used_memory=sample.number("used_memory"),
        max_memory=limit or None,
        clients=sample.number("connected_clients"),
        max_clients=sample.number("maxclients"),
        slow=_own_trouble(sample),
    )
    if last is None:
        return load
    seconds = max(sample.at - last.at, 1e-6)

    def grown(name: str) -> int | None:
        new, old = sample.number(name), last.number(name)
        # CONFIG RESETSTAT begins anew.
        return None if new is None or old is None or new < old else new - old

    def rate(name: str) -> float | None:
        count = grown(name)
        return None if count is None else count / seconds

    hits, misses = grown("keyspace_hits"), grown("keyspace_misses")
    commands = _commands_since(sample, last, seconds)
    calls = sum(one.per_second for one in commands.values())
    evicted = rate("evicted_keys")
    return replace(
        load,
        operations=rate("total_commands_processed"),
        hits=None
        if hits is None or misses is None or not hits + misses
        else hits / (hits + misses),
        microseconds=sum(one.busy for one in commands.values()) * 1e6 / calls if calls else None,
        received=rate("total_net_input_bytes"),
        sent=rate("total_net_output_bytes"),
        evicted=evicted,
        slow=f"evicts {evicted:,.0f} keys a second" if evicted else load.slow,
        commands=commands,
    )


def _commands_since(sample: _Sample, last: _Sample, seconds: float) -> dict[str, CommandLoad]:
    found = {}
    for name, (calls, microseconds) in sample.commands.items():
        old_calls, old_microseconds = last.commands.get(name, (0, 0))
        calls, microseconds = calls - old_calls, microseconds - old_microseconds
        if calls > 0 and microseconds >= 0:
            busy = microseconds / seconds / 1e6
            found[name] = CommandLoad(calls / seconds, microseconds / calls, busy)
    return found


def _own_trouble(sample: _Sample) -> str:
    """Return the fault that makes a node slow or useless by itself, or nothing."""
    if sample.number("loading"):
        return "loads its data"
    if sample.info.get("master_link_status") == "down":
        return "not replicating"
    used, limit = sample.number("used_memory"), sample.number("maxmemory")
    if used and limit and used > _FULL * limit:
        return f"{used / limit:.0%} of maxmemory used"
    return ""


def _with_slow(loads: Sequence[NodeLoad]) -> list[NodeLoad]:
    """Return the loads with the reason why a node is slow beside the others."""
    return [
        replace(load, slow=_slowness(load, [other for other in loads if other is not load]))
        if load.down is None and not load.slow
        else load
        for load in loads
    ]


def _slowness(load: NodeLoad, others: Sequence[NodeLoad]) -> str:
    trip, time_of_call = load.round_trip_ms, load.microseconds
    usual = [other.round_trip_ms for other in others if other.round_trip_ms is not None]
    if trip is not None and (
        trip > _LATE_MS
        or (usual and trip > max(_LEAST_ROUND_TRIP, _SLOWER * statistics.median(usual)))
    ):
        beside = f", the others {statistics.median(usual):.2f} ms" if usual else ""
        return f"round trip {trip:.2f} ms{beside}"
    same = [one.microseconds for one in others if one.microseconds and one.role == load.role]
    if time_of_call is not None and (
        time_of_call > _LATE_MS * 1000
        or (same and time_of_call > max(_LEAST_MICROSECONDS, _SLOWER * statistics.median(same)))
    ):
        beside = f", the others {statistics.median(same):,.0f} µs" if same else ""
        return f"{time_of_call:,.0f} µs a command{beside}"
    return ""
