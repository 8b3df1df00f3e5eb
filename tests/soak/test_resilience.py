"""The short form of the soak test: small rows, and the checks that hold at any speed."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from dscache.aio import heartbeat
from dscache.embedded import ServerBinary, find_server
from tests.conftest import SERVERS
from tests.soak import rows
from tests.soak.figures import Figures
from tests.support import blocking
from tests.support.blocking import run_child

# The rows start their own servers, to kill them.
BINARY = SERVERS[0] if SERVERS and isinstance(SERVERS[0], ServerBinary) else find_server()

SIZES: dict[str, dict[str, Any]] = {
    "kill": {"rounds": 3},
    "storm": {"operations": 6000, "delays": (0.0, 0.02, 0.2)},
    "blackhole": {"seconds": 3.0},
    "freeze": {"seconds": 1.5},
    "cut": {"step": 3},
    "fuzz": {"replies": 20_000},
    "mutations": {"cases": 5000},
    "failover": {"rounds": 1},
    "refused": {"seconds": 2.0},
    "near": {"reads": 100_000, "mischief_pause": 0.05},
    "away": {"operations": 15_000},
    "silent": {},
    "mixed": {"minutes": 4 / 60},
    "messages": {"count": 9000},
    "messages-kill": {"rounds": 2},
    "messages-slow": {"seconds": 1.0, "pause": 0.01},
    "maintenance": {"rounds": 5},
    "sync-maintenance": {"rounds": 5},
    "sync-kill": {"rounds": 2},
    "records-updates": {"processes": 3, "times": 60},
    "records-crowd": {"callers": 50},
    "records-model": {"examples": 10},
    "records-mirror": {"writes": 4000},
    "records-scans": {"names": 20_000},
    "records-expiry": {"names": 2000, "ttl": 3},
    "sync-near": {"reads": 60_000},
    "sync-near-disturbed": {"reads": 20_000, "mischief_pause": 0.05, "times": 1},
    "sync-near-race": {"rounds": 400},
    "sync-near-writes": {"rounds": 200, "losses": 20},
    "sync-near-memory": {"processes": 2, "count": 20_000},
    # tests/blocking/test_near_faults.py has the other scenes.
    "sync-near-faults": {"seconds": 4.5, "rounds": 1, "scenes": ("stopped", "overrun")},
}

# The pure core has no such reader, and no such near cache.
OF_COMPILED_CORE: dict[str, dict[str, Any]] = {
    "own-reader": {"cases": 6000},
    "sync-near-host": {"reads": 20_000, "processes": 2},
    "sync-near-host-killed": {"times": 3, "processes": 3},
}

# tests/deepstream has its short form, as it needs Node.
ON_NODE = ("deepstream", "deepstream-calls")

# test_sync.py and test_sync_cluster.py have their short form.
OF_THREADS = ("sync-threads", "sync-interrupts", "sync-reshard")

# test_cluster.py has their short form, with a shared cluster.
ON_CLUSTERS = ("cluster-records", "reshard", "cluster-kill", "cluster-failover")

# Their short form is in test_injection.py and test_interruptions.py.
IN_PROCESSES = ("injection", "interruptions", "shortage", "finalizers")


@pytest.mark.parametrize("row", SIZES)
async def test_row(row: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if row == "silent":
        monkeypatch.setattr(heartbeat, "_PING_AFTER", 0.2)
        monkeypatch.setattr(heartbeat, "_PING_ANSWER", 0.2)
    figures = await rows.run(row, BINARY, **SIZES[row])
    print(figures.line())
    assert figures.problems == []
    assert figures.operations > 0


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        ("sync-near", {"reads": 5000}),
        ("sync-near-race", {"rounds": 8, "patience": 1.0}),
        ("sync-near-writes", {"rounds": 20}),
        ("sync-near-faults", {"rounds": 1, "scenes": ("removed",)}),
    ],
)
async def test_a_near_cache_that_hears_nothing_is_noticed(
    row: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "PATIENCE", 2)
    figures = await rows.run(row, BINARY, near="naive", **sizes)
    assert figures.problems != []


async def test_a_child_that_does_not_end_is_a_problem_of_its_row(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other scenes of the row, and the other rows, run all the same."""
    monkeypatch.setattr(rows, "SCENES", [("first", "asyncio"), ("second", "uvloop")])

    def run_briefly(script: str, *arguments: str, backend: str, seconds: float) -> Any:
        return run_child(script, *arguments, backend=backend, seconds=0.01)

    monkeypatch.setattr(rows, "run_child", run_briefly)
    figures = await rows.run("interruptions", BINARY, rounds=1)
    assert figures.operations == 2
    first, second = figures.problems
    assert "first" in first
    assert "second" in second
    assert "did not end within 0.01 s" in first


async def test_a_program_that_does_not_end_is_a_problem_of_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def row(figures: Figures, binary: ServerBinary) -> None:
        raise subprocess.TimeoutExpired("program", 1.0)

    monkeypatch.setitem(rows.ROWS, "stuck", row)
    figures = await rows.run("stuck", BINARY)
    [problem] = figures.problems
    assert "TimeoutExpired" in problem


@pytest.mark.parametrize("row", OF_COMPILED_CORE)
async def test_row_of_the_compiled_core(row: str) -> None:
    figures = await rows.run(row, BINARY, **OF_COMPILED_CORE[row])
    print(figures.line())
    assert figures.problems == []


def test_every_row_is_here() -> None:
    assert {
        *SIZES,
        *OF_COMPILED_CORE,
        *ON_NODE,
        *ON_CLUSTERS,
        *OF_THREADS,
        *IN_PROCESSES,
    } == rows.ROWS.keys()
