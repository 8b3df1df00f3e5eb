"""The cores without a server: the benchmarks of ``test_*.py``, by pytest-benchmark, as tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestants import HERE
from report import Section, Table, ratio

# Records that every benchmark handles at each call.
RECORDS = 1000
CORES = ("fast", "pure")
TEXT = """\
Nanoseconds a record, medians: keys, encoding, parsing, slots and JSON, without a server. *hiredis*
is `hiredis.pack_command` or `hiredis.Reader` with as much plain Python as makes the same of it."""


def run(smoke: bool) -> Section:
    """Run the suite; return its tables. Raises RuntimeError if a benchmark fails."""
    with tempfile.TemporaryDirectory(prefix="dscache-bench-") as folder:
        told = Path(folder) / "micro.json"
        how = ["--benchmark-disable"] if smoke else ["--benchmark-only", f"--benchmark-json={told}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider", *how],
            cwd=HERE.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the benchmarks of the cores failed:\n{done.stdout}")
        section = Section("micro", "Micro", TEXT)
        if smoke:
            section.printed = done.stdout.strip().splitlines()[-1]
            return section
        found = json.loads(told.read_text("utf-8"))["benchmarks"]
    section.tables = [_table(found)]
    section.raw = [_raw(one) for one in found]
    return section


def _table(found: list[dict[str, Any]]) -> Table:
    groups: dict[str, dict[str, float]] = {}
    for one in found:
        nanoseconds = one["stats"]["median"] / RECORDS * 1e9
        groups.setdefault(one["group"], {})[_who(one)] = nanoseconds
    rows = []
    for group, by in groups.items():
        told = [f"{by[core]:,.0f}" if core in by else "-" for core in CORES]
        others = [(who, cost) for who, cost in by.items() if who not in CORES]
        beside = ", ".join(f"{who} {cost:,.0f}" for who, cost in others)
        gain = ratio(others[0][1] / by["fast"]) if others and "fast" in by else "-"
        rows.append([group, *told, beside or "-", gain])
    return Table("", ["nanoseconds a record", *CORES, "a library", "to fast"], rows)


def _who(one: dict[str, Any]) -> str:
    """Return the core, or the library, that a benchmark is of."""
    if one["param"]:
        return str(one["param"])
    match = re.search(r"_(hiredis|msgspec|redis_py)$", one["name"])
    assert match, f"{one['name']}: it is neither a core's nor a library's"
    return match[1].replace("_", "-")


def _raw(one: dict[str, Any]) -> dict[str, Any]:
    kept = ("min", "max", "mean", "median", "stddev", "iqr", "rounds", "iterations")
    stats = {name: one["stats"][name] for name in kept}
    return {"group": one["group"], "who": _who(one), "seconds": stats, "records": RECORDS}
