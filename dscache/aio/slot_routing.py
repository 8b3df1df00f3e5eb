"""Routing of operations on a cluster: each slot to its node, or into a SlotHold.

``masters`` has the known owner of each slot. The router's tables say where operations go: to the
owner, or to a SlotHold while a later operation could overtake an earlier one. Operations on slots
without a known owner wait in ``unrouted``, a SlotHold that is never released.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import _backend
from ..core import constants
from ..core.split_records import SplitRecords
from ..errors import ConnectError, ConnectionLost
from ..net.slot_table import Shard
from .connection import Connection
from .lifecycle import closed
from .slot_hold import SlotHold

if TYPE_CHECKING:
    from ..core.batch import Batch
    from ..core.pipeline import Pipeline
    from ..core.router import Router
    from .cluster import Cluster


class SlotRouter:
    """The Router of a cluster, and the SlotHolds where its operations wait."""

    def __init__(self, cluster: Cluster) -> None:
        options, shared = cluster.options, cluster.shared
        self._cluster = cluster
        self._loop = asyncio.get_running_loop()
        self.unopened: dict[int, Shard] = {}
        """The slots whose node has no connection yet, on clusters too large to connect to all."""
        self.masters: list[Connection | None] = [None] * constants.SLOTS
        """The known owner of each slot."""
        self.readers: Mapping[Connection, list[Connection]] = {}
        self._holders: dict[Pipeline, Connection | SlotHold] = {}
        core = _backend.core
        self._new_pipeline: Callable[[Callable[[], None]], Pipeline] = partial(
            core.Pipeline,
            self._loop.create_future,
            address=options.address,
            refuse_when_full=shared.when_full == "error",
            clustered=True,
            bound=True,
            **shared.for_pipeline(),
        )
        self._apart = SplitRecords(
            core, self._loop.create_future, key_prefix=options.key_prefix, ttl=options.ttl or 0
        )
        self._all_holds: list[SlotHold] = []
        self.unrouted = self._new_hold(self._on_unrouted)
        self.unrouted.pipeline.down = ConnectError("still connecting")
        self.router: Router = core.Router(
            self._loop.create_future,
            self.unrouted.pipeline,
            self._apart,
            key_prefix=options.key_prefix,
            hash_tag=options.hash_tag,
        )
        self._apart.router = self.router
        self._holds: dict[int, SlotHold] = {}
        self._release_timer: asyncio.TimerHandle | None = None
        # Operations taken from one pipeline, each with the pipeline that is to get it.
        self._between: list[tuple[Pipeline, Batch]] = []

    @property
    def is_busy(self) -> bool:
        """Whether any operation waits, or was sent and not answered."""
        return any(one.queued or one.in_flight for one in self._holders)

    def stats(self) -> list[Mapping[str, Any]]:
        of_holds = [hold.pipeline.stats() for hold in self._all_holds]
        return [*of_holds, self._apart.stats(), self.router.stats()]

    def end(self) -> None:
        """Fail every operation that waits, or was sent and not answered; stop the timers."""
        self._stop_release_timer()
        for hold in self._all_holds:
            hold.stop()
        for pipeline in self._holders:
            pipeline.fail_all(closed)

    # -- owners of slots

    def join(self, node: Connection) -> None:
        self._holders[node.pipeline] = node

    def leave(self, node: Connection) -> None:
        """Let a node get no more operations; operations that wait for it go elsewhere."""
        del self._holders[node.pipeline]
        self._move(node.pipeline)

    def hand_slots(self, owners: Mapping[int, Connection | None]) -> None:
        """Change owners of slots, each at once or once its former owner has answered."""
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
        """Read from the nodes that ``readers`` lists for each primary."""
        if readers == self.readers:
            return
        self.readers = readers
        for slot in range(constants.SLOTS):
            if slot not in self._holds:
                self._route(slot)

    def stop_reading(self, slot: int, node: Connection) -> None:
        """Read a slot from other nodes until the next view, if ``node`` is a replica.

        It has redirected reads of the slot.
        """
        if self.readers and node is not self.masters[slot]:
            for candidates in self.readers.values():
                if node in candidates:
                    candidates.remove(node)

    def _route(self, slot: int) -> None:
        """Send operations on a slot to its known owner, and reads to its reader."""
        master = self.masters[slot]
        pipeline = self.unrouted.pipeline if master is None else master.pipeline
        self.router.owners[slot] = pipeline
        if master is not None and (candidates := self.readers.get(master)):
            # The slot decides, so that all reads of one record come from one node and rarely go
            # back in time.
            pipeline = candidates[slot % len(candidates)].pipeline
        self.router.readers[slot] = pipeline

    # -- waiting operations

    def hold(self, slot: int, source: Connection, fresh: set[SlotHold]) -> SlotHold:
        """Return the hold in which operations on a slot wait until ``source`` has answered.

        If ``source`` is a replica, they wait for the writes at the primary as well. ``fresh``
        contains the hold, if any, that slots share which are held at the same moment.
        """
        hold = self._holds.get(slot)
        if hold is None:
            spare = (one for one in self._all_holds if not one.slots and one is not self.unrouted)
            hold = next(iter(fresh), None) or next(spare, None) or self._new_hold()
            fresh.add(hold)
            hold.slots.add(slot)
            self._holds[slot] = hold
            owner = self._holders.get(self.router.owners[slot])
            if isinstance(owner, Connection):
                self._await(owner, hold)
            self.router.owners[slot] = hold.pipeline
            self.router.readers[slot] = hold.pipeline
        self._await(source, hold)
        return hold

    def _await(self, source: Connection, hold: SlotHold) -> None:
        if source not in hold.sources:
            hold.fence(source)
            source.watched = True

    def is_awaited(self, source: Connection) -> bool:
        """Whether a hold waits for a node's answers."""
        return any(source in hold.sources for hold in self._held())

    def resume(self, *sources: Connection | None) -> None:
        """Move the operations that wait at the wrong node (None: unrouted); release due holds."""
        self._move(
            *(self.unrouted.pipeline if source is None else source.pipeline for source in sources)
        )
        self.release_due()

    def release_due(self) -> None:
        for hold in self._held():
            if hold.is_due():
                self._release(hold)
        due = [when for hold in self._held() if (when := hold.due) is not None]
        if due and (self._release_timer is None or self._release_timer.when() > min(due)):
            self._stop_release_timer()
            self._release_timer = self._loop.call_at(min(due), self._release_overdue)

    def requeue(self, holder: Connection | SlotHold, batches: list[Batch]) -> None:
        try:
            holder.requeue(batches)
        except ConnectionLost:
            # The node was closed just now. Unrouted operations get another node, or time out.
            self.unrouted.requeue(batches)
            self._cluster.look_again()

    def _move(self, *pipelines: Pipeline) -> None:
        """Move the operations of these pipelines that belong to another one by now.

        All are taken before any is given: a node that sent its queue meanwhile would send
        operations of another node, and later operations would overtake them there.
        """
        for pipeline in pipelines:
            self._between += pipeline.take_queued(self._target_of)
        if not self._between:
            return
        batches: dict[Pipeline, list[Batch]] = {}
        for target, batch in self._between:
            batches.setdefault(target, []).append(batch)
        for target, waiting in batches.items():
            self.requeue(self._holders.get(target, self.unrouted), waiting)
        self._between.clear()  # after a failure above, the next call moves them

    def check_timers(self) -> None:
        """Set the timers again that an exception has lost."""
        for hold in self._all_holds:
            hold.check_timers()
        timer = self._release_timer
        if timer is not None and timer.when() < self._loop.time():
            self._release_overdue()

    def _on_unrouted(self) -> None:
        if self.unopened:
            self._move(self.unrouted.pipeline)

    def _target_of(self, kind: int, name: str) -> Pipeline:
        """Return the pipeline for an operation; this may connect to its node."""
        target = self.router.target_of(kind, name)
        if target is self.unrouted.pipeline:
            self._cluster.open_for(target.slot_of(kind, name))
            target = self.router.target_of(kind, name)
        return target

    def _release(self, hold: SlotHold) -> None:
        for slot in list(hold.slots):
            if not hold.next_batch(slot):
                hold.slots.discard(slot)
                del self._holds[slot]
                self._route(slot)
        self._move(hold.pipeline)

    def _release_overdue(self) -> None:
        self._release_timer = None
        self.release_due()

    def _stop_release_timer(self) -> None:
        if self._release_timer is not None:
            self._release_timer.cancel()
            self._release_timer = None

    def _held(self) -> list[SlotHold]:
        return [hold for hold in self._all_holds if hold.slots]

    def _new_hold(self, entered: Callable[[], None] | None = None) -> SlotHold:
        hold = SlotHold(self._new_pipeline, self._cluster.check_usable, entered)
        self._all_holds.append(hold)
        self._holders[hold.pipeline] = hold
        return hold
