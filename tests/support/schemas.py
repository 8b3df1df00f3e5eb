"""The schemas of files that other programs read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def check_schema(name: str, *files: Path) -> None:
    """Check files against a schema of check-jsonschema. Raises AssertionError with the reasons."""
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", name, *map(str, files)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
