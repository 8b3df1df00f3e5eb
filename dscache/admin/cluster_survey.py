"""Look at every node of a cluster from here: what it is, what it serves, and how it is.

The nodes are those that CLUSTER NODES lists. CLUSTER SLOTS, by which operations are routed, leaves
out what one looks for in trouble: replicas that failed or aren't in step yet, primaries without
slots. Each node is then visited by a short-lived connection, made just as a cache makes its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from ..aio.cluster import Cluster
from ..aio.connection import Connection
from ..config import Config, Options
from ..core import constants
from ..errors import ConnectError, DscacheError, ProtocolError, ReplyError, clean, shorten
from ..net.slots import Address, parse_epoch, parse_slots
from .cluster_report import CLUSTER_DOWN, ClusterReport, NodeReport, Slots
from .primaries import parse_info

_PINGS = 5
# How many nodes are asked which nodes there are; the newest view counts.
_ASKED = 3
# A visit leaves nothing behind that would be worth waiting for.
_CLOSE_MS = 100


# -- the survey


async def survey(config: Config) -> ClusterReport:
    """Return how each node of the cluster is that ``nodes`` of a configuration names.

    All nodes are visited at once, each for ``connectTimeout`` at most, and nothing stays open.
    Raises ConfigError if the server is no cluster, ReplyError if it refuses, and ConnectError if
    no node can be reached within ``connectTimeout``.
    """
    cluster = Cluster(config, None)
    try:
        try:
            await _discover(cluster)
        except ConnectError:
            # Nodes of which none has slots serve nothing, and can be looked at all the same.
            if not (members := await _list(cluster)):
                raise
        else:
            members = await _list(cluster)
    finally:
        await cluster.close()
    return ClusterReport(tuple(await asyncio.gather(*(_visit(cluster, one) for one in members))))


async def _discover(cluster: Cluster) -> None:
    """Wait until some node has told the slots, whichever others are down."""
    ready = asyncio.ensure_future(cluster.when_ready())
    discovered = asyncio.ensure_future(cluster.when_discovered())
    try:
        await asyncio.wait([ready, discovered], return_when=asyncio.FIRST_COMPLETED)
        if not cluster.view:
            await ready  # which raises what keeps it from being ready
    finally:
        for task in (ready, discovered):
            task.cancel()
        await asyncio.gather(ready, discovered, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Member:
    """A node as the others know it, and where it is reached from here, if that is known."""

    place: Address | None
    report: NodeReport


async def _list(cluster: Cluster) -> list[_Member]:
    """Return the nodes as the newest view lists them."""
    ready = list(cluster.ready_nodes().items())[:_ASKED]
    answers = await asyncio.gather(
        *(_view_of(cluster.options, *one) for one in ready), return_exceptions=True
    )
    views = []
    for answer in answers:
        if not isinstance(answer, BaseException):
            views.append(answer)
        elif not isinstance(answer, DscacheError):
            raise answer
    # Who may not ask for the nodes (by an ACL, or at a hosting company) still has the slots.
    return max(views, key=lambda view: view[0])[1] if views else _members_by_slots(cluster)


async def _view_of(options: Options, node: Connection, asked: Address) -> tuple[int, list[_Member]]:
    """Return a node's epoch and the nodes that it lists; raises DscacheError if it doesn't."""
    try:
        async with asyncio.timeout(options.slots_refresh_timeout / 1000):
            nodes, slots, info = await node.ask(
                ["CLUSTER", "NODES"], ["CLUSTER", "SLOTS"], ["CLUSTER", "INFO"]
            )
    except TimeoutError:
        raise ConnectError(f"{node.address}: no answer to CLUSTER NODES") from None
    for reply in (nodes, slots):
        if isinstance(reply, ReplyError):
            raise reply
    return parse_epoch(info), _members(_parse_nodes(nodes), slots, asked, options)


def _members_by_slots(cluster: Cluster) -> list[_Member]:
    mapped = cluster.options.mapped
    slots: dict[Address, tuple[Slots, ...]] = {}
    replicas: dict[tuple[Address, Address], None] = {}
    for one in cluster.view:
        primary = mapped(*one.primary)
        slots[primary] = (*slots.get(primary, ()), (one.first, one.last))
        replicas.update(dict.fromkeys((mapped(*replica), primary) for replica in one.replicas))
    primaries = [_member(place, "primary", slots=its) for place, its in slots.items()]
    others = [_member(place, "replica", primary=primary) for place, primary in replicas]
    return _in_order([*primaries, *others])


def _member(
    place: Address, role: str, *, primary: Address | None = None, slots: tuple[Slots, ...] = ()
) -> _Member:
    shown = constants.join_address
    its = None if primary is None else shown(*primary)
    return _Member(place, NodeReport(address=shown(*place), role=role, primary=its, slots=slots))


def _in_order(members: list[_Member]) -> list[_Member]:
    """Return primaries by their first slot and those without last, each before its replicas."""
    starts = {
        one.report.address: min(one.report.slots, default=(constants.SLOTS, 0))[0]
        for one in members
        if one.report.role == "primary"
    }

    def rank(member: _Member) -> tuple[int, str, bool, str]:
        report = member.report
        shard = report.address if report.role == "primary" else report.primary or ""
        is_replica = report.role != "primary"
        return starts.get(shard, constants.SLOTS + 1), shard, is_replica, report.address

    return sorted(members, key=rank)


# -- CLUSTER NODES


@dataclass(frozen=True, slots=True)
class _NodesLine:
    """What a node says of one node in CLUSTER NODES."""

    id: str
    host: str
    """Its address; empty if that isn't known."""
    name: str
    """The host name that it announces; empty if it doesn't."""
    port: int
    flags: frozenset[str]
    primary: str
    """The id of its primary; ``-`` if it is one itself."""
    is_linked: bool
    slots: tuple[Slots, ...]

    @property
    def health(self) -> str:
        if "fail" in self.flags:
            return "failed"
        if "fail?" in self.flags:
            return "suspected"
        return "ok" if self.is_linked or "myself" in self.flags else "disconnected"


