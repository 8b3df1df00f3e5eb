"""Batches, bulks and their waiters; the pure twin of ``batch.pxi``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import constants as c
from .constants import Waiter
from .waiters import reject, resolve


class _Serials:
    """One sequence of numbers for all pipelines, so that batches keep their order across nodes."""

    def __init__(self) -> None:
        self.last = 0

    def __next__(self) -> int:
        self.last += 1
        return self.last


serials = _Serials()


class Write:
    """The content of one record to be written, and its waiters."""

    __slots__ = ("guard", "text", "ttl", "version", "waiter")

    def __init__(self, version: int, text: bytes, ttl: int, guard: bytes) -> None:
        self.version = version
        self.text = text
        self.ttl = ttl
        self.guard = guard
        self.waiter: Any = None  # a waiter, a list of them, or None in a bulk


class Command:
    """An encoded command of one key, and the waiter for its reply."""

    __slots__ = ("text", "waiter")

    def __init__(self, text: bytes, waiter: Any) -> None:
        self.text = text
        self.waiter = waiter


class Bulk:
    """The outcome of one bulk operation, gathered from its slots.

    A ``shared`` bulk has a batch on each of several nodes. A failure that ends one batch doesn't
    affect the records of the others.
    """

    __slots__ = (
        "errors",
        "missing",
        "operation",
        "over",
        "remaining",
        "result",
        "shared",
        "total",
        "waiter",
    )

    def __init__(
        self, operation: str, waiter: Waiter, result: Any, total: int, shared: bool = False
    ) -> None:
        self.operation = operation
        self.waiter = waiter
        self.result = result
        self.shared = shared
        self.total = total
        self.remaining = total
        self.errors: dict[str, Exception] = {}
        self.missing: list[str] = []  # names to remove from a result that began with all names
        self.over = False  # the waiter has its outcome

    def settle(self, count: int) -> None:
        """Count records that have an outcome; the last one settles the waiter.

        If settling the waiter raises, ``settle(0)`` tries again.
        """
        self.remaining -= count
        if self.remaining or self.over:
            return
        for name in self.missing:
            self.result.pop(name, None)
        if self.errors:
            error = c.bulk_failure(self.operation, self.errors, self.total, self.result)
            reject(self.waiter, lambda: error)
        else:
            resolve(self.waiter, self.result)
        self.over = True

    def take(self, kind: int, name: str, result: Any) -> None:
        """Add the result of one record, as its single operation would return it."""
        if kind == c.DELETE:
            self.result += result
        elif kind == c.GET and result is None:
            self.missing.append(name)
        elif kind <= c.HEAD and result is not None:
            self.result[name] = result
        self.settle(1)

    def take_error(self, kind: int, name: str, error: Exception) -> None:
        """Add the error of one record."""
        self.errors[name] = error
        if kind == c.GET:
            self.missing.append(name)
        self.settle(1)


class Batch:
    """Records of one kind that are sent together: the operations of a tick, or one bulk.

    ``records`` maps each name to its waiter, list of waiters, Write or Command. It is frozen
    into two lists when its first record is sent. Records before ``answered`` are settled, records
    from there to ``sent`` are in flight, and the others are queued. ``serial`` orders the batches
    of all nodes; a repeat has the serial of its original.
    """

    __slots__ = (
        "answered",
        "asking",
        "bulk",
        "counted",
        "deadline",
        "entries",
        "expired",
        "failed",
        "hash_slots",
        "kind",
        "names",
        "one_per_command",
        "records",
        "redirections",
        "repeated",
        "sent",
        "serial",
        "target",
        "whole_script",
    )

    def __init__(self, kind: int, deadline: float, serial: int, records: dict[str, Any]) -> None:
        self.kind = kind
        self.deadline = deadline
        self.serial = serial  # assigned when the batch is queued
        self.records = records
        self.names: list[str] = []
        self.entries: list[Any] = []
        self.sent = 0
        self.answered = 0
        self.failed = 0  # records before this index were rejected when the batch failed
        self.bulk: Bulk | None = None
        self.expired = False  # its waiters have their outcome; further replies are dropped
        self.repeated = 0  # records before this index were sent on a lost connection
        self.whole_script = False  # Redis has lost the script: send the text of the script
        self.one_per_command = False  # one record a command, to find the refused one
        self.counted = False  # counts as one pending operation; only for a bulk
        self.hash_slots: list[int] = []  # slots of the names, on a cluster
        self.redirections: tuple[str, ...] = ()  # "address: error text" of each redirection
        self.asking = False  # the node serves these slots only after ASKING
        self.target: Any = None  # the pipeline that a redirection names, for one sending

    def freeze(self) -> None:
        if not self.names:
            names = list(self.records)
            self.entries = list(self.records.values())
            self.names = names

    def group(self, slot_of: Callable[[str], int]) -> None:
        """Sort records by slot; records that were sent before stay ahead of the others."""
        if len(self.names) < 2:
            return
        slots = [slot_of(name) for name in self.names]
        order = sorted(range(len(slots)), key=lambda i: (i >= self.repeated, slots[i]))
        names = [self.names[i] for i in order]
        entries = [self.entries[i] for i in order]
        hash_slots = [slots[i] for i in order]
        self.names, self.entries, self.hash_slots = names, entries, hash_slots

    def part(self, records: dict[str, Any], repeated: int) -> Batch:
        """Return a batch of some of the records, with the age and the state of this one."""
        part = Batch(self.kind, self.deadline, self.serial, records)
        part.bulk = self.bulk
        part.repeated = repeated
        part.whole_script = self.whole_script
        part.one_per_command = self.one_per_command
        part.redirections = self.redirections
        part.asking = self.asking
        return part

    def ask(self, target: Any) -> None:
        """Direct the batch to ``target``, this once with ASKING before each command."""
        self.target = target
        self.asking = True

    def text_size(self) -> int:
        """Return the bytes of text in unanswered records; if abandoned, only in the sent ones."""
        if not c.has_text(self.kind):
            return 0
        # An abandoned batch sends no more records.
        last = self.sent if self.abandoned() else len(self.records)
        entries = self.entries if self.names else list(self.records.values())
        return sum(len(entry.text) for entry in entries[self.answered : last])

    def abandoned(self) -> bool:
        """Return whether no waiter is left for the outcome of this batch."""
        return self.expired or (self.bulk is not None and self.bulk.over)

    def settled(self) -> bool:
        """Return whether this batch has its outcome, or was sent on as another batch."""
        return self.abandoned() or self.answered >= len(self.records)

    def waiting(self) -> int:
        return len(self.records) - self.sent
