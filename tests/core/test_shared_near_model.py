"""Random steps of threads that share a near cache: reads, writes, reports and losses, interleaved.

Each step of a thread is one of: begin a read, have the server execute it, take its answer; and the
same for a write. Reports of changes wait in the link until they are taken, in their order. So every
interleaving of two connections can happen. Both cores go through the same steps.

A hit may be behind the server only by changes whose reports have not been taken yet, or that were
made while the link was dead but not known to be. It is never behind a write of this cache that was
begun, and never behind what a read of this cache has returned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dscache import _fast
from dscache.core import pure as _pure
from dscache.errors import ProtocolError

NAMES = ("a", "b")
names = st.sampled_from(NAMES)
FOREVER = 1e6


def make(core: ModuleType, **options: Any) -> Any:
    """Return a near cache of whose misses a KeyError tells."""

    def miss(name: str, type: Any = None) -> Any:
        raise KeyError(name)

    defaults = {"max_age": FOREVER, "idle_limit": FOREVER}
    return core.SharedNearCache(miss, miss, **{**defaults, **options})


def hit(near: Any, name: str) -> Any:
    """Return the cached record's version, None for a missing one, or -1 if nothing is cached."""
    try:
        record = near.get(name)
    except KeyError:
        return -1
    return None if record is None else record.version


@dataclass
class Read:
    """A read under way; ``found`` is the number of the state it has found, once executed."""

    name: str
    entries: list[Any]
    found: int = -1


@dataclass
class Write:
    """A write of this cache under way."""

    name: str
    writes: list[Any]
    is_executed: bool = False


class Threads(RuleBasedStateMachine):
    """The threads, the server and the link. A record's version is the number of its state."""

    @initialize(max_records=st.sampled_from((1, 100)))
    def begin(self, max_records: int) -> None:
        self.cores = [_fast, _pure]
        self.nears = [make(core, max_records=max_records) for core in self.cores]
        self.nodes = [near.only_node() for near in self.nears]
        self.states = dict.fromkeys(NAMES, 1)
        self.gone: set[tuple[str, int]] = set()
        self.floors = dict.fromkeys(NAMES, 0)
        self.reports: list[str | None] = []
        self.reads: list[Read] = []
        self.writes: list[Write] = []
        self.is_tracked = False
        self.connect()

    @rule()
    def connect(self) -> None:
        """Begin a link; reports of the earlier one are lost."""
        self.reports.clear()
        for node in self.nodes:
            node.connected("one", time.monotonic())

    @rule()
    def lose(self) -> None:
        self.reports.clear()
        for node in self.nodes:
            node.disconnected("connection")

    @rule(name=names, is_gone=st.booleans())
    def change(self, name: str, is_gone: bool) -> None:
        """Let another client write or delete a record."""
        self._execute(name, is_gone)

    def _execute(self, name: str, is_gone: bool) -> None:
        self.states[name] += 1
        if is_gone:
            self.gone.add((name, self.states[name]))
        if self.nodes[0].is_live:
            self.reports.append(name)

    @rule()
    def flush(self) -> None:
        """Let another client remove everything."""
        for name in NAMES:
            self.states[name] += 1
            self.gone.add((name, self.states[name]))
        if self.nodes[0].is_live:
            self.reports.append(None)

    @rule()
    def take_report(self) -> None:
        if not self.reports:
            return
        name = self.reports.pop(0)
        keys = None if name is None else [f"{name}_v".encode(), f"{name}_d".encode()]
        for node in self.nodes:
            node.take_push([b"invalidate", keys])

    @rule(name=names)
    def begin_read(self, name: str) -> None:
        entries = [near.begin_read(name) for near in self.nears]
        assert len({entry is None for entry in entries}) == 1
        self.reads.append(Read(name, entries))

    @rule(number=st.integers(0, 5))
    def execute_read(self, number: int) -> None:
        if self.reads:
            read = self.reads[number % len(self.reads)]
            read.found = self.states[read.name]

    @rule(number=st.integers(0, 5), is_of_owner=st.sampled_from((True, True, True, False)))
    def end_read(self, number: int, is_of_owner: bool) -> None:
        ready = [read for read in self.reads if read.found >= 0]
        if not ready:
            return
        read = ready[number % len(ready)]
        self.reads.remove(read)
        is_gone = (read.name, read.found) in self.gone
        for core, near, entry in zip(self.cores, self.nears, read.entries, strict=True):
            record = None if is_gone else core.Record(read.name, read.found, b"1")
            if entry is None:
                near.observe(read.name, None if is_gone else read.found)
            else:
                near.settle(entry, record, is_of_owner)
        if not is_gone:
            self.floors[read.name] = max(self.floors[read.name], read.found)

    @rule(number=st.integers(0, 5))
    def lose_read(self, number: int) -> None:
        """Let a read fail, or its thread be struck by an exception."""
        if self.reads:
            del self.reads[number % len(self.reads)]

    @rule(name=names)
    def begin_write(self, name: str) -> None:
        self.writes.append(Write(name, [near.begin_write([name]) for near in self.nears]))
        assert {hit(near, name) for near in self.nears} == {-1}

    @rule(number=st.integers(0, 5), is_gone=st.booleans())
    def execute_write(self, number: int, is_gone: bool) -> None:
        waiting = [write for write in self.writes if not write.is_executed]
        if waiting:
            write = waiting[number % len(waiting)]
            write.is_executed = True
            self._execute(write.name, is_gone)

    @rule(number=st.integers(0, 5), is_struck=st.booleans())
    def end_write(self, number: int, is_struck: bool) -> None:
        done = [write for write in self.writes if write.is_executed]
        if not done:
            return
        write = done[number % len(done)]
        self.writes.remove(write)
        if not is_struck:
            for one in write.writes:
                one.end()
        write.writes.clear()
        self.floors[write.name] = self.states[write.name]

    @rule(number=st.integers(0, 5))
    def lose_write(self, number: int) -> None:
        """Let a write fail without a reply; the server executes it now, or never."""
        if self.writes:
            write = self.writes.pop(number % len(self.writes))
            for one in write.writes:
                one.end()

    @invariant()
    def check_hits(self) -> None:
        if not hasattr(self, "nears"):
            return
        for name in NAMES:
            found = {hit(near, name) for near in self.nears}
            assert len(found) == 1, found
            self._check(name, found.pop())

    def _check(self, name: str, version: int | None) -> None:
        if version == -1:
            return
        assert all(write.name != name for write in self.writes)
        unreported = sum(report in (name, None) for report in self.reports)
        allowed = range(self.states[name] - unreported, self.states[name] + 1)
        if version is None:
            assert any((name, state) in self.gone for state in allowed)
        else:
            assert version in allowed
            assert version >= self.floors[name]

    @invariant()
    def check_counters(self) -> None:
        if not hasattr(self, "nears"):
            return
        counts = [near.stats() for near in self.nears]
        for one in counts:
            one.pop("bytes")
            assert one["records"] <= len(NAMES)
        assert counts[0] == counts[1]


