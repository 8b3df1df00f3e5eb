"""A survey of a cluster from here: each node with its role, slots, version and health.

CLUSTER NODES lists the nodes. CLUSTER SLOTS, which routes operations, omits the nodes that matter
most in trouble: failed replicas, replicas out of step and primaries without slots. A short-lived
connection, made as a cache makes its own, then visits each node.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from ..aio.cluster import Cluster
from ..aio.connection import Connection
from ..aio.control import Reply
from ..config import Config, Options
from ..config.address import is_address, join_address
from ..core import constants
from ..errors import ConnectError, DscacheError, ProtocolError, clean, shorten
from ..net.slots import Address, parse_epoch, parse_info, parse_nodes
from .cluster_report import CLUSTER_DOWN, ClusterReport, NodeReport, Slots
from .progress import cancel_all

_PINGS = 5
# The number of nodes that report their view of the cluster; the newest view wins.
_VIEWS = 3
# Milliseconds to close a visit, which leaves nothing behind that is worth waiting for.
_CLOSE_MS = 100


# -- the survey


async def survey(config: Config) -> ClusterReport:
    """Return a report on every node of the cluster that ``nodes`` of a configuration names.

    Visits all nodes at once, each for at most ``connectTimeout``, and closes every connection.
    Raises ConfigError if the server runs without cluster support, ReplyError if it refuses the
    handshake, and ConnectError if no node can be reached within ``connectTimeout``.
    """
    options = config.options
    cluster = Cluster(config, None)
    try:
        try:
            await _discover(cluster)
        except ConnectError:
            # Nodes without slots serve no record, and can be surveyed all the same.
            if not (members := await _list(cluster, options)):
                raise
        else:
            members = await _list(cluster, options)
    finally:
        await cluster.close()
    return ClusterReport(tuple(await asyncio.gather(*(_visit(cluster, one) for one in members))))


async def _discover(cluster: Cluster) -> None:
    """Wait until one node has reported the slots, even if others are down."""
    ready = asyncio.ensure_future(cluster.when_ready())
    discovered = asyncio.ensure_future(cluster.when_discovered())
    try:
        await asyncio.wait([ready, discovered], return_when=asyncio.FIRST_COMPLETED)
        if not cluster.view:
            await ready  # raises the reason
    finally:
        await cancel_all([ready, discovered])


@dataclass(frozen=True, slots=True)
class _Member:
    """A node as the others report it, and its address from here, or None if unknown."""

    place: Address | None
    report: NodeReport


async def _list(cluster: Cluster, options: Options) -> list[_Member]:
    """Return the nodes in the newest view of the cluster."""
    ready = list(cluster.ready_nodes().items())[:_VIEWS]
    views = await asyncio.gather(*(_view_of(options, *one) for one in ready))
    known = [view for view in views if view is not None]
    if not known:
        # CLUSTER NODES may be forbidden, by an ACL or a hosting company; the slots are known.
        return _members_by_slots(cluster, options)
    return max(known, key=lambda view: view[0])[1]


async def _view_of(
    options: Options, node: Connection, source: Address
) -> tuple[int, list[_Member]] | None:
    """Return a node's epoch and the nodes it lists; None if it gives no valid answer in time."""
    try:
        async with asyncio.timeout(options.slots_refresh_timeout / 1000):
            nodes, slots, info = await node.ask(
                ["CLUSTER", "NODES"], ["CLUSTER", "SLOTS"], ["CLUSTER", "INFO"]
            )
        return parse_epoch(info), _members(_parse_nodes(nodes), slots, source, options)
    except (TimeoutError, DscacheError):
        return None


def _members_by_slots(cluster: Cluster, options: Options) -> list[_Member]:
    slots: dict[Address, list[Slots]] = {}
    primary_of: dict[Address, Address] = {}
    for one in cluster.view:
        primary = options.mapped(*one.primary)
        slots.setdefault(primary, []).append((one.first, one.last))
        primary_of.update((options.mapped(*replica), primary) for replica in one.replicas)
    show = join_address
    members = [
        _Member(place, NodeReport(address=show(*place), role="primary", slots=tuple(its)))
        for place, its in slots.items()
    ]
    members += (
        _Member(place, NodeReport(address=show(*place), role="replica", primary=show(*primary)))
        for place, primary in primary_of.items()
    )
    return _in_order(members)


def _in_order(members: list[_Member]) -> list[_Member]:
    """Return primaries in order of their first slot, each before its replicas.

    Primaries without slots come last.
    """
    starts = {one.report.address: min(one.report.slots)[0] for one in members if one.report.slots}

    def rank(member: _Member) -> tuple[int, str, bool, str]:
        report = member.report
        primary = report.primary or report.address
        start = starts.get(primary, constants.SLOTS)
        return start, primary, report.role != "primary", report.address

    return sorted(members, key=rank)


# -- CLUSTER NODES


