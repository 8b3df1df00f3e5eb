"""The work of a client: documents, their names, and the number of tasks that read or write them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any
from unittest.mock import patch

import msgspec

from dscache import _backend

DOCUMENT = {
    "firstname": "Ada",
    "lastname": "Lovelace",
    "age": 36,
    "email": "ada@ex.org",
    "tags": ["math", "engine"],
    "active": True,
    "score": 12.5,
}
TOPIC = 4
MESSAGE = {
    "topic": TOPIC,
    "action": 0,
    "name": "news/europe",
    "data": {"headline": "Analytic engine", "authors": ["Ada", "Charles"], "score": 12.25},
}
# A busy machine may stop a benchmark for a while, which is no error.
PATIENCE_SECONDS = 600
VERSION = 1
RECORDS = 1000
CORES = {"fast": "dscache._fast", "pure": "dscache.core.pure"}

# JSON goes through msgspec for every Python client, so that clients are compared, not decoders.
encode: Callable[[object], bytes] = msgspec.json.Encoder().encode
decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode


@dataclass(frozen=True)
class Kind:
    """Documents of one size, and the number of their records in the server."""

    folder: str
    document: object
    stored: int


ORDINARY = "123 B"
KINDS = {
    "20 B": Kind("flag", {"n": 123, "ok": False}, 1_000),
    ORDINARY: Kind("user", DOCUMENT, 10_000),
    "2 KB": Kind("team", {"members": [DOCUMENT] * 16}, 1_000),
    "100 KB": Kind("town", {"people": [DOCUMENT] * 813}, 100),
}
SIZES = tuple(KINDS)
# Records that are only written: reads of the others must not find their long versions.
WRITTEN = "written"
KINDS[WRITTEN] = Kind(WRITTEN, DOCUMENT, 10_000)
# Records that updates write under versions of their own.
CHANGED = "changed"
KINDS[CHANGED] = Kind(CHANGED, DOCUMENT, 10_000)
# As in YCSB: the most popular of 10,000 records is requested in every tenth read.
ZIPF = 0.99
DRAWS = 100_000


def names_of(kind: str, count: int | None = None) -> list[str]:
    """Return the names of that many records of a kind; by default of all that are stored."""
    folder = KINDS[kind].folder
    return [f"{folder}/{number}" for number in range(count or KINDS[kind].stored)]


def drawn(names: Sequence[str], count: int = DRAWS) -> list[str]:
    """Return that many names, the first ones as often as Zipf's law has it."""
    weights = accumulate(1 / rank**ZIPF for rank in range(1, len(names) + 1))
    return random.Random(1).choices(names, cum_weights=list(weights), k=count)


def keys_of(names: Sequence[str], hashtag: bool = False) -> list[str]:
    """Return the keys of records, in the order in which a bulk requests them."""
    if hashtag:
        return [key for name in names for key in (f"{{{name}}}_v", f"{{{name}}}_d")]
    return [key for name in names for key in (name + "_v", name + "_d")]


@dataclass(frozen=True)
class Work:
    """The work that one benchmark measures."""

    operation: str
    """get, set, mixed (nine gets to a set), zipf (gets), get_many, set_many, cached (one task reads
    a thousand records again and again), popular (tasks read them by Zipf's law), latency,
    messages, fetch (hits), read (a get in a method, as that of fetch), update, rewrite (a get and
    then a set), replace (a set whose if_version is the version that is there), scan (all names),
    watch (changes that are written meanwhile), hear (a write, until its change is heard), export
    (a bulk of all records, into a file)."""
    tasks: int = 1
    """The number of tasks at a time; each does one record, or bulk, after the other."""
    size: int = RECORDS
    """Records of a bulk, or from which popular ones are drawn."""
    decode: bool = True
    """Whether the client decodes each document that it reads, or leaves the text."""
    kind: str = ORDINARY
    ttl: int | None = None
    if_newer: bool = False
    connections: int = 1
    """The number of clients in one process, between which the tasks are divided."""
    collects: bool = True
    """Whether Python collects garbage meanwhile."""
    rate: float = 0
    """Operations a second of the work latency; 0 for half of the client's highest load."""

    @property
    def is_bulk(self) -> bool:
        return self.operation.endswith("_many") or self.operation == "export"

    @property
    def reads(self) -> bool:
        return "set" not in self.operation and self.operation not in ("messages", "watch", "hear")

    @property
    def least(self) -> int:
        """The smallest sensible number of records."""
        return self.size * self.tasks if self.is_bulk else self.tasks

    @property
    def is_large(self) -> bool:
        """Whether it takes long even when it is done only once."""
        return self.tasks > 1000 or self.connections > 4 or self.is_huge

    @property
    def is_huge(self) -> bool:
        """Whether one bulk takes a good part of a second."""
        return self.is_bulk and self.size > 10_000

    @property
    def stored(self) -> int:
        """The number of records that must be in the server."""
        among = self.is_bulk or self.operation == "popular"
        return max(KINDS[self.kind].stored, self.size if among else 0)


def core(name: str) -> ModuleType:
    """Return the core of that name; a missing one must fail the run, not shorten the table."""
    return importlib.import_module(CORES[name])


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Let caches that are opened in this block use the core of that name."""
    with patch.multiple(_backend, core=core(name), BACKEND=name):
        yield
