"""The whole suite: ``python bench/run.py`` measures, and writes Markdown, SVG and JSON.

``--only SECTION`` selects one of its sections, and may be repeated; ``--smoke`` does each thing
once and hardly measures it, to check that everything works.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cost
import growth
import micro
import versus
import workloads
from contest import EVERYBODY, Contest
from contestants import HERE
from dscache.embedded import EmbeddedServer
from machine import facts, stolen_seconds
from report import Section, Table
from rounds import Group, Pace, arguments
from workload import ORDINARY, apart

SECTIONS = (
    *("goals", "micro", "peers", "workloads", "cost", "growth"),
    *("cluster", "threads", "near", "messages"),
)
# Separate programs, whose text is taken unchanged.
PROGRAMS = {
    "cluster": ("compare_cluster.py", "Cluster", "What routing costs."),
    "threads": ("compare_sync.py", "Threads", "`Cache`, which blocks, beside redis-py."),
    "near": ("compare_near.py", "Near cache", "What needs no round trip, and a load that changes."),
    "messages": ("compare_messages.py", "Messages", "Two nodes that send and hear each other."),
}
SMOKE = Pace(rounds=1, seconds=0.0005, warm=1, smoke=True)


@dataclass
class Run:
    """The sections to measure, and the results so far."""

    pace: Pace
    contest: Contest | None = None
    sections: list[Section] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    goals: list[list[str]] = field(default_factory=list)

    @property
    def field(self) -> Contest:
        """The contestants, on their own server."""
        assert self.contest is not None
        return self.contest


def measure_micro(run: Run) -> None:
    run.sections.append(micro.run(run.pace.smoke))


def measure_peers(run: Run) -> None:
    section, run.groups = versus.compare(run.field, run.pace)
    run.sections.append(section)


def measure_workloads(run: Run) -> None:
    run.sections.append(workloads.run(run.field, run.pace))


def measure_cost(run: Run) -> None:
    section, goal = cost.run(run.field, run.pace)
    run.sections.append(section)
    run.goals.append(goal)


def measure_growth(run: Run) -> None:
    run.sections.append(growth.run(run.field, run.pace))


def measure_with(name: str) -> Callable[[Run], None]:
    """Return a function that runs a separate program."""
    program, title, text = PROGRAMS[name]

    def measured(run: Run) -> None:
        # redis-benchmark can't measure less than that.
        seconds = max(run.pace.seconds, 0.01)
        how = ["--rounds", str(run.pace.rounds), "--seconds", str(seconds)]
        done = subprocess.run(
            [sys.executable, str(HERE / program), *how],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program} ended with code {done.returncode}")
        section = Section(name, title, text, printed=done.stdout)
        section.raw = {"printed": done.stdout}
        run.sections.append(section)

    return measured


def conclude(run: Run) -> Section:
    """Return which goals are reached."""
    if not run.goals:
        _, _, goal = cost.imports(run.pace, cost.COMPARED_IMPORTS)
        run.goals.append(goal)
    table = versus.goals_table(run.groups, run.goals)
    text = (
        "What dscache is meant to reach, as ratios of records per second within this run. Where a "
        "goal does not say whether documents are decoded, the record as `get` gives it decides, "
        "and the ratio with every `.data` read stands beside it."
    )
    section = Section("goals", "Goals", text, [table])
    section.raw = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    return section


APART: dict[str, Callable[[Run], None]] = {
    "micro": measure_micro,
    **{name: measure_with(name) for name in PROGRAMS},
}
CONTESTS: dict[str, Callable[[Run], None]] = {
    "peers": measure_peers,
    "workloads": measure_workloads,
    "cost": measure_cost,
    "growth": measure_growth,
}
# The contestants of these; the other contests include all.
TAKING_PART = {"workloads": workloads.WHO, "cost": cost.WHO, "growth": growth.WHO}


def write(sections: Sequence[Section], folder: Path, told: dict[str, Any]) -> Path:
    """Write the report, its charts and the raw results into a folder; return the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Results", ""]
    lines += [f"- {line}" for line in [*told["machine"], *told["notes"]]]
    lines += ["", *_versions(told["versions"])]
    for section in sections:
        lines += ["", *section.lines()]
        for name, chart in section.charts.items():
            (folder / name).write_text(chart, encoding="utf-8")
    text = json.dumps(told, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    report = folder / "results.md"
    clean = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    report.write_text(clean + "\n", encoding="utf-8")
    return report


def _versions(versions: dict[str, str]) -> list[str]:
    rows = [[label, version] for label, version in versions.items()]
    return Table("", ["measured", "version"], rows, words=True).lines() if rows else []


def measure(run: Run, wanted: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Measure the wanted sections; return the facts about the run, and the versions."""

    def timed(measures: dict[str, Callable[[Run], None]]) -> None:
        for name, measure_it in measures.items():
            if name in wanted:
                since = time.monotonic()
                measure_it(run)
                print(f"{name}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)

    who = dict.fromkeys(
        one for name in CONTESTS if name in wanted for one in TAKING_PART.get(name, EVERYBODY)
    )
    # Before the contest, as these programs choose their cores themselves; beside it if nothing is
    # measured.
    with ThreadPoolExecutor(1) as beside:
        others = beside.submit(timed, APART)
        if not run.pace.smoke:
            others.result()
        with EmbeddedServer() as server, apart(server) as placing:
            header = facts(server, placing, run.pace.rounds)
            with Contest(server, who, strict=run.pace.smoke) as run.contest:
                if who:
                    run.contest.store(ORDINARY)
                timed(CONTESTS)
                versions = run.contest.versions()
        others.result()
    if "goals" in wanted:
        run.sections.append(conclude(run))
    run.sections.sort(key=lambda section: SECTIONS.index(section.name))
    return header, versions


def main() -> None:
    parser = arguments(__doc__, rounds=7, seconds=0.2)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section alone")
    parser.add_argument("--smoke", action="store_true", help="each thing once, hardly measured")
    parser.add_argument("--output", type=Path, help="folder of the results (bench/results)")
    options = parser.parse_args()
    pace = SMOKE if options.smoke else Pace(options.rounds, options.seconds)
    folder = options.output or HERE / "results" / ("smoke" if options.smoke else "")
    wanted = set(options.only or SECTIONS)
    if "goals" in wanted:
        wanted.add("peers")
    run = Run(pace)
    began, stolen, load = time.monotonic(), stolen_seconds(), os.getloadavg()
    header, versions = measure(run, wanted)
    took = time.monotonic() - began
    notes = [
        f"measurements of about {pace.seconds:g} s each; the whole took {took / 60:.1f} minutes",
        f"load average at the start: {load[0]:.2f}; others at work would show in every number",
    ]
    if stolen is not None:
        more = (stolen_seconds() or stolen) - stolen
        notes.append(f"processor time taken by the machine's host: {more:.1f} s")
    if options.smoke:
        notes.append("a smoke run: nothing here is a measurement")
    told = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": header,
        "notes": notes,
        "options": {"rounds": pace.rounds, "seconds": pace.seconds, "smoke": options.smoke},
        "versions": versions,
        "sections": {section.name: section.raw for section in run.sections},
    }
    report = write(run.sections, folder, told)
    for section in run.sections:
        if section.name == "goals":
            print(*section.lines(), sep="\n")
    print(f"written: {report}", file=sys.stderr)


if __name__ == "__main__":
    main()
