"""A private Prometheus that scrapes a test's metrics, and promtool, which checks its rules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from tests.support.checkers import checked
from tests.support.clusters import hold_port

_HOST = "127.0.0.1"
_PATIENCE_SECONDS = 60
# Where ``make test`` unpacks them.
_UNPACKED = Path(sys.prefix, "prometheus", "usr", "bin")


def _find(name: str) -> str | None:
    unpacked = _UNPACKED / name
    return str(unpacked) if os.access(unpacked, os.X_OK) else shutil.which(name)


def find_promtool() -> str | None:
    """Return the path of a promtool, or None if there is none."""
    return _find("promtool")


def find_prometheus() -> str | None:
    """Return the path of a Prometheus, or None if there is none."""
    return _find("prometheus")


def promtool(*arguments: str | Path, given: str = "") -> str:
    """Run promtool with a text to read; return its output.

    Raises AssertionError if it finds a mistake.
    """
    program = find_promtool()
    assert program is not None
    return checked(program, *arguments, given=given)


class Prometheus:
    """A Prometheus that runs during ``with``, and keeps everything in a folder.

    ``configuration`` is that of prometheus.yml. The files that it names are in the folder.
    """

    def __init__(self, configuration: Mapping[str, Any], folder: Path) -> None:
        self._folder = folder
        (folder / "prometheus.yml").write_text(yaml.safe_dump(dict(configuration)))
        self._held = hold_port()
        self._port = self._held.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        program = find_prometheus()
        assert program is not None
        # It listens without SO_REUSEPORT, so the port is free for a moment.
        self._held.close()
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(program, "--config.file=prometheus.yml", "--storage.tsdb.path=data"),
                    *(f"--web.listen-address={_HOST}:{self._port}", "--log.level=warn"),
                ],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + _PATIENCE_SECONDS
        while not self._is_ready():
            assert self._process.poll() is None, self._log()
            assert time.monotonic() < end, self._log()
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _log(self) -> str:
        return (self._folder / "log").read_text()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{self._port}/-/ready", timeout=10):
                return True
        except urllib.error.HTTPError as refusal:
            refusal.close()
            return False
        except OSError:
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data that the HTTP API answers with."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://{_HOST}:{self._port}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=_PATIENCE_SECONDS) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        return told["data"]

    def values(self, expression: str) -> list[float]:
        """Return the values of an expression now, one for each set of labels."""
        found = self.ask("query", query=expression)
        assert found["resultType"] == "vector"
        return [float(one["value"][1]) for one in found["result"]]

    def firing(self) -> dict[str, list[dict[str, Any]]]:
        """Return the alerts that fire, by their names."""
        found: dict[str, list[dict[str, Any]]] = {}
        for one in self.ask("alerts")["alerts"]:
            if one["state"] == "firing":
                found.setdefault(one["labels"]["alertname"], []).append(one)
        return found
