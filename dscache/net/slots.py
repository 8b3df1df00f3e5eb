"""Parsers for a cluster's view of its slots: CLUSTER SLOTS, CLUSTER INFO, MOVED and ASK; and INFO.

Source: the Redis Cluster specification and the pages of CLUSTER SLOTS and CLUSTER INFO.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..config.address import is_address, join_address
from ..core.constants import SLOTS
from ..errors import ConfigError, ConnectError, ProtocolError, ReplyError, clean, shorten

# The commands that ask a node for its view, and how many nodes are asked at a time: the newest view
# counts.
QUESTIONS: Final = (("CLUSTER", "SLOTS"), ("CLUSTER", "INFO"))
ASKED: Final = 3
# A node that this many views in a row leave out has left the cluster.
VIEWS_TO_LEAVE: Final = 2
# A cluster without any known node for this long, in seconds, may have been replaced by another one.
GONE_AFTER: Final = 1.0
# The shortest time between two refreshes. This and all times below are in seconds. While a node is
# down, refreshes go on, at growing intervals: a replica may take over at any moment, and no event
# says so.
GAP: Final = 0.1
GAP_GROWTH: Final = 1.3
GAP_CAP: Final = 0.5
# The pause before an operation is sent again because a node can't serve it yet. It doubles each
# time. The keys of a slot take milliseconds to move, and a failover takes a second.
RETRY_FIRST: Final = 0.01
RETRY_CAP: Final = 0.25
# How long the result of a name lookup is used.
NAMES_LAST: Final = 2.0

Address = tuple[str, int]
_UNKNOWN_HOSTS: Final = ("", "?")
# Refusals of a CLUSTER command by a single server: by Redis and Valkey, and by Dragonfly.
_NO_CLUSTER: Final = re.compile("cluster support disabled|cluster is disabled", re.IGNORECASE)
NO_NODE: Final = "none"
"""In place of the id of a node: the server isn't a node of a cluster."""
_NODE_ID: Final = re.compile(rb"[0-9a-f]{40}")
# The longest number that is parsed from a server's text.
_MOST_DIGITS: Final = 20


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots ``first`` to ``last``, with the addresses of their primary and replicas."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class View:
    """One node's view of the cluster: its ranges of slots, as of an epoch."""

    epoch: int
    ranges: tuple[SlotRange, ...]
    nodes: Mapping[str, Address | None] = field(default_factory=dict)
    """The address of each node by its id; None if the view doesn't tell it."""
    asked: Address = ("", 0)
    """The address of the node that gave the view."""
    node_id: str = ""
    """The id of that node, if it is known."""
    zones: Mapping[Address, str] = field(default_factory=dict)
    """The availability zone of each node that has one in the view."""

    def is_kin(self, other: View) -> bool:
        """Whether both may be views of one cluster: they share a node, or have no node ids."""
        if not self.nodes or not other.nodes:
            return True
        return not self.nodes.keys().isdisjoint(other.nodes)

    def is_heir(self, known: Collection[str]) -> bool:
        """Whether one of the known nodes is in the view, or gave it.

        A replica without data is in no view. So a primary and the replica that took over from it
        may be in no common view. The former primary's own view then tells that both are of one
        cluster.
        """
        gave_it = bool(self.node_id) and self.node_id in known
        return gave_it or not self.nodes.keys().isdisjoint(known)

    @property
    def covered(self) -> int:
        """The number of slots whose primary the view names."""
        return sum(one.last - one.first + 1 for one in self.ranges)


def read_view(slots: object, info: object, asked: Address, source: str, node_id: str = "") -> View:
    """Return the view in a node's replies to CLUSTER SLOTS and CLUSTER INFO.

    ``node_id`` is the node's id, if it is known. ``source`` names the configuration in errors.
    Raises ConfigError if the node belongs to no cluster, ReplyError if it refuses, and
    ProtocolError if its reply has another shape.
    """
    if isinstance(slots, ReplyError):
        if has_no_cluster(slots):
            raise ConfigError(
                f"{source}: nodes: {join_address(*asked)} isn't a node of a "
                f'cluster (it says "{slots.message}"); give host and port instead of nodes'
            )
        raise slots
    entries = _entries(slots, asked, node_id)
    return View(
        parse_epoch(info),
        tuple(_ranges_of(entries)),
        _nodes_of(entries),
        asked,
        node_id,
        _zones_of(slots, entries),
    )


def newest(views: Iterable[View]) -> View:
    """Return the view of the highest epoch; raises ConnectError if none has slots."""
    # A node that has left the cluster keeps its epoch, and has few slots or none.
    view = max(views, key=lambda one: (bool(one.ranges), one.epoch, one.covered))
    if not view.ranges:
        raise ConnectError("no node of the cluster serves any slot")
    return view


def groups_of(views: Iterable[View]) -> list[list[View]]:
    """Return the views by cluster; views with a common node are of one cluster."""
    groups: list[list[View]] = []
    for view in views:
        kin = [group for group in groups if any(view.is_kin(one) for one in group)]
        groups = [group for group in groups if group not in kin]
        groups.append([*(one for group in kin for one in group), view])
    return groups


def parse_slots(reply: object, asked: Address, node_id: str = "") -> list[SlotRange]:
    """Return the ranges in a reply to CLUSTER SLOTS.

    A node that doesn't know a host leaves it out. The host is then in the entry's metadata, or it
    is the host of ``asked``. If ``node_id``, the id of the answering node, is known, no other node
    is taken to be at that host. A range is left out if its primary has no known address, and a
    replica without a known address is left out too. Raises ProtocolError if the reply has another
    shape.
    """
    return _ranges_of(_entries(reply, asked, node_id))