TestThreads = Threads.TestCase
TestThreads.settings = settings(max_examples=200, stateful_step_count=60)


@pytest.fixture(params=[_fast, _pure], ids=["fast", "pure"])
def near(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def read(near: Any, name: str, version: int) -> None:
    """Read a record that isn't cached."""
    core = _fast if type(near).__module__ == "dscache._fast" else _pure
    near.settle(near.begin_read(name), core.Record(name, version, b"1"), True)


def test_a_late_answer_fills_nothing_after_a_report(near: Any) -> None:
    node = near.only_node()
    node.connected("one", time.monotonic())
    entry = near.begin_read("a")
    node.take_push([b"invalidate", [b"a_v"]])
    near.settle(entry, None, True)
    assert hit(near, "a") == -1
    assert near.stats()["dropped_fills"] == 1


def test_answers_that_differ_end_the_entry(near: Any) -> None:
    near.only_node().connected("one", time.monotonic())
    first, second = near.begin_read("a"), near.begin_read("a")
    assert first is second
    core = _fast if type(near).__module__ == "dscache._fast" else _pure
    near.settle(second, core.Record("a", 2, b"1"), True)
    assert hit(near, "a") == 2
    near.settle(first, core.Record("a", 1, b"1"), True)
    assert hit(near, "a") == -1


def test_entries_end_with_what_confirms_them() -> None:
    for core in (_fast, _pure):
        near = make(core, idle_limit=1.0)
        node = near.only_node()
        node.connected("one", time.monotonic() - 100)
        read(near, "a", 1)
        assert hit(near, "a") == -1
        node.confirm(time.monotonic() + FOREVER)
        read(near, "a", 1)
        assert hit(near, "a") == 1
        node.disconnected("connection")
        assert hit(near, "a") == -1


def test_a_push_of_a_wrong_shape(near: Any) -> None:
    node = near.only_node()
    node.connected("one", time.monotonic())
    for push in ([b"invalidate"], [b"invalidate", b"a_v"], [b"invalidate", [b"a"], 1]):
        with pytest.raises(ProtocolError, match="a change of keys"):
            node.take_push(push)
    node.take_push([b"tracking-redir-broken", 1])
    node.take_push([b"invalidate", [b"no key", 3, b"a_v"]])


def test_limits() -> None:
    for core in (_fast, _pure):
        near = make(core, max_records=3, max_bytes=10_000)
        near.only_node().connected("one", time.monotonic())
        for number in range(5):
            read(near, f"n{number}", 1)
        assert near.stats()["records"] == 3
        assert near.stats()["evictions"] == 2
        assert [hit(near, f"n{number}") for number in range(5)] == [-1, -1, 1, 1, 1]
        near.settle(near.begin_read("big"), core.Record("big", 1, b"1" * 20_000), True)
        assert hit(near, "big") == -1
        assert near.stats()["bytes"] <= 10_000
        near.close()
        assert near.begin_read("n0") is None
        assert near.stats()["records"] == 0
