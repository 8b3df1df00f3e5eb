"""The processes of the clients: started on a core, asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clients.work import PATIENCE_SECONDS, Work

HERE = Path(__file__).parent
_START_SECONDS = 120


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
