"""All that is compared, each with its label, its version, and the way it is started."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients.peers import PYTHON
from clients.work import (
    DOCUMENT,
    KINDS,
    MESSAGE,
    ORDINARY,
    PATIENCE_SECONDS,
    RECORDS,
    Work,
    encode,
    keys_of,
    names_of,
)
from processes import HERE, Process, on_core

DEEPSTREAM = "deepstream"
EXPORT, EXPORT_BY_CLI, SCAN = "export", "redis-cli", "redis-cli-scan"
# Commands that redis-benchmark keeps in flight, and records in one of them: more gain nothing.
DEPTH = 64


class Absent(Exception):
    """A contestant can't take part; the message says why."""


def program(*names: str) -> str | None:
    """Return the path of the first of these programs, in PATH or where ``make`` unpacks it."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


class Contestant:
    """A client that is started with the address of a server, and measured by ``measure``."""

    label = ""
    package = ""
    version = ""
    needs: tuple[tuple[str, ...], ...] = ()
    """Programs without which it can't take part; of each, any of several names."""

    def absence(self) -> str:
        """Return the reason why it can't take part, or an empty text."""
        missing = [names[0] for names in self.needs if program(*names) is None]
        return f"there is no {missing[0]} in PATH" if missing else ""

    def start(
        self, where: dict[str, Any], core: int | None, before: Sequence[str] = ()
    ) -> Process | Command:
        """Start it on a core, below a program that watches it if one is named."""
        raise NotImplementedError


