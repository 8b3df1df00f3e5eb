"""Timeouts, lost connections and changes of nodes; the same code for both cores.

``refusals.py`` handles error replies. Each function takes a pipeline, compiled or pure, and works
through its public attributes. Encoding commands and reading replies, which are frequent, stay in
each core.

Rules that every function of either module keeps, whatever raises and wherever:

* No operation is lost. An operation leaves a queue or a slot only when it has its outcome or
  waits elsewhere. Steps that may fail come first; then the queue is replaced in one step.
* No operation gets two outcomes. A waiter that is settled again raises InvalidStateError, which
  ``resolve`` and ``reject`` ignore; ``Batch.failed`` and ``Bulk.over`` mark the place reached.
* ``connection_lost``, ``fail_all`` and ``fail_batch`` may be called again after an exception,
  such as a MemoryError, and go on from there.
* While the queue or the slots change, the pipeline is ``busy``. Finalizers and waiters may issue
  operations meanwhile; these join the end of the queue and do not flush.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from . import constants as c
from . import failures
from .failures import ErrorOf
from .outcomes import fail_batch
from .refusals import settle_doubts, waiting_batches
from .suspects import drop_settled_suspects, parts_of, suspects_apart

if TYPE_CHECKING:
    from .batch import Batch
    from .pipeline import Pipeline

_serial_of = attrgetter("serial")

# Kinds that may be sent again when a connection was lost: doing them twice changes nothing, or the
# repeat does nothing where it can't know that.
_REPEATABLE: Final = (c.GET, c.HEAD, c.SET_IF_NEWER, c.DELETE_IF, c.READ_KEY)


def take_queued(
    pipeline: Pipeline, target_of: Callable[[int, str], Any]
) -> list[tuple[Any, Batch]]:
    """Remove the waiting operations that belong to other pipelines now.

    Returns each such batch with its pipeline, in the order of the queue.
    """
    kept: list[Batch] = []
    released: list[tuple[Any, Batch]] = []
    split: list[tuple[Batch, Batch]] = []
    pipeline.open_batches.clear()
    pipeline.busy = True
    try:
        waiting = pipeline.queue.copy()
        for batch in (*waiting, *pipeline.suspects):
            if batch.target is not None:
                released.append((batch.target, batch))
            elif batch.asking and not batch.abandoned():
                kept.append(batch)  # it was sent here, although the slot is another node's
            elif not batch.abandoned():
                _divide(pipeline, batch, target_of, kept, released, split)
        # Once the queue is replaced nothing may fail, or ``released`` is lost: iterators are made
        # before, so that nothing allocates behind it.
        split_rest, gone = iter(split), iter(released)
        _replace_queue(pipeline, kept, len(waiting))
        for batch, rest in split_rest:
            batch.names, batch.entries, batch.records = rest.names, rest.entries, rest.records
        for _target, batch in gone:
            batch.target = None
    finally:
        pipeline.busy = False
    try:
        pipeline.recount()
    except BaseException:
        # The caller gets nothing, so that what was released waits here until the next time.
        requeue(pipeline, [batch for _target, batch in released])
        raise
    return released


def _divide(
    pipeline: Pipeline,
    batch: Batch,
    target_of: Callable[[int, str], Any],
    kept: list[Batch],
    released: list[tuple[Any, Batch]],
    split: list[tuple[Batch, Batch]],
) -> None:
    """Decide where the records of a batch go, without changing the batch yet."""
    batch.freeze()
    # Of each target: its records, and how many of them are repeated.
    parts: dict[Any, tuple[dict[str, Any], int]] = {}
    for i in range(batch.sent, len(batch.names)):
        name = batch.names[i]
        target = target_of(batch.kind, name)
        records, repeated = parts.get(target, ({}, 0))
        records[name] = batch.entries[i]
        parts[target] = records, repeated + (i < batch.repeated)
    if parts.keys() <= {pipeline}:
        kept.append(batch)
        return
    sent = zip(batch.names[: batch.sent], batch.entries[: batch.sent], strict=True)
    rest = batch.part(dict(sent), 0)
    rest.freeze()
    split.append((batch, rest))
    for target, (records, repeated) in parts.items():
        part = batch.part(records, repeated)
        if target is pipeline:
            kept.append(part)
        else:
            released.append((target, part))


def requeue(pipeline: Pipeline, batches: Iterable[Batch]) -> None:
    """Queue batches for ``Pipeline.requeue``, which has called ``wake``."""
    pipeline.open_batches.clear()
    pipeline.busy = True
    try:
        waiting = dict.fromkeys(pipeline.queue.copy())
        size = len(waiting)
        waiting.update(dict.fromkeys(pipeline.suspects))
        for batch in batches:
            if batch.sent == batch.answered and not batch.settled():
                waiting[batch] = None
        _replace_queue(pipeline, list(waiting), size)
    finally:
        pipeline.busy = False
    pipeline.recount()


def _replace_queue(pipeline: Pipeline, batches: list[Batch], known: int) -> None:
    """Let ``batches`` wait, in the order of their age, in place of all suspects and of the
    first ``known`` that wait now. The others came while this was being prepared, and stay.

    If it raises, nothing has changed.
    """
    while True:
        while known < len(pipeline.queue):
            batches.append(pipeline.queue[known])
            known += 1
        queue, suspects = suspects_apart(sorted(batches, key=_serial_of))
        if known == len(pipeline.queue):
            break
    pipeline.queue, pipeline.suspects = queue, suspects
    if suspects:
        pipeline.open_window = 0


def requeue_returned(pipeline: Pipeline) -> None:
    """Queue the batches that must be sent again, each in the place of its age."""
    waiting = list(pipeline.queue)
    batches = [*waiting, *pipeline.suspects, *pipeline.returned]
    _replace_queue(pipeline, list(dict.fromkeys(batches)), len(waiting))
    pipeline.returned.clear()


def expire(pipeline: Pipeline, now: float) -> float | None:
    """Fail every operation whose deadline is past; return the next deadline, or None.

    Both are seconds of ``time.monotonic``.
    """
    pending = pipeline.in_flight
    next_deadline = math.inf
    pipeline.busy = True
    try:
        for batch, _count in pipeline.slots.copy():  # all: a repeat may be behind younger ones
            if batch.abandoned():
                continue
            if batch.deadline > now:
                next_deadline = min(next_deadline, batch.deadline)
            else:
                make = partial(
                    failures.no_answer_in_time, pipeline.address, pipeline.timeout, pending
                )
                fail_batch(pipeline, batch, make)
        drop_late(pipeline, now)
        for batch in pipeline.suspects.copy():
            if batch.deadline <= now:
                _fail_late(pipeline, batch)
            else:
                next_deadline = min(next_deadline, batch.deadline)
        drop_settled_suspects(pipeline)
    finally:
        pipeline.busy = False
        pipeline.recount()
    if pipeline.queue:
        next_deadline = min(next_deadline, pipeline.queue[0].deadline)
    return None if next_deadline == math.inf else next_deadline


def change_timeout(pipeline: Pipeline, seconds: float) -> None:
    """Give operations this much time from now on; those under way get more, too, or lose it.

    Less time never ends an operation at once: it has at least the new time left, or what it had.
    """
    more = seconds - pipeline.timeout
    at_most = math.inf if more > 0 else time.monotonic() + seconds
    in_flight = [batch for batch, _count in pipeline.slots.copy()]
    batches = dict.fromkeys((*in_flight, *pipeline.queue.copy(), *pipeline.suspects))
    pipeline.timeout = seconds
    for batch in batches:
        batch.deadline = min(batch.deadline + max(more, 0.0), at_most)


def drop_late(pipeline: Pipeline, now: float) -> None:
    """Fail batches at the head of the queue whose deadline is past; the caller counts anew."""
    queue = pipeline.queue
    while queue:
        batch = queue[0]
        if not batch.abandoned():
            if batch.deadline > now:
                break
            pipeline.open_batches.clear()
            _fail_late(pipeline, batch)
        queue.popleft()
        pipeline.open_batches.clear()


def _fail_late(pipeline: Pipeline, batch: Batch) -> None:
    """Fail a batch that waits, and whose deadline is past."""
    make = partial(
        failures.never_sent,
        pipeline.address,
        pipeline.timeout,
        pipeline.in_flight,
        pipeline.down,
        batch.redirections,
    )
    doubt = partial(failures.not_sent_again, pipeline.address, pipeline.timeout, pipeline.down)
    if batch.redirections and not pipeline.clustered:
        words = batch.redirections[-1]
        make = partial(failures.refused_in_time, pipeline.address, pipeline.timeout, words)
        if batch.bulk is not None:
            batch.bulk.shared = True  # the records that were not refused have theirs
    fail_batch(pipeline, batch, make, doubt)


def connection_lost(pipeline: Pipeline, reason: Exception, retry: bool) -> None:
    """Settle the slots of a connection that ended.

    With ``retry``, reads and guarded writes wait for the next connection, in their order and
    before newer operations; one that was cut off for the third time fails. Other writes fail, as
    all do without ``retry``; they may or may not have happened. Operations that were not sent yet
    stay queued. After an exception, such as a MemoryError, it may be called again and goes on where
    it was.
    """
    pipeline.busy = True
    try:
        _settle_slots(pipeline, reason, retry)
    finally:
        pipeline.busy = False
    pipeline.recount()
    settle_doubts(pipeline)
    pipeline.end_tick()
    pipeline.reset_reader()


def _settle_slots(pipeline: Pipeline, reason: Exception, retry: bool) -> None:
    pipeline.severed = True  # until all is settled: no reply of this connection counts any more
    kept: dict[Batch, None] = {}
    # Each batch to blame, with the parts that are to wait in its place.
    divided: dict[Batch, list[Batch]] = {}
    again: list[Batch] = []
    is_cut = not isinstance(reason, failures.EndedHere)
    for batch, _count in pipeline.slots.copy():
        if batch.abandoned() or batch in kept:
            continue
        lost = partial(failures.lost, pipeline.address, reason, batch.kind)
        if batch is pipeline.answering and batch.bulk is not None and retry:
            # An exception struck between a record and its count in the bulk. No repeat can tell
            # whether it was counted, so the whole bulk fails.
            batch.bulk.shared = False
            fail_batch(pipeline, batch, lost)
        elif batch.answered >= len(batch.records):
            # Its last reply was read, but a step after that failed.
            if batch.bulk is not None:
                batch.bulk.settle(0)
        elif retry and batch.kind in _REPEATABLE:
            if is_cut and batch.losses + 1 >= c.FATAL_LOSSES:
                fail_batch(
                    pipeline,
                    batch,
                    partial(failures.cut_again, pipeline.address, reason, batch.kind),
                )
                continue
            kept[batch] = None
            again.append(batch)
            if is_cut:
                divided[batch] = parts_of(batch)
        else:
            fail_batch(pipeline, batch, lost)
    pipeline.answering = None
    waiting = pipeline.queue.copy()
    for batch in (*waiting, *pipeline.suspects, *pipeline.returned):
        if not batch.abandoned():
            kept[batch] = None
    batches = [part for batch in kept for part in divided.get(batch) or (batch,)]
    # Once the queue is replaced nothing may fail, or an operation would wait twice: the iterator is
    # made before, so that nothing allocates behind it.
    replaced = iter([batch for batch, parts in divided.items() if parts])
    for batch in again:
        batch.repeated = max(batch.repeated, batch.sent)
    for batch in divided:
        batch.losses += 1
    # After a protocol error, nothing that the connection brought can be trusted.
    pipeline.disconnected(retry)
    _replace_queue(pipeline, batches, len(waiting))
    for batch in replaced:
        batch.expired = True  # its parts have its operations now
    for batch, _count in pipeline.slots:  # no waiting batch has anything in flight now
        if not batch.abandoned():
            batch.sent = batch.answered
    pipeline.drop_slots()


def fail_all(pipeline: Pipeline, error_of: ErrorOf) -> None:
    """Fail every operation that is queued or in flight, with an error of its own each.

    If any was in flight, the next reply ends the connection, because it would be taken for the
    reply to a later operation. After an exception it may be called again.
    """
    doubt = partial(failures.in_doubt, error_of)
    pipeline.end_tick()
    pipeline.severed = pipeline.severed or bool(pipeline.slots)
    pipeline.busy = True
    try:
        in_flight = [batch for batch, _count in pipeline.slots.copy()]
        for batch in (*in_flight, *waiting_batches(pipeline)):
            if not batch.abandoned():
                fail_batch(pipeline, batch, error_of, doubt)
        # Operations that a finalizer issued meanwhile stay.
        while pipeline.queue and pipeline.queue[0].abandoned():
            pipeline.queue.popleft()
        drop_settled_suspects(pipeline)
        pipeline.drop_slots()
        pipeline.doubts.clear()
    finally:
        pipeline.busy = False
    pipeline.recount()
