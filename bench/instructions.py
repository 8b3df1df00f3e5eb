"""The gate: instructions of an operation on the hottest paths, against the counted ones.

``make instructions`` counts them and fails if one needs more than 2 % more than
``instructions.json`` says; ``make instructions ARGS=--update`` writes the file anew. Counts of
another Python, compiler or library can't be compared, so the file holds them by environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import callgrind
from clients.work import Work
from dscache.embedded import EmbeddedServer
from processes import HERE, Process
from tests.support.clusters import ClusterGroup

FILE = HERE / "instructions.json"
MOST = 1.02
TIMES = 1000
PATHS = (
    "pipeline get",
    "pipeline set",
    "pipeline if_newer",
    "pipeline get_bulk",
    "pipeline set_bulk",
    "near cache hit",
    "blocking get",
    "blocking get, cluster",
    "await get, 100 tasks",
    "await get, near cache hit",
    "await fetch, 100 tasks",
    "await fetch, near cache hit",
    "blocking get, near cache hit",
    "blocking fetch",
    "blocking fetch, near cache hit",
)


def environment() -> str:
    """Return whatever changes the counts without a change of dscache."""
    compiler = subprocess.run(
        ["cc", "-dumpfullversion"], stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("msgspec", "uvloop")]
    libc = " ".join(platform.libc_ver())
    parts = [python, platform.machine(), f"cc {compiler}", libc, *libraries]
    return ", ".join(parts)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a function that counts the instructions of a path."""
    if reason := callgrind.absence():
        pytest.fail(f"instructions can't be counted: {reason}")
    folder = tmp_path_factory.mktemp("callgrind")
    with EmbeddedServer() as server, ClusterGroup(server.binary, primaries=1, replicas=0) as one:
        where = json.dumps({"host": server.host, "port": server.port}), json.dumps(one.options)
        program = [sys.executable, "-m", "clients.hot_paths", *where]
        command = [*callgrind.command(folder), *program]
        process = Process("hot paths", command, {"PYTHONHASHSEED": "0"})
        try:
            yield lambda path: callgrind.count(
                process, folder, lambda n: process.ask(path, Work("get"), n), TIMES
            )
        finally:
            process.close()


@pytest.fixture(scope="module")
def known(request: pytest.FixtureRequest) -> Iterator[dict[str, int]]:
    """Yield the counts of this environment; with --update, write those that a test puts there."""
    everything = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    here = everything.setdefault(environment(), {})
    yield here
    if request.config.getoption("update"):
        FILE.write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@pytest.mark.parametrize("path", PATHS)
def test_instructions(
    path: str, counted: Any, known: dict[str, int], request: pytest.FixtureRequest
) -> None:
    found = round(counted(path))
    before = known.get(path)
    told = f"{found:,} instructions" + (f", {before:,} in {FILE.name}" if before else "")
    request.node.user_properties.append(("counted", f"{path}: {told}"))
    if request.config.getoption("update"):
        known[path] = found
    elif before is None:
        pytest.skip(
            f"{FILE.name} has no count for {environment()}; make instructions ARGS=--update adds it"
        )
    else:
        assert found <= before * MOST, (
            f"{path} needs {found / before - 1:.1%} more instructions: {told}; make it cheaper, or "
            "commit the new count: make instructions ARGS=--update"
        )
