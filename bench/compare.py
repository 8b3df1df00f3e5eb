"""dscache beside redis-py in one run: interleaved rounds, medians, ratios, and the limit.

``python bench/compare.py`` prints a table for people, with ``--markdown`` that of the README too.
The limit is ``redis-benchmark``, a C program that throws the answers away, where it is found.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import uvloop

from dscache.embedded import EmbeddedServer
from workload import (
    DOCUMENT,
    NAMES,
    RECORDS,
    Client,
    Dscache,
    RedisPy,
    RedisPyPipelined,
    apart,
    encode,
    from_tasks,
    keys_of,
    repeatedly,
)

FAST, PURE, REDIS_PY, PIPELINED = "fast", "pure", "redis-py", "pipelined"
LIBRARIES = ("hiredis", "redis", "msgspec", "uvloop")
TASKS = 100
LIMIT = "redis-benchmark"
# Commands that it has under way, and records in one of them: more gain nothing.
DEPTH = 64
RECORDS_A_COMMAND = 32


@dataclass
class Row:
    """One thing measured: a workload of one client, and its records per second in each round."""

    label: str
    measure: Callable[[int], Awaitable[None]]
    """Handle about that many records, and at least one unit of work."""
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def best(self) -> float:
        """The fastest round, the one that was disturbed least."""
        return max(self.rates)


@dataclass
class Group:
    """Rows of one workload. The last is what the others are compared with."""

    title: str
    rows: list[Row]


@dataclass
class Goal:
    """A ratio that dscache is meant to reach, whatever the machine."""

    text: str
    row: Row
    against: Row
    at_least: float

    def __str__(self) -> str:
        ratio = self.row.median / self.against.median
        verdict = "reached" if ratio >= self.at_least else "MISSED"
        return f"{self.text}: {ratio:.1f} x, wanted {self.at_least:g} x: {verdict}"


def one_by_one(
    label: str, operation: Callable[[str], Awaitable[object]], tasks: int = TASKS
) -> Row:
    async def measure(records: int) -> None:
        await from_tasks(operation, tasks, max(records, tasks))

    return Row(label, measure)


def in_bulk(label: str, operation: Callable[[Sequence[str]], Awaitable[object]]) -> Row:
    async def measure(records: int) -> None:
        await repeatedly(operation, max(1, round(records / RECORDS)))

    return Row(label, measure)


def groups_of(clients: dict[str, Client]) -> tuple[list[Group], list[Goal]]:
    """Return what is measured, and the ratios that are wanted."""
    fast, pure = clients[FAST], clients[PURE]
    redis_py, pipelined = clients[REDIS_PY], clients[PIPELINED]
    get = Group(
        f"await get, {TASKS} tasks",
        [
            one_by_one(fast.label, fast.get),
            one_by_one(pure.label, pure.get),
            one_by_one(f"{redis_py.label}: MGET", redis_py.get),
        ],
    )
    get_decoded = Group(
        f"await get, {TASKS} tasks, decoded",
        [
            one_by_one(fast.label, fast.get_decoded),
            one_by_one(pure.label, pure.get_decoded),
            one_by_one(f"{redis_py.label}: MGET", redis_py.get_decoded),
        ],
    )
    get_alone = Group(
        "await get, 1 task",
        [
            one_by_one(fast.label, fast.get, tasks=1),
            one_by_one(pure.label, pure.get, tasks=1),
            one_by_one(f"{redis_py.label}: MGET", redis_py.get, tasks=1),
        ],
    )
    bulk = Group(
        f"{RECORDS} names in bulk, raw",
        [
            in_bulk(fast.label, fast.get_bulk),
            in_bulk(pure.label, pure.get_bulk),
            in_bulk(f"{redis_py.label}: a pipeline of MGET", pipelined.get_bulk),
            in_bulk(f"{redis_py.label}: one MGET", redis_py.get_bulk),
        ],
    )
    bulk_decoded = Group(
        f"{RECORDS} names in bulk, decoded",
        [
            in_bulk(fast.label, fast.get_bulk_decoded),
            in_bulk(pure.label, pure.get_bulk_decoded),
            in_bulk(f"{redis_py.label}: a pipeline of MGET", pipelined.get_bulk_decoded),
            in_bulk(f"{redis_py.label}: one MGET", redis_py.get_bulk_decoded),
        ],
    )
    set_one = Group(
        f"await set, {TASKS} tasks",
        [
            one_by_one(fast.label, fast.set),
            one_by_one(pure.label, pure.set),
            one_by_one(f"{redis_py.label}: MSET", redis_py.set),
        ],
    )
    set_bulk = Group(
        f"{RECORDS} records written in bulk",
        [
            in_bulk(fast.label, fast.set_bulk),
            in_bulk(pure.label, pure.set_bulk),
            in_bulk(f"{redis_py.label}: a pipeline of MSET", pipelined.set_bulk),
            in_bulk(f"{redis_py.label}: one MSET", redis_py.set_bulk),
        ],
    )
    goals = [
        Goal(f"{get.title}, fast core to redis-py", get.rows[0], get.rows[-1], 12),
        Goal(
            f"{bulk.title}, fast core to redis-py's one MGET with decoding",
            bulk.rows[0],
            bulk_decoded.rows[-1],
            6,
        ),
    ]
    return [get, get_decoded, get_alone, bulk, bulk_decoded, set_one, set_bulk], goals


async def rate(row: Row, records: int) -> float:
    began = time.perf_counter()
    await row.measure(records)
    return records / (time.perf_counter() - began)


async def measure(groups: list[Group], rounds: int, seconds: float) -> None:
    """Fill the rows: one round of every row, then the next, so that a slow spell hits all."""
    rows = [row for group in groups for row in group.rows]
    sizes = []
    for row in rows:
        # Twice: what is cold at first (connections, caches of the processor) isn't measured.
        await rate(row, RECORDS)
        wanted = await rate(row, RECORDS) * seconds
        sizes.append(max(1, round(wanted / RECORDS)) * RECORDS)
    for _ in range(rounds):
        for row, size in zip(rows, sizes, strict=True):
            row.rates.append(await rate(row, size))


def limit(server: EmbeddedServer, records: int, seconds: float) -> tuple[str, float] | None:
    """Return what redis-benchmark says, reading so many records a command; None without it."""
    program = shutil.which(LIMIT)
    if program is None:
        return None
    keys = keys_of(NAMES[:records])
    # About what it reaches in that time. It sends whole pipelines only.
    requests = DEPTH * max(1, round(1_000_000 * seconds / records / DEPTH))
    where = ("-h", server.host, "-p", str(server.port))
    how = ("-c", "1", "-P", str(DEPTH), "-n", str(requests), "--csv")
    done = subprocess.run(
        [program, *where, *how, "MGET", *keys],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60 + 60 * seconds,
    )
    *_, values = csv.reader(done.stdout.splitlines())
    each = "1 record" if records == 1 else f"{records} records"
    return f"{LIMIT} -c 1 -P {DEPTH}, {each} a command", float(values[1]) * records


def facts(server: EmbeddedServer, placing: str, rounds: int) -> list[str]:
    """Return what has to be known of a run to read its numbers."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return [
        f"{datetime.datetime.now().astimezone():%Y-%m-%d}, {processor()}, {platform.system()}",
        f"{server.binary.name}, Python {platform.python_version()}, {versions}",
        f"{placing}, loopback",
        f"documents of {len(encode(DOCUMENT))} bytes; median of {rounds} interleaved rounds",
    ]


