"""Retries, redirections, timeouts and lost connections: the cold half of both cores.

Each function takes a pipeline, compiled or pure, and works through its public attributes. The
hot half, which encodes commands and reads replies, stays in each core.

Rules that every function keeps, whatever raises and wherever:

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
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..errors import ReplyError
from . import constants as c
from . import failures
from .failures import ErrorOf
from .waiters import DISCARDED, SupersededWrite, reject, resolve, with_waiter

if TYPE_CHECKING:
    from .batch import Batch, Bulk
    from .pipeline import Pipeline

# Kinds that may be sent again when a connection was lost: doing them twice changes nothing, or the
# repeat does nothing where it can't know that.
_REPEATABLE: Final = (c.GET, c.HEAD, c.SET_IF_NEWER, c.DELETE_IF, c.READ_KEY)

# Of each name, its first later write: the batch, the place in it, and whether a read is between.
_Later = dict[str, tuple["Batch", int, bool]]


# -- operations that change nodes


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
        pipeline.replace_queue(kept, len(waiting))
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
        pipeline.replace_queue(list(waiting), size)
    finally:
        pipeline.busy = False
    pipeline.recount()


def requeue_returned(pipeline: Pipeline) -> None:
    """Queue the batches that must be sent again, each in the place of its age."""
    waiting = list(pipeline.queue)
    batches = [*waiting, *pipeline.suspects, *pipeline.returned]
    pipeline.replace_queue(list(dict.fromkeys(batches)), len(waiting))
    pipeline.returned.clear()


# -- time and failure


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
        _drop_settled_suspects(pipeline)
    finally:
        pipeline.busy = False
        pipeline.recount()
    if pipeline.queue:
        next_deadline = min(next_deadline, pipeline.queue[0].deadline)
    return None if next_deadline == math.inf else next_deadline


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
                divided[batch] = _parts_of(batch)
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
    pipeline.replace_queue(batches, len(waiting))
    for batch in replaced:
        batch.expired = True  # its parts have its operations now
    for batch, _count in pipeline.slots:  # no waiting batch has anything in flight now
        if not batch.abandoned():
            batch.sent = batch.answered
    pipeline.drop_slots()


# -- suspects


def _parts_of(batch: Batch) -> list[Batch]:
    """Return what is to wait in place of a batch that was cut off; nothing for the batch itself.

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


def is_suspicious(pipeline: Pipeline) -> bool:
    """Return whether a suspect waits or is under way."""
    return bool(pipeline.suspects) or _is_trial(pipeline)


def _is_trial(pipeline: Pipeline) -> bool:
    """Return whether a suspect is under way, or the next to be."""
    queue = pipeline.queue
    return bool(queue and queue[0].losses >= c.SUSPECT_LOSSES) or any(
        batch.losses >= c.SUSPECT_LOSSES for batch, _count in pipeline.slots
    )


def window_beside_suspects(pipeline: Pipeline) -> int:
    """Return how many records may be in flight now; 1 for a suspect, which goes alone.

    If it is time for a suspect, it is put at the head of the queue.
    """
    if _is_trial(pipeline):
        return 1
    _drop_settled_suspects(pipeline)
    due = _due_suspect(pipeline)
    if due is None:
        return pipeline.window
    pipeline.queue.appendleft(due)
    pipeline.suspects.remove(due)  # behind it: an exception between them must not lose it
    return 1


def _drop_settled_suspects(pipeline: Pipeline) -> None:
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
    if any(_keep_order(suspect, batch) for batch in pipeline.queue for suspect in suspects):
        # Not just that suspect: it must not overtake an older one of another of its names.
        return first
    return None


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
        for batch in (*in_flight, *_waiting(pipeline)):
            if not batch.abandoned():
                fail_batch(pipeline, batch, error_of, doubt)
        # Operations that a finalizer issued meanwhile stay.
        while pipeline.queue and pipeline.queue[0].abandoned():
            pipeline.queue.popleft()
        _drop_settled_suspects(pipeline)
        pipeline.drop_slots()
        pipeline.doubts.clear()
    finally:
        pipeline.busy = False
    pipeline.recount()