def _parse_nodes(reply: Any) -> list[_NodesLine]:
    """Return the lines of a reply to CLUSTER NODES; raises ProtocolError if it is no such."""
    try:
        lines = [_parse_line(line) for line in reply.decode(errors="replace").splitlines() if line]
    except (AttributeError, ValueError) as error:
        raise ProtocolError(f"CLUSTER NODES was answered with {shorten(reply)}") from error
    # Who is only being met is known by a name for the meantime, and may be no new node.
    return [line for line in lines if "handshake" not in line.flags]


def _parse_line(line: str) -> _NodesLine:
    name, where, flags, primary, _, _, _, link, *slots = line.split(" ")
    # ip:port@busport,hostname,shard-id=..., of which old servers leave out the end.
    address, _, more = where.partition(",")
    host, _, port = address.partition("@")[0].rpartition(":")
    # What is being moved, in brackets, is owned by this node still, and listed as such.
    owned = (one.partition("-") for one in slots if not one.startswith("["))
    return _NodesLine(
        id=clean(name),
        host=host,
        name=more.partition(",")[0] if "=" not in more.partition(",")[0] else "",
        port=int(port),
        flags=frozenset(flags.split(",")),
        primary=clean(primary),
        is_linked=link == "connected",
        slots=tuple((int(first), int(last or first)) for first, _, last in owned),
    )