@dataclass(frozen=True, slots=True)
class _NodesLine:
    """One line of CLUSTER NODES: a node as another node sees it."""

    id: str
    host: str
    """The node's IP address; empty if unknown."""
    name: str
    """The host name the node announces; empty if none."""
    port: int
    flags: frozenset[str]
    primary: str
    """The id of the node's primary; ``-`` for a primary."""
    is_linked: bool
    slots: tuple[Slots, ...]

    @property
    def health(self) -> str:
        if "fail" in self.flags:
            return "failed"
        if "fail?" in self.flags:
            return "suspected"
        return "ok" if self.is_linked or "myself" in self.flags else "disconnected"


def _parse_nodes(reply: Reply) -> list[_NodesLine]:
    """Return the lines of a reply to CLUSTER NODES; raises ProtocolError for any other reply."""
    try:
        lines = [_parse_line(line) for line in reply.decode(errors="replace").splitlines() if line]
    except (AttributeError, ValueError) as error:
        raise ProtocolError(f"unexpected reply to CLUSTER NODES: {shorten(reply)}") from error
    # A node in handshake has a temporary id, and may be listed under its own id already.
    return [line for line in lines if "handshake" not in line.flags]


def _parse_line(line: str) -> _NodesLine:
    name, where, flags, primary, _, _, _, link, *slots = line.split(" ")
    # ip:port@busport,hostname,shard-id=...; old servers omit the end.
    address, host_name, *_ = (*where.split(","), "")
    host, _, port = address.partition("@")[0].rpartition(":")
    # A slot in brackets is being moved; its owner also lists it among its ranges.
    owned = (one.partition("-") for one in slots if not one.startswith("["))
    return _NodesLine(
        id=clean(name),
        host=host,
        name="" if "=" in host_name else host_name,
        port=int(port),
        flags=frozenset(flags.split(",")),
        primary=clean(primary),
        is_linked=link == "connected",
        slots=tuple((int(first), int(last or first)) for first, _, last in owned),
    )


def _members(
    lines: list[_NodesLine], slots: Reply, source: Address, options: Options
) -> list[_Member]:
    """Return the nodes of CLUSTER NODES at their addresses in CLUSTER SLOTS."""
    places = _places(lines, slots, source)
    places = {name: options.mapped(*place) for name, place in places.items()}
    shown = {line.id: line.id[:12] for line in lines}
    shown |= {name: join_address(*place) for name, place in places.items()}
    members = []
    for line in lines:
        report = NodeReport(
            address=shown[line.id],
            id=line.id,
            role="primary" if "master" in line.flags else "replica",
            primary=shown.get(line.primary),
            slots=line.slots,
            health=line.health,
        )
        members.append(_Member(places.get(line.id), report))
    return _in_order(members)


def _places(lines: list[_NodesLine], slots: Reply, source: Address) -> Mapping[str, Address]:
    """Return the address of each node by its id; nodes without a known address are left out."""
    nodes = parse_nodes(slots, source)
    announced = {name: place for name, place in nodes.items() if place is not None}
    # A cluster announces IP addresses or host names; certificates may require the latter.
    by_name = any(announced.get(line.id) == (line.name, line.port) for line in lines)
    places = {}
    for line in lines:
        host = (by_name and line.name) or line.host or (source[0] if "myself" in line.flags else "")
        if line.id in announced:
            places[line.id] = announced[line.id]
        elif is_address(host, line.port) and "noaddr" not in line.flags:
            places[line.id] = host, line.port
    return places


# -- a visit


async def _visit(cluster: Cluster, member: _Member) -> NodeReport:
    """Return the report on a node, completed with the node's own answers."""
    report = member.report
    if member.place is None:
        return _unreached(report, "no node knows its address")
    options = cluster.options_at(member.place)
    node = Connection(replace(options, close_timeout=_CLOSE_MS, near_cache=None))
    try:
        async with asyncio.timeout(options.connect_timeout / 1000):
            try:
                await node.first_attempt()
            except Exception:  # an attempt may fail in any way
                return _unreached(report, str(node.pipeline.down))
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
    await node.ask(["PING"])  # a refusal takes the same time
    return time.perf_counter() - began


def _unreached(report: NodeReport, reason: str) -> NodeReport:
    health = "unreachable" if report.health == "ok" else report.health
    return dataclasses.replace(report, down=reason, health=health)


def _health(report: NodeReport, cluster: Mapping[str, str], replication: Mapping[str, str]) -> str:
    """Return the health of a node that answers: as other nodes report it, then as it does."""
    if report.health != "ok":
        return report.health
    if replication.get("master_sync_in_progress") == "1":
        return "synchronizing"
    if report.role == "replica" and replication.get("master_link_status") == "down":
        return "not replicating"
    return CLUSTER_DOWN if cluster.get("cluster_state") == "fail" else "ok"
