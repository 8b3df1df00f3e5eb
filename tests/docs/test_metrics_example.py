"""The example of metrics, read as ``curl`` would."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import urllib.request

from tests.support.documents import PROJECT

PATIENCE = 60


def test_curl_reads_the_metrics() -> None:
    command = [
        sys.executable,
        "-W",
        "error",
        str(PROJECT / "examples" / "metrics.py"),
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as example:
        watchdog = threading.Timer(PATIENCE, example.kill)
        watchdog.start()
        try:
            assert example.stdout is not None
            match = re.fullmatch(
                r"curl (http://127\.0\.0\.1:\d+/metrics)\n", example.stdout.readline()
            )
            assert match, "it prints no address"
            pattern = r'^dscache_operations_total\{cache="users"\} ([0-9.e+]+)$'
            done = 0.0
            while done < 30:
                with urllib.request.urlopen(match[1], timeout=PATIENCE) as answer:
                    text = answer.read().decode()
                found = re.search(pattern, text, re.MULTILINE)
                done = float(found[1]) if found else 0.0
            assert 'dscache_ready{cache="users"} 1.0' in text
            example.send_signal(signal.SIGINT)
            assert example.stdout.read() == ""
            assert example.wait(PATIENCE) == 0
        finally:
            watchdog.cancel()
            example.kill()
