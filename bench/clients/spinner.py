"""Keep one core awake until the parent is gone: ``python bench/spinner.py CORE``.

It runs in the lowest class of Linux's scheduler: any other process that wants the core gets it at
once.
"""

from __future__ import annotations

import os
import sys


def main(core: int) -> None:
    parent = os.getppid()
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while os.getppid() == parent:
        for _ in range(1_000_000):
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
