"""The cost of a record: processor time, instructions, allocations, memory, and waiting."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from chart import Line, Plot, lines
from contest import DEEPSTREAM, Contest, label_of
from contestants import PythonClient
from counters import WORKS, Reading, allocations, cells, instructions
from dscache.embedded import EmbeddedServer
from report import Section, Table, count
from rounds import Group, Pace, Row, measure
from workload import RECORDS, Work, share_core

WHO = ("fast", "pure", "redis-py", "coredis", "glide", "aiocache", DEEPSTREAM)
# Contestants whose every allocation goes through malloc, and that valgrind runs.
WATCHED = ("fast", "pure", "redis-py", "coredis")
IN_FLIGHT = 100_000
# The imports timed in fresh interpreters, and how far above redis-py the goal allows dscache.
COMPARED_IMPORTS = ("redis", "dscache")
IMPORTS = (*COMPARED_IMPORTS, "redis.asyncio", "coredis", "glide", "aiocache")
IMPORT_GOAL = 0.060
WINDOW = 100
# Rare delays need more operations to be seen.
LONGER = 5
TEXT = """\
Per record, with documents of 123 bytes. Processor time is that of all threads of the client, kernel
included, and beside it the server's. Instructions are those in user mode."""

# -- processor time


def processor(contest: Contest, pace: Pace) -> tuple[Table, list[Group]]:
    """Measure the processor time of client and server."""
    groups = [
        Group(what, [contest.row(who, work) for who in WHO if _has(who, work)])
        for what, work in WORKS.items()
    ]
    measure(groups, pace)
    rows = []
    for who in WHO:
        row = [contest.label(who)]
        for group in groups:
            found = [one for one in group.measured if one.facts["who"] == who]
            row.append(_pair(found[0]) if found else "-")
        rows.append(row)
    notes = [
        f"- {contest.label(who)}: not measured: {why}"
        for who, why in contest.absent.items()
        if who in WHO
    ]
    title = "Microseconds of processor time a record, client + server"
    return Table(title, ["", *WORKS], rows, "\n".join(notes)), groups


def _has(who: str, work: Work) -> bool:
    """Whether a contestant supports that: deepstream's connector decodes whatever it reads."""
    return who != DEEPSTREAM or work.decode or "get" not in work.operation


def _pair(row: Row) -> str:
    client, server = row.each("cpu"), row.each("server_cpu")
    return " + ".join("?" if one is None else f"{one * 1e6:.2f}" for one in (client, server))


# -- memory


MEMORY = ("get, asked for", "get, answered", "peak of a bulk", "a record kept", "decoded")


def memory(beside: EmbeddedServer, names: Sequence[str], records: int) -> tuple[Table, Any]:
    """Measure the memory of records that are requested, that have arrived, and that are kept."""
    told: Reading = {}
    # A separate server, as it is stopped during the measurement, which would affect others.
    with EmbeddedServer() as server:
        share_core(server, beside)
        with _opened(server, "fast") as client:
            client.ask("store", Work("set_many", size=records))
        for name in names:
            told[label_of(name)] = dict(zip(MEMORY, _memory_of(server, name, records), strict=True))
    note = (
        "The first three are the growth of the process, a fresh one for each, the server being "
        "stopped while they are asked for; the last two are what Python's tracemalloc sees of the "
        f"result of a bulk of {RECORDS:,}, names left out. A get of redis-py would open a "
        "connection for each of them."
    )
    title = f"Bytes of memory a record, with {records:,} at a time"
    return Table(title, ["", *MEMORY], cells(told), note), told


def _memory_of(server: EmbeddedServer, name: str, records: int) -> list[float | None]:
    found: list[float | None] = [None, None]
    if name != "redis-py":
        found = [*_in_flight(server, name, Work("get", decode=False, size=records))]
    with _opened(server, name) as client:
        peak = client.ask("peak", Work("get_many", decode=False, size=records))
        found.append(peak["peak"] / peak["records"])
    with _opened(server, name) as client:
        for decode in (False, True):
            held = client.ask("held", Work("get_many", decode=decode))
            found.append(held["held"] / held["records"])
    return found


def _in_flight(server: EmbeddedServer, name: str, work: Work) -> tuple[float, float]:
    with _opened(server, name) as client:
        client.measure(Work("get", 100, decode=False), RECORDS)
        server.pause()
        try:
            issued = client.ask("issue", work)
        finally:
            server.resume()
        finished = client.ask("finish", work)
    before = issued["before"]
    return (issued["after"] - before) / work.size, (finished["after"] - before) / work.size


@contextmanager
def _opened(server: EmbeddedServer, name: str) -> Iterator[PythonClient]:
    with PythonClient(name) as client:
        client.open(server)
        yield client


# -- imports


