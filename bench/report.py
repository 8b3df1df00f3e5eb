"""The report of a run in Markdown, of the JSON and the histograms that pytest-benchmark made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import goals

# Quantities of extra_info that have a column of their own.
COSTS = {"client_us": "client µs", "server_us": "server µs", "instructions": "instructions"}
HIDDEN = {"records_per_second", "records", "label", "version", "target", "work", *COSTS}
PERCENTILE = re.compile(r"p[\d.]+$")


def write(folder: Path, reached: Sequence[Sequence[str]], skipped: Mapping[str, str]) -> Path:
    """Write results.md beside results.json and the histograms; return the path of the report."""
    told = json.loads((folder / "results.json").read_text("utf-8"))
    by_group = {
        title: list(some)
        for title, some in groupby(
            sorted(told["benchmarks"], key=lambda one: one["group"] or ""), lambda one: one["group"]
        )
    }
    machine, commit = told["machine_info"], told["commit_info"]
    lines = [
        *("# Results", ""),
        f"- {told['datetime'][:10]}, commit {commit['id'][:12]}, {machine['processor_name']}, "
        f"{machine['system']}, Python {machine['python_version']}",
        f"- load average at the end: {machine['load_average']:.2f}; a busy machine shows in all",
        "- times are of one record, or message; ratios are taken within this run only",
        *(f"- not measured: {why}" for why in dict.fromkeys(skipped.values())),
        "",
    ]
    if reached:
        lines += ["## Goals", "", *table(goals.HEADER, reached), ""]
    for path in sorted(folder.glob("*.svg")):
        lines += [f"![{path.stem}](<{path.name}>)", ""]
    for title, some in by_group.items():
        lines += [f"## {title}", "", *group_table(some), ""]
    report = folder / "results.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    return report


def group_table(benchmarks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of a group, the fastest first, with ratios to redis-py if it is there."""
    ordered = sorted(benchmarks, key=median)
    peers = [one for one in ordered if "redis-py" in who(one)]
    base = min(peers or ordered[-1:], key=lambda one: len(who(one)))
    costs = [name for name in COSTS if any(name in one["extra_info"] for one in ordered)]
    header = ["", "median", "best", f"x {who(base)}", *map(COSTS.__getitem__, costs), "more"]
    rows = []
    for one in ordered:
        info = one["extra_info"]
        more = [
            f"{name} {time(value) if PERCENTILE.match(name) else short(value)}"
            for name, value in info.items()
            if name not in HIDDEN
        ]
        best = one["stats"]["min"] / info.get("records", 1)
        ratio = f"{median(base) / median(one):.2f}"
        told = [short(info[name]) if name in info else "-" for name in costs]
        rows.append([who(one), time(median(one)), time(best), ratio, *told, ", ".join(more)])
    return table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def who(benchmark: Mapping[str, Any]) -> str:
    return str(benchmark["param"] or benchmark["name"])


def median(benchmark: Mapping[str, Any]) -> float:
    """Return the seconds of a record."""
    return float(benchmark["stats"]["median"] / benchmark["extra_info"].get("records", 1))


def time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.3g} {unit}"
    return f"{seconds * 1e9:,.3g} ns"


def short(value: object) -> str:
    """Return a number with three digits, or all of a larger one."""
    if not isinstance(value, (int, float)):
        return str(value)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else "0"
