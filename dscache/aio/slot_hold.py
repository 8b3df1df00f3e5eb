"""Where operations wait that no node may have yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .. import _backend
from .._forks import after_fork_in_child
from ..config import Options
from ..core.constants import ErrorOf
from ..errors import ConnectionLost
from .deadlines import Deadlines

# How soon, in seconds, to look whether what is asked elsewhere has ended by its deadline, which
# nobody tells.
_LOOK_AGAIN = 0.05


class AwaitedNode(Protocol):
    """A node from whose commands in flight a room keeps its distance."""

    pipeline: Any
    watched: bool


class SlotHold:
    """Operations on some slots of a cluster, which wait until it is certain who serves them.

    What a node has redirected waits here, with everything that is issued on the same slots since,
    until the node has answered all that was in flight when the room was entered (``fence``): of
    that, more may be redirected. Then all of it goes on, oldest first, and nothing has overtaken
    anything. The pipeline is one without a connection: it enforces deadlines. ``entered`` is called
    after each tick in which something came.

    What is to ask another node goes in turns. That node may refuse an operation, because a key is
    still on its way, and serve the next one; so the slot stays shut until those asked are settled,
    and no two of them are on the same record.
    """

    def __init__(
        self,
        options: Options,
        check_usable: Callable[[], None],
        address: str,
        entered: Callable[[], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._check_usable = check_usable
        self._entered = entered
        self._adopting = False
        self._refusal: ErrorOf | None = None
        self._fences: dict[AwaitedNode, int] = {}
        self._redirected: dict[int, dict[Any, AwaitedNode | None]] = {}
        self._asked: list[tuple[Any, AwaitedNode]] = []
        self.slots: set[int] = set()
        self.not_before = 0.0
        self.pipeline = _backend.core.Pipeline(
            self._loop.create_future,
            self._wake,
            address=address,
            refuse_when_full=options.when_full == "error",
            clustered=True,
            bound=True,
            **options.for_pipeline(),
        )
        self._deadlines = Deadlines(self.pipeline.expire)
        # Else an operation of a child could join one of its parent's unfinished tick.
        after_fork_in_child(self, lambda hold: hold.pipeline.end_tick())

    @property
    def sources(self) -> list[AwaitedNode]:
        """Return the nodes whose answers it waits for."""
        return [*self._fences, *(target for _, target in self._asked)]

    @property
    def due(self) -> float | None:
        """Return when to look whether it may open, or None if a node's answer will tell."""
        if self._fences:
            return None
        return self._loop.time() + _LOOK_AGAIN if self._asked else self.not_before

    def fence(self, source: AwaitedNode) -> None:
        """Stay shut until ``source`` has answered what is in flight now."""
        self._fences[source] = source.pipeline.fence()

    def wait(self, seconds: float) -> None:
        """Stay shut for so long."""
        self.not_before = max(self.not_before, self._loop.time() + seconds)

    def may_open(self) -> bool:
        """Return whether what waits here may go on."""
        for source, end in list(self._fences.items()):
            if source.pipeline.settled >= end:
                del self._fences[source]
        self._asked = [one for one in self._asked if not one[0].settled()]
        return not self._fences and not self._asked and self._loop.time() >= self.not_before

    def note(self, slot: int, batch: Any, target: AwaitedNode | None) -> None:
        """Note that a batch on ``slot`` was redirected, and which node it is to ask, if any."""
        self._redirected.setdefault(slot, {})[batch] = target

    def next_batch(self, slot: int) -> bool:
        """Let operations on ``slot`` go to the nodes that they are to ask.

        Returns False if there are none: then all that waits is for the node which serves the slot.
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

    def requeue(self, batches: Iterable[Any]) -> None:
        """Take over what another pipeline gave away, even while the cache is closing."""
        self._adopting = True
        try:
            self.pipeline.requeue(batches)
        finally:
            self._adopting = False
        self._deadlines.look()

    def refuse(self, error_of: ErrorOf | None) -> None:
        """Fail what waits here, and at once what will come; None ends that."""
        self._refusal = error_of
        if error_of is not None:
            self.pipeline.fail_all(error_of)

    def fail(self, reason: str) -> None:
        """Fail everything that waits here."""
        self._deadlines.stop()
        self.pipeline.fail_all(lambda operation: ConnectionLost(f"{operation}: {reason}"))

    def _wake(self) -> None:
        if not self._adopting:
            self._check_usable()
        # What joins an operation of this tick must be checked no more, that of the next again.
        self._loop.call_soon(self._end_tick)
        self._deadlines.ensure(0)

    def _end_tick(self) -> None:
        self.pipeline.end_tick()
        if self._refusal is not None:
            self.pipeline.fail_all(self._refusal)
        elif self._entered is not None:
            self._entered()
