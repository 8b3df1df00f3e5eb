"""The result of a survey of a cluster: the state of each node, and its effect on records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..core import constants

Slots = tuple[int, int]
"""The first and the last slot of a range."""

CLUSTER_DOWN = "cluster down"
"""The health of a node that answers every command on records with CLUSTERDOWN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node of a cluster, as other nodes report it and as it answered itself."""

    address: str
    id: str = ""
    """The node's id in the cluster; empty if no node reports it."""
    role: str
    """``primary`` or ``replica``."""
    primary: str | None = None
    """The address of a replica's primary; None if unknown, and for a primary."""
    slots: tuple[Slots, ...] = ()
    """The ranges of slots that a primary owns."""
    round_trip_ms: float | None = None
    """The median time of 5 PINGs in milliseconds; None if the node can't be reached."""
    down: str | None = None
    """The reason that the node can't be reached from here; None if it can."""
    server: str = ""
    """The server's kind and version, such as ``redis 7.0.15``; empty if unknown."""
    health: str = "ok"
    """``ok``, or the fault that other nodes or the node itself report."""

    @property
    def slot_count(self) -> int:
        """The number of slots the node owns."""
        return _count(self.slots)

    @property
    def is_down(self) -> bool:
        """Whether the node can't be reached from here, or the cluster considers it failed."""
        return self.down is not None or self.health == "failed"

    @property
    def trouble(self) -> str:
        """The fault, to follow the address in a sentence; empty if there is none."""
        if self.down is not None:
            return f"is down: {self.down}"
        if self.health == "failed":
            return "answers, but the cluster considers it failed"
        return "" if self.health == "ok" else f"answers, but: {self.health}"


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """The nodes of a cluster: primaries by their first slot, each followed by its replicas."""

    nodes: tuple[NodeReport, ...]

    @property
    def uncovered(self) -> list[Slots]:
        """The ranges of slots without a primary."""
        missing: list[Slots] = []
        expected = 0
        owned = sorted(one for node in self.nodes for one in node.slots)
        for first, last in (*owned, (constants.SLOTS, constants.SLOTS)):
            if first > expected:
                missing.append((expected, first - 1))
            expected = max(expected, last + 1)
        return missing

    @property
    def covered(self) -> int:
        """The number of slots that have a primary, up or down."""
        return constants.SLOTS - _count(self.uncovered)

    @property
    def problems(self) -> list[str]:
        """The faults that keep records from being served."""
        found = [
            f"{node.address}, primary of {node.slot_count} slots, {node.trouble}"
            for node in self.nodes
            if node.slots and node.is_down
        ]
        if refusing := self._refusing:
            found.append(f"{refusing} of the primaries refuse to serve, as cluster_state is fail")
        if uncovered := self.uncovered:
            found.append(f"{_count(uncovered)} slots have no primary: {show_slots(uncovered)}")
        return found

    @property
    def remarks(self) -> list[str]:
        """The other faults, which keep no record from being served."""
        return [
            f"{node.address}, {node.role}, {node.trouble}"
            for node in self.nodes
            if node.trouble
            and not (node.slots and node.is_down)
            # One line for each node would hide the other remarks.
            and not (node.health == CLUSTER_DOWN and self._refusing)
        ]

    @property
    def _refusing(self) -> int:
        return sum(bool(node.slots) and node.health == CLUSTER_DOWN for node in self.nodes)


def show_slots(ranges: Iterable[Slots], limit: int = 6) -> str:
    """Return ranges of slots as ``0-5460, 5462``; after ``limit`` ranges, the number of others."""
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _count(ranges: Iterable[Slots]) -> int:
    return sum(last - first + 1 for first, last in ranges)
