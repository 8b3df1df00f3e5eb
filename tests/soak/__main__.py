"""The long form of the fault tests: each row causes faults, prints its figures and a verdict.

    make soak                                  every row, about an hour
    make soak ARGS="kill storm --scale 0.1"    two rows, a tenth as long
    make soak ARGS="mixed --minutes 5 --backend pure --uvloop"

Exits with 1 if something did not hold. ``tests/soak/test_resilience.py`` calls the same rows with
small sizes and asserts the limits that hold at any speed (``Figures.problems``); those that depend
on the speed of the machine (``Figures.slow``) count only here.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
from collections.abc import Iterator
from typing import Any

import uvloop

from dscache import _backend
from dscache.embedded import find_server
from tests.soak.figures import HEADING
from tests.soak.rows import ROWS, run


def _sizes(row: str, scale: float, minutes: float) -> dict[str, Any]:
    def scaled(size: float) -> int:
        return max(1, round(size * scale))

    return {
        "kill": {"rounds": scaled(20)},
        "storm": {"operations": scaled(1_000_000)},
        "blackhole": {"seconds": 60 * scale},
        "freeze": {"seconds": 10 * scale},
        "cut": {"step": max(1, round(1 / scale))},
        "fuzz": {"replies": scaled(1_000_000), "seed": random.randrange(10**6)},
        "mutations": {"cases": scaled(1_000_000), "seed": random.randrange(10**6)},
        "own-reader": {"cases": scaled(1_000_000), "seed": random.randrange(10**6)},
        "injection": {"every": scale >= 1},
        "interruptions": {"rounds": scaled(20)},
        "shortage": {"stride": max(1, round(1 / scale))},
        "finalizers": {"count": scaled(100_000)},
        "failover": {"rounds": scaled(3)},
        "refused": {"seconds": 60 * scale},
        "near": {"reads": scaled(10_000_000)},
        "away": {"operations": scaled(100_000)},
        "silent": {},
        "mixed": {"minutes": minutes * scale},
        "cluster-records": {"count": scaled(100_000), "reads": scaled(1_000_000)},
        "reshard": {"slots": scaled(4000)},
        "cluster-kill": {"rounds": scaled(3)},
        "cluster-failover": {"rounds": scaled(3)},
        "maintenance": {"rounds": scaled(200)},
        "sync-maintenance": {"rounds": scaled(200)},
        "messages": {"count": scaled(1_000_000)},
        "messages-kill": {"rounds": scaled(20)},
        "messages-slow": {"seconds": 20 * scale},
        "deepstream-calls": {"calls": scaled(100_000), "seed": random.randrange(10**6)},
        "deepstream": {"seconds": 300 * scale, "seed": random.randrange(10**6)},
        "sync-threads": {"operations": scaled(1_000_000)},
        "sync-interrupts": {"count": scaled(10_000)},
        "sync-kill": {"rounds": scaled(20)},
        "sync-reshard": {"slots": scaled(4000)},
        "records-updates": {"times": scaled(1000)},
        "records-crowd": {"callers": scaled(1000)},
        "records-model": {"examples": scaled(3000)},
        "records-mirror": {"writes": scaled(100_000)},
        "records-scans": {"names": scaled(1_000_000)},
        "records-expiry": {"names": scaled(100_000)},
        "sync-near": {"reads": scaled(10_000_000)},
        "sync-near-disturbed": {"reads": scaled(1_000_000)},
        "sync-near-race": {"rounds": scaled(100_000)},
        "sync-near-writes": {"rounds": scaled(5000), "losses": scaled(300)},
        "sync-near-memory": {"count": scaled(1_000_000)},
        "sync-near-faults": {"seconds": 10 * scale, "rounds": scaled(20)},
    }[row]


def _cores(wanted: str) -> Iterator[str]:
    for name in ("fast", "pure") if wanted == "both" else (wanted,):
        _backend.BACKEND, _backend.core = _backend.choose(name)
        yield name


def main(arguments: list[str]) -> int:
    """Run the named rows; return 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="times what the long form does")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the mixed load")
    parser.add_argument("--backend", choices=("fast", "pure", "both"), default="fast")
    parser.add_argument("--uvloop", action="store_true", help="use uvloop's event loop")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - ROWS.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    # Losses are intended here; the figures show them.
    for name in ("dscache", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    binary = find_server()
    held = True
    for name in _cores(options.backend):
        loop = "uvloop" if options.uvloop else "asyncio"
        print(f"{binary.name}, {name} core, {loop}, Python {sys.version.split()[0]}\n{HEADING}")
        for row in options.rows or ROWS:
            with asyncio.Runner(
                loop_factory=uvloop.new_event_loop if options.uvloop else None
            ) as runner:
                sizes = _sizes(row, options.scale, options.minutes)
                figures = runner.run(run(row, binary, **sizes))
            print(figures.line(), flush=True)
            held = held and not (figures.problems or figures.slow)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
