"""The nodes of a cluster and who serves which slot, as all threads of a blocking cache know it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from ipaddress import ip_address
from math import inf
from typing import Any

from ..config import Options
from ..core.constants import ErrorOf
from .slots import Address


class NodeInfo:
    """A node, as all lines of a cache know it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.address: Address = options.host, options.port
        self.shown = options.address
        self.is_named = _is_name(options.host)
        """Whether a look-up is needed to reach it, which nothing can limit."""
        self.server = ""
        self.connects = 0
        self.reconnections = 0
        self.redirections = 0
        self.last_loss = ""
        self.is_tried = False
        """Whether it has been connected to, or that has failed."""
        self.trouble: Exception | None = None
        """Why the last attempt to connect failed, if it did."""
        self.refusal: ErrorOf | None = None
        """How operations fail if that is for good."""
        self.counts: dict[str, Any] = {}
        """What lines that are no more have counted."""
        self.absences = 0
        self.avoid_until = -inf
        self.avoid_for = 0.0

    def connections(self) -> dict[str, int]:
        """Return what was counted of the connections to it."""
        return {
            "connects": self.connects,
            "reconnections": self.reconnections,
            "redirections": self.redirections,
        }


@dataclass(frozen=True, slots=True)
class Shard:
    """Slots ``first`` to ``last``, the address of who serves them, and of those who are read."""

    first: int
    last: int
    primary: str
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Who serves the slots, by address: the newest view, and what nodes have told since."""

    shards: tuple[Shard, ...] = ()
    moved: list[tuple[int, str]] = field(default_factory=list)

    def find(self, slot: int, reads: bool) -> str | None:
        """Return who serves a slot, or is read for it, as far as that is known."""
        for its, address in reversed(self.moved):
            if its == slot:
                return address
        at = bisect_right(self.shards, slot, key=lambda shard: shard.first) - 1
        if at < 0 or slot > self.shards[at].last:
            return None
        shard = self.shards[at]
        if reads and shard.readers:
            return reader_of(shard, slot)
        return shard.primary

    @property
    def primaries(self) -> dict[str, None]:
        """The addresses of all who serve slots, each once."""
        heirs = (address for _, address in self.moved)
        return dict.fromkeys((*(shard.primary for shard in self.shards), *heirs))


def reader_of(shard: Shard, slot: int) -> str:
    """Return who is read for a slot of a shard.

    By the slot, so that reads of one record come from one node and seldom go back.
    """
    return shard.readers[slot % len(shard.readers)]


def _is_name(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return True
    return False