def fail_batch(
    pipeline: Pipeline, batch: Batch, error_of: ErrorOf, error_of_doubt: ErrorOf | None = None
) -> None:
    """Give an error to every operation of a batch that has no outcome yet.

    ``error_of_doubt`` makes the error of a write that was sent and so may have happened. After
    an exception it may be called again, and goes on with the record that it had come to.
    """
    batch.freeze()
    doubtful = 0
    if error_of_doubt is not None and c.is_write(batch.kind):
        doubtful = max(batch.sent, batch.repeated)
    bulk = batch.bulk
    if bulk is not None and not bulk.shared:
        make = error_of
        if error_of_doubt is not None and (
            doubtful or (batch.kind >= c.SET and bulk.remaining < bulk.total)
        ):
            make = error_of_doubt
        reject(bulk.waiter, partial(make, bulk.operation))
        bulk.over = True
        pipeline.failed += bulk.remaining
        batch.expired = True
        return
    batch.failed = max(batch.failed, batch.answered)
    while batch.failed < len(batch.names):
        name = batch.names[batch.failed]
        entry = batch.entries[batch.failed]
        if entry is DISCARDED:
            batch.failed += 1
            continue
        make = error_of
        if error_of_doubt is not None and batch.failed < doubtful:
            make = error_of_doubt
        give_error(pipeline, batch, name, entry, partial(make, failures.describe(batch.kind, name)))
        if bulk is None:
            batch.failed += 1
        else:  # both or none, whatever fails
            batch.failed, bulk.remaining = batch.failed + 1, bulk.remaining - 1
    batch.expired = True
    if bulk is not None:
        bulk.settle(0)


def give_error(
    pipeline: Pipeline, batch: Batch, name: str, entry: Any, make: Callable[[], Exception]
) -> None:
    """Give the error of one record to its waiters, or add it to the errors of its bulk."""
    pipeline.failed += batch.kind < c.COMMAND
    if batch.bulk is None:
        reject(entry.waiter if c.has_text(batch.kind) else entry, make)
        return
    batch.bulk.errors[name] = make()
    if batch.kind == c.GET:
        batch.bulk.missing.append(name)


# -- bulks


def finish(bulk: Bulk) -> None:
    """Settle the waiter of a bulk, all of whose records have an outcome."""
    for name in bulk.missing:
        bulk.result.pop(name, None)
    if bulk.errors:
        error = failures.bulk_failure(bulk.operation, bulk.errors, bulk.total, bulk.result)
        reject(bulk.waiter, lambda: error)
    else:
        resolve(bulk.waiter, bulk.result)
    bulk.over = True


def take(bulk: Bulk, kind: int, name: str, result: Any) -> None:
    """Add the result of one record, as its single operation would return it."""
    if kind == c.DELETE:
        bulk.result += result
    elif kind == c.GET and result is None:
        bulk.missing.append(name)
    elif kind <= c.HEAD and result is not None:
        bulk.result[name] = result
    bulk.settle(1)


def take_error(bulk: Bulk, kind: int, name: str, error: Exception) -> None:
    """Add the error of one record."""
    bulk.errors[name] = error
    if kind == c.GET:
        bulk.missing.append(name)
    bulk.settle(1)


# -- servers behind a proxy


def prepare_single_writes(pipeline: Pipeline, batch: Batch) -> None:
    """Let each write command hold one record, for a proxy that hides several servers.

    A proxy sends a script to the server of its first key. So the records of one script must lie on
    one server, which is certain only for one record whose two keys share a hash tag. Writes by
    script of other records fail. The caller counts on a frozen batch at the head of the queue.
    """
    if batch.one_per_command:
        return
    fails = False
    if batch.kind != c.SET:  # a proxy splits MSET
        for i in range(len(batch.names) - 1, batch.sent - 1, -1):
            name, entry = batch.names[i], batch.entries[i]
            if pipeline.slot_of(batch.kind, name) >= 0:
                continue
            fails = True
            # First, so that an exception loses no operation: a second outcome has no effect.
            give_error(pipeline, batch, name, entry, partial(failures.keys_apart, name))
            del batch.names[i], batch.entries[i], batch.records[name]
            batch.repeated -= i < batch.repeated
            if batch.bulk is not None:
                batch.bulk.settle(1)
    batch.one_per_command = True
    if fails:
        pipeline.recount()


# -- refusals


