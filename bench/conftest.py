"""The server and the clients of each file, and contests measured in interleaved rounds.

pytest-benchmark's options set the pace: ``--benchmark-min-rounds`` is the number of rounds, and
``--benchmark-max-time`` the seconds of all rounds of one benchmark. With ``--benchmark-disable``
everything is done once and hardly measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

import goals
import report
from clients.peers import OURS, PYTHON
from clients.work import DOCUMENT, RECORDS, Work, encode
from contest import Row, Sample, facts_of, replay
from dscache.embedded import EmbeddedServer
from processes import (
    DEEPSTREAM,
    HERE,
    LIMITS,
    Absent,
    Limit,
    absence_of,
    awake,
    install_deepstream,
    label_of,
    on_core,
    start_deepstream,
    start_python,
    version_of,
)
from tests.support.clusters import ClusterGroup

# Rounds of bulks that take seconds.
FEW_ROUNDS = 3
MORE = 4
PRIMARIES = {"one": 1, "three": 3}
LIBRARIES = ("hiredis", "msgspec", "redis", "uvloop")


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

    def __init__(self, pace: Pace, packages: Callable[[], Path], stack: contextlib.ExitStack):
        self.pace = pace
        self._packages = packages
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
        if reason := absence_of(name):
            raise Absent(reason)
        if (name, target) not in self._clients:
            client = self.fresh(name, self.where(target))
            self._clients[name, target] = client
            self._stack.callback(client.close)
        return self._clients[name, target]

    def fresh(self, name: str, where: dict[str, Any], before: Sequence[str] = ()) -> Any:
        """Start another client, which the caller closes."""
        if name in LIMITS:
            return Limit(name, where, self.core)
        with on_core(self.core):
            if name == DEEPSTREAM:
                return start_deepstream(where, self._packages())
            return start_python(name, where, before)

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


@pytest.fixture(scope="session")
def pace(request: pytest.FixtureRequest) -> Pace:
    """Return the pace of the run."""
    options = request.config.option
    if options.benchmark_disable:
        return Pace(1, 0.0005, 1, 50)
    rounds = options.benchmark_min_rounds
    return Pace(rounds, float(options.benchmark_max_time) / rounds, 2, RECORDS)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function for the folder of deepstream's packages, installed when it is called."""
    tried: list[Path | Absent] = []

    def folder() -> Path:
        if not tried:
            path = tmp_path_factory.mktemp("node")
            try:
                install_deepstream(path)
            except Absent as reason:
                tried.append(reason)
            else:
                tried.append(path)
        if isinstance(tried[0], Absent):
            raise tried[0]
        return tried[0]

    return folder


@pytest.fixture(scope="module")
def stage(pace: Pace, packages: Callable[[], Path]) -> Iterator[Stage]:
    """Yield the server and the clients of a file."""
    with contextlib.ExitStack() as stack:
        yield Stage(pace, packages, stack)


@pytest.fixture
def race(request: pytest.FixtureRequest, stage: Stage, benchmark: Any) -> Callable[[Row], None]:
    """Return a function that reports one contestant of a group, whose turns were interleaved."""

    def run(row: Row) -> None:
        title = _group_of(request.node)
        rows = [
            item.callspec.params["row"]  # type: ignore[attr-defined]
            for item in request.session.items
            if item.path == request.path and _group_of(item) == title
        ]
        try:
            samples = stage.measured(title, row, rows)
        except Absent as reason:
            if row.client in OURS:
                raise
            pytest.skip(f"{label_of(row.client)}: {reason}")
        facts = facts_of(row, label_of(row.client), version_of(row.client))
        replay(benchmark, samples, **facts)

    return run


def _group_of(item: pytest.Item) -> str:
    marker = item.get_closest_marker("benchmark")
    return marker.kwargs.get("group", "") if marker else ""


# -- hooks of the run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--report", type=Path, metavar="FOLDER", help="write results.json and a report of it here"
    )
    parser.addoption("--update", action="store_true", help="write the counts of instructions anew")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "goals: a benchmark that a goal compares.")
    config.addinivalue_line("markers", "large: work that takes long even when it is done once.")
    if folder := config.getoption("report"):
        folder.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = str(folder / "results.json")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if goals.key_of(item.nodeid) in goals.COMPARED:
            item.add_marker("goals")


def pytest_report_header(config: pytest.Config) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    names = [*PYTHON, DEEPSTREAM, *LIMITS]
    absent: dict[str, list[str]] = {}
    for name in names:
        if why := absence_of(name):
            absent.setdefault(why, []).append(name)
    packages = {one.package: one.version for name, one in PYTHON.items() if not absence_of(name)}
    return [
        f"machine: {processor()}, load average {os.getloadavg()[0]:.2f}; Python "
        f"{platform.python_version()}, {versions}",
        f"clients: {', '.join(f'{name} {version}' for name, version in packages.items())}",
        *(f"  absent: {', '.join(some)}: {why}" for why, some in absent.items()),
        f"times are of one record of {len(encode(DOCUMENT))} bytes, OPS are records per second; "
        f"in test_micro.py of {RECORDS:,}",
    ]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["processor_name"] = processor()
    machine_info["load_average"] = os.getloadavg()[0]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    finished = [one for some in terminalreporter.stats.values() for one in some]
    for one in finished:
        if getattr(one, "when", "") == "call":
            for name, told in one.user_properties:
                terminalreporter.write_line(f"{name}: {told}")
    skipped = {
        goals.key_of(one.nodeid): str(one.longrepr[2]).removeprefix("Skipped: ")
        for one in terminalreporter.stats.get("skipped", ())
        if isinstance(one.longrepr, tuple)
    }
    benchmarks = [one.as_dict() for one in config._benchmarksession.benchmarks]  # type: ignore[attr-defined]
    told = goals.table(benchmarks, skipped)
    if told:
        terminalreporter.section("goals")
        terminalreporter.write_line("\n".join(goals.as_text(told)))
    if (folder := config.getoption("report")) and benchmarks:
        path = report.write(folder, told, skipped)
        terminalreporter.write_line(f"report: {path}")


def processor() -> str:
    """Return the processor's name and how many cores this machine has."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            models = [line.partition(":")[2].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"
