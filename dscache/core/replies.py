"""Replies to operations, a function for each kind; the pure twin of ``replies.pxi``.

Each settles the records that a reply belongs to. Refusals are ``refusals.py``'s.
"""

from __future__ import annotations

import time
from asyncio import InvalidStateError
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .._interruptions import raise_interruption
from ..errors import ProtocolError, ReplyError, shorten
from . import constants as c
from . import failures, outcomes, refusals
from .near_cache import PendingRead
from .record import Draft, Record, new_record, parse_version
from .waiters import DISCARDED, resolve

if TYPE_CHECKING:
    from .batch import Batch
    from .near_cache import Epoch
    from .pipeline import Pipeline

INCOMPLETE: Final = object()


def answer(pipeline: Pipeline, reply: Any) -> None:
    """Settle the first slot. It stays in place till then, so that nothing is lost on the way
    if the reply turns out to be of the wrong shape."""
    if not pipeline.slots or pipeline.severed:
        raise failures.stray_reply(pipeline.address, reply)
    batch, count = pipeline.slots[0]
    if batch.asking and not pipeline.asked:
        pipeline.asked = True
        return
    pipeline.asked = False
    stored: Any = None
    if batch.kind == c.HEAD:
        if pipeline.version_reply is INCOMPLETE:
            pipeline.version_reply = reply
            return
        stored, pipeline.version_reply = pipeline.version_reply, INCOMPLETE
        if batch.asking:
            stored, reply = reply, stored
        if type(stored) is ReplyError and stored.code != "WRONGTYPE":
            reply = stored
    pipeline.answering = batch
    first = batch.answered
    was_over = batch.abandoned()
    refused = type(reply) is ReplyError
    if was_over:
        batch.answered += count
    elif refused:
        refusals.refused(pipeline, batch, count, reply)
    elif batch.kind == c.GET:
        answer_get(pipeline, batch, count, reply)
    elif batch.kind == c.HEAD:
        answer_head(pipeline, batch, stored, reply)
    elif batch.kind == c.SET:
        answer_set(pipeline, batch, count, reply == b"OK", reply)
    elif batch.kind == c.SET_TTL and pipeline.has_msetex:
        answer_set(pipeline, batch, count, type(reply) is int and reply == 1, reply)
    elif batch.kind == c.DELETE:
        answer_delete(pipeline, batch, reply)
    elif batch.kind == c.COMMAND:
        resolve(batch.entries[0], reply)
        batch.answered = 1
    elif batch.kind >= c.READ_KEY:
        answer_key(pipeline, batch, reply)
    else:
        answer_script(pipeline, batch, count, reply)
    pipeline.answering = None
    pipeline.slots.popleft()
    pipeline.settled += 1
    if pipeline.epoch is not None:
        pipeline.epoch.answered(pipeline.settled)
    pipeline.in_flight -= count
    timed = 0
    if batch.bulk is None:
        pipeline.operations -= count
        timed = count
    elif batch.counted and (batch.answered == len(batch.names) or batch.abandoned()):
        batch.counted = False
        pipeline.operations -= 1
        timed = 1
    if timed and not (was_over or refused) and batch.kind < c.COMMAND:
        count_latency(pipeline, batch, timed)
    if c.SET <= batch.kind <= c.DELETE_IF or batch.kind >= c.READ_KEY:
        for i in range(first, first + count):
            pipeline.pending_bytes -= len(batch.entries[i].text)
    if pipeline.near is not None and c.SET <= batch.kind <= c.DELETE:
        for i in range(first, first + count):
            pipeline.near.drop(batch.names[i])


def count_latency(pipeline: Pipeline, batch: Batch, count: int) -> None:
    """Count how long so many operations have taken, from the first call of their batch."""
    if not pipeline.arrived:
        pipeline.arrived = time.monotonic()
    row = min(batch.kind, c.SET) if batch.kind < c.DELETE_IF else c.SET + 1
    if batch.bulk is not None:
        row += len(c.TIMED) // 2
    pipeline.latencies.add(row, pipeline.arrived - (batch.deadline - pipeline.timeout), count)