def refused(pipeline: Pipeline, batch: Batch, count: int, error: ReplyError) -> None:
    """Give an error reply to the records it belongs to, or send them once more.

    An error reply to a whole command means that Redis did nothing of it.
    """
    if pipeline.clustered and error.code in c.REDIRECTIONS and batch.kind != c.COMMAND:
        _redirected(pipeline, batch, count, error)
        return
    put_off = _puts_off(pipeline, batch, error)
    by_script = batch.kind in (c.SET_TTL, c.SET_IF_NEWER, c.DELETE_IF)
    lost_script = error.code == "NOSCRIPT" and by_script and not batch.whole_script
    across = failures.is_across_slots(error.message) and not pipeline.clustered
    mixed = count > 1 and (error.code == "NOPERM" or across)
    if mixed and across and batch.kind <= c.DELETE_IF:
        pipeline.single_writes = True
        pipeline.single_reads = pipeline.single_reads or batch.kind == c.GET
    is_overtaken = lost_script or mixed or (put_off and c.SET <= batch.kind <= c.DELETE)
    later = _written_after(pipeline, batch, mixed or put_off) if is_overtaken else {}
    again: dict[str, Any] = {}
    doubts: list[tuple[str, int, str]] = []
    if put_off and batch.kind == c.PUBLISH:
        doubts = _published_after(pipeline, batch)
    settled = count
    repeated = 0
    for i in range(batch.answered, batch.answered + count):
        name = batch.names[i]
        entry = batch.entries[i]
        if entry is DISCARDED:
            settled -= 1
        elif (lost_script or mixed or put_off) and name not in later:
            again[name] = entry
            repeated += i < batch.repeated
        else:
            make = refusal_at(pipeline, error, batch, i)
            if across and by_script and pipeline.slot_of(batch.kind, name) < 0:
                make = partial(failures.keys_apart, name)
            if name in later and _attach_to_newer_write(batch, entry, *later[name], make):
                if put_off:
                    doubt = (None, batch.serial, name, later[name][0].serial, name)
                    pipeline.doubts.append(doubt)
                continue
            if put_off:
                again[name] = entry
                repeated += i < batch.repeated
                doubts.append((name, later[name][0].serial, name))
            else:
                give_error(pipeline, batch, name, entry, make)
    if again:
        _send_again(pipeline, batch, again, repeated, lost_script, mixed)
        if put_off:
            repeat = pipeline.returned[-1]
            repeat.redirections = (error.message,)
            pipeline.doubts += [(repeat, batch.serial, *doubt) for doubt in doubts]
        if c.SET <= batch.kind <= c.DELETE:
            _read_again(pipeline, batch, again)
    batch.answered += count
    if batch.bulk is not None:
        batch.bulk.settle(settled - len(again))


def _puts_off(pipeline: Pipeline, batch: Batch, error: ReplyError) -> bool:
    """Return whether a refused command is sent again later, and note that the server is away.

    The owner of the socket sees ``away`` and stops sending for a while, or leaves the server.
    """
    if pipeline.clustered or batch.kind == c.COMMAND:
        return False
    code = failures.code_of(error)
    if code in c.LEFT_FOR or (code in c.PASSING and pipeline.away not in c.LEFT_FOR):
        pipeline.away = code
        return pipeline.reconnects or code != "READONLY"
    if code == "NOREPLICAS" and not pipeline.away:
        pipeline.away = code
    return False


def _published_after(pipeline: Pipeline, batch: Batch) -> list[tuple[str, int, str]]:
    """Return the message that was refused, with the next one of its topic that is under way."""
    refused = batch.names[batch.answered]
    topic = refused[: refused.index("}") + 1]
    for later in _batches_in_flight(pipeline):
        if later.kind != c.PUBLISH or later.serial < batch.serial or later.abandoned():
            continue
        for i in range(later.answered + (later is batch), later.sent):
            if later.names[i].startswith(topic):
                return [(refused, later.serial, later.names[i])]
    return []


def settle_doubts(pipeline: Pipeline) -> None:
    """Fail the operations put off that a later one of their name has overtaken.

    When all commands under way have their replies, each later one was done, or was put off too
    and comes behind the earlier one. A repeat of an overtaken write would undo the later one.
    """
    if not pipeline.doubts:
        return
    waiting = {
        (batch.serial, name)
        for batch in _waiting(pipeline)
        if not batch.abandoned()
        for name in (batch.names or batch.records)
    }
    pipeline.busy = True
    try:
        # The last ones first: what fails has been overtaken, and lets none pass either.
        while pipeline.doubts:
            batch, serial, name, later_serial, later = pipeline.doubts[-1]
            if (later_serial, later) in waiting:
                waiting.add((serial, name))  # also if it was attached to the later one
            elif batch is not None and not batch.abandoned():
                waiting.discard((serial, name))
                _drop(pipeline, batch, name)
            pipeline.doubts.pop()
    finally:
        pipeline.busy = False
    pipeline.recount()


