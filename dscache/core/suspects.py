"""Suspects: operations at which the server cuts the connection, and which are sent alone.

``pipeline.py`` gives the theory. Both cores use this module.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import constants as c
from .refusals import settle_doubts
from .waiters import DISCARDED

if TYPE_CHECKING:
    from .batch import Batch
    from .pipeline import Pipeline


def parts_of(batch: Batch) -> list[Batch]:
    """Return the batches to wait in place of one that was cut off; nothing for the batch itself.

    At its second loss, each single operation that was under way before becomes a suspect of its
    own, and the others one batch together. A bulk is one operation.
    """
    if batch.losses + 1 != c.SUSPECT_LOSSES or batch.bulk is not None or len(batch.names) == 1:
        return []
    parts: list[Batch] = []
    end = len(batch.names)
    until = min(batch.repeated, batch.sent)
    for i in range(batch.answered, until):
        if batch.entries[i] is not DISCARDED:
            parts.append(batch.part({batch.names[i]: batch.entries[i]}, 1))
            parts[-1].losses = c.SUSPECT_LOSSES
    start = max(batch.answered, until)
    if start < end:
        records = dict(zip(batch.names[start:end], batch.entries[start:end], strict=True))
        parts.append(batch.part(records, max(batch.repeated, batch.sent) - start))
        parts[-1].losses = 1
    return parts


def suspects_apart(batches: Iterable[Batch]) -> tuple[deque[Batch], list[Batch]]:
    """Return batches, which are in the order of their age, as the queue and the suspects.

    Suspects wait outside the queue, except behind an older operation on a record of theirs, which
    they must not overtake.
    """
    queue: deque[Batch] = deque()
    suspects: list[Batch] = []
    for batch in batches:
        if batch.losses < c.SUSPECT_LOSSES or any(_keep_order(one, batch) for one in queue):
            queue.append(batch)
        else:
            suspects.append(batch)
    return queue, suspects


def _keep_order(one: Batch, other: Batch) -> bool:
    """Return whether two batches have a record in common, and aren't both reads."""
    are_reads = one.kind <= c.HEAD and other.kind <= c.HEAD
    return not are_reads and not one.records.keys().isdisjoint(other.records)


def is_restricted(pipeline: Pipeline) -> bool:
    """Return whether a suspect waits or is under way, or output waits for refusals."""
    is_held = pipeline.settled < pipeline.script_fence
    return is_held or bool(pipeline.suspects) or _is_trial(pipeline)


def _is_trial(pipeline: Pipeline) -> bool:
    """Return whether a suspect is under way, or the next to be."""
    queue = pipeline.queue
    return bool(queue and queue[0].losses >= c.SUSPECT_LOSSES) or any(
        batch.losses >= c.SUSPECT_LOSSES for batch, _count in pipeline.slots
    )


def restricted_window(pipeline: Pipeline) -> int:
    """Return how many records may be in flight now; 1 for a suspect, which goes alone.

    If it is time for a suspect, it is put at the head of the queue. Until the refusals of a lost
    script are all there, it returns 0.
    """
    if pipeline.settled < pipeline.script_fence:
        return 0
    if pipeline.script_fence:
        settle_doubts(pipeline)
        pipeline.script_fence = 0  # behind it: it may raise, and is then called again
    if _is_trial(pipeline):
        return 1
    drop_settled_suspects(pipeline)
    due = _due_suspect(pipeline)
    if due is None:
        return pipeline.window
    pipeline.queue.appendleft(due)
    pipeline.suspects.remove(due)  # behind it: an exception between them must not lose it
    return 1


def drop_settled_suspects(pipeline: Pipeline) -> None:
    """Drop suspects that have their outcome, or were sent."""
    suspects = [one for one in pipeline.suspects if one.sent == one.answered and not one.settled()]
    if len(suspects) < len(pipeline.suspects):
        pipeline.suspects[:] = suspects
        pipeline.recount()


def _due_suspect(pipeline: Pipeline) -> Batch | None:
    """Return the suspect to be sent now, or None."""
    suspects = pipeline.suspects
    if not suspects:
        return None
    first = suspects[0]
    if not pipeline.queue and not pipeline.in_flight:
        return first
    if first.deadline - time.monotonic() <= pipeline.timeout / 2:
        return first
    # A copy: a finalizer may issue an operation, which joins the queue.
    if any(_keep_order(suspect, batch) for batch in pipeline.queue.copy() for suspect in suspects):
        # Not just that suspect: it must not overtake an older one of another of its names.
        return first
    return None