class InPython(Contestant):
    """One of the clients in Python, in a process of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.label = PYTHON[name].label
        self.package = PYTHON[name].package
        try:
            self.version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            self.version = ""

    def absence(self) -> str:
        if self.version:
            return ""
        return f"{self.package} is not installed: pip install {self.package}"

    def start(self, where: dict[str, Any], core: int | None, before: Sequence[str] = ()) -> Process:
        line = [*before, sys.executable, "-m", "clients.python", self._name, json.dumps(where)]
        with on_core(core):
            return Process(self.label, line)


class Deepstream(Contestant):
    """deepstream's own connectors on Node, which npm installs when they are first started."""

    label = "deepstream's connector"
    # The clusternode connector requires more than it declares.
    packages = (
        *("@deepstream/cache-redis@2.0.9", "@deepstream/clusternode-redis@1.0.1"),
        "@deepstream/protobuf@1.0.8",
    )
    package, _, version = packages[0].rpartition("@")
    needs = (("node",), ("npm",))

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._failure = ""

    def start(self, where: dict[str, Any], core: int | None, before: Sequence[str] = ()) -> Process:
        node = program("node")
        assert node is not None
        told = [encode(DOCUMENT).decode(), encode(MESSAGE | {"topic": 5}).decode()]
        at = [self._installed(), where["host"], str(where["port"])]
        line = [node, str(HERE / "clients" / "deepstream.js"), *at, *told]
        with on_core(core):
            return Process(self.label, line, {"NODE_ENV": "production"})

    def _installed(self) -> str:
        """Return the folder of the packages. Raises Absent if npm can't get them."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            self._failure = self._install(Path(self._folder.name))
        if self._failure:
            raise Absent(self._failure)
        return self._folder.name

    def _install(self, folder: Path) -> str:
        """Return the reason why npm fails, or an empty text."""
        # Otherwise npm would install into a parent folder that has one.
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        quiet = ("--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund")
        try:
            done = subprocess.run(
                ["npm", "install", *quiet, "--loglevel=error", *self.packages],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "npm install did not end within 300 s"
        if not done.returncode:
            return ""
        said = [line for line in done.stdout.splitlines() if "ERR" in line or "error" in line]
        why = " ".join(said)[:200] or f"code {done.returncode}"
        return f"npm install {' '.join(self.packages)} failed: {why}"


class Command(Contestant):
    """A program that is run anew for each measurement."""

    _where: dict[str, Any]
    _core: int | None

    def start(self, where: dict[str, Any], core: int | None, before: Sequence[str] = ()) -> Command:
        started = object.__new__(type(self))
        started.__dict__ = {**self.__dict__, "_where": where, "_core": core}
        return started

    def measure(self, work: Work, records: int) -> dict[str, float]:
        """Do that work on about that many records; return records and seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing: nothing is left open."""

    def run(self, line: Sequence[str], **options: Any) -> Any:
        with on_core(self._core):
            return subprocess.run(line, check=True, timeout=PATIENCE_SECONDS, **options)


class Limit(Command):
    """redis-benchmark: one connection, and a C program that discards the replies."""

    needs = (("redis-benchmark", "valkey-benchmark"),)
    # It measures whole milliseconds.
    least_requests = 100

    def __init__(self, depth: int, records: int) -> None:
        self._depth, self._records = depth, records
        each = "1 record" if records == 1 else f"{records} records"
        how = f" -P {depth}, {each} a command" if depth > 1 else ""
        self.label = f"redis-benchmark -c 1{how}"

    def measure(self, work: Work, records: int) -> dict[str, float]:
        """Ask for the same records again and again, in whole pipelines."""
        requests = max(self.least_requests, round(records / (self._depth * self._records)))
        requests *= self._depth
        at = ("-h", self._where["host"], "-p", str(self._where["port"]))
        how = ("-c", "1", "-P", str(self._depth), "--csv", "-n", str(requests))
        keys = keys_of(names_of(ORDINARY, RECORDS)[: self._records])
        line = [program(*self.needs[0]) or "", *at, *how, "MGET", *keys]
        *_, values = csv.reader(self.run(line, stdout=subprocess.PIPE, text=True).stdout.split())
        return {"records": requests * self._records, "seconds": requests / float(values[1])}


class Export(Command):
    """All records into a file, by a program that is timed from its start to its end."""

    def __init__(self, label: str, line: str, needs: tuple[tuple[str, ...], ...] = ()) -> None:
        self.label, self._line, self.needs = label, line, needs

    def measure(self, work: Work, records: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "records"
            line = self._line.format(
                **self._where,
                python=sys.executable,
                cli=program("redis-cli"),
                folder=KINDS[work.kind].folder,
                file=file,
            )
            before, began = _children(), time.perf_counter()
            self.run(["sh", "-c", line], stdout=subprocess.DEVNULL)
            seconds, cpu = time.perf_counter() - began, _children() - before
            text = encode(KINDS[work.kind].document)
            found = file.read_bytes().count(text)
        if found != work.size:
            raise RuntimeError(f"{self.label}: {found:,} records in place of {work.size:,}")
        return {"records": found, "seconds": seconds, "cpu": cpu}


class Scan(Command):
    """redis-cli, which prints the keys of all versions."""

    label = "redis-cli --scan"
    needs = (("redis-cli", "valkey-cli"),)

    def measure(self, work: Work, records: int) -> dict[str, float]:
        at = ("-h", self._where["host"], "-p", str(self._where["port"]))
        pattern = f"{KINDS[work.kind].folder}/*_v"
        line = [program(*self.needs[0]) or "", *at, "--scan", "--pattern", pattern]
        found = 0
        before, began = _children(), time.perf_counter()
        while found < records:
            found += self.run(line, stdout=subprocess.PIPE).stdout.count(b"\n")
        return {
            "records": found,
            "seconds": time.perf_counter() - began,
            "cpu": _children() - before,
        }


def _children() -> float:
    """Return the processor time of all programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# 500 records a command, as many as keep redis-cli busy between two replies.
_MGET_OF_ALL = r"""
{cli} -h {host} -p {port} --scan --pattern '{folder}/*_v' | awk '{{
    sub(/_v$/, ""); printf "%s %s_v %s_d", n++ % 500 ? "" : "\nMGET", $0, $0
}} END {{ print "" }}' | {cli} -h {host} -p {port} > {file}
"""
CONTESTANTS: dict[str, Contestant] = {
    **{name: InPython(name) for name in PYTHON},
    DEEPSTREAM: Deepstream(),
    "limit-alone": Limit(1, 1),
    "limit-single": Limit(DEPTH, 1),
    "limit-batched": Limit(DEPTH, 32),
    SCAN: Scan(),
    EXPORT: Export(
        "dscache export",
        "{python} -m dscache export {file} --prefix {folder}/ --url {host}:{port}",
    ),
    EXPORT_BY_CLI: Export(
        "redis-cli --scan, and MGET", _MGET_OF_ALL, (("redis-cli", "valkey-cli"), ("awk",))
    ),
}
OURS = (*(name for name, one in PYTHON.items() if one.package == "dscache"), EXPORT)
