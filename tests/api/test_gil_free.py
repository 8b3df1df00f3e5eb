"""Threads with event loops, threads that share a Cache, and Records of them all, at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig

import pytest

from tests.support.waiting import PATIENCE

# The long form is ``python -m tests.programs.gil_free --seconds 600``.
SECONDS = {"fast": 5.0, "pure": 2.0}


@pytest.mark.parametrize("core", ["fast", "pure"])
def test_threads_read_what_is_right(core: str) -> None:
    """Without the GIL on a Python that can do without; the pure core needs hiredis, so the GIL."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    environment["DSCACHE_BACKEND"] = core
    if core == "pure":
        environment["PYTHON_GIL"] = "1"  # as the import of hiredis does, but without a warning
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.gil_free", "--seconds", str(SECONDS[core])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE + SECONDS[core],
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["counted"] == found["fetched"] > 0
    assert found["late_hits"] == 0
    needs_gil = core == "pure" or not sysconfig.get_config_var("Py_GIL_DISABLED")
    assert (found["backend"], found["gil"], found["hiredis"]) == (core, needs_gil, needs_gil)
    assert found["steps"] > 100
    assert found["hits"] > 0
    assert found["passed"] > 0
    assert found["looks"] > 0
    assert found["pending"] == 0
