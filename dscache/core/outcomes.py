"""The errors of operations that fail, and the outcome of a bulk. Both cores use this module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from . import constants as c
from . import failures
from .failures import ErrorOf
from .waiters import DISCARDED, reject, resolve

if TYPE_CHECKING:
    from .batch import Batch, Bulk
    from .pipeline import Pipeline


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