def answer_get(pipeline: Pipeline, batch: Batch, count: int, reply: Any) -> None:
    check_array(pipeline, reply, 2 * count, "MGET")
    if pipeline.epoch is None and set(map(type, reply)) == {bytes}:
        entries = batch.entries[batch.answered : batch.answered + count]
        if (versions := versions_of(reply[::2])) and DISCARDED not in entries:
            answer_found(pipeline, batch, entries, versions, reply[1::2])
            return
    bulk = batch.bulk
    # Redis sends no invalidation for records read by ASKING.
    epoch = None if batch.asking else pipeline.epoch
    settled = 0
    try:
        for i in range(0, 2 * count, 2):
            stored, raw = reply[i], reply[i + 1]
            name = batch.names[batch.answered]
            entry = batch.entries[batch.answered]
            if entry is DISCARDED:
                batch.answered += 1
                continue
            if type(stored) is bytes and type(raw) is bytes:
                version = parse_version(stored)
                if version < 0:
                    damaged(pipeline, batch, name, entry, stored)
                else:
                    pipeline.counts["hits"] += 1
                    if epoch is not None:
                        keep_near(pipeline, epoch, batch, entry, version, raw)
                    if bulk is not None:
                        bulk.result[name] = new_record(name, version, raw)
                    elif type(entry) is list:
                        for waiter in entry:
                            resolve(waiter, new_record(name, version, raw))
                    else:
                        resolve(entry, new_record(name, version, raw))
            else:
                for value in (stored, raw):
                    if value is not None and type(value) is not bytes:
                        raise wrong_shape(pipeline, "MGET", value)
                if stored is not None or raw is not None:
                    pipeline.counts["halves"] += 1
                pipeline.counts["misses"] += 1
                if epoch is not None:
                    keep_near(pipeline, epoch, batch, entry, 0, None)
                if bulk is not None:
                    bulk.missing.append(name)
                else:
                    resolve(entry, None)
            pipeline.counts["reads"] += 1
            batch.answered += 1
            settled += 1
    finally:  # those before one of the wrong shape have their outcome
        if bulk is not None:
            bulk.settle(settled)


def versions_of(stored: list[bytes]) -> list[int]:
    """Return the versions of records, or an empty list if one is damaged."""
    try:
        if b"".join(stored).isdigit():
            versions = list(map(int, stored))
            return versions if max(versions) <= c.MAX_VERSION else []
    except ValueError as error:  # one is empty, or has thousands of digits
        raise_interruption(error)
    return []


def answer_found(
    pipeline: Pipeline, batch: Batch, entries: list[Any], versions: list[int], raws: list[bytes]
) -> None:
    """Settle the records of a reply that need no closer look: a third of the time for each."""
    first, last = batch.answered, batch.answered + len(entries)
    names = batch.names[first:last]
    bulk = batch.bulk
    done = 0
    try:
        if bulk is not None:
            records = {}
            for name, version, raw in zip(names, versions, raws, strict=True):
                record: Any = Draft()  # as in new_record, without the call
                record.name = name
                record.version = version
                record.raw = raw
                record.stale = False
                record._data = {}
                record._type = None
                record.__class__ = Record
                records[name] = record
            bulk.result.update(records)
            batch.answered = last
            done = len(entries)
            return
        for name, version, raw, entry in zip(names, versions, raws, entries, strict=True):
            if type(entry) is list:
                for waiter in entry:
                    resolve(waiter, new_record(name, version, raw))
            else:
                record = Draft()
                record.name = name
                record.version = version
                record.raw = raw
                record.stale = False
                record._data = {}
                record._type = None
                record.__class__ = Record
                try:  # noqa: SIM105 # as in resolve
                    entry.set_result(record)
                except InvalidStateError:
                    pass
            batch.answered += 1
            done += 1
    finally:
        pipeline.counts["reads"] += done
        pipeline.counts["hits"] += done
        if bulk is not None:
            bulk.settle(done)


def keep_near(
    pipeline: Pipeline, epoch: Epoch, batch: Batch, entry: Any, version: int, raw: Any
) -> None:
    assert pipeline.near is not None
    slot = entry.slot if type(entry) is PendingRead else -1
    if batch.hash_slots:
        slot = batch.hash_slots[batch.answered]
    name = batch.names[batch.answered]
    pipeline.near.fill(pipeline, epoch, batch.serial, name, version, raw, slot)


def answer_head(pipeline: Pipeline, batch: Batch, stored: Any, reply: Any) -> None:
    if batch.asking and type(reply) is int:  # how many of both keys there are
        reply = c.STRING if reply == 2 else c.NO_STRING[0]
    if reply != c.STRING and reply not in c.NO_STRING:
        raise wrong_shape(pipeline, "TYPE", reply)
    name = batch.names[batch.answered]
    entry = batch.entries[batch.answered]
    has_version = type(stored) is bytes
    if not has_version and stored is not None and type(stored) is not ReplyError:
        raise wrong_shape(pipeline, "GET", stored)
    if entry is DISCARDED:
        batch.answered += 1
        return
    pipeline.counts["reads"] += 1
    if has_version and reply == c.STRING:
        version = parse_version(stored)
        if version < 0:
            damaged(pipeline, batch, name, entry, stored)
        else:
            pipeline.counts["hits"] += 1
            if batch.bulk is None:
                resolve(entry, version)
            else:
                batch.bulk.result[name] = version
    else:
        if has_version or reply == c.STRING:
            pipeline.counts["halves"] += 1
        pipeline.counts["misses"] += 1
        if batch.bulk is None:
            resolve(entry, None)
    batch.answered += 1
    if batch.bulk is not None:
        batch.bulk.settle(1)