def parse_nodes(reply: object, asked: Address, node_id: str = "") -> dict[str, Address | None]:
    """Return the address of each node by its id in a reply to CLUSTER SLOTS; see parse_slots."""
    return _nodes_of(_entries(reply, asked, node_id))


def _ranges_of(entries: Iterable[_Entry]) -> list[SlotRange]:
    ranges = []
    for first, last, ((_, primary), *others) in entries:
        if primary is not None:
            replicas = tuple(address for _, address in others if address is not None)
            ranges.append(SlotRange(first, last, primary, replicas))
    return ranges


def _nodes_of(entries: Iterable[_Entry]) -> dict[str, Address | None]:
    return {name: address for *_, nodes in entries for name, address in nodes if name}


def has_no_cluster(reply: object) -> bool:
    """Return whether a CLUSTER command's reply says that the server isn't a node of a cluster."""
    return isinstance(reply, ReplyError) and _NO_CLUSTER.search(reply.message) is not None


def parse_node_id(reply: object) -> str:
    """Return the id of a node in a reply to CLUSTER MYID, or an empty text if there is none."""
    if isinstance(reply, bytes) and _NODE_ID.fullmatch(reply):
        return reply.decode()
    return ""


_Entry = tuple[int, int, list[tuple[str, Address | None]]]
"""The first and the last slot of a range, and the id and address of its nodes."""


def _entries(reply: object, asked: Address, node_id: str) -> list[_Entry]:
    try:
        if not isinstance(reply, list | tuple) or len(reply) > SLOTS:
            raise ValueError("no list of ranges")
        return [_entry(entry, asked, node_id) for entry in reply]
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ProtocolError(f"CLUSTER SLOTS was answered with {shorten(reply)}") from error


def _entry(entry: Any, asked: Address, node_id: str) -> _Entry:
    first, last, primary, *replicas = entry
    if not type(first) is type(last) is int or not 0 <= first <= last < SLOTS:
        raise ValueError("no such slots")
    return first, last, [_node(one, asked, node_id) for one in (primary, *replicas)]


def _node(entry: Any, asked: Address, node_id: str) -> tuple[str, Address | None]:
    host, port, *rest = entry
    its_id = parse_node_id(rest[0]) if rest else ""
    host = "" if host is None else host.decode()
    if host in _UNKNOWN_HOSTS:
        # An unknown endpoint (None) means that the host that was asked leads to every node.
        is_elsewhere = entry[0] is not None
        found = _host_in(rest[1]) if is_elsewhere and len(rest) > 1 else ""
        if not found and is_elsewhere and node_id and its_id not in ("", node_id):
            return its_id, None
        host = found or asked[0]
    if type(port) is int and port == 0:
        return its_id, None  # a node whose address was forgotten, as another node was met there
    if not is_address(host, port):
        raise ValueError("no such host and port")
    return its_id, (host, port)


def _zones_of(reply: Any, entries: list[_Entry]) -> dict[Address, str]:
    zones: dict[Address, str] = {}
    for described, (_, _, nodes) in zip(reply, entries, strict=True):
        for node, (_, address) in zip(described[2:], nodes, strict=True):
            zone = _named_in(node[3]).get(b"availability-zone") if len(node) > 3 else None
            if address is not None and type(zone) is bytes and zone:
                zones[address] = zone.decode(errors="replace")
    return zones


def _named_in(metadata: Any) -> dict[Any, Any]:
    """Return the metadata of an entry, which is a map or a flat list of pairs."""
    if isinstance(metadata, dict):
        return metadata
    if isinstance(metadata, list | tuple) and all(type(one) is bytes for one in metadata):
        return dict(zip(metadata[::2], metadata[1::2], strict=False))
    return {}


def _host_in(metadata: Any) -> str:
    """Return the host in the metadata of an entry, or nothing."""
    named = _named_in(metadata)
    for name in (b"ip", b"hostname"):
        value = named.get(name)
        host = value.decode() if type(value) is bytes else ""
        if host not in _UNKNOWN_HOSTS and is_address(host, 1):
            return host
    return ""


def parse_redirection(words: str, slot: int, source: Address) -> Address | None:
    """Return the address in ``MOVED <slot> <host>:<port>`` or ASK, a reply of ``source``.

    Returns None if the words have another shape or name another slot. The host of ``source`` is
    used if the reply leaves the host out.
    """
    parts = words.split()
    if len(parts) != 3 or parts[1] != str(slot):
        return None
    host, colon, port = parts[2].rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > _MOST_DIGITS:
        return None
    host = host.removeprefix("[").removesuffix("]")
    if host in _UNKNOWN_HOSTS:
        host = source[0]
    return (host, int(port)) if is_address(host, int(port)) else None


def parse_info(reply: object) -> dict[str, str]:
    """Return the ``name:value`` lines of a reply to INFO; empty for an error reply."""
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode(errors="replace").splitlines()
    return {
        clean(name): clean(value)
        for name, colon, value in (one.partition(":") for one in lines)
        if colon
    }


def parse_epoch(reply: object) -> int:
    """Return the current epoch in a reply to CLUSTER INFO, or -1."""
    value = parse_info(reply).get("cluster_current_epoch", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS else -1
