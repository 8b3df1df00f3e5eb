"""The processes of the clients: started on a core, asked, and ended."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clients.peers import PATIENCE_SECONDS, PYTHON
from clients.work import DOCUMENT, MESSAGE, ORDINARY, RECORDS, Work, encode, keys_of, names_of

HERE = Path(__file__).parent
DEEPSTREAM = "deepstream"
OTHERS = {DEEPSTREAM: "deepstream's connector"}
# The clusternode connector requires more than it declares.
PACKAGES = (
    *("@deepstream/cache-redis@2.0.9", "@deepstream/clusternode-redis@1.0.1"),
    "@deepstream/protobuf@1.0.8",
)
# Commands that redis-benchmark keeps in flight, and records in one of them: more gain nothing.
DEPTH = 64
LIMITS = {"limit-alone": (1, 1), "limit-single": (DEPTH, 1), "limit-batched": (DEPTH, 32)}
_START_SECONDS = 120
# redis-benchmark measures whole milliseconds.
_LEAST_REQUESTS = 100


class Absent(Exception):
    """A client can't take part; the message says why."""


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Pin the processes started in this block to a core, with all their threads."""
    if core is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def awake(cores: Sequence[int]) -> Iterator[None]:
    """Keep cores from sleeping, as a load would.

    On a virtual machine, waking a core takes a multiple of the measured time: with both asleep, a
    read that takes 75 us took 300, and a bulk of 1000 that takes 1.1 ms took 3.7.
    """
    spinner = str(HERE / "clients" / "spinner.py")
    spinners = [subprocess.Popen([sys.executable, spinner, str(core)]) for core in cores]
    try:
        yield
    finally:
        for one in spinners:
            one.kill()
            one.wait()


class Process:
    """A program that takes JSON objects, one a line, and answers each with one."""

    def __init__(
        self, label: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.label = label
        self._process = subprocess.Popen(
            command,
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self._answer(_START_SECONDS)
        except RuntimeError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def measure(self, work: Work, records: int) -> dict[str, float]:
        """Do that work on about that many records; return records, seconds and processor time."""
        return self.ask("work", work, max(records, work.least))

    def ask(self, what: str, work: Work, records: int = 0) -> dict[str, Any]:
        """Send a request and return the answer. Raises RuntimeError if it fails."""
        assert self._process.stdin is not None
        line = json.dumps({"do": what, "work": asdict(work), "records": records})
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{self.label}: its process has ended") from None
        return self._answer(PATIENCE_SECONDS)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        # A hanging process is killed, which ends the wait.
        watch = threading.Timer(seconds, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise RuntimeError(
                f"{self.label}: its process has ended with code {self._process.wait()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.label}: {answer['error']}")
        return answer

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def start_python(name: str, where: dict[str, Any], before: Sequence[str] = ()) -> Process:
    """Start one of the clients in Python, below a program that watches it if one is named."""
    described = PYTHON[name]
    program = [*before, sys.executable, "-m", "clients.python", name, json.dumps(where)]
    return Process(described.label, program)


def start_deepstream(where: dict[str, Any], folder: Path) -> Process:
    """Start deepstream's own connectors, from the packages in that folder."""
    node = shutil.which("node")
    assert node is not None
    told = [encode(DOCUMENT).decode(), encode(MESSAGE | {"topic": 5}).decode()]
    at = [str(folder), where["host"], str(where["port"])]
    program = [node, str(HERE / "clients" / "deepstream.js"), *at, *told]
    return Process(label_of(DEEPSTREAM), program, {"NODE_ENV": "production"})


def install_deepstream(folder: Path) -> None:
    """Install the connectors. Raises Absent if there is no Node, or npm can't get them."""
    if reason := absence_of(DEEPSTREAM):
        raise Absent(reason)
    # Otherwise npm would install into a parent folder that has one.
    (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
    npm = shutil.which("npm")
    assert npm is not None
    quiet = ["--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        done = subprocess.run(
            [npm, "install", *quiet, *PACKAGES],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Absent("npm install did not end within 300 s") from None
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if "ERR" in line or "error" in line]
        why = " ".join(said)[:200] or f"code {done.returncode}"
        raise Absent(f"npm install {' '.join(PACKAGES)} failed: {why}")


class Limit:
    """redis-benchmark: one connection, and a C program that discards the replies."""

    def __init__(self, name: str, where: dict[str, Any], core: int | None) -> None:
        self._depth, self._records = LIMITS[name]
        self._core = core
        at = ["-h", where["host"], "-p", str(where["port"]), "-c", "1", "-P", str(self._depth)]
        self._command = [_limit_program() or "", *at, "--csv"]

    def measure(self, work: Work, records: int) -> dict[str, float]:
        """Ask for the same records again and again, in whole pipelines."""
        requests = max(_LEAST_REQUESTS, round(records / (self._depth * self._records)))
        requests *= self._depth
        keys = keys_of(names_of(ORDINARY, RECORDS)[: self._records])
        with on_core(self._core):
            done = subprocess.run(
                [*self._command, "-n", str(requests), "MGET", *keys],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=PATIENCE_SECONDS,
            )
        *_, values = csv.reader(done.stdout.splitlines())
        return {"records": requests * self._records, "seconds": requests / float(values[1])}

    def close(self) -> None:
        """Do nothing: nothing is left open."""


def _limit_program() -> str | None:
    return shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")


def label_of(name: str) -> str:
    """Return the name of a client in a table."""
    if name in LIMITS:
        depth, records = LIMITS[name]
        each = "1 record" if records == 1 else f"{records} records"
        how = f" -P {depth}, {each} a command" if depth > 1 else ""
        return f"redis-benchmark -c 1{how}"
    return PYTHON[name].label if name in PYTHON else OTHERS.get(name, name)


def absence_of(name: str) -> str:
    """Return the reason why a client can't take part, or an empty text."""
    if name in LIMITS:
        return "" if _limit_program() else "there is no redis-benchmark in PATH"
    if name == DEEPSTREAM:
        missing = [program for program in ("node", "npm") if shutil.which(program) is None]
        return f"there is no {missing[0]} in PATH" if missing else ""
    try:
        version_of(name)
    except importlib.metadata.PackageNotFoundError:
        package = PYTHON[name].package
        return f"{package} is not installed: pip install {package}"
    return ""


def version_of(name: str) -> str:
    """Return the version of a client that can take part."""
    if name in PYTHON:
        return PYTHON[name].version
    return PACKAGES[0].rpartition("@")[2] if name == DEEPSTREAM else ""