def _drop(pipeline: Pipeline, batch: Batch, name: str) -> None:
    """Fail one record of a batch that was put off, which was not sent since."""
    batch.freeze()
    i = batch.names.index(name)
    entry = batch.entries[i]
    if entry is DISCARDED:
        return
    error = ReplyError(batch.redirections[-1])
    give_error(pipeline, batch, name, entry, refusal_at(pipeline, error, batch, i))
    batch.records = {one: batch.entries[at] for at, one in enumerate(batch.names) if at != i}
    batch.names, batch.entries = list(batch.records), list(batch.records.values())
    batch.repeated -= i < batch.repeated
    if batch.bulk is not None:
        batch.bulk.settle(1)


def refusal(pipeline: Pipeline, error: ReplyError, kind: int, name: str) -> Callable[[], Exception]:
    """Return a function that makes the error of one record from an error reply."""
    context = f"{failures.describe(kind, name)} at {pipeline.address}"
    return lambda: ReplyError(error.message, context=context)


def refusal_at(
    pipeline: Pipeline, error: ReplyError, batch: Batch, i: int
) -> Callable[[], Exception]:
    """Return a function that makes the error of the record at ``i`` from an error reply."""
    return _in_doubt_at(batch, i, refusal(pipeline, error, batch.kind, batch.names[i]))


def _in_doubt_at(batch: Batch, i: int, make: Callable[[], Exception]) -> Callable[[], Exception]:
    """Return a function that makes the error of a refused record, in doubt if that is a repeat.

    The first attempt of a repeat with ``if_version`` may have been done. With ``if_newer`` the
    caller can repeat it without harm, and gets the refusal itself.
    """
    if i >= batch.repeated or not _is_conditional(batch.kind, batch.entries[i]):
        return make
    operation = failures.describe(batch.kind, batch.names[i])
    return partial(failures.in_doubt, lambda _operation: make(), operation)


def _is_if_newer(kind: int, entry: Any) -> bool:
    """Return whether an operation is a write with ``if_newer``."""
    return kind == c.SET_IF_NEWER and bool(entry.guard == c.GUARDED)


def _is_conditional(kind: int, entry: Any) -> bool:
    """Return whether an operation has an ``if_version``."""
    return c.SET_IF_NEWER <= kind <= c.DELETE_IF and bool(entry.guard != c.GUARDED)


def _redirected(pipeline: Pipeline, batch: Batch, count: int, error: ReplyError) -> None:
    """Give away the records of a command that another node, or a later moment, is right for.

    Commands in flight behind it may write the same names. Either they are redirected as well and
    follow in their order; or they were done, if the node changed its view meanwhile, and this
    write must not undo them: a plain write is attached to the newer one, or fails where that
    would report a wrong outcome. A write with ``if_newer`` undoes nothing.
    """
    later = _written_after(pipeline, batch, True) if c.SET <= batch.kind <= c.DELETE else {}
    redirections = (*batch.redirections, f"{pipeline.address}: {error.message}")
    limit = pipeline.max_redirections
    again: dict[str, Any] = {}
    failed = repeated = 0
    for i in range(batch.answered, batch.answered + count):
        name = batch.names[i]
        entry = batch.entries[i]
        if entry is DISCARDED:
            continue
        make = refusal_at(pipeline, error, batch, i)
        if len(redirections) > limit:
            context = f"{failures.describe(batch.kind, name)} at {pipeline.address}"
            make = partial(
                failures.too_many_redirections, error.message, redirections, limit, context
            )
            make = _in_doubt_at(batch, i, make)
            give_error(pipeline, batch, name, entry, make)
            failed += 1
        elif name not in later or _is_if_newer(batch.kind, entry):
            again[name] = entry
            repeated += i < batch.repeated
        elif later[name][0].kind != c.SET_IF_NEWER and _attach_to_newer_write(
            batch, entry, *later[name], make
        ):
            continue
        elif error.code in c.FLEETING:
            give_error(pipeline, batch, name, entry, make)
            failed += 1
        else:
            again[name] = entry
            repeated += i < batch.repeated
    if again:
        part = batch.part(again, repeated)
        part.redirections = redirections
        part.asking = False
        # A batch whose keys are being migrated must not hold up others of its slot again.
        part.one_per_command = batch.one_per_command or error.code == "TRYAGAIN"
        slot = pipeline.slot_of(batch.kind, next(iter(again)))
        pipeline.redirected.append((error.message, slot, part))
    batch.answered += count
    if batch.bulk is not None:
        batch.bulk.settle(failed)


