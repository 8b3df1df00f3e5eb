"""The nodes of a cluster, configured and known, and the table of which node serves which slot."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from math import inf
from typing import Any

from msgspec import UNSET

from ..config import Node, Options
from ..core.failures import ErrorOf
from .foreign_errors import foreign
from .slots import NAMES_LAST, Address
from .sockets import UselessAddresses


class NodeInfo:
    """One node of a cluster, or the only server, shared by all connections of a cache to it.

    ``connects``, ``reconnections`` and ``redirections`` count over all connections of a blocking
    cache. ``counts`` sums the counters of connections that have ended.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.address: Address = options.host, options.port
        self.shown = options.address
        """The address as ``host:port``, as it stands in errors and ``stats()``."""
        self.is_named = _is_name(options.host)
        """Whether reaching it takes a name lookup, which no timeout limits."""
        self.server = ""
        """The kind and version of the server, once it is known."""
        self.zone = ""
        """Its availability zone, if it has told it to a connection."""
        self.connects = 0
        self.reconnections = 0
        self.redirections = 0
        self.last_loss = ""
        self.is_tried = False
        """Whether an attempt to connect to it was made."""
        self.trouble: Exception | None = None
        """Why the last attempt to connect failed; None if it succeeded."""
        self.refusal: ErrorOf | None = None
        """How operations fail if that failure is permanent."""
        self.counts: dict[str, Any] = {}
        self.absences = 0
        """How many views in a row have left it out."""
        self.avoid_until = -inf
        """Until when it isn't read as a replica, by ``time.monotonic()``."""
        self.node_id = ""
        """The id that the node told last; empty if it doesn't tell it."""
        self.useless = UselessAddresses()
        self.avoid_for = 0.0
        """How long the last exclusion from reads lasts, in seconds."""

    def record_connected(self, server: str, again: bool) -> None:
        """Note a new connection, while holding the lock of its cache; see ClusterState."""
        self.connects += 1
        self.reconnections += again
        self.is_tried = True
        self.server = server
        self.trouble = self.refusal = None

    def connections(self) -> dict[str, int]:
        """Return the counters of the connections to it."""
        return {
            "connects": self.connects,
            "reconnections": self.reconnections,
            "redirections": self.redirections,
        }


class Seeds:
    """The configured nodes, and the addresses by which the cluster may announce them."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._named: dict[Address, Node] = {}
        self._again_at = 0.0
        self.addresses = [(seed.host, seed.port) for seed in options.seeds]

    def options_at(self, address: Address) -> Options:
        """Return the options of the connection to the node at an address."""
        return self._options.for_node(*address, self._named.get(address))

    def to_look_up(self, now: float) -> list[Node]:
        """Return the nodes to look up now: nodes with credentials, at most every 2 seconds.

        ``now`` is ``time.monotonic()``.
        """
        if now < self._again_at:
            return []
        self._again_at = now + NAMES_LAST
        return [
            seed
            for seed in self._options.seeds
            if seed.password is not UNSET or seed.username is not UNSET
        ]

    def looked_up(self, seed: Node, found: Iterable[tuple[Any, ...]]) -> None:
        """Note the addresses that ``getaddrinfo`` has returned for a node."""
        for *_, address in found:
            self._named[str(address[0]), seed.port] = seed


@dataclass(frozen=True, slots=True)
class Shard:
    """Slots ``first`` to ``last``, with the addresses of their primary and of its readers.

    ``readers`` is empty where reads go to the primary. ``reserves`` are read when no reader can be.
    """

    first: int
    last: int
    primary: str
    readers: tuple[str, ...]
    reserves: tuple[str, ...] = ()

    def without(self, shown: str) -> Shard:
        """Return the shard without one of its readers or reserves."""
        readers = tuple(one for one in self.readers if one != shown)
        reserves = tuple(one for one in self.reserves if one != shown)
        if readers == (self.primary,):
            readers = ()
        if not readers:
            readers, reserves = reserves, ()
        return replace(self, readers=readers, reserves=reserves)


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Addresses by slot: the shards of the newest view, and the slots redirected since then.

    Only ``moved`` changes, and it only grows; every other change makes a new table. So a thread
    compares a table's identity and the length of ``moved`` to see, without a lock, whether its
    own tables are up to date.
    """

    shards: tuple[Shard, ...] = ()
    moved: list[tuple[int, str]] = field(default_factory=list)
    ids: Mapping[str, str] = field(default_factory=dict)
    """The id of the node at each address; without an address that several nodes share."""

    def is_of(self, shown: str, node_id: str) -> bool:
        """Return whether a node may be the one at an address; it may have no known id."""
        return not node_id or self.ids.get(shown, node_id) == node_id

    def find(self, slot: int, reads: bool) -> str | None:
        """Return the address that serves a slot, or from which it is read; None if unknown."""
        for moved, address in reversed(self.moved):
            if moved == slot:
                return address
        shard = self._shard(slot)
        if shard is not None and reads and shard.readers:
            return reader_of(shard, slot)
        return None if shard is None else shard.primary

    def shard_owner(self, slot: int) -> str | None:
        """Return the address that serves a slot in the newest view; None if unknown."""
        shard = self._shard(slot)
        return None if shard is None else shard.primary

    def _shard(self, slot: int) -> Shard | None:
        at = bisect_right(self.shards, slot, key=lambda shard: shard.first) - 1
        return None if at < 0 or slot > self.shards[at].last else self.shards[at]

    @property
    def primaries(self) -> dict[str, None]:
        """The addresses of all nodes that serve slots, each once."""
        heirs = (address for _, address in self.moved)
        return dict.fromkeys((*(shard.primary for shard in self.shards), *heirs))


def reader_of(shard: Shard, slot: int) -> str:
    """Return the address that is read for a slot of a shard.

    The slot decides, so that all reads of one record come from one node and rarely go back in
    time.
    """
    return shard.readers[slot % len(shard.readers)]


def _is_name(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError as error:
        if foreign(error) is not None:
            raise  # a signal handler has raised it
        return True
    return False
