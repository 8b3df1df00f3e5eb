"""The server and the clients of a file, and the rounds of a group, in which all take turns."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from clients.work import Work
from contest import Row, Sample
from contestants import CONTESTANTS, Absent
from dscache.embedded import EmbeddedServer
from processes import HERE, awake, on_core
from tests.support.clusters import ClusterGroup

# Rounds of bulks that take seconds.
FEW_ROUNDS = 3
MORE = 4
PRIMARIES = {"one": 1, "three": 3}


@dataclass(frozen=True)
class Pace:
    """How often each contestant is measured, and about how many seconds at a time."""

    rounds: int
    seconds: float
    warm: int
    """How often each is measured before: cold connections and caches don't count."""
    taste: int
    """Records of a first measurement, which shows how many take the wanted time."""


class Stage:
    """A private server, clusters if they are wanted, and the clients on them."""

    def __init__(self, pace: Pace, stack: contextlib.ExitStack) -> None:
        self.pace = pace
        self._stack = stack
        self._clients: dict[tuple[str, str], Any] = {}
        self._clusters: dict[str, ClusterGroup] = {}
        self._stored: dict[tuple[str, str], int] = {}
        self._measured: dict[str, dict[Row, list[Sample] | Exception]] = {}
        self._infos: dict[str, list[Any]] = {}
        self.server = stack.enter_context(EmbeddedServer())
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        # With a single core, or if the system can't pin a process, nothing is changed.
        self.core: int | None = cores[0] if len(cores) > 1 else None
        self._server_core: int | None = cores[1] if len(cores) > 1 else None
        self.pin(self.server.pid)
        stack.enter_context(awake(cores[:2] if len(cores) > 1 else []))

    def pin(self, pid: int) -> None:
        """Put a server on the servers' core."""
        if self._server_core is not None:
            os.sched_setaffinity(pid, {self._server_core})

    def where(self, target: str) -> dict[str, Any]:
        """Return the address of a server or cluster, which is started if it isn't there."""
        if target not in PRIMARIES:
            at: dict[str, Any] = {"host": self.server.host, "port": self.server.port}
            layout = {"keyLayout": "hashtag"} if target == "hashtag" else {}
            return {**at, "options": {**at, **layout}}
        if target not in self._clusters:
            cluster = ClusterGroup(self.server.binary, primaries=PRIMARIES[target], replicas=0)
            self._clusters[target] = self._stack.enter_context(cluster)
            for node in cluster.nodes:
                self.pin(node.server.pid)
        nodes = self._clusters[target].nodes
        options = self._clusters[target].options
        return {"host": "127.0.0.1", "port": nodes[0].port, "options": options}

    def client(self, name: str, target: str = "server") -> Any:
        """Return a client in a process of its own, which is started if it isn't there.

        Raises Absent if it can't take part.
        """
        if reason := CONTESTANTS[name].absence():
            raise Absent(reason)
        if (name, target) not in self._clients:
            client = self.fresh(name, target)
            self._clients[name, target] = client
            self._stack.callback(client.close)
        return self._clients[name, target]

    def fresh(self, name: str, target: str = "server", before: Sequence[str] = ()) -> Any:
        """Start another client, below a program if one is named; the caller closes it."""
        return CONTESTANTS[name].start(self.where(target), self.core, before)

    def store(self, work: Work, target: str = "server") -> None:
        """Write the records that this work reads, unless they are there."""
        if not work.reads or self._stored.get((target, work.kind), 0) >= work.stored:
            return
        self.client("fast", target).ask("store", work)
        self._stored[target, work.kind] = work.stored

    def measured(self, title: str, row: Row, rows: Sequence[Row]) -> list[Sample]:
        """Return the rounds of one row; the first call for a group measures all its rows."""
        if title not in self._measured:
            with self._beside(row.work):
                self._measured[title] = self._measure(rows)
        found = self._measured[title][row]
        if isinstance(found, Exception):
            raise found
        return found

    def _measure(self, rows: Sequence[Row]) -> dict[Row, list[Sample] | Exception]:
        told: dict[Row, list[Sample] | Exception] = {}
        sizes: dict[Row, int] = {}
        for row in rows:
            try:
                self.store(row.work, row.target)
                for _ in range(1 if row.work.is_huge else self.pace.warm):
                    taste = self._sample(row, self.pace.taste)
            except (Absent, RuntimeError) as error:
                told[row] = error
            else:
                # Thousands of tasks have done little in the usual time.
                seconds = self.pace.seconds * (MORE if row.work.tasks > 1000 else 1)
                sizes[row] = max(1, round(taste["records"] / taste["seconds"] * seconds))
                told[row] = []
        huge = any(row.work.is_huge for row in sizes)
        for _ in range(min(FEW_ROUNDS, self.pace.rounds) if huge else self.pace.rounds):
            for row, size in sizes.items():
                samples = told[row]
                if isinstance(samples, list):
                    try:
                        samples.append(self._sample(row, size))
                    except RuntimeError as error:
                        told[row] = error
        return told

    def _sample(self, row: Row, records: int) -> Sample:
        client = self.client(row.client, row.target)
        before = self._server_seconds(row.target)
        sample: dict[str, float] = client.measure(row.work, records)
        sample["server_cpu"] = self._server_seconds(row.target) - before
        return sample

    def _server_seconds(self, target: str) -> float:
        if target not in self._infos:
            at = self.where(target)
            ports = (
                [node.port for node in self._clusters[target].nodes] if target in PRIMARIES else []
            )
            servers = [redis.Redis(at["host"], port) for port in ports or [at["port"]]]
            for one in servers:
                self._stack.callback(one.close)
            self._infos[target] = servers
        used = [one.info("cpu") for one in self._infos[target]]
        return sum(float(one["used_cpu_user"] + one["used_cpu_sys"]) for one in used)

    @contextlib.contextmanager
    def _beside(self, work: Work) -> Iterator[None]:
        """Let another process rewrite records, on the servers' core, if the work is about that."""
        if work.operation != "popular":
            yield
            return
        self.store(work)
        at = (self.server.host, str(self.server.port))
        with on_core(self._server_core):
            writer = subprocess.Popen([sys.executable, "-m", "clients.rewriter", *at], cwd=HERE)
        try:
            yield
            if writer.poll() is not None:
                raise RuntimeError(f"the writer has ended with {writer.returncode}")
        finally:
            writer.kill()
            writer.wait()
