"""The cost of a record: instructions, memory, waiting, and the time of an import.

Processor time of client and server is in the ``extra_info`` of every benchmark that has a server.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import callgrind
from clients.work import RECORDS, Work
from contest import Row, contest, grouped, replay, rows
from contestants import OURS

WATCHED = ("fast", "pure", "redis-py", "coredis")
WORKS = {
    "get": Work("get", 100, decode=False),
    "get-decoded": Work("get", 100),
    "get_bulk": Work("get_many", decode=False),
    "get_bulk-decoded": Work("get_many"),
    "set": Work("set", 100),
    "set_bulk": Work("set_many"),
}
# Records of clients that take a hundred times as many instructions, which are slow to count.
FEW = 100
IN_FLIGHT = 100_000
WAITING = (*WATCHED, "glide", "ruvio", "redis-rs", "aiocache")
STEADY = 2000
IMPORTS = ("redis", "dscache", "redis.asyncio", "coredis", "glide", "ruvio", "aiocache")
LEAST_IMPORTS = 11


@pytest.fixture(scope="module")
def instructions(
    stage: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Row], float]]:
    """Yield a function that counts the instructions of a record, in user mode."""
    clients: dict[str, tuple[Any, Path]] = {}

    def count(row: Row) -> float:
        if row.client not in clients:
            folder = tmp_path_factory.mktemp("callgrind")
            client = stage.fresh(row.client, row.target, callgrind.command(folder))
            clients[row.client] = client, folder
            stack.callback(client.close)
        client, folder = clients[row.client]
        records = RECORDS if row.client in OURS or row.work.is_bulk else FEW
        return callgrind.count(client, folder, lambda n: client.measure(row.work, n), records)

    with contextlib.ExitStack() as stack:
        yield count


@contest({f"cost: {name}": rows(WATCHED, work, name) for name, work in WORKS.items()})
def test_record(race: Any, row: Row, benchmark: Any, instructions: Callable[[Row], float]) -> None:
    race(row)
    if reason := callgrind.absence():
        benchmark.extra_info["instructions"] = f"not counted: {reason}"
    elif benchmark.enabled or row == rows(["fast"], WORKS["get_bulk"], "get_bulk")[0]:
        benchmark.extra_info["instructions"] = instructions(row)


@contest(
    {
        "cost: waiting for a get at half the highest load": rows(
            WAITING, Work("latency", decode=False), "half"
        ),
        f"cost: waiting for a get at {STEADY:,} a second": rows(
            WAITING, Work("latency", decode=False, rate=STEADY), "steady"
        ),
    }
)
def test_waiting(race: Any, row: Row) -> None:
    race(row)


@grouped(f"cost: memory of {IN_FLIGHT:,} records")
@pytest.mark.parametrize("client", WATCHED)
def test_memory(benchmark: Any, stage: Any, client: str) -> None:
    """Report the growth of a process, the server being stopped while records are asked for."""
    count = IN_FLIGHT if benchmark.enabled else RECORDS
    bulk = Work("get_many", size=count, decode=False)
    stage.store(bulk)
    facts: dict[str, float] = {}
    with closing(stage.fresh(client)) as process:
        facts["peak_bytes"] = process.ask("peak", bulk)["bytes"] / count
        sample = process.measure(bulk, count)
        for name, decode in (("kept_bytes", False), ("decoded_bytes", True)):
            held = process.ask("held", Work("get_many", decode=decode))
            facts[name] = held["bytes"] / held["records"]
    # A get of redis-py would open a connection for each of them.
    if client != "redis-py":
        facts |= in_flight(stage, client, count)
    replay(benchmark, [sample], **facts)


def in_flight(stage: Any, client: str, count: int) -> dict[str, float]:
    with closing(stage.fresh(client)) as process:
        process.measure(Work("get", 100, decode=False), RECORDS)
        work = Work("get", decode=False, size=count)
        stage.server.pause()
        try:
            issued = process.ask("issue", work)
        finally:
            stage.server.resume()
        answered = process.ask("finish", work)
    return {
        "asked_bytes": (issued["after"] - issued["before"]) / count,
        "answered_bytes": (answered["after"] - issued["before"]) / count,
    }


@pytest.fixture(scope="module")
def imports(pace: Any) -> dict[str, list[float]]:
    """Return the seconds of imports in fresh interpreters, in rounds."""
    program = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    told: dict[str, list[float]] = {module: [] for module in IMPORTS}
    # The first round is discarded, as it may have to compile, unless there is no other.
    rounds = 0 if pace.rounds == 1 else max(pace.rounds, LEAST_IMPORTS)
    for number in range(1 + rounds):
        for module, seconds in told.items():
            done = subprocess.run(
                [sys.executable, "-c", program.format(module)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=120,
                check=False,
            )
            if done.returncode == 0 and bool(number) == bool(rounds):
                seconds.append(float(done.stdout))
    return told


@grouped("cost: import, without the start of Python itself")
@pytest.mark.parametrize("module", IMPORTS)
def test_import(benchmark: Any, imports: dict[str, list[float]], module: str) -> None:
    if not imports[module]:
        pytest.skip(f"import {module} fails: it is not installed")
    replay(benchmark, [{"records": 1, "seconds": seconds} for seconds in imports[module]])
