"""The nodes of a cluster that are configured, some with a login of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from msgspec import UNSET

from ..config import Node, Options
from .slots import NAMES_LAST, Address

# Where a cluster announces more nodes than this, each is connected to when it is needed: sixteen
# thousand would take seconds, which a node that is out of its mind can announce as well.
AT_ONCE: Final = 256


class Seeds:
    """The configured nodes, and which addresses those have that the cluster names otherwise."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._named: dict[Address, Node] = {}
        self._again_at = 0.0
        self.addresses = [(seed.host, seed.port) for seed in options.seeds]

    def options_at(self, address: Address) -> Options:
        """Return the options of the connection to the node at an address."""
        return self._options.for_node(*address, self._named.get(address))

    def to_look_up(self, now: float) -> list[Node]:
        """Return the nodes whose addresses are to be looked up again: those with a login."""
        if now < self._again_at:
            return []
        self._again_at = now + NAMES_LAST
        return [
            seed
            for seed in self._options.seeds
            if seed.password is not UNSET or seed.username is not UNSET
        ]

    def looked_up(self, seed: Node, found: Iterable[tuple[Any, ...]]) -> None:
        """Note what ``getaddrinfo`` has found of a node."""
        for *_, address in found:
            self._named[str(address[0]), seed.port] = seed
