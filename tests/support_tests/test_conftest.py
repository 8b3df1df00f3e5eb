"""The suite on a machine with other servers than this one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import conftest
from tests.conftest import BINARIES
from tests.support.documents import PROJECT

# Hides all servers but one from the run of pytest that follows.
ALONE = """
import dscache.embedded, pytest, sys
found = [one for one in dscache.embedded.find_servers() if one.name == sys.argv[1]]
dscache.embedded.find_servers = lambda: found
options = ["-p", "no:cacheprovider", "-W", "ignore:Module already imported", "--collect-only", "-q"]
sys.exit(pytest.main([*options, *sys.argv[2:]]))
"""
VALKEY = [one.name for one in BINARIES if one.name.startswith("valkey") and one.version >= (9,)]


def test_the_server_of_a_wheel_is_enough_to_collect_every_test() -> None:
    # Without a server of the machine's own, Python 3.14 and newer have that one alone.
    choosers = sorted(
        str(path)
        for path in (PROJECT / "tests").rglob("test_*.py")
        if re.search(r"\b(BINARIES|BY_AGE|OLDEST_AND_NEWEST)\b", path.read_text(encoding="utf-8"))
    )
    assert len(choosers) > 20
    done = subprocess.run(
        [sys.executable, "-c", ALONE, VALKEY[-1], *choosers],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.OK, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_header_names_the_servers_and_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def header() -> dict[str, str]:
        lines = (line.partition(": ") for line in conftest.pytest_report_header())
        return {title: text for title, _, text in lines}

    names = [conftest._server_id(server) for server in conftest.SERVERS]
    assert header()["servers"] == ", ".join(names)
    monkeypatch.setattr(conftest, "SERVERS", [])
    monkeypatch.setattr(conftest, "OLDEST_AND_NEWEST", BINARIES[:1])
    monkeypatch.setattr(conftest, "WITHOUT_DATABASES", [])
    found = header()
    assert found["servers"] == "none"
    assert "a second server version, so one stands for the oldest and the newest" in found["absent"]
    assert "a server whose clusters have one database only" in found["absent"]
