"""What a cluster says of its slots: the reply to CLUSTER SLOTS, and redirections.

Source: the Redis Cluster specification and the pages of CLUSTER SLOTS and CLUSTER INFO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ._common import SLOTS
from .errors import ProtocolError, shorten

Address = tuple[str, int]
_UNKNOWN_HOSTS: Final = ("", "?")


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots ``first`` to ``last``, and who serves them."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...]


def parse_slots(reply: Any, asked: Address) -> list[SlotRange]:
    """Return the ranges that a reply to CLUSTER SLOTS states.

    A node that doesn't know its own host leaves it out; it is the one that was ``asked``. Raises
    ProtocolError if the reply is of another shape.
    """
    try:
        return [_range(entry, asked) for entry in reply]
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ProtocolError(f"CLUSTER SLOTS was answered with {shorten(reply)}") from error


def _range(entry: Any, asked: Address) -> SlotRange:
    first, last, primary, *replicas = entry
    if not 0 <= first <= last < SLOTS:
        raise ValueError("no such slots")
    return SlotRange(
        first, last, _address(primary, asked), tuple(_address(one, asked) for one in replicas)
    )


def _address(entry: Any, asked: Address) -> Address:
    host = "" if entry[0] is None else entry[0].decode()
    if not 0 < entry[1] < 65536:
        raise ValueError("no such port")
    return (asked[0] if host in _UNKNOWN_HOSTS else host), entry[1]


def parse_redirection(words: str, slot: int, source: Address) -> Address | None:
    """Return where ``MOVED <slot> <host>:<port>``, or ASK, sends what was sent to ``source``.

    None if the words are no such thing, or speak of another slot.
    """
    parts = words.split()
    if len(parts) != 3 or parts[1] != str(slot):
        return None
    host, colon, port = parts[2].rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        return None
    host = host.removeprefix("[").removesuffix("]")
    return (source[0] if host in _UNKNOWN_HOSTS else host), int(port)


def parse_epoch(reply: Any) -> int:
    """Return the current epoch that a reply to CLUSTER INFO states, or -1."""
    if not isinstance(reply, bytes):
        return -1
    for line in reply.splitlines():
        name, _, value = line.partition(b":")
        if name == b"cluster_current_epoch" and value.isdigit():
            return int(value)
    return -1
