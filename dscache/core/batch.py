"""Batches, bulks and their waiters; the pure twin of ``batch.pxi``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from . import constants as c
from . import outcomes
from .waiters import Waiter

# One sequence of numbers for all pipelines, so that batches keep their order across nodes. Threads
# may take from it at once.
serials: Final = itertools.count(1)


def latest_serial() -> int:
    """Return the number of the latest batch."""
    # Of "count(8)": taking a number to learn the latest would put it behind reads that are still to
    # join the latest batch.
    return int(repr(serials)[6:-1]) - 1


@dataclass(slots=True, eq=False)
class Write:
    """The content of one record to be written, and its waiters."""

    version: int
    text: bytes
    ttl: int
    guard: bytes
    waiter: Any = None  # a waiter, a list of them, or None in a bulk


@dataclass(slots=True, eq=False)
class Command:
    """An encoded command of one key, and the waiter for its reply."""

    text: bytes
    waiter: Any


@dataclass(slots=True, eq=False)
class Bulk:
    """The outcome of one bulk operation, gathered from its slots.

    A ``shared`` bulk has a batch on each of several nodes. A failure that ends one batch doesn't
    affect the records of the others.
    """

    operation: str
    waiter: Waiter
    result: Any
    total: int
    shared: bool = False
    remaining: int = field(init=False)
    errors: dict[str, Exception] = field(default_factory=dict)
    # Names to remove from a result that began with all names.
    missing: list[str] = field(default_factory=list)
    over: bool = False  # the waiter has its outcome

    def __post_init__(self) -> None:
        self.remaining = self.total

    def settle(self, count: int) -> None:
        """Count records that have an outcome; the last one settles the waiter.

        If settling the waiter raises, ``settle(0)`` tries again.
        """
        self.remaining -= count
        if not (self.remaining or self.over):
            outcomes.finish(self)

    take = outcomes.take
    take_error = outcomes.take_error


@dataclass(slots=True, eq=False)
class Batch:
    """Records of one kind that are sent together: the operations of a tick, or one bulk.

    ``records`` maps each name to its waiter, list of waiters, Write or Command. It is frozen
    into two lists when its first record is sent. Records before ``answered`` are settled, records
    from there to ``sent`` are in flight, and the others are queued. ``serial`` orders the batches
    of all nodes; a repeat has the serial of its original.
    """

    kind: int
    deadline: float
    serial: int  # assigned when the batch is queued
    records: dict[str, Any]
    names: list[str] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)
    sent: int = 0
    answered: int = 0
    failed: int = 0  # records before this index were rejected when the batch failed
    bulk: Bulk | None = None
    expired: bool = False  # its waiters have their outcome; further replies are dropped
    repeated: int = 0  # records before this index were sent on a lost connection
    whole_script: bool = False  # Redis has lost the script: send the text of the script
    one_per_command: bool = False  # one record a command, to find the refused one
    counted: bool = False  # counts as one pending operation; only for a bulk
    hash_slots: list[int] = field(default_factory=list)  # slots of the names, on a cluster
    # "address: error text" of each redirection; outside a cluster, the text of the last refusal.
    redirections: tuple[str, ...] = ()
    asking: bool = False  # the node serves these slots only after ASKING
    target: Any = None  # the pipeline that a redirection names, for one sending
    losses: int = 0  # how often the server cut the connection while it was under way

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
        part.losses = self.losses
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
