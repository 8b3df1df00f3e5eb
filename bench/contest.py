"""Contestants on one server, opened together, measured in turn, and closed together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import redis

from contestants import (
    RECORDS_A_COMMAND,
    Absent,
    Contestant,
    Deepstream,
    Limit,
    PythonClient,
)
from dscache.embedded import EmbeddedServer
from peers import PYTHON
from rounds import Row
from workload import KINDS, Work

# Commands that redis-benchmark keeps in flight: more gain nothing.
DEPTH = 64
OURS = ("fast", "fast-asyncio", "pure", "blocking", "blocking-pure")
DEEPSTREAM = "deepstream"
# The limits: one command at a time, a record a command, and some records a command.
ALONE, SINGLE, BATCHED = "limit-alone", "limit-single", "limit-batched"
_OTHERS: dict[str, Callable[[], Contestant]] = {
    DEEPSTREAM: Deepstream,
    ALONE: lambda: Limit(1, 1),
    SINGLE: lambda: Limit(DEPTH, 1),
    BATCHED: lambda: Limit(DEPTH, RECORDS_A_COMMAND),
}
EVERYBODY = (*PYTHON, *_OTHERS)


class Contest:
    """Opens the named contestants, on a server with the records that they read."""

    def __init__(
        self, server: EmbeddedServer, names: Iterable[str] = EVERYBODY, *, strict: bool = False
    ) -> None:
        self.server = server
        self._strict = strict
        """Whether a peer that is installed must not fail, as dscache must not."""
        self.absent: dict[str, str] = {}
        """Who can't take part, and why."""
        self._names = tuple(names)
        self._present: dict[str, Contestant] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._redis: Any = redis.Redis(host=self.server.host, port=self.server.port)
            self._stack.callback(self._redis.close)
            for name in self._names:
                contestant = _OTHERS[name]() if name in _OTHERS else PythonClient(name)
                try:
                    contestant.open(self.server)
                except (Absent, RuntimeError) as reason:
                    if name in OURS or (self._strict and not isinstance(reason, Absent)):
                        raise
                    self.absent[name] = str(reason)
                else:
                    self._present[name] = contestant
                    self._stack.callback(contestant.close)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._present

    def store(self, *kinds: str, count: int | None = None) -> None:
        """Write the records of these kinds."""
        for kind in kinds:
            self.ask("fast", "store", Work("set_many", kind=kind, size=count or KINDS[kind].stored))

    def ask(self, name: str, what: str, work: Work, **more: Any) -> dict[str, Any]:
        """Let a contestant in a process do something other than a measurement."""
        process: Any = self._present[name]
        answer: dict[str, Any] = process.ask(what, work, **more)
        return answer

    def label(self, name: str) -> str:
        """Return a contestant's label in a table."""
        return self._present[name].label if name in self._present else label_of(name)

    def versions(self) -> dict[str, str]:
        """Return the contestants' versions, or the reasons for their absence, by label."""
        found = {one.label: one.version for one in self._present.values()}
        return found | {label_of(name): f"absent: {why}" for name, why in self.absent.items()}

    def row(self, name: str, work: Work, label: str = "") -> Row:
        """Return a row that measures this work of one contestant, and its cost for the server."""
        facts = {"who": name, "work": asdict(work)}
        label = label or self.label(name)
        if name not in self._present:
            why = self.absent.get(name, "not asked to take part")
            return Row(label, None, facts, missing=why)
        contestant = self._present[name]

        def measure(records: int) -> dict[str, float]:
            before = self._server_seconds()
            sample = contestant.measure(work, records)
            sample["server_cpu"] = self._server_seconds() - before
            return sample

        return Row(label, measure, facts, needed=name in OURS or self._strict)

    def _server_seconds(self) -> float:
        used = self._redis.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])


def label_of(name: str) -> str:
    """Return the label of a contestant that may be absent."""
    return _OTHERS[name]().label if name in _OTHERS else PYTHON[name].label
