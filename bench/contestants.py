"""The contestants, each in a process that takes commands over a pipe."""

from __future__ import annotations

import abc
import contextlib
import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from dscache.embedded import EmbeddedServer
from peers import PATIENCE_SECONDS, PYTHON
from workload import KINDS, NAMES, ORDINARY, Work, encode, keys_of

HERE = Path(__file__).parent
LIMIT = "redis-benchmark"
# Commands that it keeps in flight, and records in one of them: more gain nothing.
DEPTH = 64
RECORDS_A_COMMAND = 32
DEEPSTREAM = "@deepstream/cache-redis"
DEEPSTREAM_VERSION = "2.0.9"
_START_SECONDS = 120
# Of redis-benchmark, which measures whole milliseconds, for each command that it keeps in flight.
_LEAST_REQUESTS = 100


class Absent(Exception):
    """A contestant can't take part; the message says why."""


@contextlib.contextmanager
def from_npm(*packages: str) -> Iterator[tuple[str, Path]]:
    """Yield Node's program, and a folder with these packages, which is removed at the end.

    Raises Absent if there is no Node, or npm can't get them.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise Absent(f"there is no {'node' if node is None else 'npm'} in PATH")
    wanted = " ".join(packages)
    with tempfile.TemporaryDirectory(prefix="dscache-bench-") as folder:
        # Otherwise npm would install into a parent folder that has one.
        Path(folder, "package.json").write_text('{"private": true}', encoding="utf-8")
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        try:
            done = subprocess.run(
                [npm, "install", "--ignore-scripts", "--prefer-offline", *quiet, *packages],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Absent(f"npm install {wanted} did not end within 300 s") from None
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if "ERR" in line or "error" in line]
            raise Absent(f"npm install {wanted} failed: {' '.join(said)[:200] or done.returncode}")
        yield node, Path(folder)


class Contestant(abc.ABC):
    """One contestant, from ``open`` to ``close``."""

    label: str
    version: str = ""

    @abc.abstractmethod
    def open(self, server: EmbeddedServer) -> None:
        """Start it. Raises Absent with the reason if it can't take part."""

    @abc.abstractmethod
    def measure(self, work: Work, records: int) -> dict[str, float]:
        """Do that work on about that many records; return records, seconds and processor time."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what was started."""


class _Process(Contestant):
    """A program that takes JSON objects, one a line, and answers each with one."""

    _process: subprocess.Popen[str] | None = None

    def measure(self, work: Work, records: int) -> dict[str, float]:
        return self.ask("work", work, records=max(records, work.least))

    def ask(self, what: str, work: Work, **more: Any) -> dict[str, Any]:
        """Send a request and return the answer. Raises RuntimeError if it fails."""
        assert self._process is not None, f"{self.label} is not open"
        assert self._process.stdin is not None
        line = json.dumps({"do": what, "work": asdict(work), **more})
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{self.label}: its process has ended") from None
        return self._answer(PATIENCE_SECONDS)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            self._answer(_START_SECONDS)
        except RuntimeError:
            self.close()
            raise

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        # A hanging process is killed, which ends the wait.
        watch = threading.Timer(seconds, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"{self.label}: its process has ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.label}: {answer['error']}")
        return answer


class PythonClient(_Process):
    """One of the clients in ``peers.py``."""

    def __init__(
        self,
        name: str,
        *,
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.label = PYTHON[name].label
        self._before = before
        """What its command begins with: a program that watches it."""
        self._environment = environment or {}

    def open(self, server: EmbeddedServer) -> None:
        described = PYTHON[self.name]
        try:
            self.version = described.version
        except importlib.metadata.PackageNotFoundError:
            raise Absent(
                f"{described.package} is not installed: pip install {described.package}"
            ) from None
        program = [*self._before, sys.executable, str(HERE / "worker.py")]
        self._start([*program, self.name, server.host, str(server.port)], self._environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Deepstream(_Process):
    """deepstream's own connector, on Node, from npm into a folder that is removed again."""

    label = "deepstream's connector"

    def __init__(self) -> None:
        self._installed = contextlib.ExitStack()

    def open(self, server: EmbeddedServer) -> None:
        node, folder = self._installed.enter_context(from_npm(f"{DEEPSTREAM}@{DEEPSTREAM_VERSION}"))
        try:
            below = json.loads((folder / "node_modules/ioredis/package.json").read_text("utf-8"))
            self.version = f"{DEEPSTREAM_VERSION}, ioredis {below['version']}, Node {_said(node)}"
            document = encode(KINDS[ORDINARY].document).decode()
            where = [str(folder), server.host, str(server.port)]
            program = [node, str(HERE / "deepstream.js"), *where, document]
            self._start(program, {"NODE_ENV": "production"})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self._installed.close()


class Limit(Contestant):
    """redis-benchmark: one connection, and a C program that discards the replies."""

    def __init__(self, depth: int, records: int) -> None:
        self._depth, self._records = depth, records
        each = "1 record" if records == 1 else f"{records} records"
        how = f" -P {depth}, {each} a command" if depth > 1 else ""
        self.label = f"{LIMIT} -c 1{how}"
        self._command: list[str] = []

    def open(self, server: EmbeddedServer) -> None:
        program = shutil.which(LIMIT)
        if program is None:
            raise Absent(f"there is no {LIMIT} in PATH")
        self.version = _said(program).removeprefix(LIMIT).strip()
        where = ["-h", server.host, "-p", str(server.port), "--csv"]
        self._command = [program, *where, "-c", "1", "-P", str(self._depth)]

    def measure(self, work: Work, records: int) -> dict[str, float]:
        # It sends only whole pipelines.
        batch = self._depth * self._records
        requests = max(1, round(records / batch)) * self._depth
        requests = max(requests, _LEAST_REQUESTS * self._depth)
        done = subprocess.run(
            [*self._command, "-n", str(requests), "MGET", *keys_of(NAMES[: self._records])],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=PATIENCE_SECONDS,
        )
        *_, values = csv.reader(done.stdout.splitlines())
        handled = requests * self._records
        return {"records": handled, "seconds": requests / float(values[1])}

    def close(self) -> None:
        """Do nothing: nothing is left open."""


def _said(program: str) -> str:
    """Return the version that a program reports."""
    done = subprocess.run(
        [program, "--version"], stdout=subprocess.PIPE, text=True, timeout=30, check=False
    )
    return done.stdout.strip()
