"""Change a segment of a host's near cache beside others, in a process that may be killed anywhere.

``python -m tests.programs.host_near DATA LOCK NUMBER SECONDS BYTES`` uses the two files. Each
record tells its name and version over and over, so that half of one and half of another is
noticed. Prints the number of hits, or what it found wrong.
"""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any

from dscache import _fast

NAMES = [f"torn/{number}" * (1 + number % 7) for number in range(60)]
IDENTITY = b"one"


def content(name: str, version: int) -> bytes:
    """Return the text of a version, whose length depends on it."""
    return f'"{name} {version} '.encode() * (1 + version * 7919 % 60) + b'"'


def opened(data: str, lock: str, max_bytes: int) -> Any:
    """Return a process's near cache in these files."""

    def miss(name: str, type: Any = None) -> Any:
        raise KeyError(name)

    near = _fast.HostNearCache(
        miss, miss, max_records=40, max_bytes=max_bytes, max_age=1e6, idle_limit=1e6
    )
    files = [os.open(path, os.O_RDWR) for path in (data, lock)]
    assert near.attach(*files)
    assert near.vouches(IDENTITY)
    return near


def work(near: Any, number: int, seconds: float) -> tuple[int, str]:
    """Read, fill, drop and flush; return the number of hits, and what was wrong."""
    chance = random.Random(number)
    end = time.monotonic() + seconds
    hits = 0
    version = number << 32
    while time.monotonic() < end:
        near.vouches(IDENTITY)
        for _ in range(200):
            name = chance.choice(NAMES)
            try:
                record = near.get(name)
            except KeyError:
                entry = near.begin_read(name)
                version += 1
                record = _fast.Record(name, version, content(name, version))
                if entry is not None:
                    near.settle(entry, record, True)
                continue
            hits += 1
            if record.name != name or record.raw != content(name, record.version):
                return hits, f"{name} {record.version}: {record.raw!r}"
            if hits % 17 == 0:
                near.begin_write([name]).end()
            if hits % 29 == 0:
                near.observe(name, 0)
    return hits, ""


if __name__ == "__main__":
    found = work(
        opened(sys.argv[1], sys.argv[2], int(sys.argv[5])), int(sys.argv[3]), float(sys.argv[4])
    )
    print(found[1] or found[0], flush=True)
    sys.exit(bool(found[1]))
