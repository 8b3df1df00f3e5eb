"""Parsers for a cluster's view of its slots: CLUSTER SLOTS, CLUSTER INFO, MOVED and ASK.

Source: the Redis Cluster specification and the pages of CLUSTER SLOTS and CLUSTER INFO.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from ..core.constants import SLOTS, is_address, join_address
from ..errors import ConfigError, ConnectError, ProtocolError, ReplyError, shorten

# The commands that ask a node for its view, and how many nodes are asked at a time: the newest view
# counts.
QUESTIONS: Final = (("CLUSTER", "SLOTS"), ("CLUSTER", "INFO"))
ASKED: Final = 3
# A node that this many views in a row leave out has left the cluster.
VIEWS_TO_LEAVE: Final = 2
# The shortest time between two refreshes, in seconds, as are all times below. While a node is down,
# refreshes go on, each a little later: a replica may take over at any moment, and no event says so.
GAP: Final = 0.1
GAP_GROWTH: Final = 1.3
GAP_CAP: Final = 0.5
# The pause before an operation is sent again that a node can't serve yet; it doubles each time. The
# keys of a slot take milliseconds to move, and a failover takes a second.
RETRY_FIRST: Final = 0.01
RETRY_CAP: Final = 0.25
# How long the result of a name lookup is used.
NAMES_LAST: Final = 2.0

Address = tuple[str, int]
_UNKNOWN_HOSTS: Final = ("", "?")
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

    @property
    def covered(self) -> int:
        """The number of slots whose primary the view names."""
        return sum(one.last - one.first + 1 for one in self.ranges)


def read_view(slots: Any, info: Any, asked: Address, source: str) -> View:
    """Return the view in a node's replies to CLUSTER SLOTS and CLUSTER INFO.

    ``source`` names the configuration in errors. Raises ConfigError if the node belongs to no
    cluster, ReplyError if it refuses, and ProtocolError if its reply has another shape.
    """
    if isinstance(slots, ReplyError):
        if "cluster support disabled" in slots.message.lower():
            raise ConfigError(
                f"{source}: cache.options.nodes: {join_address(*asked)} is no node of a "
                f'cluster (it says "{slots.message}"); give host and port instead of nodes'
            )
        raise slots
    return View(parse_epoch(info), tuple(parse_slots(slots, asked)))


def newest(views: Iterable[View]) -> View:
    """Return the view of the highest epoch; raises ConnectError if it has no slots."""
    # A node that has left the cluster keeps its epoch, and has few slots or none.
    view = max(views, key=lambda one: (one.epoch, one.covered))
    if not view.ranges:
        raise ConnectError("no node of the cluster serves any slot")
    return view


def parse_slots(reply: Any, asked: Address) -> list[SlotRange]:
    """Return the ranges in a reply to CLUSTER SLOTS.

    A node that doesn't know its own host leaves the host out; the host of ``asked`` is used then.
    Raises ProtocolError if the reply has another shape.
    """
    try:
        if not isinstance(reply, list | tuple) or len(reply) > SLOTS:
            raise ValueError("no list of ranges")
        return [_range(entry, asked) for entry in reply]
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ProtocolError(f"CLUSTER SLOTS was answered with {shorten(reply)}") from error


def _range(entry: Any, asked: Address) -> SlotRange:
    first, last, primary, *replicas = entry
    if not type(first) is type(last) is int or not 0 <= first <= last < SLOTS:
        raise ValueError("no such slots")
    return SlotRange(
        first, last, _address(primary, asked), tuple(_address(one, asked) for one in replicas)
    )


def _address(entry: Any, asked: Address) -> Address:
    host, port = entry[:2]
    host = "" if host is None else host.decode()
    if host in _UNKNOWN_HOSTS:
        host = asked[0]
    if not is_address(host, port):
        raise ValueError("no such host and port")
    return host, port


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


def parse_epoch(reply: Any) -> int:
    """Return the current epoch in a reply to CLUSTER INFO, or -1."""
    if not isinstance(reply, bytes):
        return -1
    for line in reply.splitlines():
        name, _, value = line.partition(b":")
        if name == b"cluster_current_epoch" and value.isdigit() and len(value) <= _MOST_DIGITS:
            return int(value)
    return -1