def _send_again(
    pipeline: Pipeline,
    batch: Batch,
    again: dict[str, Any],
    repeated: int,
    lost_script: bool,
    one_per_command: bool,
) -> None:
    """Queue records of a batch once more, in the place of the batch."""
    repeat = batch.part(again, repeated)
    repeat.whole_script = lost_script or batch.whole_script
    repeat.one_per_command = one_per_command or batch.one_per_command
    repeat.counted = batch.bulk is not None
    size = repeat.text_size()
    pipeline.returned.append(repeat)
    pipeline.queued += len(again)
    pipeline.operations += 1 if repeat.counted else len(again)
    pipeline.pending_bytes += size


def _waiting(pipeline: Pipeline) -> tuple[Batch, ...]:
    """Return the batches that wait: in the queue, as suspects, or to be queued again."""
    return (*pipeline.queue, *pipeline.suspects, *pipeline.returned)


def _batches_in_flight(pipeline: Pipeline) -> dict[Batch, None]:
    return dict.fromkeys(batch for batch, _count in pipeline.slots.copy())


def _read_again(pipeline: Pipeline, batch: Batch, names: Mapping[str, Any]) -> None:
    """Repeat reads in flight behind a repeated write, so that they see it."""
    for later in _batches_in_flight(pipeline):
        if later.serial <= batch.serial or later.kind > c.HEAD or later.abandoned():
            continue
        again: dict[str, Any] = {}
        for i in range(later.answered, later.sent):
            if later.names[i] in names and later.entries[i] is not DISCARDED:
                again[later.names[i]] = later.entries[i]
        if again:
            _send_again(pipeline, later, again, 0, False, False)
        for i in range(later.answered, later.sent):
            if later.names[i] in again:
                later.entries[i] = DISCARDED


def _written_after(pipeline: Pipeline, batch: Batch, mixed: bool) -> _Later:
    """Return, for each name, its first later write in flight that a repeat could undo or see.

    If a script is lost, later writes by script are refused too and come back in their order,
    unless a repeat has brought the script before them. A repeat with ``if_newer`` can't
    undo another such write, but a read between them would see the wrong one.
    """
    found: _Later = {}
    read: set[str] = set()
    loaded = mixed
    for later in _batches_in_flight(pipeline):
        newer = batch.serial < later.serial and later.kind < c.COMMAND
        guarded = later.kind in (c.SET_IF_NEWER, c.DELETE_IF)
        by_script = guarded or (later.kind == c.SET_TTL and not pipeline.has_msetex)
        if newer and later.kind <= c.HEAD:
            for i in range(later.answered, later.sent):
                if later.entries[i] is not DISCARDED:
                    read.add(later.names[i])
        elif newer and (loaded or not by_script):
            for i in range(later.answered, later.sent):
                name = later.names[i]
                harmless = (
                    name in batch.records
                    and _is_if_newer(later.kind, later.entries[i])
                    and _is_if_newer(batch.kind, batch.records[name])
                )
                if name in read or not harmless:
                    found.setdefault(name, (later, i, name in read))
        loaded = loaded or later.whole_script
    return found


def _attach_to_newer_write(
    batch: Batch, entry: Any, later: Batch, i: int, read: bool, make: Callable[[], Exception]
) -> bool:
    """Let the waiters of a refused write wait for the newer write of the same name.

    Returns False if the newer outcome doesn't determine the outcome of the refused write.
    """
    if batch.kind not in (c.SET, c.SET_TTL) or batch.bulk is not None:
        return False
    if later.bulk is not None or later.abandoned() or read:
        return False
    there = later.entries[i]
    if later.kind == c.DELETE:
        removal = SupersededWrite(there, make, True)
        later.entries[i] = [removal, SupersededWrite(entry.waiter, make, True)]
    elif _is_conditional(later.kind, there) or (
        later.kind == c.SET_IF_NEWER and there.version <= entry.version
    ):
        return False
    else:
        there.waiter = with_waiter(there.waiter, SupersededWrite(entry.waiter, make, False))
    return True
