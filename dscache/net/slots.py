"""What a cluster says of its slots: the replies to its questions, and redirections.

Source: the Redis Cluster specification and the pages of CLUSTER SLOTS and CLUSTER INFO.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from ..core.constants import SLOTS, is_address, join_address
from ..errors import ConfigError, ConnectError, ProtocolError, ReplyError, shorten

# What a node is asked for its view, and how many are asked at a time: the newest view counts.
QUESTIONS: Final = (("CLUSTER", "SLOTS"), ("CLUSTER", "INFO"))
ASKED: Final = 3
# A node that two views in a row leave out has left.
VIEWS_TO_LEAVE: Final = 2
# Two refreshes are at least so far apart, in seconds as all below. While a node is down, a
# replica may take over at any moment and nobody will tell: then they go on, ever more slowly.
GAP: Final = 0.1
GAP_GROWTH: Final = 1.3
GAP_CAP: Final = 0.5
# How long to wait before an operation is sent again that a node can't serve yet: up to twice as
# long each time. A slot's keys take milliseconds to move, a failover takes a second.
RETRY_FIRST: Final = 0.01
RETRY_CAP: Final = 0.25
# How long to believe which addresses the names of nodes have.
NAMES_LAST: Final = 2.0

Address = tuple[str, int]
_UNKNOWN_HOSTS: Final = ("", "?")
# Of any number that a server states.
_MOST_DIGITS: Final = 20


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots ``first`` to ``last``, and who serves them."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class View:
    """What one node knows of the cluster: the slots in ranges, as of an epoch."""

    epoch: int
    ranges: tuple[SlotRange, ...]

    @property
    def covered(self) -> int:
        """Of how many slots it knows who serves them."""
        return sum(one.last - one.first + 1 for one in self.ranges)


def read_view(slots: Any, info: Any, asked: Address, source: str) -> View:
    """Return the view that a node's replies to both questions state.

    ``source`` is the configuration's. Raises ConfigError if the node is of no cluster, ReplyError
    if it refuses, and ProtocolError if it gives no such reply.
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
    """Return the view that counts; raises ConnectError if none knows of any slot."""
    # A node that has left keeps its epoch, and knows of few slots or none.
    view = max(views, key=lambda one: (one.epoch, one.covered))
    if not view.ranges:
        raise ConnectError("no node of the cluster serves any slot")
    return view


def parse_slots(reply: Any, asked: Address) -> list[SlotRange]:
    """Return the ranges that a reply to CLUSTER SLOTS states.

    A node that doesn't know its own host leaves it out; it is the one that was ``asked``. Raises
    ProtocolError if the reply is of another shape.
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
    """Return where ``MOVED <slot> <host>:<port>``, or ASK, sends what was sent to ``source``.

    None if the words are no such thing, or speak of another slot.
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
    """Return the current epoch that a reply to CLUSTER INFO states, or -1."""
    if not isinstance(reply, bytes):
        return -1
    for line in reply.splitlines():
        name, _, value = line.partition(b":")
        if name == b"cluster_current_epoch" and value.isdigit() and len(value) <= _MOST_DIGITS:
            return int(value)
    return -1
