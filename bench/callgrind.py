"""Instructions of a client's process, counted by callgrind: they don't depend on other work."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("valgrind", "callgrind_control")


def absence() -> str:
    """Return the reason why nothing can be counted, or an empty text."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"there is no {missing[0]} in PATH" if missing else ""


def command(folder: Path) -> tuple[str, ...]:
    """Return the beginning of a command line whose process is counted."""
    # Off at first: merely starting Python would take a minute.
    options = ("--instr-atstart=no", f"--callgrind-out-file={folder}/out")
    return ("valgrind", "-q", "--tool=callgrind", *options)


def count(client: Any, folder: Path, run: Callable[[int], object], records: int) -> float:
    """Return the instructions of a record: the difference of more of them and less.

    Of two counts the lower one is taken: a reply that comes in parts costs more.
    """
    run(records)
    _control(client, "--instr=on")
    try:
        counted = []
        for times in (1, 3, 3):
            run(records)
            _control(client, "--zero")
            run(times * records)
            _control(client, "--dump")
            counted.append(_dumped(folder))
    finally:
        _control(client, "--instr=off")
    return (min(counted[1:]) - counted[0]) / (2 * records)


def _control(client: Any, what: str) -> None:
    subprocess.run(
        ["callgrind_control", what, str(client.pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )


def _dumped(folder: Path) -> int:
    """Return the instructions of a dump, which is then removed."""
    found = None
    for path in folder.iterdir():
        if match := re.search(r"^(?:summary|totals): (\d+)", path.read_text("utf-8"), re.MULTILINE):
            found = int(match[1])
        path.unlink()
    if found is None:
        raise RuntimeError("callgrind counted nothing")
    return found
