"""Error replies: operations that are sent again, given to another node, or fail.

Each function takes a pipeline, compiled or pure, and keeps the rules of ``recovery.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..errors import ReplyError
from . import constants as c
from . import failures
from .outcomes import give_error
from .waiters import DISCARDED, SupersededWrite, with_waiter

if TYPE_CHECKING:
    from .batch import Batch
    from .pipeline import Pipeline

# After so many equal refusals in a row the pauses between them grow no longer.
_SAME_REFUSALS: Final = 6

_NO_SCRIPT: Final = "NOSCRIPT No matching script. Please use EVAL."

# Of each name, its first later write: the batch, the place in it, and whether a read is between.
_Later = dict[str, tuple["Batch", int, bool]]


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


def refused(pipeline: Pipeline, batch: Batch, count: int, error: ReplyError) -> None:
    """Give an error reply to the records it belongs to, or send them once more.

    An error reply to a whole command means that Redis did nothing of it.
    """
    if pipeline.clustered and error.code in c.REDIRECTIONS and batch.kind != c.COMMAND:
        _redirected(pipeline, batch, count, error)
        return
    put_off = _puts_off(pipeline, batch, error)
    by_script = batch.kind in (c.SET_TTL, c.SET_IF_NEWER, c.DELETE_IF)
    lost_script = not batch.whole_script and _is_by_script(pipeline, batch)
    if lost_script and failures.refuses("evalsha", error):
        pipeline.whole_scripts = True
    else:
        lost_script = lost_script and error.code == "NOSCRIPT"
    # By script it is served. Such a reply may belong to a command sent before another refusal.
    lost_msetex = batch.kind == c.SET_TTL and failures.refuses("msetex", error)
    if lost_msetex:
        pipeline.has_msetex = False
    across = failures.is_across_slots(error.message) and not pipeline.clustered
    is_lost = lost_script or lost_msetex
    mixed = count > 1 and not is_lost and (error.code == "NOPERM" or across)
    if mixed and across and batch.kind <= c.DELETE_IF:
        pipeline.single_writes = True
        pipeline.single_reads = pipeline.single_reads or batch.kind == c.GET
    is_overtaken = is_lost or mixed or (put_off and c.SET <= batch.kind <= c.DELETE)
    later = {}
    if is_overtaken:
        later = _written_after(pipeline, batch, mixed or put_off or lost_msetex)
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
        elif (is_lost or mixed or put_off) and name not in later:
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
        repeat = pipeline.returned[-1]
        if lost_script and (under_way := _scripts_under_way(pipeline)):
            pipeline.script_fence = pipeline.fence()
            pipeline.open_window = 0
            doubts = _maybe_done_after(batch, again, under_way)
        if put_off:
            repeat.redirections = (error.message,)
        if doubts:
            pipeline.doubts += [(repeat, batch.serial, *doubt) for doubt in doubts]
        if c.SET <= batch.kind <= c.DELETE:
            _read_again(pipeline, batch, again)
    batch.answered += count
    if batch.bulk is not None:
        batch.bulk.settle(settled - len(again))


def _scripts_under_way(pipeline: Pipeline) -> list[Batch]:
    """Return the batches under way, behind the first, that need the script in the server."""
    return [
        batch
        for batch in dict.fromkeys(batch for batch, _count in list(pipeline.slots)[1:])
        if _is_by_script(pipeline, batch) and not batch.whole_script
    ]


def _maybe_done_after(
    batch: Batch, again: Mapping[str, Any], under_way: Iterable[Batch]
) -> list[tuple[str, int, str]]:
    """Return each name to be written again with the first write under way that may undo it.

    That write is refused too, unless another client has loaded the script in between.
    """
    found: dict[str, int] = {}
    for later in under_way:
        if later.serial <= batch.serial:
            continue
        for i in range(later.answered, later.sent):
            name = later.names[i]
            if name in again and not _are_if_newer(batch, again, later, i):
                found.setdefault(name, later.serial)
    return [(name, serial, name) for name, serial in found.items()]


def _puts_off(pipeline: Pipeline, batch: Batch, error: ReplyError) -> bool:
    """Return whether a refused command is sent again later, and note that the server is away.

    The owner of the socket sees ``away`` and stops sending for a while, or leaves the server.
    """
    if batch.kind == c.COMMAND:
        return False
    code = failures.code_of(error)
    if pipeline.clustered:
        if code == "NOAUTH":
            pipeline.away = code
        return False
    if code == "NOAUTH" and error.message in batch.redirections:
        return False  # another login has not helped
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
    """Fail the operations to be repeated that a later one of their name has overtaken.

    When all commands under way have their replies, each later one was done, or is repeated too
    and comes behind the earlier one. A repeat of an overtaken write would undo the later one.
    """
    if not pipeline.doubts:
        return
    held = {*waiting_batches(pipeline)}
    waiting = {
        (batch.serial, name)
        for batch in held
        if not batch.abandoned()
        for name in (batch.names or batch.records)
    }
    was_busy, pipeline.busy = pipeline.busy, True
    try:
        # The last ones first: what fails has been overtaken, and lets none pass either.
        while pipeline.doubts:
            batch, serial, name, later_serial, later = pipeline.doubts[-1]
            if (later_serial, later) in waiting:
                waiting.add((serial, name))  # also if it was attached to the later one
            elif batch in held and not batch.abandoned():
                # One that was sent meanwhile gets its result from its reply.
                waiting.discard((serial, name))
                _drop(pipeline, batch, name)
            pipeline.doubts.pop()
    finally:
        pipeline.busy = was_busy
    pipeline.recount()


def _drop(pipeline: Pipeline, batch: Batch, name: str) -> None:
    """Fail one record of a batch that is to be repeated, which was not sent since."""
    batch.freeze()
    i = batch.names.index(name)
    entry = batch.entries[i]
    if entry is DISCARDED:
        return
    is_put_off = batch.redirections and not pipeline.clustered
    error = ReplyError(batch.redirections[-1] if is_put_off else _NO_SCRIPT)
    give_error(pipeline, batch, name, entry, refusal_at(pipeline, error, batch, i))
    batch.records = {one: batch.entries[at] for at, one in enumerate(batch.names) if at != i}
    batch.names, batch.entries = list(batch.records), list(batch.records.values())
    batch.repeated -= i < batch.repeated
    if batch.bulk is not None:
        batch.bulk.settle(1)


def refusal(pipeline: Pipeline, error: ReplyError, kind: int, name: str) -> Callable[[], Exception]:
    """Return a function that makes the error of one record from an error reply."""
    context = f"{failures.describe(kind, name)} at {pipeline.address}"
    remedy = failures.remedy_of(error.message)
    return lambda: ReplyError(error.message, context=f"{context}{remedy}")


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


def _is_by_script(pipeline: Pipeline, batch: Batch) -> bool:
    """Return whether a batch is written or removed by script."""
    return batch.kind in (c.SET_IF_NEWER, c.DELETE_IF) or (
        batch.kind == c.SET_TTL and not pipeline.has_msetex
    )


def _is_if_newer(kind: int, entry: Any) -> bool:
    """Return whether an operation is a write with ``if_newer``."""
    return kind == c.SET_IF_NEWER and bool(entry.guard == c.GUARDED)


def _are_if_newer(batch: Batch, records: Mapping[str, Any], later: Batch, i: int) -> bool:
    """Return whether two writes of a name have ``if_newer``, so that neither undoes the other."""
    name = later.names[i]
    return (
        name in records
        and _is_if_newer(later.kind, later.entries[i])
        and _is_if_newer(batch.kind, records[name])
    )


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
    redirections = _path_of(pipeline, batch, error)
    moves = sum(_is_move(one.partition(": ")[2].partition(" ")[0]) for one in redirections)
    limit = pipeline.max_redirections
    has_moved_too_often = _is_move(error.code) and moves > limit
    again: dict[str, Any] = {}
    failed = repeated = 0
    for i in range(batch.answered, batch.answered + count):
        name = batch.names[i]
        entry = batch.entries[i]
        if entry is DISCARDED:
            continue
        make = refusal_at(pipeline, error, batch, i)
        if has_moved_too_often:
            context = f"{failures.describe(batch.kind, name)} at {pipeline.address}"
            make = partial(
                failures.too_many_redirections, error.message, redirections, moves, limit, context
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


def _is_move(code: str) -> bool:
    """Return whether a redirection names another node; the others put an operation off."""
    return code in ("MOVED", "ASK")


def _path_of(pipeline: Pipeline, batch: Batch, error: ReplyError) -> tuple[str, ...]:
    """Return the redirections of a batch with the latest one.

    Of a refusal that is repeated, as of a busy node, only the first ones are kept.
    """
    latest = f"{pipeline.address}: {error.message}"
    last = batch.redirections[-_SAME_REFUSALS:]
    if not _is_move(error.code) and last.count(latest) == _SAME_REFUSALS:
        return batch.redirections
    return (*batch.redirections, latest)


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


def waiting_batches(pipeline: Pipeline) -> tuple[Batch, ...]:
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
        loaded = loaded or later.whole_script
        if newer and later.kind <= c.HEAD:
            for i in range(later.answered, later.sent):
                if later.entries[i] is not DISCARDED:
                    read.add(later.names[i])
        elif newer and (loaded or not _is_by_script(pipeline, later)):
            for i in range(later.answered, later.sent):
                name = later.names[i]
                if name in read or not _are_if_newer(batch, batch.records, later, i):
                    found.setdefault(name, (later, i, name in read))
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
    elif there.ttl == c.KEPT_TTL:
        return False  # it keeps the lifetime that the refused write would have given
    else:
        there.waiter = with_waiter(there.waiter, SupersededWrite(entry.waiter, make, False))
    return True
