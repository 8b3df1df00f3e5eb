"""The fixtures of the suite, and the hooks that report its run.

pytest-benchmark's options set the pace: ``--benchmark-min-rounds`` is the number of rounds, and
``--benchmark-max-time`` the seconds of all rounds of one benchmark. With ``--benchmark-disable``
everything is done once and hardly measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import goals
import report
from clients.work import DOCUMENT, RECORDS, encode
from contest import Row, facts_of, replay
from contestants import CONTESTANTS, OURS, Absent
from stage import Pace, Stage

LIBRARIES = ("hiredis", "msgspec", "redis", "uvloop")


@pytest.fixture(scope="session")
def pace(request: pytest.FixtureRequest) -> Pace:
    """Return the pace of the run."""
    options = request.config.option
    if options.benchmark_disable:
        return Pace(1, 0.0005, 1, 50)
    rounds = options.benchmark_min_rounds
    return Pace(rounds, float(options.benchmark_max_time) / rounds, 2, RECORDS)


@pytest.fixture(scope="module")
def stage(pace: Pace) -> Iterator[Stage]:
    """Yield the server and the clients of a file."""
    with contextlib.ExitStack() as stack:
        yield Stage(pace, stack)


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
            pytest.skip(f"{CONTESTANTS[row.client].label}: {reason}")
        one = CONTESTANTS[row.client]
        replay(benchmark, samples, **facts_of(row, one.label, one.version))

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
        for chart in folder.glob("*.svg"):
            chart.unlink()
        config.option.benchmark_json = str(folder / "results.json")
        config.option.benchmark_histogram = [str(folder / "histogram")]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if goals.key_of(item.nodeid) in goals.COMPARED:
            item.add_marker("goals")


def pytest_report_header(config: pytest.Config) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    absent: dict[str, list[str]] = {}
    for name, one in CONTESTANTS.items():
        if why := one.absence():
            absent.setdefault(why, []).append(name)
    versions_of = {one.package: one.version for one in CONTESTANTS.values() if one.version}
    return [
        f"machine: {processor()}, load average {os.getloadavg()[0]:.2f}; Python "
        f"{platform.python_version()}, {versions}",
        f"clients: {', '.join(f'{name} {version}' for name, version in versions_of.items())}",
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
