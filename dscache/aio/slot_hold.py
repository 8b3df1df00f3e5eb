"""Holds back operations on slots that are changing owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .._forks import after_fork_in_child
from ..core.failures import ErrorOf
from .deadlines import Deadlines

if TYPE_CHECKING:
    from ..core.batch import Batch
    from ..core.pipeline import Pipeline
    from .connection import Connection

# How often to check whether asked operations have timed out, in seconds: no event reports it.
_CHECK_ASKED = 0.05


class SlotHold:
    """Operations on some slots of a cluster, held until it is certain which node serves them.

    Redirected operations wait here, together with all later operations on the same slots. They wait
    until the node that redirected them has answered all commands that were in flight when the hold
    began (``fence``), since it may redirect more of them. Then all operations go on, oldest first,
    so that no later operation overtakes an earlier one.

    The hold's pipeline has no connection, and enforces deadlines. ``new_pipeline`` makes it from
    its ``wake``. ``entered`` is called after each tick in which operations came.

    Operations that are to ask another node (ASK) go in rounds. That node may refuse one operation,
    because its key is still on its way, and serve the next one. So the slot stays held until the
    asked operations are settled, and no two of them are on the same record.
    """

    def __init__(
        self,
        new_pipeline: Callable[[Callable[[], None]], Pipeline],
        check_usable: Callable[[], None],
        entered: Callable[[], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._check_usable = check_usable
        self._entered = entered
        self._adopting = False
        self._refusal: ErrorOf | None = None
        self._fences: dict[Connection, int] = {}
        self._redirected: dict[int, dict[Batch, Connection | None]] = {}
        self._asked: list[tuple[Batch, Connection]] = []
        self.slots: set[int] = set()
        self.not_before = 0.0
        self.pipeline = new_pipeline(self._wake)
        self._deadlines = Deadlines(self.pipeline.expire)
        # Otherwise an operation of the child could join a batch of the parent's unfinished tick.
        after_fork_in_child(self, lambda hold: hold.pipeline.end_tick())

    @property
    def sources(self) -> list[Connection]:
        return [*self._fences, *(target for _, target in self._asked)]

    @property
    def due(self) -> float | None:
        """Return when to check ``is_due`` (loop time), or None if a node's answer is awaited."""
        if self._fences:
            return None
        return self._loop.time() + _CHECK_ASKED if self._asked else self.not_before

    def fence(self, source: Connection) -> None:
        """Hold until ``source`` has answered all commands in flight now."""
        self._fences[source] = source.pipeline.fence()

    def wait(self, seconds: float) -> None:
        self.not_before = max(self.not_before, self._loop.time() + seconds)

    def is_due(self) -> bool:
        """Return whether the operations held here may go on."""
        for source, end in list(self._fences.items()):
            if source.pipeline.settled >= end:
                del self._fences[source]
        self._asked = [one for one in self._asked if not one[0].settled()]
        return not self._fences and not self._asked and self._loop.time() >= self.not_before

    def note(self, slot: int, batch: Batch, target: Connection | None) -> None:
        """Note a redirected batch on ``slot``, and the node that it is to ask, if any."""
        self._redirected.setdefault(slot, {})[batch] = target

    def next_batch(self, slot: int) -> bool:
        """Send the next operations on ``slot`` to the nodes that they are to ask.

        Returns False if there are none: then all operations held are for the slot's owner.
        """
        redirected = self._redirected.get(slot, {})
        waiting = [one for one in redirected.items() if not one[0].settled()]
        waiting.sort(key=lambda one: one[0].serial)
        names: set[str] = set()
        later = {}
        asked = []
        for batch, target in waiting:
            if target is not None and names.isdisjoint(batch.records):
                asked.append((batch, target))
            else:
                later[batch] = target
            names.update(batch.records)
        if not asked:
            self._redirected.pop(slot, None)
            return False
        self._redirected[slot] = later
        self._asked += asked
        for batch, target in asked:
            batch.ask(target.pipeline)
            target.watched = True
        return True

    def requeue(self, batches: Iterable[Batch]) -> None:
        """Take over batches taken from another pipeline, even while the cache is closing."""
        self._adopting = True
        try:
            self.pipeline.requeue(batches)
        finally:
            self._adopting = False
        self._deadlines.look()

    def refuse(self, error_of: ErrorOf | None) -> None:
        """Fail all operations held, and later ones at once; None ends that."""
        self._refusal = error_of
        if error_of is not None:
            self.pipeline.fail_all(error_of)

    def stop(self) -> None:
        """Stop the timer of the deadlines."""
        self._deadlines.stop()

    def check_timers(self) -> None:
        """Set the timer of the deadlines again if an exception has lost it."""
        self._deadlines.restart_if_lost()
        if self.pipeline.operations:
            self._deadlines.ensure(0)

    def _wake(self) -> None:
        if not self._adopting:
            self._check_usable()
        # An operation that joins this tick's batch needs no check; the next tick's does.
        self._loop.call_soon(self._end_tick)
        self._deadlines.restart_if_lost()
        self._deadlines.ensure(0)

    def _end_tick(self) -> None:
        self.pipeline.end_tick()
        if self._refusal is not None:
            self.pipeline.fail_all(self._refusal)
        elif self._entered is not None:
            self._entered()
