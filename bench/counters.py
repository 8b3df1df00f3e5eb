"""Instructions and allocations of a record, counted: they don't depend on other work."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contest import OURS, label_of
from contestants import HERE, PythonClient
from dscache.embedded import EmbeddedServer
from report import Table
from workload import RECORDS, Work

TASKS = 100
WORKS = {
    "get, 100 tasks, raw": Work("get", TASKS, decode=False),
    "get, 100 tasks, decoded": Work("get", TASKS),
    "get_bulk 1000, raw": Work("get_many", decode=False),
    "get_bulk 1000, decoded": Work("get_many"),
    "set, 100 tasks": Work("set", TASKS),
    "set_bulk 1000": Work("set_many"),
}
# Records of contestants that take a hundred times as many instructions, which are slow to count.
FEW = 100

Reading = dict[str, dict[str, float | None]]


# -- instructions


def instructions(server: EmbeddedServer, names: Sequence[str], smoke: bool) -> tuple[Table, Any]:
    """Count instructions a record.

    By the processor's counters, by valgrind's callgrind if those are missing, or not at all.
    """
    counter = _counter()
    wanted = list(WORKS)[2:3] if smoke else list(WORKS)
    title = "Instructions a record"
    if isinstance(counter, str):
        return Table(title, ["", *WORKS], [], f"Not available: {counter}."), {"absent": counter}
    told: Reading = {}
    for name in names:
        label = label_of(name)
        told[label] = dict.fromkeys(WORKS)
        try:
            with counter(server, name) as count_of:
                for what in wanted:
                    work = WORKS[what]
                    ours_or_bulk = name in OURS or work.operation.endswith("_many")
                    records = RECORDS if ours_or_bulk else FEW
                    # The difference, as a request has a cost by itself.
                    less, more = count_of(work, records), count_of(work, 3 * records)
                    told[label][what] = (more - less) / (2 * records)
        except RuntimeError as error:
            if name in OURS:
                raise
            print(f"instructions: {label}: {error}", file=sys.stderr)
    note = f"Counted by {'perf' if counter is _by_perf else 'callgrind of valgrind'}."
    return Table(title, ["", *WORKS], cells(told), note), told


Counter = Callable[[EmbeddedServer, str], Any]


def _counter() -> Counter | str:
    """Return the available counter of instructions, or the reason for its absence."""
    reasons = []
    if perf := shutil.which("perf"):
        done = _run(perf, "stat", "-x,", "-e", "instructions:u", "true")
        if _perf_count(done) is not None:
            return _by_perf
        reasons.append("perf finds no counters of the processor")
    else:
        reasons.append("there is no perf in PATH")
    if shutil.which("valgrind") and shutil.which("callgrind_control"):
        return _by_callgrind
    return ", and ".join([*reasons, "there is no valgrind in PATH"])


@contextmanager
def _by_perf(server: EmbeddedServer, name: str) -> Iterator[Callable[[Work, int], float]]:
    with PythonClient(name) as client:
        client.open(server)

        def counted(work: Work, records: int) -> float:
            client.measure(work, records)
            watch = subprocess.Popen(
                ["perf", "stat", "-x,", "-e", "instructions:u", "-p", str(client.pid)],
                stderr=subprocess.PIPE,
                text=True,
            )
            # It doesn't signal when it has begun to count.
            time.sleep(0.5)
            client.measure(work, records)
            watch.send_signal(signal.SIGINT)
            _, said = watch.communicate(timeout=30)
            found = _perf_count(said)
            if found is None:
                raise RuntimeError(f"perf counted nothing: {said.strip()}")
            return found

        yield counted


def _perf_count(said: str) -> float | None:
    """Return the instructions that perf has counted; None if the processor doesn't count."""
    match = re.search(r"^(\d+),[^,]*,instructions", said, re.MULTILINE)
    return float(match[1]) if match else None


@contextmanager
def _by_callgrind(server: EmbeddedServer, name: str) -> Iterator[Callable[[Work, int], float]]:
    with tempfile.TemporaryDirectory(prefix="dscache-bench-") as folder:
        # Off at first: merely starting Python would take a minute.
        options = ("--instr-atstart=no", f"--callgrind-out-file={folder}/out")
        before = ("valgrind", "-q", "--tool=callgrind", *options)
        with PythonClient(name, before=before) as client:
            client.open(server)

            def control(*what: str) -> None:
                _run("callgrind_control", *what, str(client.pid))

            control("-i", "on")
            warm: set[Work] = set()

            def counted(work: Work, records: int) -> float:
                if work not in warm:
                    client.measure(work, records)
                    warm.add(work)
                control("-z")
                client.measure(work, records)
                control("--dump=x")
                return _callgrind_count(Path(folder))

            yield counted


def _callgrind_count(folder: Path) -> float:
    """Return the instructions of a dump, which is then removed."""
    found = None
    for path in folder.iterdir():
        match = re.search(r"^(?:summary|totals): (\d+)", path.read_text("utf-8"), re.MULTILINE)
        found = float(match[1]) if match else found
        path.unlink()
    if found is None:
        raise RuntimeError("callgrind counted nothing")
    return found


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout


# -- allocations


def allocations(server: EmbeddedServer, names: Sequence[str], records: int) -> tuple[Table, Any]:
    """Count the calls of malloc a record and their bytes."""
    title = "Allocations a record: calls of malloc, and bytes asked for"
    header = ["", *WORKS]
    with tempfile.TemporaryDirectory(prefix="dscache-bench-") as folder:
        library = _counting_library(Path(folder))
        if isinstance(library, str):
            return Table(title, header, [], f"Not available: {library}."), {"absent": library}
        environment = {"LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"}
        calls: Reading = {}
        size: Reading = {}
        for name in names:
            label = label_of(name)
            with PythonClient(name, environment=environment) as client:
                client.open(server)
                calls[label], size[label] = {}, {}
                for what, work in WORKS.items():
                    client.measure(work, records)
                    sample = client.measure(work, records)
                    calls[label][what] = sample["allocations"] / sample["records"]
                    size[label][what] = sample["bytes"] / sample["records"]
    rows = [
        [label, *(f"{calls[label][what]:.2f}; {size[label][what]:,.0f} B" for what in WORKS)]
        for label in calls
    ]
    note = (
        "Counted in a Python that takes each object from malloc; what its free lists serve is not "
        "counted, nor what is given back."
    )
    return Table(title, header, rows, note), {"calls": calls, "bytes": size}


def _counting_library(folder: Path) -> Path | str:
    """Return the compiled counting library, or the reason for its absence."""
    if not sys.platform.startswith("linux"):
        return "malloc is counted on Linux only"
    compiler = shutil.which("cc")
    if compiler is None:
        return "there is no cc in PATH, which compiles what counts"
    library = folder / "allocations.so"
    options = ("-O2", "-shared", "-fPIC", "-o", str(library))
    said = _run(compiler, *options, str(HERE / "allocations.c"))
    return library if library.exists() else f"cc can't compile allocations.c: {said[:200]}"


def cells(told: Reading) -> list[list[str]]:
    return [
        [label, *("-" if one is None else f"{one:,.0f}" for one in row.values())]
        for label, row in told.items()
    ]
