"""The configured nodes of a cluster, some with credentials of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from msgspec import UNSET

from ..config import Node, Options
from .slots import NAMES_LAST, Address

# A cluster that announces more nodes than this has each one connected to on its first use:
# connecting to sixteen thousand takes seconds, and a faulty node may announce as many.
AT_ONCE: Final = 256


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
        """Return the nodes to look up now: those with credentials, at most every 2 seconds.

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
