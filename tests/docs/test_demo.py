"""The demo runs on either core, and shows what it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support.documents import PROJECT

RECORDS = 200
PATIENCE = 120
NUMBER = r"[\d,.]+"
LINES = (
    r"  That is the dscache redis cache at 127\.0\.0\.1:\d+ \(\w+ [\d.]+\), BACKEND core\.",
    r"  set user/1, version 3 +True",
    r"  get user/2, which there is not +None",
    r"  set version 2, if newer +False: refused, Redis holds version 3",
    r"    record 'user/1': version must be an int from 0 to 9223372036854775807, not -1",
    r"  GET user/1_v +b'4'",
    r"""  GET user/1_d +b'\{"firstname":"Ada","lastname":"Lovelace","born":1815\}'""",
    r"  get session/9 after 1\.1 s +None",
    rf"  get_bulk, JSON left as it is +200 found +{NUMBER} ms +{NUMBER} µs/record",
    r"  every \.data decoded and compared +200 equal .*",
    r"  set_bulk, version 2 of all, if newer +100 refused .*",
    rf"    dscache: await get +{NUMBER} records/s +{NUMBER} x",
    rf"    redis-py: await mget of both keys, decoded +{NUMBER} records/s +1\.0 x",
    rf"    redis-py: one mget of all keys, decoded +{NUMBER} records/s +1\.0 x",
    r"  delete_bulk +200 deleted .*",
)


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(PROJECT / "examples" / "demo.py"), *options],
        env={**os.environ, **environment, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("backend", ["fast", "pure"])
def test_the_demo_runs(backend: str) -> None:
    done = run("--records", str(RECORDS), "--seconds", "0.02", DSCACHE_BACKEND=backend)
    assert done.returncode == 0, done.stdout
    printed = done.stdout.splitlines()
    for line in LINES:
        pattern = line.replace("BACKEND", backend)
        assert any(re.fullmatch(pattern, one) for one in printed), f"no {pattern}: {done.stdout}"
    assert len(printed) <= 60
    assert max(map(len, printed)) <= 100
    assert "Traceback" not in done.stdout


def test_the_demo_is_interrupted() -> None:
    with subprocess.Popen(
        [sys.executable, str(PROJECT / "examples" / "demo.py"), "--seconds", "60"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        try:
            assert demo.stdout is not None
            assert demo.stdout.readline()
            demo.send_signal(signal.SIGINT)
            _, err = demo.communicate(timeout=PATIENCE)
        finally:
            demo.kill()
    assert (demo.returncode, err) == (1, "demo.py: interrupted\n")


@pytest.mark.parametrize(
    ("where", "err"),
    [
        (">/dev/full", "demo.py: standard output can't be written: No space left on device\n"),
        ("| true", ""),
        (">&-", "demo.py: standard output is closed\n"),
    ],
)
def test_the_demo_without_usable_output(where: str, err: str) -> None:
    words = f'"$0" "$1" --records 100 --seconds 0.01 {where}'
    done = subprocess.run(
        ["sh", "-c", words, sys.executable, PROJECT / "examples" / "demo.py"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stderr == err


def test_the_demo_refuses_impossible_options() -> None:
    done = run("--records", "10")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].endswith(
        "--records must be at least 100, --seconds above 0"
    )
