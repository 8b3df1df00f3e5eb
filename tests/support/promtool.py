"""promtool, which checks Prometheus's rules and expressions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Where ``make test`` unpacks it.
_UNPACKED = Path(sys.prefix, "promtool", "usr", "bin", "promtool")


def find_promtool() -> str | None:
    """Return the path of a promtool, or None if there is none."""
    if os.access(_UNPACKED, os.X_OK):
        return str(_UNPACKED)
    return shutil.which("promtool")


def promtool(*arguments: str | Path) -> str:
    """Run promtool; return its output. Raises AssertionError if it finds a mistake."""
    program = find_promtool()
    assert program is not None
    done = subprocess.run(
        [program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