def answer_set(pipeline: Pipeline, batch: Batch, count: int, done: bool, reply: Any) -> None:
    if not done:
        raise wrong_shape(pipeline, "MSET or MSETEX", reply)
    if batch.bulk is None:
        for write in batch.entries[batch.answered : batch.answered + count]:
            resolve(write.waiter, True)
    pipeline.counts["writes"] += count
    batch.answered += count
    if batch.bulk is not None:
        batch.bulk.settle(count)


def answer_script(pipeline: Pipeline, batch: Batch, count: int, reply: Any) -> None:
    if type(reply) is int and reply == c.WRITTEN:
        reply = [c.WRITTEN] * count
    check_array(pipeline, reply, count, "the set script")
    bulk = batch.bulk
    settled = 0
    try:
        for value in reply:
            name = batch.names[batch.answered]
            entry = batch.entries[batch.answered]
            if type(value) is ReplyError:
                make = refusals.refusal_at(pipeline, value, batch, batch.answered)
                outcomes.give_error(pipeline, batch, name, entry, make)
            elif value == c.UNTOLD and batch.answered < batch.repeated:
                operation = failures.describe(batch.kind, name)
                make = partial(failures.untold, pipeline.address, operation)
                outcomes.give_error(pipeline, batch, name, entry, make)
            elif type(value) is not int or not c.DAMAGED <= value <= c.WRITTEN:
                raise wrong_shape(pipeline, "the set script", value)
            elif value == c.DAMAGED:
                damaged(pipeline, batch, name, entry, None)
            else:
                done = "deletes" if batch.kind == c.DELETE_IF else "writes"
                pipeline.counts[done if value == c.WRITTEN else "not_newer"] += 1
                if bulk is None:
                    resolve(entry.waiter, value == c.WRITTEN)
                elif batch.kind == c.DELETE_IF:
                    bulk.result += value
                elif value == c.NOT_NEWER:
                    bulk.result.add(name)
            batch.answered += 1
            settled += 1
    finally:  # those before one of the wrong shape have their outcome
        if bulk is not None:
            bulk.settle(settled)


def answer_delete(pipeline: Pipeline, batch: Batch, reply: Any) -> None:
    if type(reply) is not int or not 0 <= reply <= 2:
        raise wrong_shape(pipeline, "DEL", reply)
    if reply == 1:
        pipeline.counts["halves"] += 1
    pipeline.counts["deletes"] += 1
    if batch.bulk is None:
        resolve(batch.entries[batch.answered], reply == 2)
    batch.answered += 1  # behind it, as it may raise
    if batch.bulk is not None:
        batch.bulk.result += reply == 2
        batch.bulk.settle(1)


def answer_key(pipeline: Pipeline, batch: Batch, reply: Any) -> None:
    if batch.kind == c.READ_KEY:
        fits = reply is None or type(reply) is bytes
    elif batch.kind == c.PUBLISH:
        fits = type(reply) is int and reply >= 0
    else:
        fits = reply == b"OK" or (type(reply) is int and 0 <= reply <= 1)
    if not fits:
        raise wrong_shape(pipeline, "a command of one key", reply)
    entry = batch.entries[batch.answered]
    resolve(entry.waiter, reply)
    batch.answered += 1


def check_array(pipeline: Pipeline, reply: Any, length: int, command: str) -> None:
    if type(reply) is not list or len(reply) != length:
        raise wrong_shape(pipeline, command, reply)


def wrong_shape(pipeline: Pipeline, command: str, reply: Any) -> ProtocolError:
    pipeline.answering = None  # each record before this one is settled and counted
    return ProtocolError(f"{pipeline.address}: unexpected reply to {command}: {shorten(reply)}")


def damaged(pipeline: Pipeline, batch: Batch, name: str, entry: Any, stored: bytes | None) -> None:
    pipeline.counts["damaged"] += 1
    outcomes.give_error(
        pipeline, batch, name, entry, partial(failures.damaged_version, name, stored)
    )
