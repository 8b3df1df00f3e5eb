"""Where the operations on a cluster go right now: each slot to its node, or into a Room.

``masters`` is what is known of the slots; the router's table is where operations go, which is a
Room while it is uncertain that nothing would be overtaken. What no node is known to serve waits
in limbo, a Room that never opens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from .. import _backend
from ..config import Options
from ..core import constants
from ..core.split_records import SplitRecords
from ..errors import ConnectError, ConnectionLost
from ..net.slots import SlotRange
from .connection import Connection
from .slot_hold import SlotHold


class SlotRouter:
    """The Router of a cluster, and the rooms where its operations wait.

    ``options`` are the cluster's, ``shared`` what holds for each of its nodes. ``check_usable``
    raises if nothing may be begun, ``look_again`` is called if the slots seem to have moved, and
    ``open_for`` with a slot of which something waits that no opened node serves.
    """

    def __init__(
        self,
        options: Options,
        shared: Options,
        check_usable: Callable[[], None],
        look_again: Callable[[], None],
        open_for: Callable[[int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = options.address
        self._shared = shared
        self._check_usable = check_usable
        self._look_again = look_again
        self._open_for = open_for
        self.unopened: dict[int, SlotRange] = {}
        """The slots of nodes that weren't needed yet, where there are too many to open each."""
        self.masters: list[Connection | None] = [None] * constants.SLOTS
        self._readers: Mapping[Connection, list[Connection]] = {}
        self._holders: dict[Any, Connection | SlotHold] = {}
        core = _backend.core
        self._apart = SplitRecords(
            core, self._loop.create_future, key_prefix=options.key_prefix, ttl=options.ttl or 0
        )
        self.unrouted = self._new_hold(self._limbo_entered)
        self.unrouted.pipeline.down = ConnectError("still connecting")
        self.router = core.Router(
            self._loop.create_future,
            self.unrouted.pipeline,
            self._apart,
            key_prefix=options.key_prefix,
            hash_tag=options.hash_tag,
        )
        self._apart.router = self.router
        self._holds: dict[int, SlotHold] = {}
        self._held: set[SlotHold] = set()
        self._spare_holds: list[SlotHold] = []
        self._opener: asyncio.TimerHandle | None = None
        # Operations that one pipeline has given away, each with the one that is to have it.
        self._between: list[tuple[Any, Any]] = []

    @property
    def is_busy(self) -> bool:
        """Whether anything waits, or was sent and not answered."""
        return any(one.queued or one.in_flight for one in self._holders)

    def stats(self) -> list[Mapping[str, Any]]:
        """Return what was counted of no node."""
        holds = (self.unrouted, *self._held, *self._spare_holds)
        of_holds = [hold.pipeline.stats() for hold in holds]
        return [*of_holds, self._apart.stats(), self.router.stats()]

    def fail_all(self, reason: str) -> None:
        """Fail everything that waits, or was sent and not answered."""
        for pipeline in self._holders:
            pipeline.fail_all(lambda operation: ConnectionLost(f"{operation}: {reason}"))

    def end(self, reason: str) -> None:
        """Fail everything that waits for a node, and wait for none any more."""
        self._stop_opener()
        for hold in (self.unrouted, *self._held, *self._spare_holds):
            hold.fail(reason)

    # -- who serves what

    def join(self, node: Connection) -> None:
        """Let a node have operations."""
        self._holders[node.pipeline] = node

    def leave(self, node: Connection) -> None:
        """Let a node have no more operations."""
        del self._holders[node.pipeline]
        self._move(node.pipeline)

    def hand_slots(self, owners: Mapping[int, Connection | None]) -> None:
        """Give slots to others, at once or when their former nodes have answered."""
        fresh: set[SlotHold] = set()
        for slot, owner in owners.items():
            before, self.masters[slot] = self.masters[slot], owner
            if slot in self._holds:
                continue
            if before is not None and before.pipeline.in_flight:
                self.hold(slot, before, fresh)
            else:
                self._route(slot)

    def read_from(self, readers: Mapping[Connection, list[Connection]]) -> None:
        """Read from others than the primaries: from those that ``readers`` has for each."""
        self._readers = readers
        for slot in range(constants.SLOTS):
            if slot not in self._holds:
                self._route(slot)

    def stop_reading(self, slot: int, node: Connection) -> None:
        """If it is a replica that sends reads on a slot away, read others until the next view."""
        if self._readers and node is not self.masters[slot]:
            for candidates in self._readers.values():
                if node in candidates:
                    candidates.remove(node)

    def _route(self, slot: int) -> None:
        """Send operations on a slot to the node that is known to serve it."""
        master = self.masters[slot]
        pipeline = self.unrouted.pipeline if master is None else master.pipeline
        self.router.owners[slot] = pipeline
        if master is not None and (candidates := self._readers.get(master)):
            # By the slot, so that reads of one record come from one node and seldom go back.
            pipeline = candidates[slot % len(candidates)].pipeline
        self.router.readers[slot] = pipeline

    # -- what waits

    def hold(self, slot: int, source: Connection, fresh: set[SlotHold]) -> SlotHold:
        """Return the room in which operations on a slot wait until ``source`` has answered.

        ``fresh`` has the one, if any, that slots share which are shut at the same moment.
        """
        hold = self._holds.get(slot)
        if hold is None:
            hold = next(iter(fresh), None) or self._take_hold()
            fresh.add(hold)
            self._held.add(hold)
            hold.slots.add(slot)
            self._holds[slot] = hold
            self.router.owners[slot] = hold.pipeline
            self.router.readers[slot] = hold.pipeline
        if source not in hold.sources:
            hold.fence(source)
            source.watched = True
        return hold

    def is_awaited(self, source: Connection) -> bool:
        """Whether a room waits for a node's answers."""
        return any(source in hold.sources for hold in self._held)

    def resume(self, *sources: Connection | None) -> None:
        """Hand over what waits at nodes, or at none, and belongs elsewhere; open what may open."""
        for source in sources:
            self._move(self.unrouted.pipeline if source is None else source.pipeline)
        self.release_due()

    def release_due(self) -> None:
        """Let what waits go on where it may."""
        for hold in list(self._held):
            if hold.may_open():
                self._open(hold)
        due = [when for hold in self._held if (when := hold.due) is not None]
        if due and (self._opener is None or self._opener.when() > min(due)):
            self._stop_opener()
            self._opener = self._loop.call_at(min(due), self._release_overdue)

    def requeue(self, holder: Connection | SlotHold, batches: list[Any]) -> None:
        """Give operations to a node, or let them wait in a room."""
        try:
            holder.requeue(batches)
        except ConnectionLost:
            # The node was closed just now. What is in limbo finds another, or ends in time.
            self.unrouted.requeue(batches)
            self._look_again()

    def _move(self, pipeline: Any) -> None:
        """Hand over what waits in a pipeline and belongs elsewhere by now."""
        self._between += pipeline.take_queued(self._target_of)
        if not self._between:
            return
        batches: dict[Any, list[Any]] = {}
        for target, batch in self._between:
            batches.setdefault(target, []).append(batch)
        for target, waiting in batches.items():
            self.requeue(self._holders.get(target, self.unrouted), waiting)
        self._between.clear()  # if anything has failed, they are handed over with the next

    def _limbo_entered(self) -> None:
        if self.unopened:
            self._move(self.unrouted.pipeline)

    def _target_of(self, kind: int, name: str) -> Any:
        """Return where an operation goes; its node may be opened for it."""
        target = self.router.target_of(kind, name)
        if target is self.unrouted.pipeline:
            self._open_for(target.slot_of(kind, name))
            target = self.router.target_of(kind, name)
        return target

    def _open(self, hold: SlotHold) -> None:
        for slot in list(hold.slots):
            if not hold.next_batch(slot):
                hold.slots.discard(slot)
                del self._holds[slot]
                self._route(slot)
        if not hold.slots:
            self._held.discard(hold)
            self._spare_holds.append(hold)
        self._move(hold.pipeline)

    def _release_overdue(self) -> None:
        self._opener = None
        self.release_due()

    def _stop_opener(self) -> None:
        if self._opener is not None:
            self._opener.cancel()
            self._opener = None

    def _take_hold(self) -> SlotHold:
        return self._spare_holds.pop() if self._spare_holds else self._new_hold()

    def _new_hold(self, entered: Callable[[], None] | None = None) -> SlotHold:
        hold = SlotHold(self._shared, self._check_usable, self._address, entered)
        self._holders[hold.pipeline] = hold
        return hold
