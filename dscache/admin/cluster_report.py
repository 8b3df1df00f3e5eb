"""What a look at a cluster found: each node and how it is, and what that means for records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..core import constants

Slots = tuple[int, int]
"""The first and the last of a range."""

CLUSTER_DOWN = "cluster down"
"""The health of a node that answers CLUSTERDOWN to whatever is asked of its records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node of a cluster: what the others say of it, and how it answered."""

    address: str
    id: str = ""
    """Its id in the cluster; empty if no node told it."""
    role: str
    """``primary`` or ``replica``."""
    primary: str | None = None
    """Of a replica, the address of its primary; None if that isn't known."""
    slots: tuple[Slots, ...] = ()
    """Of a primary, the ranges of slots that it owns."""
    round_trip_ms: float | None = None
    """The median of some PINGs; None if the node can't be reached."""
    down: str | None = None
    """Why the node can't be reached from here; None if it can."""
    server: str = ""
    """Its kind and version, such as ``redis 7.0.15``; empty if it didn't tell."""
    health: str = "ok"
    """``ok``, or what the other nodes or it itself say is wrong with it."""

    @property
    def slot_count(self) -> int:
        """How many slots it owns."""
        return _count(self.slots)

    @property
    def is_down(self) -> bool:
        """Whether it can't be reached from here, or is taken for down by the cluster."""
        return self.down is not None or self.health == "failed"

    @property
    def trouble(self) -> str:
        """What is wrong with it, as the rest of a sentence; empty if nothing is."""
        if self.down is not None:
            return f"is down: {self.down}"
        if self.health == "failed":
            return "answers, but the cluster takes it for down"
        return "" if self.health == "ok" else f"answers, but: {self.health}"


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """The nodes of a cluster: each primary by its first slot, and after it its replicas."""

    nodes: tuple[NodeReport, ...]

    @property
    def uncovered(self) -> list[Slots]:
        """The ranges of slots that no primary owns."""
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
        """How many slots have a primary that owns them, be it up or down."""
        return constants.SLOTS - _count(self.uncovered)

    @property
    def problems(self) -> list[str]:
        """What keeps records from being served."""
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
        """What is wrong as well, but keeps no record from being served."""
        return [
            f"{node.address}, {node.role}, {node.trouble}"
            for node in self.nodes
            if node.trouble
            and not (node.slots and node.is_down)
            # Of all nodes one after the other it would hide what else there is.
            and not (node.health == CLUSTER_DOWN and self._refusing)
        ]

    @property
    def _refusing(self) -> int:
        return sum(bool(node.slots) and node.health == CLUSTER_DOWN for node in self.nodes)


def show_slots(ranges: Iterable[Slots], limit: int = 6) -> str:
    """Return ranges of slots as ``0-5460, 5462``, and of very many how many more there are."""
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _count(ranges: Iterable[Slots]) -> int:
    return sum(last - first + 1 for first, last in ranges)