def processor() -> str:
    """Return the processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            models = [line.partition(":")[2].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def as_text(groups: list[Group], limits: list[tuple[str, float]]) -> list[str]:
    """Return the table for people: medians, the best rounds, and the medians' ratios."""
    lines = []
    for group in groups:
        lines += ["", f"{group.title:42}{'records/s':>12}{'best round':>12}{'ratio':>9}"]
        base = group.rows[-1].median
        for row in group.rows:
            lines.append(
                f"  {row.label:40}{row.median:12,.0f}{row.best:12,.0f}{row.median / base:7.1f} x"
            )
    if limits:
        lines += ["", "the limit"]
        lines += [f"  {label:52}{value:12,.0f}" for label, value in limits]
    else:
        lines += ["", f"the limit: left out, there is no {LIMIT} in PATH"]
    return lines


def as_markdown(groups: list[Group]) -> list[str]:
    """Return the README's table: thousands of records per second."""
    lines = ["", "| thousand records per second | fast | pure | redis-py | fast / redis-py |"]
    lines.append("|---|--:|--:|--:|--:|")
    for group in groups:
        fast, pure, *_, peer = (row.median for row in group.rows)
        cells = [group.title, *map(thousands, (fast, pure, peer)), f"{fast / peer:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def thousands(number: float) -> str:
    """Return a number in thousands, with three digits where it has no more."""
    return f"{number / 1000:,.{0 if number >= 100_000 else 1}f}"


async def run(
    server: EmbeddedServer, rounds: int, seconds: float
) -> tuple[list[Group], list[Goal]]:
    clients: dict[str, Client] = {
        FAST: Dscache("fast"),
        PURE: Dscache("pure"),
        REDIS_PY: RedisPy(),
        PIPELINED: RedisPyPipelined(),
    }
    for client in clients.values():
        await client.connect(server)
    try:
        await clients[FAST].set_bulk(NAMES)
        groups, goals = groups_of(clients)
        await measure(groups, rounds, seconds)
    finally:
        for client in clients.values():
            await client.close()
    return groups, goals


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement (7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one measurement (0.3)")
    parser.add_argument("--markdown", action="store_true", help="print the README's table too")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds above 0")
    with EmbeddedServer() as server, apart(server) as placing:
        groups, goals = uvloop.run(run(server, options.rounds, options.seconds))
        limits = [limit(server, records, options.seconds) for records in (1, RECORDS_A_COMMAND)]
        header = facts(server, placing, options.rounds)
    print(*header, sep="\n")
    found = [one for one in limits if one is not None]
    print(*as_text(groups, found), "", *goals, sep="\n")
    if options.markdown:
        print(*as_markdown(groups), sep="\n")


if __name__ == "__main__":
    main()
