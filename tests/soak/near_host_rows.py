"""Soak rows for the near cache that the processes of a host share: threads, kills of the owner."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dscache.embedded import EmbeddedServer, ServerBinary
from tests.programs.near_host_kills import READER
from tests.soak import near_thread_rows
from tests.soak.figures import Figures
from tests.soak.near_rows import NAMES, Board, start_writers

_ROOT = Path(__file__).parents[2]
_IDLE_LIMIT = 0.5
# Too small for all names, so that processes also evict what others read.
_SHARED = {"shared": True, "maxRecords": NAMES // 2, "maxBytes": 2**20, "mode": "broadcast"}


async def threads(
    figures: Figures, binary: ServerBinary, *, reads: int = 10_000_000, processes: int = 4
) -> None:
    """Read in threads of processes that share what they read, as in the row ``sync-near``."""
    near: Any = {**_SHARED, "idleLimit": 60_000}
    await near_thread_rows.threads(
        figures, binary, reads=reads, processes=processes, near=near, core="fast"
    )


async def killed(
    figures: Figures,
    binary: ServerBinary,
    *,
    times: int = 100,
    processes: int = 8,
    count: int = 2,
    pause: float = 0.02,
) -> None:
    """Kill the process that hears of changes for all others, and start another one."""
    await asyncio.to_thread(_killed, figures, binary, times, processes, count, pause)


def _killed(
    figures: Figures, binary: ServerBinary, times: int, processes: int, count: int, pause: float
) -> None:
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(binary) as server:
        path = Path(folder, "board")
        board = Board(path, NAMES)
        writers = start_writers(server, path, pause)
        where = {
            "options": {"url": server.url, "connectionName": READER, "commandTimeout": 60_000},
            "near": {**_SHARED, "idleLimit": round(_IDLE_LIMIT * 1000)},
            "host": server.host, "port": server.port, "board": str(path), "names": NAMES,
            "threads": count, "reads": 1000 * count, "pause": pause,
            "disturbed": True, "bound": _IDLE_LIMIT,
            "times": times, "processes": processes,
            # A process that is killed while it writes would leave a step open.
            "writes": False,
        }  # fmt: skip
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tests.programs.near_host_kills", json.dumps(where)],
                cwd=_ROOT,
                env={**os.environ, "DSCACHE_BACKEND": "fast"},
                capture_output=True,
                text=True,
                timeout=3600,
            )
        finally:
            board.end()
            for writer in writers:
                if writer.wait(30):
                    figures.problems.append(f"a writer ended with {writer.returncode}")
        if done.returncode:
            figures.problems.append(done.stderr)
            return
        told = json.loads(done.stdout)
        figures.notes.append(f"{told['killed']} owners killed, {sum(board.writes)} writes")
    figures.problems += told["problems"]
    if len(told["found"]) != told["expected"]:
        figures.problems.append(f"{len(told['found'])} readers of {told['expected']} have ended")
    for number, one in enumerate(told["found"]):
        _tell(figures, number, one)


def _tell(figures: Figures, number: int, found: dict[str, Any]) -> None:
    figures.operations += found["reads"]
    figures.outcomes.update(found["outcomes"])
    figures.problems += [f"process {number}: {problem}" for problem in found["problems"]]
    near = found["near"]
    figures.notes.append(
        f"process {number}: {found['reads'] / found['seconds']:.0f} reads/s, {near['hits']} hits, "
        f"{near['misses']} misses, flushes {near['flushes']}, {found['outdated']} outdated for up "
        f"to {found['longest'] * 1000:.1f} ms"
    )
    if not near["hits"]:
        figures.problems.append(f"process {number}: nothing was put to the test: {near}")