def _members(
    lines: list[_NodesLine], slots: Any, asked: Address, options: Options
) -> list[_Member]:
    """Return the nodes of CLUSTER NODES, at the addresses that CLUSTER SLOTS has for them."""
    places = _places(lines, slots, asked)
    places = {name: options.mapped(*place) for name, place in places.items()}
    shown = {
        line.id: constants.join_address(*places[line.id]) if line.id in places else line.id[:12]
        for line in lines
    }
    return _in_order(
        [
            _Member(
                places.get(line.id),
                NodeReport(
                    address=shown[line.id],
                    id=line.id,
                    role="primary" if "master" in line.flags else "replica",
                    primary=shown.get(line.primary),
                    slots=line.slots,
                    health=line.health,
                ),
            )
            for line in lines
        ]
    )


def _places(lines: list[_NodesLine], slots: Any, asked: Address) -> Mapping[str, Address]:
    """Return where each node is, by its id; without those of which nobody knows that."""
    announced: dict[str, Address] = {}
    for entry, known in zip(slots, parse_slots(slots, asked), strict=True):
        for node, place in zip(entry[2:], (known.primary, *known.replicas), strict=True):
            if len(node) > 2 and isinstance(node[2], bytes):
                announced[clean(node[2].decode(errors="replace"))] = place
    # A cluster announces its nodes by address or by name, as its certificates may need.
    by_name = any(announced.get(line.id) == (line.name, line.port) for line in lines)
    places = {}
    for line in lines:
        host = (by_name and line.name) or line.host or (asked[0] if "myself" in line.flags else "")
        if line.id in announced:
            places[line.id] = announced[line.id]
        elif constants.is_address(host, line.port) and "noaddr" not in line.flags:
            places[line.id] = host, line.port
    return places


# -- a visit


class _FirstAttempt:
    """Tells how the first attempt to connect to a node ended: with None, or with its error."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def on_connected(self, node: Connection, /) -> None:
        if not self.outcome.done():
            self.outcome.set_result(None)

    def on_disconnected(self, node: Connection, /) -> None:
        if not self.outcome.done():
            self.outcome.set_result(str(node.pipeline.down))

    def on_redirected(self, source: Connection, /) -> None:
        """Nothing is asked that could be."""

    def on_progress(self, source: Connection, /) -> None:
        """Nothing is watched."""


async def _visit(cluster: Cluster, member: _Member) -> NodeReport:
    """Return the report of a node, with what it answers itself."""
    report = member.report
    if member.place is None:
        return _unreached(report, "no node knows its address")
    options = cluster.options_at(member.place)
    attempt = _FirstAttempt()
    node = Connection(replace(options, close_timeout=_CLOSE_MS), cluster=attempt)
    try:
        async with asyncio.timeout(options.connect_timeout / 1000):
            if (error := await attempt.outcome) is not None:
                return _unreached(report, error)
            times = [await _ping(node) for _ in range(_PINGS)]
            info, replication = await node.ask(["CLUSTER", "INFO"], ["INFO", "replication"])
    except TimeoutError:
        return _unreached(report, f"no answer within {options.connect_timeout} ms")
    except DscacheError as error:
        return _unreached(report, str(error))
    finally:
        await node.close()
    return dataclasses.replace(
        report,
        round_trip_ms=round(statistics.median(times) * 1000, 3),
        server=node.server,
        health=_health(report, parse_info(info), parse_info(replication)),
    )


async def _ping(node: Connection) -> float:
    began = time.perf_counter()
    await node.ask(["PING"])  # a user who may not say it is refused in the same time
    return time.perf_counter() - began


def _unreached(report: NodeReport, reason: str) -> NodeReport:
    health = "unreachable" if report.health == "ok" else report.health
    return dataclasses.replace(report, down=reason, health=health)


def _health(report: NodeReport, cluster: Mapping[str, str], replication: Mapping[str, str]) -> str:
    """Return what is wrong with a node that answers: the others' word first, then its own."""
    if report.health != "ok":
        return report.health
    if replication.get("master_sync_in_progress") == "1":
        return "synchronizing"
    if report.role == "replica" and replication.get("master_link_status") == "down":
        return "not replicating"
    return CLUSTER_DOWN if cluster.get("cluster_state") == "fail" else "ok"
