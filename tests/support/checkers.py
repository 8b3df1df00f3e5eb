"""Programs that check files, such as promtool and check-jsonschema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def checked(program: str, *arguments: str | Path, given: str = "") -> str:
    """Run a program with a text to read; return its output.

    Raises AssertionError with that output if the program finds a mistake.
    """
    done = subprocess.run(
        [program, *arguments],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_schema(name: str, *files: Path) -> None:
    """Check files against a schema of check-jsonschema. Raises AssertionError with the reasons."""
    checked(sys.executable, "-m", "check_jsonschema", "--builtin-schema", name, *files)