def imports(pace: Pace, modules: Sequence[str]) -> tuple[Table, Any, list[str]]:
    """Time imports in fresh interpreters; return the row of the goal too."""
    program = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    told: dict[str, list[float]] = {}
    rounds = 1 if pace.smoke else max(pace.rounds, 11)
    # The first round is discarded: it may have to compile.
    for number in range(rounds + 1):
        for module in modules:
            done = subprocess.run(
                [sys.executable, "-c", program.format(module)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=120,
                check=False,
            )
            if done.returncode == 0 and number:
                told.setdefault(module, []).append(float(done.stdout))
    medians = {module: statistics.median(taken) for module, taken in told.items()}
    rows = [
        [f"`import {module}`", _milliseconds(medians[module]), _milliseconds(min(taken))]
        for module, taken in told.items()
    ]
    more = medians["dscache"] - medians["redis"]
    goal = [
        "import time",
        "`import redis` alone",
        f"+ {IMPORT_GOAL * 1e3:.0f} ms at most",
        f"{more * 1e3:+.0f} ms",
        "",
        "holds" if more <= IMPORT_GOAL else "MISSED",
    ]
    note = f"Median of {rounds}, each in a fresh interpreter, without the start of Python itself."
    return Table("Import time", ["", "median", "best"], rows, note), told, goal


# -- waiting


def latency(contest: Contest, pace: Pace) -> tuple[Table, str, Any]:
    """Measure how long a get takes at half its client's highest load, and at half of redis-py's."""
    work = Work("get", decode=False)
    who = [name for name in WHO if name in contest]
    highest: dict[str, float] = {}
    least = 200 if pace.smoke else 2000
    for name in who:
        taste = contest.ask(name, "latency", work, count=least, rate=None, window=WINDOW)
        wanted = max(least, round(taste["rate"] * pace.seconds))
        told = contest.ask(name, "latency", work, count=wanted, rate=None, window=WINDOW)
        highest[name] = told["rate"]
    samples: dict[str, list[dict[str, Any]]] = {}
    slow = highest["redis-py"] / 2 if "redis-py" in highest else 0
    for _ in range(pace.rounds):
        for name in who:
            for rate in (highest[name] / 2, slow):
                wanted = max(least, round(rate * pace.seconds * LONGER))
                told = contest.ask(name, "latency", work, count=wanted, rate=rate, window=0)
                samples.setdefault(f"{name} {rate:.0f}", []).append(told | {"asked": rate})
    rows, raw = [], []
    drawn: list[Line] = []
    steadily: list[Line] = []
    for name in who:
        own = samples[f"{name} {highest[name] / 2:.0f}"]
        steady = samples[f"{name} {slow:.0f}"]
        at_half, at_slow = _percentiles(own), _percentiles(steady)
        ticks = list(at_half)
        rows.append(
            [
                contest.label(name),
                count(highest[name] / 2),
                *(_microseconds(at_half[one]) for one in ticks),
                *(_microseconds(at_slow[one]) for one in ("50", "99")),
            ]
        )
        raw.append({"who": name, "highest": highest[name], "at_half": own, "at_slow": steady})
        points = [(float(i), at_half[one] * 1e6) for i, one in enumerate(ticks)]
        drawn.append(Line(f"{contest.label(name)}: {count(highest[name] / 2)}/s", points))
        points = [(float(i), at_slow[one] * 1e6) for i, one in enumerate(ticks)]
        steadily.append(Line(contest.label(name), points))
    ticks = [f"p{one}" for one in ticks]
    header = ["", "get/s", *ticks, f"p50 at {count(slow)}/s", f"p99 at {count(slow)}/s"]
    note = (
        "Microseconds. Operations begin at times drawn beforehand (Poisson), however late others "
        "are, and are timed from then: what delays many counts for each of them. The highest load "
        f"is what the same program reaches with {WINDOW} under way. Documents stay text, except "
        "with deepstream's connector."
    )
    plots = [
        Plot("at half the highest load of each", "percentile", "µs", drawn, ticks),
        Plot(f"all at {count(slow)} a second", "percentile", "µs", steadily, ticks),
    ]
    return (
        Table("Waiting for a get at half the highest load", header, rows, note),
        lines("How long an await get takes", plots),
        raw,
    )


def _percentiles(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each percentile, in seconds."""
    names = samples[0]["percentiles"]
    return {one: statistics.median(told["percentiles"][one] for told in samples) for one in names}


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


# -- all of it


def run(contest: Contest, pace: Pace) -> tuple[Section, list[str]]:
    """Measure all of it; return the section, and the row of its goal."""
    server = contest.server
    smoke = pace.smoke
    names = [name for name in WATCHED if name in contest][: 1 if smoke else None]
    many = RECORDS if smoke else IN_FLIGHT
    used, groups = processor(contest, pace)
    counted = instructions(server, names, smoke)
    allocated = allocations(server, names, RECORDS if smoke else 10 * RECORDS)
    kept = memory(server, names, many)
    imported, imports_raw, goal = imports(pace, COMPARED_IMPORTS if smoke else IMPORTS)
    waited, chart, waited_raw = latency(contest, pace)
    section = Section("cost", "Cost", TEXT)
    section.tables = [used, counted[0], allocated[0], kept[0], imported, waited]
    section.charts["latency.svg"] = chart
    section.raw = {
        "processor": [group.as_json() for group in groups],
        "instructions": counted[1],
        "allocations": allocated[1],
        "memory": kept[1],
        "imports": imports_raw,
        "latency": waited_raw,
    }
    return section, goal
